"""What a page names and does not make, as small as it can be: pictures, models of others, released files.

A name stands for a file or folder of this name in the reader's folder, and is made when it is first named.
"""

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from discs import add_masks, save_discs
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from tars import write

ANIMALS = ("bird", "cat", "owl", "robin")
DOCS = Path(__file__).parents[2] / "docs"
PACKAGED = DOCS.parent / "latentdiff" / "weights" / "emoji"


def animal(number: int) -> Image.Image:
    """32 pixels wide."""
    image = Image.new("RGB", (32, 32 + number % 2), "white")
    ImageDraw.Draw(image).ellipse((4, 4, 20 + number % 9, 28), fill=("red", "green", "blue", "orange")[number % 4])
    return image


def captioned(folder: Path, count: int = 16) -> None:
    """The captions are names of classes too; a quarter of them is held out."""
    for number in range(count):
        place = folder / ("validation" if number >= count * 3 // 4 else "train")
        place.mkdir(parents=True, exist_ok=True)
        animal(number).save(place / f"{number}.png")
        (place / f"{number}.txt").write_text(ANIMALS[number % 4])


def bare(folder: Path) -> None:
    folder.mkdir()
    for number in range(4):
        animal(number).save(folder / f"{number}.png")


def masked(folder: Path) -> None:
    add_masks(save_discs(folder))


def shards(folder: Path) -> None:
    """Sixteen, of one picture each."""
    folder.mkdir()
    for number in range(16):
        content = io.BytesIO()
        animal(number).save(content, "PNG")
        write(folder / f"{number:03}.tar", {"a.png": content.getvalue(), "a.txt": ANIMALS[number % 4].encode()})


def pipeline(folder: Path) -> None:
    from tiny import tiny_pipeline

    tiny_pipeline("clip").save_pretrained(folder)


def packaged(folder: Path) -> None:
    shutil.copytree(PACKAGED, folder)


def autoencoder(folder: Path) -> None:
    from tiny import VAE

    from latentdiff import AutoencoderKL

    AutoencoderKL(**VAE).save_pretrained(folder)


def codes_autoencoder(folder: Path) -> None:
    from tiny import VAE

    from latentdiff import VQModel

    VQModel(**VAE, num_vq_embeddings=16).save_pretrained(folder)


def sdxl(folder: Path) -> None:
    from tiny_sdxl import tiny_sdxl

    tiny_sdxl().save_pretrained(folder)


def pixart(folder: Path) -> None:
    from tiny_transformers import pixart_folder

    pixart_folder(folder)


def dit(folder: Path) -> None:
    """Some of its classes are those of the pictures."""
    import json

    from tiny_transformers import dit_folder

    index = dit_folder(folder) / "model_index.json"
    config = json.loads(index.read_text())
    config["id2label"] |= {str(number): name for number, name in enumerate(ANIMALS)}
    index.write_text(json.dumps(config))


def released_dit(file: Path) -> None:
    """Of the thousand classes of ImageNet."""
    from released_dit import weights

    found = weights()
    table = found["y_embedder.embedding_table.weight"]
    torch.save({**found, "y_embedder.embedding_table.weight": table.repeat(200, 1)[:1001]}, file)


def single_file(file: Path) -> None:
    from kinds import make_model
    from tiny import clip_parts

    make_model("sd1", clip_parts()).save_single_file(file)


def clip(folder: Path) -> None:
    from tiny_clip import save_clip

    save_clip(folder)


def style(file: Path) -> None:
    """A LoRA for the packaged model."""
    from loras import ATTENTION, lora_weights

    from latentdiff import TextToImagePipeline

    unet, settings = lora_weights(TextToImagePipeline.from_pretrained().unet, ATTENTION, rank=2, alpha=2)
    TextToImagePipeline.save_lora_weights(
        file.parent, unet_lora_layers=unet, unet_lora_adapter_metadata=settings, weight_name=file.name
    )


def blip(folder: Path) -> None:
    from tiny_blip import save_blip

    save_blip(folder)


def taming_autoencoder(file: Path) -> None:
    from tiny import VAE

    from latentdiff import VQModel

    vae = VQModel(**{**VAE, "block_out_channels": (32, 64), "norm_num_groups": 32}, num_vq_embeddings=16)
    vae.save_single_file(file.with_suffix(".safetensors"))
    torch.save({"state_dict": load_file(file.with_suffix(".safetensors"))}, file)


def taming(file: Path) -> None:
    """Of the thousand classes of ImageNet, with its autoencoder."""
    from released_taming import weights

    taming_autoencoder(file)
    first = {f"first_stage_model.{key}": tensor for key, tensor in torch.load(file)["state_dict"].items()}
    torch.save({"state_dict": {**weights(tokens=1000, width=1024, blocks=1), **first}}, file)


def dalle(part: str) -> Callable[[Path], None]:
    def save(file: Path) -> None:
        from tiny_codes import dalle_module

        torch.save(dalle_module().get_submodule(part), file)

    return save


def prompts(file: Path) -> None:
    rows = ["a red thing", "a cup", "a car"]
    file.write_text("\n".join(["prompt", *rows] if file.suffix == ".csv" else rows))


def picture(file: Path) -> None:
    Image.new("RGB", (128, 128), "orange").save(file)


def mask(file: Path) -> None:
    Image.new("L", (128, 128), 255).save(file)


def example(file: Path) -> None:
    shutil.copy(DOCS / "examples" / file.name, file)


READY: dict[str, Callable[[Path], None]] = {
    **dict.fromkeys(
        ("pictures", "drawings", "data", "DIR", "D", "FOLDER", "runs/emoji/data", "runs/emoji/scenes"),
        captioned,
    ),
    **dict.fromkeys(("my-dog", "my-cup"), bare),
    "cups": masked,
    "shards": shards,
    **dict.fromkeys(("prompts.csv", "prompts.txt"), prompts),
    **dict.fromkeys(("car.png", "a.png"), picture),
    "m.png": mask,
    **dict.fromkeys(("runs/mine", "base", "M", "another model of the same size"), pipeline),
    "runs": lambda folder: pipeline(folder / "mine"),
    **dict.fromkeys(("model", "MODEL"), packaged),
    **dict.fromkeys(("runs/autoencoder", "runs/ae", "runs/kl", "stabilityai/sd-vae-ft-ema"), autoencoder),
    **dict.fromkeys(("vq", "VQ"), codes_autoencoder),
    **dict.fromkeys(("sdxl", "stabilityai/stable-diffusion-xl-base-1.0"), sdxl),
    "PixArt-alpha/PixArt-XL-2-512x512": pixart,
    "facebook/DiT-XL-2-256": dit,
    "DiT-XL-2-256x256.pt": released_dit,
    "model.safetensors": single_file,
    "style.safetensors": style,
    "clip": clip,
    "Salesforce/blip-image-captioning-base": blip,
    "vq-f4/model.ckpt": taming_autoencoder,
    "encoder.pkl": dalle("encoder"),
    "decoder.pkl": dalle("decoder"),
    "cin.ckpt": taming,
    **dict.fromkeys(("straight_flow.py", "postcards.py"), example),
}
MADE = {
    "runs/birds": "latentdiff train denoiser --data pictures --autoencoder pixels condition=class",
    "runs/ddpm": "latentdiff train denoiser --data pictures --autoencoder pixels condition=none",
    "runs/full": "latentdiff finetune --model runs/mine --data pictures --method full ema_snapshots=500",
    "runs/words": "latentdiff train prior --autoencoder vq --data pictures",
}
"""What the commands of other pages make, with their ``--output``."""
