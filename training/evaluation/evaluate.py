"""How good a pipeline is: pictures drawn from the captions of held-out ones, measured against those, and the report."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from latentdiff import __version__
from latentdiff.codec import Codec
from latentdiff.interchange.fingerprint import weights_digest
from latentdiff.interchange.folders import packaged_models
from latentdiff.interchange.picture_files import to_pictures
from latentdiff.interchange.png import read_settings, save_picture
from latentdiff.metrics import frechet_distance, kernel_distance, precision_recall, psnr, ssim
from latentdiff.metrics.clip import ClipScore, load_clip
from latentdiff.metrics.distribution_distances import NEAREST
from latentdiff.metrics.extractors import Extractor, load_extractor
from latentdiff.metrics.pixels import WINDOW, pictures_to_pixels
from latentdiff.pipelines.registry import find_kind
from latentdiff.pipelines.storage.places import local_place
from latentdiff.training.card.card import last_part, update_evaluation
from latentdiff.training.data import CaptionedPicture, read_pixels
from latentdiff.training.data.caption_checks import labels_of
from latentdiff.training.data.source import TRAIN, same_split
from latentdiff.training.drawings import Drawing, draw, missing
from latentdiff.training.evaluation.held_out import check_report, held_out_pictures, was_trained_on, write_report
from latentdiff.training.loop.figures import comparison_sheet
from latentdiff.training.settings import Condition, EvaluationSettings

logger = logging.getLogger(__name__)

REPORT, SHEET = "evaluation.json", "comparison.png"
SHOWN, MADE_BY = 16, {"made_by": "latentdiff evaluate"}  # pictures of the sheet, and what its PNG says
FEW = 200  # pictures of each kind, below which precision and recall are not shown
MANY = 500  # pictures to draw, from which on it is said that fewer will do
RECONSTRUCTED = 256  # real pictures through the autoencoder, at most
NAMES = {
    "fid": "FID",
    "kid": "KID",
    "kid_std": "KID, standard deviation over subsets",
    "frechet_distance": "Fréchet distance (not FID)",
    "kernel_distance": "kernel distance (not KID)",
    "kernel_distance_std": "kernel distance, standard deviation over subsets",
    "precision": "precision",
    "recall": "recall",
    "clip_score": "CLIP score",
    "clip_score_of_real_pictures": "CLIP score of the real pictures",
    "reconstruction_psnr": "autoencoder, PSNR of real pictures, dB",
    "reconstruction_ssim": "autoencoder, SSIM of real pictures",
}


def evaluate_pipeline(pipeline: Any, settings: EvaluationSettings) -> dict[str, Any]:
    """Draw one picture per caption of held-out pictures, and measure all of them. Pictures of an earlier run are kept.

    Writes ``samples/``, ``evaluation.json`` and ``comparison.png`` (see `comparison`) in the output folder, and the
    evaluation in the model's card if latentdiff wrote that.

    Args:
        pipeline: a `TextToImagePipeline`, `ClassConditionalPipeline` or `UnconditionalPipeline`, on the device that it
            is to compute on.

    Returns:
        What ``evaluation.json`` holds.

    Raises:
        FileNotFoundError: no such data, split, weights or model.
        ValueError: something does not fit; the message says what.
        FileExistsError: the output folder holds something else under a name that is needed.
    """
    folder = settings.folder()
    check_report(folder / REPORT)
    check_sheet(folder / SHEET)
    extractor = load_extractor(settings.extractor)  # errors should come before hours of drawing
    clip = load_clip(settings.clip) if settings.clip is not None else None
    condition = condition_of(pipeline)
    if condition == "none" and (clip is not None or settings.guidance is not None):
        raise ValueError(f"{settings.model} draws without captions: --clip and --guidance are not for it")
    pictures, left_out = held_out_pictures(settings, folder, condition)
    if condition == "class":
        labels_of(pipeline, pictures)
    count = settings.count or len(pictures)
    if min(count, len(pictures)) < 2:
        raise ValueError(f"{settings.data}: one picture is too few to evaluate on; two are needed at least")
    common = call_settings(pipeline, settings.model, settings.steps, settings.guidance)
    drawings = plan(pictures, count, settings.seed, folder / "samples", common)
    drawn_now = draw_missing(pipeline, drawings, settings.batch_size)
    device = pipeline._execution_device
    measured = Measured(pictures, drawings, common["height"], common["width"])
    notes: list[str] = []
    metrics = set_metrics(measured, extractor.to(device), settings.batch_size, notes)
    if condition != "none":
        metrics |= caption_metrics(measured, clip.to(device) if clip else None, notes)
    if not Codec(pipeline.vae).is_identity:
        metrics |= reconstruction_metrics(measured, pipeline, settings.batch_size)
    drawn = ("num_inference_steps", "guidance_scale", "scheduler", "precision", "height", "width")
    figures = {
        "drawn": {"pictures": count, "seed": settings.seed, **{key: common[key] for key in drawn}},
        "extractor": {**extractor.describe(), "dimensions": measured.dimensions},
        "clip": clip.describe() if clip else None,
        "metrics": metrics,
        "notes": notes,
    }
    report = write_report(folder / REPORT, settings, pictures, left_out, figures, weights_sha256=common["weights"])
    logger.info("%d pictures drawn now, %d kept from an earlier run", drawn_now, count - drawn_now)
    for line in short_table(report):
        logger.info("%s", line)
    save_sheet(measured, settings, folder / SHEET)
    note_in_card(settings, report)
    return report


def plan(
    pictures: Sequence[CaptionedPicture], count: int, seed: int, folder: Path, common: Mapping[str, Any]
) -> list[Drawing]:
    """What to draw: the captions in a random order that is the seed's, the first of each picture, then the second...

    The first drawings stay the same when `count` grows, so that they are kept.

    Args:
        common: settings of all of them, see `call_settings`.
    """
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed)).tolist()
    drawings = []
    for i in range(count):
        captions = pictures[order[i % len(order)]].captions
        caption = captions[i // len(order) % len(captions)]
        drawings.append(Drawing(folder / f"{i:06d}.png", {"prompts": [caption], "seed": seed + i, **common}))
    return drawings


def caption_of(drawing: Drawing) -> str:
    return str(drawing.settings["prompts"][0])


def call_settings(pipeline: Any, model: str, steps: int | None, guidance: float | None) -> dict[str, Any]:
    """What every drawing of an evaluation has in common; kept in each picture.

    Args:
        model: its name; of a path only the last part is kept.
        steps, guidance: None is the model's own.
    """
    height, width = pipeline.picture_size(None, None)
    defaults = pipeline.defaults
    parts = ("unet", "vae", "text_encoder", "classifier")
    networks = {part: net for part in parts if (net := getattr(pipeline, part, None)) is not None}
    for part, net in pipeline.components.items():  # what a kind from elsewhere has besides
        if isinstance(net, torch.nn.Module) and not any(net is other for other in networks.values()):
            networks[part] = net
    config = {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")}
    tensors = {f"{part}.{name}": t for part, net in networks.items() for name, t in net.state_dict().items()}
    return {
        "count": 1,
        "negative_prompt": None,
        "num_inference_steps": defaults["num_inference_steps"] if steps is None else steps,
        "guidance_scale": defaults.get("guidance_scale", 1.0) if guidance is None else guidance,
        "model": last_part(model),
        "weights": weights_digest(tensors),
        "scheduler": type(pipeline.scheduler).__name__,
        "scheduler_config": json.loads(json.dumps(config, default=str)),  # as it comes back from the picture
        "precision": str(pipeline.unet.dtype).removeprefix("torch."),
        "width": width,
        "height": height,
        "version": __version__,
    }


def draw_missing(pipeline: Any, drawings: Sequence[Drawing], batch_size: int) -> int:
    """Draw what is not there yet, or was drawn otherwise. Returns how many."""
    absent = missing(drawings)
    if len(absent) > MANY:
        logger.info("%d pictures are to be drawn; --count draws fewer, and the rest later", len(absent))

    def output_of(batch: Sequence[Drawing]) -> Any:
        common = batch[0].settings
        given: dict[str, Any] = {"batch_size": len(batch)}
        conditioned_by = find_kind(type(pipeline).__name__).conditioned_by
        if conditioned_by != "none":
            which = "class_labels" if conditioned_by == "class" else "prompt"
            given = {which: list(map(caption_of, batch)), "guidance_scale": common["guidance_scale"]}
        return pipeline(
            **given,
            num_inference_steps=common["num_inference_steps"],
            seed=[drawing.settings["seed"] for drawing in batch],
        )

    draw(absent, output_of, batch_size)
    return len(absent)


def condition_of(pipeline: Any) -> Condition:
    """What the captions of held-out pictures are for."""
    conditioned_by = find_kind(type(pipeline).__name__).conditioned_by
    return "text" if conditioned_by == "picture" else conditioned_by


class Measured:
    """The two sets of pictures, read one at a time."""

    def __init__(
        self, pictures: Sequence[CaptionedPicture], drawings: Sequence[Drawing], height: int, width: int
    ) -> None:
        self.pictures, self.drawings, self.height, self.width = pictures, drawings, height, width
        self.dimensions = 0  # of the features, once they are known

    def real(self) -> Iterator[Image.Image]:
        """Cropped and resized to what the model draws, as in training: otherwise size alone would make a difference."""
        for picture in self.pictures:
            pixels = read_pixels(picture, self.width, self.height)
            yield to_pictures(pixels[None])[0]

    def drawn(self) -> Iterator[Image.Image]:
        for drawing in self.drawings:
            with Image.open(drawing.file) as image:
                yield image.convert("RGB")


def check_sheet(file: Path) -> None:
    """Raises FileExistsError if `file` is there and was not written by latentdiff."""
    if file.exists() and (read_settings(file) or {}).get("made_by") != MADE_BY["made_by"]:
        raise FileExistsError(f"{file} exists and was not written by latentdiff evaluate; choose another --output")


def save_sheet(measured: Measured, settings: EvaluationSettings, file: Path) -> None:
    """Write the `comparison`, and say of which pictures it is."""
    seen = was_trained_on(settings)
    real = "real" if same_split(settings.split) == TRAIN else "held out"
    save_picture(comparison(measured, "trained on" if seen else real), file, MADE_BY)
    kind = "pictures of training" if seen else f"{real.replace(' ', '-')} pictures"
    logger.info("%s, and what was drawn of their captions: %s", kind, file)
    if seen:
        logger.warning(
            "these are pictures that the model was trained on, and the figures say how well it remembers; "
            "--split validation asks for those that were held out"
        )


def comparison(measured: Measured, kind: str) -> Image.Image:
    """The first drawings, and above each a real picture, of this `kind`, that has its caption; the caption is below."""
    drawings = measured.drawings[:SHOWN]
    captions = list(map(caption_of, drawings))
    having: dict[str, list[CaptionedPicture]] = {}
    for picture in measured.pictures:
        for caption in picture.captions:
            having.setdefault(caption, []).append(picture)
    turns = [captions[:i].count(caption) for i, caption in enumerate(captions)]
    originals = [having[caption][turn % len(having[caption])] for caption, turn in zip(captions, turns, strict=True)]
    chosen = Measured(originals, drawings, measured.height, measured.width)
    return comparison_sheet({kind: list(chosen.real()), "drawn": list(chosen.drawn())}, captions)


def set_metrics(measured: Measured, extractor: Extractor, batch_size: int, notes: list[str]) -> dict[str, float]:
    """Fréchet and kernel distance, precision and recall."""
    real = extractor.features(measured.real(), batch_size)
    drawn = extractor.features(measured.drawn(), batch_size)
    measured.dimensions = real.shape[1]
    fewest = min(len(real), len(drawn))
    frechet, kernel = ("fid", "kid") if extractor.is_fid else ("frechet_distance", "kernel_distance")
    if fewest <= measured.dimensions:
        notes.append(
            f"{len(drawn)} drawn and {len(real)} real pictures are too few for {measured.dimensions} dimensions: "
            f"{frechet} comes out too large, and can be compared only at equal counts; prefer {kernel}"
        )
    if not extractor.is_fid:
        notes.append(
            f"the distances are not FID and KID, which need --extractor inception; compare them only with figures of "
            f"the same extractor ({extractor.name})"
        )
    by_kernel = kernel_distance(drawn, real)
    found = {frechet: frechet_distance(drawn, real), kernel: by_kernel.mean}
    if by_kernel.subsets > 1:
        found[f"{kernel}_std"] = by_kernel.std
    if fewest > NEAREST:
        both = precision_recall(drawn, real)
        found |= {"precision": both.precision, "recall": both.recall}
        if fewest < FEW:
            notes.append(f"precision and recall of {fewest} pictures are chance; they are shown of {FEW} and more")
    else:
        notes.append(f"no precision and recall: they need more than {NEAREST} pictures of each kind")
    return found


def caption_metrics(measured: Measured, clip: ClipScore | None, notes: list[str]) -> dict[str, float]:
    """CLIP score of the drawn pictures, and of the real ones to compare it with."""
    if clip is None:
        notes.append(
            "no CLIP score: give a CLIP model with --clip (a folder, owner/name, or open_clip:NAME/PRETRAINED)"
        )
        return {}
    captions = map(caption_of, measured.drawings)
    real_captions = (picture.captions[0] for picture in measured.pictures)
    return {
        "clip_score": clip.mean(zip(measured.drawn(), captions, strict=True)),
        "clip_score_of_real_pictures": clip.mean(zip(measured.real(), real_captions, strict=True)),
    }


@torch.no_grad()
def reconstruction_metrics(measured: Measured, pipeline: Any, batch_size: int) -> dict[str, float]:
    """PSNR and SSIM of real pictures through the model's autoencoder: a limit of what it can draw."""
    vae = pipeline.vae
    count = min(RECONSTRUCTED, len(measured.pictures))
    sums = {"reconstruction_psnr": 0.0, "reconstruction_ssim": 0.0}
    for start in range(0, count, batch_size):
        chosen = measured.pictures[start : min(start + batch_size, count)]
        part = Measured(chosen, [], measured.height, measured.width)
        pixels = pictures_to_pixels(list(part.real()))
        output = vae(pixels.to(pipeline._execution_device, vae.dtype)).sample.float().cpu()
        sums["reconstruction_psnr"] += psnr(output, pixels) * len(chosen)
        if min(measured.height, measured.width) >= WINDOW:
            sums["reconstruction_ssim"] += ssim(output, pixels) * len(chosen)
    return {name: total / count for name, total in sums.items() if total or name.endswith("psnr")}


def note_in_card(settings: EvaluationSettings, report: dict[str, Any]) -> None:
    """Put the evaluation into the card of a model in a folder, if latentdiff wrote it."""
    folder = local_place(settings.model)
    if folder is None or folder.is_file() or settings.model in packaged_models():
        return
    if update_evaluation(folder, markdown(report)):
        logger.info("the evaluation is in %s", folder / "README.md")
    else:
        logger.info("%s has no card that latentdiff wrote and can read, so none was changed", folder)


def short_table(report: Mapping[str, Any]) -> list[str]:
    """What was compared, and one line for each figure."""
    rows = [(label(name, report), f"{value:.4g}") for name, value in worth_showing(report).items()]
    width = max(len(name) for name, _ in rows)
    return [
        f"{compared(report)}, features: {report['extractor']['name']}",
        *(f"  {name.ljust(width)}  {value:>10}" for name, value in rows),
        *(f"note: {note}" for note in report["notes"]),
    ]


def worth_showing(report: Mapping[str, Any]) -> dict[str, float]:
    """The figures that say something; those of few pictures that do not are in ``evaluation.json`` only."""
    few = min(report["drawn"]["pictures"], report["data"]["pictures"]) < FEW
    return {name: value for name, value in report["metrics"].items() if not (few and name in ("precision", "recall"))}


def label(name: str, report: Mapping[str, Any]) -> str:
    """What a figure is, and whether it is one of too few pictures."""
    fewest = min(report["drawn"]["pictures"], report["data"]["pictures"])
    few = name in ("fid", "frechet_distance") and fewest <= report["extractor"]["dimensions"]
    return NAMES[name] + ", of too few pictures" * few


def compared(report: Mapping[str, Any]) -> str:
    data, drawn = report["data"], report["drawn"]
    return f"{drawn['pictures']:,} drawn pictures, {data['pictures']:,} real ones of {data['name']} ({data['split']})"


def markdown(report: Mapping[str, Any]) -> str:
    """A section of a card."""
    data, drawn, extractor = report["data"], report["drawn"], report["extractor"]
    rows = "\n".join(f"| {label(name, report)} | {value:.6g} |" for name, value in worth_showing(report).items())
    lines = [
        f"Pictures drawn: {drawn['pictures']:,}, {drawn['width']}x{drawn['height']}, seeds from {drawn['seed']}, "
        f"{drawn['num_inference_steps']} steps of {drawn['scheduler']}, guidance {drawn['guidance_scale']:g}, "
        f"{drawn['precision']}.",
        f"Real pictures: {data['pictures']:,} of {data['name']}, split {data['split']}; cropped to the drawn size.",
        f"Features: {extractor['name']}, {extractor['dimensions']} dimensions, weights SHA-256 "
        f"{extractor['weights_sha256'][:16]}; resized by {extractor['resize']}.",
    ]
    if report["clip"]:
        clip = report["clip"]
        lines.append(f"CLIP: {clip['name']}, weights SHA-256 {clip['weights_sha256'][:16]}.")
    lines += [f"Note: {note}." for note in report["notes"]]
    made = f"Measured by {report['made_by']} (`latentdiff evaluate`)."
    bullets = "\n".join(f"- {line}" for line in lines)
    return f"## Evaluation\n\n| what | figure |\n|---|---|\n{rows}\n\n{bullets}\n\n{made}"
