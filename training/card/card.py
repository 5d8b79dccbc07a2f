"""The card of a saved model: a README.md that says what it is, how to use it, and how good it is; and its upload.

latentdiff writes between its marks only. The user's text outside them stays, and so do keys of the front matter that
are not latentdiff's. A README.md without the marks is never changed.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from latentdiff.interchange.atomic import write_text_whole
from latentdiff.interchange.png import save_picture
from latentdiff.interchange.user_files import faults_named, parse_json_object, read_text
from latentdiff.training.card.kinds import ModelKind
from latentdiff.training.settings.run import PATHS

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

    from latentdiff.training.loop.run import TrainingRun

logger = logging.getLogger(__name__)

FILE, GRID = "README.md", "samples.png"
TOLD = "card.json"
"""In a run's ``training/``: what its card was made of."""
BEGIN, END = "<!-- latentdiff: {} (written anew; put your own text outside) -->", "<!-- latentdiff: end of {} -->"
MARK, NO_MARK = "<!-- latentdiff:", "<!-- latentdiff :"
MODEL, EVALUATION = "model", "evaluation"
NOT_PUSHED = ("training/**", "evaluation/samples/**", "evaluation/pictures.jsonl", "**/.*", ".*")


def describe(run: "TrainingRun", kind: ModelKind, pictures: int, base_model: str | None = None) -> None:
    """What every trainer does with a finished model: write its card, and push it where the settings say so.

    Only the main process does so.

    kind, pictures, base_model: see `write_model_card`.
    """
    if not run.accelerator.is_main_process:
        return
    settings = run.settings
    output = Path(settings.output)
    grids = sorted((run.folder / "samples").glob("step-*.png"))
    seen = int(grids[-1].stem.removeprefix("step-")) if grids else run.step
    if seen != run.step:
        how = "; repeat the command to draw them" if run.step >= settings.max_steps else ""
        logger.warning("samples.png is of step %d: samples of step %d were left out%s", seen, run.step, how)
    told: dict[str, Any] = {
        "settings": settings.model_dump(mode="json"),
        "history": run.history,
        "figures": run.figures,
        "pictures": pictures,
        "steps": run.step,
        "base_model": base_model,
    }
    write_text_whole(run.folder / TOLD, json.dumps({"kind": asdict(kind), **told}, indent=2))
    write_model_card(output, kind=kind, **told, sample_grid=grids[-1] if grids else None, sample_step=seen)
    if settings.push_to_hub and run.step >= settings.max_steps:
        logger.info("pushed to %s", push_model(output, settings.push_to_hub))


def write_model_card(
    folder: Path,
    *,
    kind: ModelKind,
    settings: Mapping[str, Any],
    figures: Mapping[str, float],
    pictures: int,
    steps: int,
    base_model: str | None = None,
    sample_grid: Path | None = None,
    sample_step: int | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    name: Path | None = None,
    average: str = "",
) -> None:
    """Write, or write anew, the card of the model in `folder`. A README.md without our marks stays as it is.

    Args:
        kind: what it is.
        settings: in force; of paths only the last part is shown.
        figures: measured ones by name.
        pictures: it was trained on.
        steps: optimizer steps.
        base_model: what was fine-tuned: a hub id, a packaged model or a folder.
        sample_grid: a picture of samples, copied to ``samples.png``.
        sample_step: of it, if it is another than `steps`.
        history: of settings that were changed during the run; see `TrainingRun`.
        name: what `folder` will be, if it is another.
        average: a sentence on its weights, if they are not the run's own.
    """
    name = name or folder
    card = open_card(folder)
    if card is None:
        return
    data: Any = card.data
    data.library_name = data.library_name or "diffusers"
    if kind.draws:
        data.pipeline_tag = data.pipeline_tag or kind.task
    ours = ["latentdiff", "diffusers", kind.task, *(["lora"] if kind.lora else [])]
    data.tags = list(dict.fromkeys([*(data.tags or []), *ours]))
    if base_model and is_hub_id(base_model):  # the hub refuses anything else
        data.base_model = base_model
    grid = copy_grid(folder, card, sample_grid)
    before = card.text.partition(BEGIN.format(MODEL))[0].splitlines()
    has_heading = any(line.startswith("# ") for line in before)  # of the user's, before our section
    source = f" from {last_part(base_model)}" if base_model else ""
    made = f"trained with latentdiff{source} on {pictures:,} {kind.learned_from} in {steps:,} optimizer steps."
    parts = [
        "" if has_heading else f"# {name.resolve().name or 'model'}",
        f"{kind.name[:1].upper()}{kind.name[1:]}, {made} {average}".rstrip(),
        kind.note,
        f"![Samples]({GRID})" if grid else "",
        f"These samples are of step {sample_step:,}." if grid and sample_step not in (None, steps) else "",
        kind.usage.replace("THIS_FOLDER", called(name, None if average else settings.get("push_to_hub"))),
        figures_table(figures, pictures, kind.learned_from),
        settings_list(settings),
        history_table(history),
    ]
    put_section(card, MODEL, "\n\n".join(part for part in parts if part))
    write_card(folder, card)


def update_evaluation(folder: Path, text: str) -> bool:
    """Put `text` (Markdown) in place of the evaluation in the card that latentdiff wrote in `folder`.

    Returns:
        Whether there is such a card, with a front matter that can be read.
    """
    card = open_card(folder) if (folder / FILE).exists() else None
    if card is None:
        return False
    put_section(card, EVALUATION, text)
    write_card(folder, card)
    return True


def tell_average(folder: Path, run: Path, name: Path, length: float, steps: int) -> None:
    """Make a run's card, copied into `folder`, that of an average of its weights, without its samples and figures.

    Args:
        run: what `describe` wrote of it is in its ``training/``.
        name: what `folder` will be.
        length: of the average, as a share of `steps`.

    Raises:
        ValueError: what is there is damaged.
    """
    card = open_card(folder) if (folder / FILE).exists() else None
    if card is None:
        return
    _, section, _ = parts_of_text(card.text, MODEL)
    if f"({GRID})" in section:
        (folder / GRID).unlink(missing_ok=True)
    before, found, after = parts_of_text(card.text, EVALUATION)
    card.text = before.rstrip() + after if found else card.text
    average = f"over {length:g} of the first {steps:,} of these steps (post-hoc EMA)."
    file = run / "training" / TOLD
    if not file.exists():
        logger.warning("%s is missing, so the card says little; repeating the run's command writes it", file)
        put_section(card, MODEL, f"The weights of a run, averaged {average}")
    write_card(folder, card)
    if file.exists():
        told = parse_json_object(read_text(file), file)
        with faults_named(file, foreign=True):
            told |= {"kind": ModelKind(**told["kind"]), "figures": {}}
            write_model_card(folder, **told, name=name, average=f"Its weights are an average {average}")


def open_card(folder: Path) -> "ModelCard | None":
    """The card in `folder`, a new one, or None where there is one without our marks or one that cannot be read."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    file = folder / FILE
    if not (file.exists() or file.is_symlink()):
        return ModelCard("---\n{}\n---\n")
    try:
        text = read_text(file)
    except (OSError, ValueError):
        text = ""
    if BEGIN.format(MODEL) not in text:
        logger.warning("%s was not written by latentdiff, so it is left as it is", file)
        return None
    try:
        return ModelCard(text)
    except (ValueError, TypeError, YAMLError) as error:  # the user's edit; training must not fail on it
        reason = " ".join(str(error).split())
        logger.warning("the front matter of %s cannot be read (%s), so the card is left as it is", file, reason)
        return None


def put_section(card: "ModelCard", name: str, text: str) -> None:
    """`text` between the marks of `name`, in their place or at the end."""
    begin, end = BEGIN.format(name), END.format(name)
    # A setting may hold anything, but a mark in it would end the section too early.
    section = f"{begin}\n{text.strip().replace(MARK, NO_MARK)}\n{end}"
    before, found, after = parts_of_text(card.text, name)
    card.text = f"{before}{section}{after}" if found else f"{card.text.rstrip()}\n\n{section}\n"


def parts_of_text(text: str, name: str) -> tuple[str, str, str]:
    """What is before the section of `name`, in it, and after it; all of it is before where there is none."""
    before, found, rest = text.partition(BEGIN.format(name))
    inside, closed, after = rest.partition(END.format(name))
    return (before, inside, after) if found and closed else (text, "", "")


def write_card(folder: Path, card: "ModelCard") -> None:
    """Whole or not at all."""
    text = f"---\n{card.data.to_yaml(line_break=None)}\n---\n{card.text}"
    write_text_whole(folder / FILE, text, sync=True)


def copy_grid(folder: Path, card: "ModelCard", sample_grid: Path | None) -> bool:
    """Copy the picture of samples. Returns whether the card can show one."""
    from PIL import Image

    target = folder / GRID
    shown = f"({GRID})" in card.text
    if sample_grid is None or not sample_grid.is_file():
        return shown and target.is_file()
    if target.exists() and not shown:
        logger.warning("%s was not written by latentdiff, so it is left as it is", target)
        return False
    with Image.open(sample_grid) as image:
        save_picture(image.convert("RGB"), target)
    return True


def called(folder: Path, hub_id: str | None) -> str:
    """By what a model is loaded: on the hub, or from where it was trained; not by a whole path, which says too much."""
    leads_out = folder.is_absolute() or ".." in folder.parts or "~" in str(folder)
    name = folder.resolve().name if leads_out else folder.as_posix()
    return hub_id or (name if re.fullmatch(r"\w[\w./-]*", name) else "THIS_FOLDER")


def figures_table(figures: Mapping[str, float], pictures: int, learned_from: str) -> str:
    if not figures:
        return ""
    rows = "\n".join(f"| {name} | {value:.6g} |" for name, value in sorted(figures.items()))
    return f"## Figures of training\n\n| what | figure |\n|---|---|\n{rows}\n| training {learned_from} | {pictures:,} |"


def settings_list(settings: Mapping[str, Any]) -> str:
    if not settings:
        return ""
    lines = "\n".join(f"{name}: {shown(name, value)}" for name, value in settings.items() if value is not None)
    return f"## Settings\n\n```yaml\n{lines}\n```"


def history_table(history: Sequence[Mapping[str, Any]]) -> str:
    if not history:
        return ""
    rows = []
    for one in history:
        old, new = (shown(one["setting"], one[key]).replace("|", r"\|") for key in ("old", "new"))
        rows.append(f"| {one['when']} | {one['step']:,} | {one['setting']} | {old} | {new} |")
    head = "| when | at step | setting | before | since then |\n|---|---|---|---|---|"
    return "\n".join(["## Settings changed during training", "", head, *rows])


def shown(name: str, value: Any) -> str:
    """A setting's value as one line of YAML; of paths the last part, for where they lay says too much."""
    import yaml

    if isinstance(value, PurePath) or (isinstance(value, str) and (name in PATHS or looks_like_path(value))):
        value = last_part(str(value))
    if isinstance(value, (list, tuple)):
        value = [last_part(item) if isinstance(item, str) and looks_like_path(item) else item for item in value]
    line = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"))
    return line.removesuffix("...\n").strip()


def looks_like_path(value: str) -> bool:
    """Whether a string is the absolute path, or the home path, of something."""
    return bool(re.match(r"(/|~|[A-Za-z]:[\\/]|\.\.?[\\/])\S", value)) and " " not in value


def last_part(value: str) -> str:
    """The last part of a path; a hub id stays whole."""
    if is_hub_id(value) and not Path(value).exists():
        return value
    return PurePath(value.replace("\\", "/")).name or value


def is_hub_id(value: str) -> bool:
    from latentdiff.interchange.folders import HUB_ID

    return bool(HUB_ID.fullmatch(value)) and not value.startswith(".") and not Path(value).expanduser().exists()


def push_model(folder: Path, repo_id: str, private: bool = False, token: str | None = None) -> str:
    """Upload a model's folder to the Hugging Face hub, less checkpoints, caches and evaluation pictures.

    Args:
        repo_id: "owner/name"; made if need be.
        private: of a repository that is made now.
        token: by default the one that ``hf auth login`` keeps, or ``HF_TOKEN``.

    Returns:
        The address of the commit.

    Raises:
        FileNotFoundError: `folder` holds no model.
        ValueError: `repo_id` is no "owner/name".
        OSError: the hub cannot be reached, or refuses; why, and what to do.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("model_index.json", "config.json")):
        raise FileNotFoundError(f"{folder} holds no model to upload: no model_index.json and no config.json")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ValueError(f"{repo_id!r} is no repository's name; write owner/name")
    api = HfApi(token=token, library_name="latentdiff")
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            ignore_patterns=list(NOT_PUSHED),
            commit_message="Upload of a model by latentdiff",
        )
    except OfflineModeIsEnabled as error:
        raise OSError(f"{folder} was not uploaded: HF_HUB_OFFLINE is set; unset it to reach the hub") from error
    except HfHubHTTPError as error:
        raise OSError(f"{folder} was not uploaded to {repo_id}: the hub says: {first_line(error)}") from error
    except Exception as error:
        if not type(error).__module__.startswith("httpx"):  # httpx or httpx2, as huggingface_hub has it
            raise
        raise OSError(f"{folder} was not uploaded to {repo_id}: {first_line(error)}; is there a network?") from error
    return commit.commit_url


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
