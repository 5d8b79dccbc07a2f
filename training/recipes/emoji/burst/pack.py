"""Pack what a machine without a network needs to train the packaged model, and make pipeline folders of what it leaves.

    python -m latentdiff.training.recipes.emoji.burst.pack pack BUNDLE PACKED
    python -m latentdiff.training.recipes.emoji.burst.pack unpack OUT MODEL --unet student

BUNDLE is what `prepare --bundle` writes; PACKED is small enough to carry (about 45 MB).
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path

from .settings import BurstSettings
from .text import cut_text_encoder

PREVIEW = """a red car; a green apple; a yellow sun; a blue fish; a house; a cat face; a red heart; a yellow star;
a banana; a slice of pizza; a smiling face; a tree; a rocket; a blue umbrella; a strawberry; a pink flower; a dog face;
a cup of coffee; a purple butterfly; a crescent moon; a cat next to a house; two apples; three red balloons;
a red car on a blue background; a purple elephant; a green car; a blue apple; a small dog; a big tree;
a sun above a house; a guitar; a lion; a hamburger; a bicycle; an airplane; a penguin; a castle; a robot; a crown;
a pink house; a cat and a dog; four stars; a yellow fish on a red background; a flat red car; a black cat; a mushroom;
a blue book next to a red apple; a ghost"""


def pack(bundle: Path, output: Path, text: Path, sampled: int = 3000, features: bool = True) -> int:
    """Write the folder `output`, whole or not at all. Returns its bytes.

    Args:
        text: folder with `tokenizer` and `text_encoder`, such as the packaged model's.
        features: whether the network of the perceptual distance is packed; a run that goes on needs none.
        sampled: scenes whose captions are read for the words of the templates; names of things are all kept.

    Raises:
        FileExistsError: `output` is there already.
        FileNotFoundError: the bundle is not.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists already; name another folder")
    if not bundle.is_file():
        raise FileNotFoundError(f"{bundle} does not exist; prepare --bundle writes it")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as temporary:
        folder = Path(temporary) / output.name
        folder.mkdir()
        shutil.copyfile(bundle, folder / "bundle.xz")
        prompts = [prompt.strip() for prompt in PREVIEW.replace("\n", " ").split(";")]
        (folder / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
        cut_text_encoder(text, [*prompts, *caption_words(bundle, sampled)], folder)
        if features:
            pack_features(folder / "features.safetensors")
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        folder.replace(output)
    return size


def caption_words(bundle: Path, sampled: int) -> Iterable[str]:
    """All names in the bundle, and the captions of so many scenes, which have the words between them."""
    from ..drawings import render_all
    from ..grammar import plural
    from ..scenes import Composer
    from .pool import read_jobs

    jobs = read_jobs(bundle)
    for concept in {job.concept for job in jobs}:
        for name in (*concept.names, *concept.unseen):
            yield from (name[1:],) if name.startswith("~") else (name, plural(name))
    some = render_all(jobs[:: max(1, len(jobs) // 300)], 128, 1)
    composer = Composer(some, 128, 1)
    for index in range(sampled):
        yield from composer.plan(index).captions


def pack_features(path: Path) -> None:
    """The first three stages of EfficientNet-lite0 (Apache-2.0) in half precision, for the perceptual distance."""
    import torch
    from safetensors.torch import save_file

    from latentdiff.training.objectives.perceptual import efficientnet

    state = efficientnet().network.state_dict()
    floats = {k: v.half() if v.dtype == torch.float32 else v for k, v in state.items()}
    save_file({k: v.contiguous() for k, v in floats.items()}, path)


def unpack(weights: Path, output: Path, text: Path, unet_name: str, steps: int, guidance_scale: float) -> None:
    """A pipeline folder of the weights that a run left in `weights`.

    Args:
        text: folder with the whole `tokenizer` and `text_encoder`.
        unet_name: "unet" or "student".
        steps, guidance_scale: what the pipeline draws with unless told otherwise.
    """
    import torch
    from diffusers import DDIMScheduler
    from transformers import BertModel, BertTokenizer

    from latentdiff.models import AutoencoderKL, UNet2DConditionModel
    from latentdiff.pipelines import TextToImagePipeline

    from .clock import load_half

    if output.exists():
        raise FileExistsError(f"{output} exists already; name another folder")
    facts = json.loads((weights / "facts.json").read_text(encoding="utf-8"))
    settings = BurstSettings.read(facts["settings"])
    vae = AutoencoderKL(**settings.autoencoder_config(), scaling_factor=facts["scaling_factor"])
    vae.load_state_dict(load_half([weights], "vae"))
    text_encoder = BertModel.from_pretrained(text / "text_encoder", torch_dtype=torch.float32)
    unet = UNet2DConditionModel(**settings.unet_config(text_encoder.config.hidden_size))
    unet.load_state_dict(load_half([weights], unet_name))
    pipeline = TextToImagePipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=BertTokenizer.from_pretrained(text / "tokenizer"),
        unet=unet.eval(),
        scheduler=DDIMScheduler(**settings.scheduler_config()),
    )
    pipeline.register_defaults(num_inference_steps=steps, guidance_scale=guidance_scale)
    pipeline.save_pretrained(output)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="pack", description="Pack for, and unpack from, a short run on one GPU.")
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("bundle", type=Path)
    packing.add_argument("--no-features", action="store_true", help="for a run that goes on from earlier weights")
    unpacking = commands.add_parser("unpack")
    unpacking.add_argument("weights", type=Path)
    unpacking.add_argument("--unet", choices=("unet", "student"), default="unet")
    unpacking.add_argument("--steps", type=int, default=25)
    unpacking.add_argument("--guidance", type=float, default=3.5)
    packaged = Path(str(files("latentdiff"))) / "weights" / "emoji"
    for command in (packing, unpacking):
        command.add_argument("output", type=Path)
        command.add_argument("--text", type=Path, default=packaged, help="folder of tokenizer and text encoder")
    options = parser.parse_args(arguments)
    try:
        if options.command == "pack":
            size = pack(options.bundle, options.output, options.text, features=not options.no_features)
            print(f"{options.output}: {size / 1e6:.1f} MB")
        else:
            unpack(options.weights, options.output, options.text, options.unet, options.steps, options.guidance)
    except (FileExistsError, FileNotFoundError, ValueError) as error:
        sys.exit(f"pack: {error}")


if __name__ == "__main__":
    main()
