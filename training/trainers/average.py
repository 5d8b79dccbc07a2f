"""A model of the averages that a run has kept, of a length chosen after training. Karras et al. 2024 (EDM2), Sec. 3."""

import logging
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentdiff.interchange.atomic import atomic_folder
from latentdiff.interchange.folders import check_safetensors
from latentdiff.interchange.user_files import faults_named
from latentdiff.training.card.card import tell_average
from latentdiff.training.loop.power_averages import AVERAGES, LENGTH, UPDATES, exponent, mixture

logger = logging.getLogger(__name__)

NOT_TAKEN = ("training", "evaluation", "evaluation.json")
"""What of a run is of its own weights."""
SHARD = re.compile(r"-\d{5}-of-\d{5}")
"""In the names of files that hold a network together."""
FAR = 0.1
"""How far the profile of an average may be off, as a share, before that is worth a warning."""


@dataclass(frozen=True)
class Kept:
    """A file of averages of one length. updates: so many the run had had."""

    file: Path
    length: float
    updates: int


def average(run: Path, length: float, output: Path, step: int | None = None) -> float:
    """Write the model of a run with its weights averaged over another share of the run.

    Args:
        run: output folder of a training with ``ema_snapshots``.
        length: standard deviation of the average's profile, as a share of the run; 0.1 is about the last fifth.
        output: new; gets all of the run but its ``training/``, and what was measured of its own weights.
        step: as if the run had ended there; one at which averages were kept. By default its end.

    Returns:
        How far the profile is off the one that was asked for, as a share of its norm.

    Raises:
        FileNotFoundError: the run has no averages, or no model.
        FileExistsError: `output` is there.
        ValueError: there is no such length or step, a file is damaged, or the model has other weights.
    """
    gamma = exponent(length)
    if output.exists():
        raise FileExistsError(f"{output} exists; choose another --output")
    if output.resolve().is_relative_to(run.resolve()):
        raise ValueError(f"--output {output} is inside the run; choose a folder beside it")
    found = kept_averages(run)
    ends = sorted({one.updates for one in found})
    if step is not None and step not in ends:
        raise ValueError(f"--step {step}: averages were kept at {', '.join(map(str, ends))}")
    end = ends[-1] if step is None else step
    used = [one for one in found if one.updates <= end]
    factors, missed = mixture([(exponent(one.length), one.updates) for one in used], (gamma, end))
    if missed > FAR:
        logger.warning(
            "averages of %d steps come only within %.0f %% of a length of %g; a smaller ema_snapshots keeps more, and "
            "lengths from 0.05 up are met best",
            *(len(ends), 100 * missed, length),
        )
    parts = parts_of(run, shapes_of(used[-1].file))
    with atomic_folder(output) as partial:
        shutil.copytree(
            run, partial, dirs_exist_ok=True, ignore=lambda place, _: NOT_TAKEN if Path(place) == run else ()
        )
        for file, names in parts.items():
            replaced = sum_of(used, factors.tolist(), names)
            with safe_open(run / file, "pt") as stream:
                header = stream.metadata()
            content = load_file(run / file)
            content |= {name: replaced[name].to(content[name].dtype) for name in replaced}
            save_file(content, partial / file, header)
        tell_average(partial, run, output, length, end)
    return missed


def kept_averages(run: Path) -> list[Kept]:
    """The files of averages of a run, the oldest first.

    Raises:
        FileNotFoundError: there are none.
        ValueError: one is damaged.
    """
    folder = run / "training" / AVERAGES
    files = sorted(folder.glob("step-*.safetensors"))
    if not run.is_dir():
        raise FileNotFoundError(f"{run}: there is no such folder; name the --output of a training")
    if not files:
        raise FileNotFoundError(
            f"{folder}: no averages there; a training with ema_snapshots=100 keeps some every 100 steps"
        )
    found = []
    for file in files:
        check_safetensors(file)
        with faults_named(file), safe_open(file, "pt") as stream:
            header = stream.metadata() or {}
            if not {UPDATES, LENGTH} <= header.keys():
                raise ValueError("it does not say of which length and step its averages are")
            found.append(Kept(file, float(header[LENGTH]), int(header[UPDATES])))
            exponent(found[-1].length)
            if found[-1].updates < 1:
                raise ValueError("it says that it is of no update")
    return sorted(found, key=lambda one: (one.updates, one.length))


def shapes_of(file: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(file, "pt") as stream:
        return {name: tuple(stream.get_slice(name).get_shape()) for name in stream.keys()}  # noqa: SIM118


def parts_of(run: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[Path, dict[str, str]]:
    """The files of a run's model that hold the weights of its averages: by their paths, {name there: name here}.

    An objective's networks are saved in folders of their own; which is which is told by names and shapes.

    Raises:
        ValueError: there is no file with all weights of a network.
    """
    networks = by_network({name: name for name in shapes})
    pair = by_network(networks.get("text_encoder", {}))
    if pair.keys() == {"first", "second"}:  # of `TwoTextEncoders`
        networks = {name: own for name, own in networks.items() if name != "text_encoder"} | pair
    shards: dict[Path, dict[Path, dict[str, tuple[int, ...]]]] = defaultdict(dict)  # by the file that they are of
    for file in model_files(run):
        shards[file.with_name(SHARD.sub("", file.name))][file.relative_to(run)] = shapes_of(file)
    found = {}
    for network, names in networks.items():
        wanted = {(own, shapes[name]) for own, name in names.items()}
        fitting = [
            files for files in shards.values() if wanted <= {one for file in files.values() for one in file.items()}
        ]
        if len(fitting) != 1:
            raise ValueError(
                f"{run}: {len(fitting)} files of the model have all {len(names)} weights that were trained of its "
                f"{network}; an average is put into the one that was trained, and into no adapter"
            )
        for file, there in fitting[0].items():
            found[file] = {own: name for own, name in names.items() if own in there}
    return found


def by_network(names: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """By the first part of a name, {the rest of it: what is said of it}."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for name, said in names.items():
        network, _, own = name.partition(".")
        found[network][own] = said
    return found


def model_files(run: Path) -> list[Path]:
    """The files with weights of a saved pipeline or network."""
    if not any((run / name).is_file() for name in ("model_index.json", "config.json")):
        raise FileNotFoundError(f"{run}: no model there yet; let the training end, or stop it with Ctrl-C")
    files = [*run.glob("*.safetensors"), *run.glob("*/*.safetensors")]
    return [file for file in sorted(files) if file.parent.name != "training"]


def sum_of(kept: Sequence[Kept], factors: Sequence[float], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The averages of a network's weights, each file times its factor, in float64 one after the other."""
    total = {own: torch.zeros((), dtype=torch.float64) for own in names}
    for one, factor in zip(kept, factors, strict=True):
        with faults_named(one.file), safe_open(one.file, "pt") as stream:
            for own, name in names.items():
                total[own] = total[own] + factor * stream.get_tensor(name).double()
    return total
