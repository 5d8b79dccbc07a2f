"""Checkpoints, each whole or absent: written under a temporary name, renamed, and only then are old ones removed."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from latentdiff.training.loop.distributed import in_parts

logger = logging.getLogger(__name__)

STATE, SUMS, AVERAGED = "state.json", "SHA256SUMS", "averaged-0.safetensors"

FORMAT = 4  # of what a checkpoint holds; to be raised when names of weights or of the state, or their meanings, change
OLDER = 3  # is read too: there `kl_weight` stood beside a mean over pixel values


class Checkpoints:
    """The checkpoints of a run: folders ``step-00001000``.

    Each holds the trained weights (what is frozen is not repeated), the averaged ones, Accelerate's optimizer state,
    ``state.json``, and ``SHA256SUMS`` as ``sha256sum -c`` takes it. Those of one process and of several are alike;
    under FSDP and DeepSpeed Accelerate saves trained weights and optimizer itself, in parts.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, keep: int = 2) -> None:
        self.folder, self.accelerator, self.keep = folder, accelerator, keep
        self.sharded = in_parts(accelerator)
        if not self.sharded:
            accelerator.register_save_state_pre_hook(self._save_trained)
            accelerator.register_load_state_pre_hook(self._load_trained)

    def save(self, step: int, state: dict[str, Any], averaged: list[Tensor]) -> None:
        """Save what the accelerator has prepared, as the checkpoint of `step`, with `state` (plain values).

        Raises:
            OSError: on the main process, if it cannot be written; then nothing of it remains, and what was there stays.
        """
        final, partial = self.folder / f"step-{step:08d}", self.folder / f".partial-{step:08d}"
        if final.exists():
            return
        main = self.accelerator.is_main_process
        problem: OSError | None = None
        whole = gathered(averaged, here=main)
        if main:
            for leftover in self.folder.glob(".partial-*"):
                shutil.rmtree(leftover, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            partial.mkdir(parents=True, exist_ok=True)
            self.accelerator.save_state(str(partial))
            if whole:
                save_tensors({str(i): tensor for i, tensor in enumerate(whole)}, partial / AVERAGED)
        except (OSError, RuntimeError, SafetensorError) as error:  # each library has its own for a full disk
            problem = OSError(f"{final} could not be written: {error}")
        problem = self._agree(problem, final)
        if main and problem is None:
            problem = self._finish(partial, final, {"format": FORMAT, "step": step, **state})
        problem = self._agree(problem, final)
        if problem is not None:
            if main:
                shutil.rmtree(partial, ignore_errors=True)
            raise problem

    def _agree(self, problem: OSError | None, final: Path) -> OSError | None:
        """The problem, or that another process has one. Waits for all."""
        if self.accelerator.num_processes == 1:
            return problem
        troubled = torch.tensor(float(problem is not None), device=self.accelerator.device)
        if float(self.accelerator.reduce(troubled, "sum")) > 0 and problem is None:
            return OSError(f"{final} could not be written by another process")
        return problem

    def _finish(self, partial: Path, final: Path, state: dict[str, Any]) -> OSError | None:
        """Make a checkpoint that is written the newest one, and remove those that are too old."""
        try:
            (partial / STATE).write_text(json.dumps(state), encoding="utf-8")
            files = sorted(path for path in partial.rglob("*") if path.is_file())
            sums = [f"{digest_of(file)}  {file.relative_to(partial).as_posix()}\n" for file in files]
            (partial / SUMS).write_text("".join(sums), encoding="utf-8")
            for path in partial.rglob("*"):
                flush(path)
            os.replace(partial, final)
            flush(self.folder)
        except OSError as error:
            return OSError(f"{final} could not be written: {error}")
        for old in whole_checkpoints(self.folder)[: -self.keep]:
            leaving = old.with_name(f".partial-{old.name}")  # so that a half-deleted one is never loaded
            with suppress(OSError):
                os.replace(old, leaving)
                shutil.rmtree(leaving)
        return None

    def load_latest(self) -> tuple[dict[str, Any], list[Tensor]]:
        """Load the newest whole checkpoint; returns its state and averaged weights, or ``{}, []`` if there is none.

        Raises:
            ValueError: it is of another model, or a file of it is damaged.
        """
        whole = whole_checkpoints(self.folder)
        if not whole:
            return {}, []
        latest, state = whole[-1], read_state(whole)
        check_files(whole)
        if (latest / trained_name(0)).is_file() == self.sharded:
            raise ValueError(
                f"{latest} was written {'without' if self.sharded else 'under'} FSDP or DeepSpeed; go on with the run "
                f"{'without' if self.sharded else 'under'} it, or choose another --output"
            )
        try:
            self.accelerator.load_state(str(latest))
        except (RuntimeError, ValueError, KeyError, OSError, SafetensorError) as error:
            raise ValueError(
                f"{latest}: does not fit the model these settings describe; use the settings of that run, "
                f"or another --output ({str(error).splitlines()[0]})"
            ) from error
        file = latest / AVERAGED
        averaged = load_file(file) if file.is_file() else {}
        logger.info("resumed from %s", latest)
        return state, [averaged[str(i)] for i in range(len(averaged))]

    def _save_trained(self, models: list[nn.Module], weights: list[Any], folder: str) -> None:
        """Accelerate's hook: in place of whole models, the main process writes what is trained."""
        weights.clear()
        if self.accelerator.is_main_process:
            for i, model in enumerate(models):
                save_tensors(trained_state(self.accelerator.unwrap_model(model)), Path(folder) / trained_name(i))

    def _load_trained(self, models: list[nn.Module], folder: str) -> None:
        """Accelerate's hook: the counterpart of `_save_trained`."""
        for i, model in enumerate(models):
            load_trained(self.accelerator.unwrap_model(model), Path(folder) / trained_name(i))
        models.clear()


def whole_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def step_reached(output: Path) -> int:
    """The step of the newest checkpoint of the run in a trainer's output folder; 0: there is none."""
    whole = whole_checkpoints(output / "training" / "checkpoints")
    return int(whole[-1].name.removeprefix("step-")) if whole else 0


def read_state(whole: Sequence[Path]) -> dict[str, Any]:
    """What the newest checkpoint says of itself, settings with the meanings that they have now.

    whole: all of them, oldest first.

    Raises:
        ValueError: it is damaged, or of another version of latentdiff.
    """
    try:
        state = json.loads((whole[-1] / STATE).read_bytes())
    except (OSError, ValueError) as error:
        raise damaged(whole, STATE, str(error).partition("\n")[0]) from error
    if not isinstance(state, dict) or state.get("format") not in (OLDER, FORMAT):
        raise ValueError(
            f"{whole[-1]} is of another version of latentdiff, whose unfinished runs this one cannot go on with: "
            f"finish the run with that version, or start again with another --output. Finished models still load"
        )
    check_files(whole, (STATE,))
    settings = state["settings"]
    if state["format"] == OLDER and settings.get("kind") == "kl":
        settings["kl_weight"] = float(f"{settings['kl_weight'] * 3 * settings['resolution'] ** 2:.9g}")
    return state


def check_files(whole: Sequence[Path], names: Sequence[str] = ()) -> None:
    """Raises ValueError for a file of the newest checkpoint, or one of `names`, that is not as it was written."""
    try:
        lines = (whole[-1] / SUMS).read_text(encoding="utf-8").splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        missing = [name for name in (STATE, *names) if name not in sums]
    except (OSError, ValueError) as error:
        raise damaged(whole, SUMS, str(error).partition("\n")[0]) from error
    if missing:
        raise damaged(whole, SUMS, f"{missing[0]} is not in it")
    for name in names or sums:
        file = whole[-1] / name
        if not file.is_file():
            raise damaged(whole, name, "it is missing")
        if digest_of(file) != sums[name]:
            raise damaged(whole, name, f"its content is not that of {SUMS}")


def damaged(whole: Sequence[Path], name: str, reason: str) -> ValueError:
    """The error for a file of the newest checkpoint."""
    then = f"goes on from {whole[-2].name}" if len(whole) > 1 else "starts from the beginning"
    return ValueError(f"{whole[-1] / name} is damaged ({reason}); without the folder {whole[-1]} the run {then}")


def digest_of(file: Path) -> str:
    """SHA-256, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def load_trained(model: nn.Module, file: Path) -> None:
    """Put what `file` holds into `model`. Raises KeyError or ValueError if it is another model's."""
    saved, own = load_file(file), trained_state(model)
    if saved.keys() != own.keys():
        odd = sorted(saved.keys() ^ own.keys())[0]
        raise KeyError(f"{odd} is in one of checkpoint and model only")
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != saved[name].shape:
                raise ValueError(f"{name} is {tuple(saved[name].shape)} there, {tuple(tensor.shape)} here")
            tensor.copy_(saved[name])


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: parameters that require a gradient or learn without one, and buffers that are saved."""
    parameters = dict(model.named_parameters())
    buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in dict(all_parameters(model))}
    trained = {
        name: tensor
        for name, tensor in parameters.items()
        if tensor.requires_grad or getattr(tensor, "learns_without_gradient", False)
    }
    return {clean(name): tensor.detach() for name, tensor in {**trained, **buffers}.items()}


def all_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Every name of every parameter, tied ones under all their names."""
    return list(model.named_parameters(remove_duplicate=False))


def clean(name: str) -> str:
    """A parameter's name without what torch.compile adds."""
    return name.replace("_orig_mod.", "")


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file)


def trained_name(i: int) -> str:
    """Of the weights of the i-th model that is trained; nearly always there is one."""
    return f"trained-{i}.safetensors" if i else "trained.safetensors"


def gathered(tensors: Sequence[Tensor], here: bool) -> list[Tensor]:
    """Tensors with all that FSDP has spread of them over the processes, which must all call it; others as they are.

    here: whether this process wants them; otherwise none come back.
    """
    found = []
    for tensor in tensors:
        whole = tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
        if here:
            found.append(whole)
    return found


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that FSDP has spread, or the tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def flush(path: Path) -> None:
    """Make sure that a file or folder survives a power cut."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
