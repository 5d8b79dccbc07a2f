"""diffusers' own tests, run on this package's classes.

::

    git clone https://github.com/huggingface/diffusers && git -C diffusers checkout 58eb52c080
    pip install parameterized requests_mock          # which those tests need
    python tests/conformance/run.py --diffusers diffusers

runs the fast tests of diffusers' Stable Diffusion, SDXL, DiT and PixArt pipelines, autoencoders, UNet and transformers
twice without a network, once as they are and once with our classes in their place. It prints a table, and every test
that passes for diffusers' classes and not for ours. Those that are known are in ``known.py``, with the reason; any
other makes the exit status 1.

A test that fails for both, mostly as it needs the hub or the pictures of a tokenizer that is there, still compares:
both must fail with the same message and the same numbers in it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from known import reason
from messages import alike

STABLE_DIFFUSION = "tests/pipelines/stable_diffusion/test_stable_diffusion"
SDXL = "tests/pipelines/stable_diffusion_xl/test_stable_diffusion_xl"
GROUPS = {
    "text-to-image": [f"{STABLE_DIFFUSION}.py", "tests/pipelines/stable_diffusion_2/test_stable_diffusion.py"],
    "image-to-image": [f"{STABLE_DIFFUSION}_img2img.py"],
    "inpainting": [
        f"{STABLE_DIFFUSION}_inpaint.py",
        "tests/pipelines/stable_diffusion_2/test_stable_diffusion_inpaint.py",
    ],
    "upscaling": ["tests/pipelines/stable_diffusion_2/test_stable_diffusion_upscale.py"],
    "variations": ["tests/pipelines/stable_diffusion_image_variation/test_stable_diffusion_image_variation.py"],
    "controlnet": ["tests/pipelines/controlnet/test_controlnet.py"],
    "autoencoders": [
        "tests/models/autoencoders/test_models_autoencoder_kl.py",
        "tests/models/autoencoders/test_models_vq.py",
    ],
    "unet": ["tests/models/unets/test_models_unet_2d_condition.py"],
    "lora": ["tests/lora/test_lora_layers_sd.py"],
    "sdxl": [f"{SDXL}.py"],
    "sdxl-image": [f"{SDXL}_img2img.py"],
    "sdxl-inpainting": [f"{SDXL}_inpaint.py"],
    "sdxl-lora": ["tests/lora/test_lora_layers_sdxl.py"],
    "transformers": [
        "tests/models/transformers/test_models_dit_transformer2d.py",
        "tests/models/transformers/test_models_pixart_transformer2d.py",
    ],
    "dit": ["tests/pipelines/dit/test_dit.py"],
    "pixart": ["tests/pipelines/pixart_alpha/test_pixart.py"],
}


@dataclass(frozen=True)
class Outcome:
    state: str
    """passed, failed, skipped or missing"""
    message: str = ""


@dataclass(frozen=True)
class Comparison:
    group: str
    test: str
    theirs: Outcome
    ours: Outcome

    @property
    def verdict(self) -> str:
        states = (self.theirs.state, self.ours.state)
        if states[0] == "passed" and states[1] != "passed":
            return "known" if reason(self.test) else "UNEXPECTED"
        if states == ("failed", "failed"):
            return "both fail alike" if alike(self.theirs.message, self.ours.message) else "both fail"
        if states[0] == states[1]:
            return {"passed": "both pass", "skipped": "both skip"}[states[0]]
        return "only ours pass" if states[1] == "passed" else "other"


COLUMNS = ("both pass", "known", "UNEXPECTED", "only ours pass", "both fail alike", "both fail", "both skip", "other")


def run(checkout: Path, files: list[str], who: str, folder: Path) -> dict[str, Outcome]:
    """Each test's outcome, under its file, class and name."""
    report, log = folder / f"{who}.xml", folder / f"{who}.log"
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "CONFORMANCE": who, "HF_HUB_OFFLINE": "1", "DIFFUSERS_TEST_DEVICE": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join([str(here), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "substitutes",
        f"--junitxml={report}",
        *files,
    ]
    with log.open("w") as stream:
        subprocess.run(command, cwd=checkout, env=environment, stdout=stream, stderr=subprocess.STDOUT, check=False)
    if not report.is_file():
        sys.exit(f"pytest did not run: {log.read_text()[-2000:]}")
    cases = ElementTree.parse(report).getroot().iter("testcase")
    return {f"{case.get('classname')}::{case.get('name')}": outcome(case) for case in cases}


def outcome(case: ElementTree.Element) -> Outcome:
    for part in case:
        if part.tag in ("failure", "error"):
            return Outcome("failed", part.get("message") or "")
        if part.tag == "skipped":
            return Outcome("skipped", part.get("message") or "")
    return Outcome("passed")


def group_of(test: str) -> str:
    module = test.split("::")[0]
    return next(
        group
        for group, files in GROUPS.items()
        if any(module.startswith(file.removesuffix(".py").replace("/", ".") + ".") for file in files)
    )


def read(file: Path, groups: list[str]) -> dict[str, Outcome]:
    rows = json.loads(file.read_text())
    return {row["test"]: Outcome(**row["theirs"]) for row in rows if row["group"] in groups}


def show(comparisons: list[Comparison]) -> None:
    counts = Counter((one.group, one.verdict) for one in comparisons)
    print(f"{'':15}" + "".join(f"{column:>17}" for column in COLUMNS))
    for group in dict.fromkeys(one.group for one in comparisons):
        print(f"{group:15}" + "".join(f"{counts[group, column]:17d}" for column in COLUMNS))
    for one in comparisons:
        name = one.test.split(".")[-1]
        if one.verdict in ("known", "both fail") and reason(one.test):
            print(f"- {name}: {one.ours.state}; {reason(one.test)}")
        elif one.verdict in ("UNEXPECTED", "both fail", "other"):
            said = " ".join(one.ours.message.split())[:300]
            print(f"- {one.verdict}: {name}: theirs {one.theirs.state}, ours {one.ours.state}: {said}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--diffusers", type=Path, required=True, help="a checkout of diffusers' repository")
    parser.add_argument("--only", nargs="*", choices=list(GROUPS), default=list(GROUPS), help="groups of tests")
    parser.add_argument("--json", type=Path, help="write every test's outcome for both here")
    parser.add_argument("--theirs", type=Path, help="take the outcomes for diffusers' classes from such a file")
    chosen = parser.parse_args()
    files = [file for group in chosen.only for file in GROUPS[group]]
    with tempfile.TemporaryDirectory() as folder:
        checkout = chosen.diffusers.resolve()
        theirs = read(chosen.theirs, chosen.only) if chosen.theirs else run(checkout, files, "theirs", Path(folder))
        ours = run(checkout, files, "ours", Path(folder))
    missing = Outcome("missing")
    comparisons = [
        Comparison(group_of(test), test, theirs.get(test, missing), ours.get(test, missing))
        for test in dict.fromkeys([*theirs, *ours])
    ]
    show(comparisons)
    if chosen.json:
        rows = [
            {"group": one.group, "test": one.test, "verdict": one.verdict, "reason": reason(one.test)}
            | {"theirs": vars(one.theirs), "ours": vars(one.ours)}
            for one in comparisons
        ]
        chosen.json.write_text(json.dumps(rows, indent=1))
    return int(any(one.verdict == "UNEXPECTED" for one in comparisons))


if __name__ == "__main__":
    sys.exit(main())
