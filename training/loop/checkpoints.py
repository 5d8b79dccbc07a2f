"""Checkpoints, each whole or absent: written under a temporary name, renamed, and only then are old ones removed."""

import json
import logging
import os
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

logger = logging.getLogger(__name__)

FORMAT = 2  # of what a checkpoint holds; to be raised when names of weights or of the state change


class Checkpoints:
    """The checkpoints of a run: folders ``step-00001000``.

    Each holds the trained weights (what is frozen is not repeated), the averaged ones, Accelerate's optimizer state,
    and ``state.json``. Those of one process and of several are alike; under FSDP and DeepSpeed Accelerate saves its
    sharded weights itself.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, keep: int = 2) -> None:
        self.folder, self.accelerator, self.keep = folder, accelerator, keep
        self.sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
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
        main, rank = self.accelerator.is_main_process, self.accelerator.process_index
        problem: OSError | None = None
        if main:
            for leftover in self.folder.glob(".partial-*"):
                shutil.rmtree(leftover, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            partial.mkdir(parents=True, exist_ok=True)
            self.accelerator.save_state(str(partial))
            if averaged and (main or self.sharded):
                save_tensors(
                    {str(i): local(tensor) for i, tensor in enumerate(averaged)}, partial / averaged_name(rank)
                )
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
            (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")
            for file in partial.rglob("*"):
                flush(file)
            os.replace(partial, final)
            flush(self.folder)
        except OSError as error:
            return OSError(f"{final} could not be written: {error}")
        for old in self.whole()[: -self.keep]:
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
        whole = self.whole()
        if not whole:
            return {}, []
        latest = whole[-1]
        self._check_files(whole)
        state = json.loads((latest / "state.json").read_text(encoding="utf-8"))
        if state.get("format") != FORMAT:
            raise ValueError(
                f"{latest} is of another version of latentdiff, whose unfinished runs this one cannot go on with: "
                f"finish the run with that version, or start again with another --output. Finished models still load"
            )
        try:
            self.accelerator.load_state(str(latest))
        except (RuntimeError, ValueError, KeyError, OSError, SafetensorError) as error:
            raise ValueError(
                f"{latest}: does not fit the model these settings describe; use the settings of that run, "
                f"or another --output ({str(error).splitlines()[0]})"
            ) from error
        rank = self.accelerator.process_index if self.sharded else 0
        file = latest / averaged_name(rank)
        averaged = load_file(file) if file.is_file() else {}
        logger.info("resumed from %s", latest)
        return state, [averaged[str(i)] for i in range(len(averaged))]

    def _check_files(self, whole: list[Path]) -> None:
        """Raises ValueError for a file of the newest checkpoint that is not as it was written, by its end."""
        for file in sorted(whole[-1].iterdir()):
            if reason := damage(file):
                then = f"goes on from {whole[-2].name}" if len(whole) > 1 else "starts from the beginning"
                raise ValueError(f"{file} is damaged ({reason}); without the folder {whole[-1]} the run {then}")

    def whole(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.iterdir() if p.name.startswith("step-") and (p / "state.json").is_file())

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


def damage(file: Path) -> str | None:
    """What is wrong with a file of a checkpoint as a whole, if anything is."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                pass
        elif file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        elif file.suffix == ".bin" and not zipfile.is_zipfile(file):
            return "not what torch.save wrote"
    except (SafetensorError, ValueError) as error:
        return str(error).splitlines()[0]
    return None


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


def averaged_name(rank: int) -> str:
    return f"averaged-{rank}.safetensors"


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
