"""A reader who types what a page says, in its order, in a folder of his own.

What a page says is kept, but for these rules:

- What it names and does not make lies ready, small (`lying_ready`).
- A training makes two updates of small networks on small pictures (`smaller`).
- Commands that draw or measure many pictures take two (`FEW`).
- What is launched in many processes or jobs is run in one; variables set before a command are set.
- A server gets a free port, and later commands its address; it runs until another takes its port, or the page ends.
- `STANDS_FOR` has words for others; float32 stands for bfloat16 where OpenVINO does not have it.
- What `NOT_HERE` has is not run.
"""

import os
import re
import runpy
import shlex
import sys
import traceback
from collections.abc import Mapping
from contextlib import ExitStack, redirect_stdout
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lying_ready
import pytest
from clients import listening
from pages import Command, Snippet
from parsed import MENTIONS, of_latentdiff, parse
from program import run_program

from latentdiff.extensions import VARIABLE
from latentdiff.pipelines.runtime.choice import openvino_has
from latentdiff.training.commands.settings import Kind, settings_of
from latentdiff.training.commands.settings_arguments import parse_overrides
from latentdiff.training.recipes.autoencoders import configurations
from latentdiff.training.settings import DenoiserSettings, FinetuneSettings
from latentdiff.training.settings.base import ALIASES

NOT_HERE = {
    r"^pip ": "asks a registry; tests/test_pages.py looks whether our extras have these names",
    r"^pytest ": "runs all tests",
    r"^bash benchmarks/gpu\.sh": "measures a GPU for minutes",
    r"^python benchmarks/denoisers\.py": "trains two networks for twenty minutes each",
    r"recipes\.emoji\.evaluate": "needs the judge and the drawings of the recipe, which are made of downloads",
    r"^export MASTER_ADDR=": "asks Slurm",
    r'\.to\("cuda"\)': "needs a GPU",
}
"""What is not run in a test, and why."""
NEEDS = {
    "openvino": "openvino",
    r"latentdiff (serve|app)|--server": "fastapi",
    "openai": "openai",
    r"\bopenai\b": "fastapi",
}
"""Packages of extras: without them what asks for them is not run."""
STANDS_FOR = {
    r"open_clip:ViT-B-32/laion2b_s34b_b79k": "clip",  # a folder of a small CLIP
    r"\{000\.\.\d99\}": "{000..015}",
    r"\bMETHOD\b": "lcm",
    r"\bcandidates=\d+": "candidates=4",
}
FEW = {"-n": "4", "--count": "2", "--steps": "2", "--candidates": "2"}
"""Options of commands that draw and measure many pictures, where larger numbers are given."""
ALWAYS = {"evaluate": ("--count", "--steps")}
"""Those of `FEW` that are given if the page does not."""
LAUNCHERS = ("accelerate", "torchrun", "srun", "sbatch")
SERVING = {"serve": "8000", "app": "7860"}
"""The ports they have by default."""
TRAININGS = (*(kind for kind in Kind if kind != Kind.doctor), "encode")
SETTINGS = {
    **{"warmup_steps": 0, "decay_steps": 0, "discriminator_start": 0, "gumbel_steps": 1, "max_steps": 2},
    **{"batch_size": 2, "gradient_accumulation_steps": 1},
    **{"sample_every": 100, "checkpoint_every": 100, "resolution": 32, "sample_steps": 2, "layers_per_block": 1},
    **{"norm_num_groups": 4, "attention_head_dim": 8, "num_layers": 1, "num_attention_heads": 2},
    **{"num_vq_embeddings": 16, "discriminator_channels": 8, "validation_pictures": 4},
    **{"denoiser_options": {"depth": 1, "width": 32, "heads": 2, "patch_size": 2}},
    **{"prompt_pictures": 2, "teacher_steps": 2, "start_steps": 8, "stage_steps": 1},
}
"""Of trainings, those that a kind has."""
IF_GIVEN = {"ema_snapshots": {"ema_snapshots": 1}, "class_prompt": {"class_pictures": 2}}
"""Further ones, if the page has these."""


class Reader:
    """Types in the folder that is the current one; ``with`` ends the servers that he started.

    failed: what did not do what the page says.
    missing: packages without which some of it was not run.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.names: dict[str, object] = {"__name__": "__main__"}
        self.servers: dict[str, tuple[str, ExitStack]] = {}
        self.failed: list[str] = []
        self.missing: set[str] = set()
        monkeypatch.setenv("BROWSER", "true")  # what opens a page, and does nothing
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
        monkeypatch.setenv(VARIABLE, "")
        monkeypatch.syspath_prepend(os.getcwd())

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        for _, process in self.servers.values():
            process.close()
        for name, module in [*sys.modules.items()]:  # of extensions, which lie in the folder
            if Path(getattr(module, "__file__", None) or "/").parent == Path.cwd():
                del sys.modules[name]

    def type(self, what: Command | Snippet) -> None:
        """Run it, if it is run here; how it failed is kept, and he goes on."""
        text = what.text if isinstance(what, Snippet) else " ".join(what.words)
        missing = {package for word, package in NEEDS.items() if re.search(word, text) and find_spec(package) is None}
        self.missing |= missing
        if missing or any(re.search(pattern, text) for pattern in NOT_HERE):
            return
        try:
            if isinstance(what, Snippet):
                self.execute(text)
            else:
                self.run(what)
        except Exception as error:
            traceback.print_exc()
            self.failed.append(f"{text}: {type(error).__name__}: {error}")

    def execute(self, text: str) -> None:
        text = self.replaced(text)
        named = re.findall(r'(?<!save_pretrained\()(?<!output=)"([^"\n]+)"', text)
        self.prepare([*named, *(f"{name}.py" for name in re.findall(r"^import (\w+)", text, re.MULTILINE))])
        exec(compile(text, "snippet", "exec"), self.names)

    def run(self, command: Command) -> None:
        words = [self.replaced(word) for word in command.words]
        while re.match(r"[A-Z_]+=", words[0]):
            self.monkeypatch.setenv(*words.pop(0).split("=", 1))
        if words[0] in LAUNCHERS:
            words = launched(words)
        outputs = [words[i + 1] for i, word in enumerate(words) if word in ("-o", "--output")]
        outputs += words[3:4] if words[1] == "convert" else []
        self.prepare([word for word in words if word not in outputs])
        called = of_latentdiff(words)
        if called is None:
            self.run_module(words)
            return
        program, arguments = called
        try:
            name, given = parse(program, arguments)
        except Exception as error:
            if command.spoken and type(error).__name__ in MENTIONS:
                return
            raise
        if command.spoken and is_mention(name, given, arguments):
            return
        if name in SERVING:
            self.serve(name, arguments)
            return
        with ExitStack() as stack:
            if command.into:
                file = stack.enter_context(Path(command.into).open("w", encoding="utf-8"))
                stack.enter_context(redirect_stdout(file))
            status = run_program(self.monkeypatch, *smaller(name, given, arguments), program=program)
        assert status == 0, words
        if command.into.endswith(".yaml"):
            fill_in(Path(command.into))
        assert all(Path(output).exists() for output in outputs if "--separate" not in words), words

    def replaced(self, text: str) -> str:
        for pattern, other in STANDS_FOR.items():
            text = re.sub(pattern, other, text)
        if "bfloat16" in text and not has_bfloat16():
            text = text.replace("bfloat16", "float32")
        for port, (address, _) in self.servers.items():
            text = text.replace(f"http://127.0.0.1:{port}", address)
        return text

    def prepare(self, words: list[str]) -> None:
        """Make what these name and is not there."""
        ready = (*lying_ready.READY, *lying_ready.MADE)
        for name in (part.partition("/{")[0] for word in words for part in re.split("[=:]", word)):
            if name in ready and not Path(name).exists():
                Path(name).parent.mkdir(parents=True, exist_ok=True)
                if make := lying_ready.READY.get(name):
                    make(Path(name))
                else:
                    self.run(Command([*shlex.split(lying_ready.MADE[name]), "--output", name], "", False))

    def run_module(self, words: list[str]) -> None:
        """``python -m MODULE ...``, here."""
        assert words[:2] == ["python", "-m"], words
        self.monkeypatch.setattr(sys, "argv", words[2:])
        runpy.run_module(words[2], run_name="__main__")

    def serve(self, name: str, arguments: list[str]) -> None:
        port = arguments.pop(arguments.index("--port") + 1) if "--port" in arguments else SERVING[name]
        arguments = [word for word in arguments if word != "--port"]
        if port in self.servers:
            self.servers.pop(port)[1].close()
        process = ExitStack()
        self.servers[port] = process.enter_context(listening(*arguments))[0], process


@cache
def has_bfloat16() -> bool:
    """Whether OpenVINO computes in it here."""
    return find_spec("openvino") is None or openvino_has("BF16")


def launched(words: list[str]) -> list[str]:
    """What is run in each process or job."""
    for word in words:
        if " latentdiff" in f" {word}" and " " in word:
            words = shlex.split(os.path.expandvars(word))
    if "-m" in words:
        words = ["python", *words[words.index("-m") :]]
    return words


def is_mention(name: str, given: Mapping[str, Any], arguments: list[str]) -> bool:
    """Whether a sentence names a command and leaves out what it needs."""
    if len(arguments) == 1 + arguments[:1].count("train"):
        return True
    if name not in TRAININGS:
        return False
    runs = Path(given["output"] or "") / "training"
    return not given["data"] and not (given["output"] and runs.exists())


def smaller(name: str, given: Mapping[str, Any], arguments: list[str]) -> list[str]:
    """The arguments, with less to do."""
    if name in TRAININGS:
        kind: Any = settings_of(name) if name != "encode" else DenoiserSettings
        if name == "encode" and not (Path(given["model"]) / "config.json").exists():
            kind = FinetuneSettings
        overrides = parse_overrides(given["overrides"] or [])
        options = {key: str(given[key]) for key in kind.model_fields if given.get(key) is not None}
        less = less_of(
            kind, kind.values_of(configurations().get(given["config"], given["config"]), overrides | options)
        )
        keys = [word.partition("=")[0] for word in arguments]
        kept = [word for word, key in zip(arguments, keys, strict=True) if ALIASES.get(key, key) not in less]
        return [*kept, *(f"{key}={value}" for key, value in less.items())]
    arguments = [*arguments]
    for option in FEW:
        if option in arguments:
            place = arguments.index(option) + 1
            arguments[place] = str(min(int(arguments[place]), int(FEW[option])))
        elif option in ALWAYS.get(name, ()):
            arguments += [option, FEW[option]]
    return arguments


def less_of(kind: Any, values: Mapping[str, Any]) -> dict[str, object]:
    """Settings for a training of which nothing is expected but that it ends: those of `SETTINGS` that fit in."""
    levels = values.get("block_out_channels", [0] * (4 if values.get("teacher") else 3))
    needed = {key: "x" for key, field in kind.model_fields.items() if field.is_required()}
    less: dict[str, object] = {}
    wanted = {**SETTINGS, "block_out_channels": [8] * len(levels)}
    for given in IF_GIVEN.keys() & values:
        wanted |= IF_GIVEN[given]
    for key, value in wanted.items():
        try:
            kind.of({**needed, **values, **less, key: value})
        except ValueError:
            continue
        less[key] = value
    assert "max_steps" in less
    return less


def fill_in(file: Path) -> None:
    """As the page says: data and output, in a file of settings."""
    text = file.read_text(encoding="utf-8")
    for key, value in {"data": "pictures", "output": "runs/mine"}.items():
        assert f"\n#{key}:" in text
        text = text.replace(f"\n#{key}:", f"\n{key}: {value}")
    file.write_text(text, encoding="utf-8")
