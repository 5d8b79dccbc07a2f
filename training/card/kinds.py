"""What kinds of model training makes, as their cards say it."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentdiff.training.data import CaptionedPicture

SEEN, SHORT = 100, 60  # pictures whose captions are looked at, and characters

AUTOENCODERS = {
    **{"kl": "AutoencoderKL", "vq": "VQModel", "gumbel": "GumbelVQModel", "fsq": "FSQModel"},
    "tiny": "AutoencoderTiny",
}
IN_DIFFUSERS = ("kl", "vq", "tiny")

AUTOENCODER_USAGE = """## How to use it

```python
from latentdiff.models import CLASS

autoencoder = CLASS.from_pretrained("THIS_FOLDER")
```"""

TINY_USAGE = """Where a pipeline has the latents that it learned, it takes the autoencoder's place, or draws previews:

```python
from latentdiff import TextToImagePipeline

pipeline = TextToImagePipeline.from_pretrained(MODEL, vae=autoencoder)
pipeline = TextToImagePipeline.from_pretrained(MODEL)
pipeline.preview_autoencoder = autoencoder
```"""

PIPELINE_USAGE = """## How to draw with it

```python
from latentdiff import TextToImagePipeline

pipeline = TextToImagePipeline.from_pretrained("THIS_FOLDER")
pipeline(PROMPT, seed=0).images[0].save("picture.png")
```

```sh
latentdiff generate PROMPT --model THIS_FOLDER -o picture.png
```

Plain diffusers loads it too:

```python
from diffusers import StableDiffusionPipeline

StableDiffusionPipeline.from_pretrained("THIS_FOLDER")(PROMPT).images[0]
```"""

LOADED = 'StableDiffusionPipeline.from_pretrained("THIS_FOLDER")'
SCALE = "pipeline.scheduler.init_noise_sigma = 1.0  # which it asks for, and schedulers of flows do not have"

TEXTLESS_USAGE = """## How to draw with it

```python
from latentdiff import {pipeline}

pipeline = {pipeline}.from_pretrained("THIS_FOLDER")
pipeline({call}, seed=0).images[0].save("picture.png")
```

```sh
latentdiff generate {options} --model THIS_FOLDER -o picture.png
```"""


@dataclass(frozen=True)
class ModelKind:
    """What a trained model is.

    Args:
        name: such as "KL autoencoder", with which the card's first sentence begins.
        task: the hub's name of what it does; "autoencoder" is none of the hub's, only a tag.
        usage: how to use it, in Markdown.
        lora: whether a LoRA lies beside the model.
        note: what to know of it, a sentence or two.
        learned_from: what it was trained on.
    """

    name: str
    task: str
    usage: str
    lora: bool = False
    note: str = ""
    learned_from: str = "pictures"

    @property
    def draws(self) -> bool:
        """Whether it is a pipeline."""
        return self.task != "autoencoder"


def autoencoder_kind(kind: str) -> ModelKind:
    """kind: of `AutoencoderSettings`."""
    usage = AUTOENCODER_USAGE.replace("CLASS", AUTOENCODERS[kind])
    if kind in IN_DIFFUSERS:
        usage += "\n\ndiffusers' class of this name loads it as well."
    if kind == "tiny":
        usage += "\n\n" + TINY_USAGE
    return ModelKind("tiny autoencoder" if kind == "tiny" else f"{kind.upper()} autoencoder", "autoencoder", usage)


def is_plain(prompt: str) -> bool:
    """Whether a prompt needs no quoting but double quotes, in Python, a shell and Markdown."""
    return prompt.isprintable() and not set(prompt) & set('"\\`$!')


def short_captions(pictures: "Sequence[CaptionedPicture]") -> list[str]:
    """A caption of the pictures to show how a model is drawn with: the first short and plain one, if there is any."""
    some = (caption for i in range(min(len(pictures), SEEN)) for caption in pictures[i].captions)
    return [caption for caption in some if 0 < len(caption) <= SHORT and is_plain(caption)][:1]


def text_to_image_kind(
    sample_prompts: Sequence[str] = (),
    lora: bool = False,
    saved_as: str = "StableDiffusionPipeline",
    told: Mapping[str, object] | None = None,
    scaled: bool = True,
) -> ModelKind:
    """saved_as: diffusers' class for the folder. told: options that this needs.

    scaled: whether the scheduler has the scale of the first noise, which that class asks it for.
    """
    prompts = [*sample_prompts, "a red car"]
    plain = next(prompt for prompt in prompts if is_plain(prompt))
    options = "".join(f", {key}={value!r}" for key, value in (told or {}).items())
    usage = PIPELINE_USAGE.replace('")(PROMPT)', f'")(PROMPT{options})').replace("PROMPT", f'"{plain}"')
    if not scaled:
        usage = usage.replace(LOADED, f"pipeline = {LOADED}\n{SCALE}\npipeline")
    usage = usage.replace("StableDiffusionPipeline", saved_as)
    return ModelKind("text-to-image pipeline", "text-to-image", usage, lora)


def distilled_kind(kind: ModelKind, method: str, steps: int, guidance_scale: float, note: str = "") -> ModelKind:
    """kind: of the teacher. steps, guidance_scale: which diffusers must be told; our pipelines know them."""
    before, found, after = kind.usage.rpartition(").images[0]")
    assert found
    usage = f"{before}, num_inference_steps={steps}, guidance_scale={guidance_scale:g}).images[0]{after}"
    plain = "diffusers import" in kind.usage
    name = f"{kind.name}, distilled to {steps} steps ({method})"
    return replace(kind, name=name, usage=usage if plain else kind.usage, note=note)


def class_conditional_kind(classes: Sequence[str], classifier: bool = False) -> ModelKind:
    """classes: their names, of which the card shows the first. classifier: whether the pipeline has one."""
    name = "class-conditional image pipeline" + (" with a classifier" if classifier else "")
    return textless_kind(name, "ClassConditionalPipeline", repr(classes[0]), f"--class {shlex.quote(classes[0])}")


def unconditional_kind() -> ModelKind:
    return textless_kind("unconditional image pipeline", "UnconditionalPipeline", "batch_size=1", "-n 1")


def codes_kind(condition: str, item: str | None) -> ModelKind:
    """A model whose pictures are codes. item: a prompt or a class to show."""
    if condition == "text":
        plain = f'"{item or "a red car"}"'
        kind = textless_kind("text-to-image pipeline of codes", "TokenPipeline", plain, plain)
        return replace(kind, task="text-to-image")
    if condition == "class":
        return textless_kind(
            *("class-conditional pipeline of codes", "ClassTokenPipeline", repr(item)),
            f"--class {shlex.quote(item or '')}",
        )
    return textless_kind("unconditional pipeline of codes", "UnconditionalTokenPipeline", "batch_size=1", "-n 1")


def textless_kind(name: str, pipeline: str, call: str, options: str) -> ModelKind:
    """call, options: what is drawn, in Python and in a shell."""
    usage = TEXTLESS_USAGE.format(pipeline=pipeline, call=call, options=options)
    return ModelKind(name, "unconditional-image-generation", usage)
