"""Pipelines whose pictures are codes: drawn, saved, loaded, painted in, and what they refuse."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import VAE, bert_parts

from latentdiff import TokenPipeline, VQModel
from latentdiff.interchange.fingerprint import codes_digest
from latentdiff.models import FSQModel, TokenTransformer
from latentdiff.pipelines import ClassTokenPipeline, TokenInpaintPipeline, UnconditionalTokenPipeline

ORDERS = ("raster", "masked")


def autoencoder(seed: int = 3) -> VQModel:
    torch.manual_seed(seed)
    vae = VQModel(**VAE, num_vq_embeddings=16).eval()
    torch.nn.init.normal_(vae.quantize.embedding.weight)
    return vae


def transformer(order: str, vae: Any, **more: Any) -> TokenTransformer:
    torch.manual_seed(5)
    config = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8, **more}
    made = TokenTransformer(vae.codes, order=order, autoencoder_digest=codes_digest(vae), **config).eval()
    for name, parameter in made.named_parameters():
        if name.startswith(("head", "blocks")):
            torch.nn.init.normal_(parameter, std=0.3)
    return made


def pipeline(order: str, kind: Any = TokenPipeline) -> Any:
    vae = autoencoder()
    torch.manual_seed(7)
    made = kind(vae, **bert_parts(), transformer=transformer(order, vae, cross_attention_dim=16))
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("order", ORDERS)
def test_a_picture_does_not_depend_on_its_batch(order: str) -> None:
    draw = pipeline(order)
    call = {"output_type": "latent", "guidance_scale": 3.0, "num_inference_steps": None if order == "raster" else 4}
    prompts = ["red thing", "a cup", "blue"]
    together = draw(prompts, seed=[4, 5, 6], **call).images
    assert together.shape == (3, 1, 8, 8)
    assert together.min() >= 0
    assert together.max() < 16
    for prompt, seed, codes in zip(prompts, (4, 5, 6), together, strict=True):
        assert torch.equal(draw(prompt, seed=seed, **call).images[0], codes)
    assert not torch.equal(draw("red thing", seed=9, **call).images[0], together[0])
    assert not torch.equal(draw("a cup", seed=4, **call).images[0], together[0])


@pytest.mark.parametrize("order", ORDERS)
@torch.no_grad()
def test_guidance_mixes_logits(order: str) -> None:
    """Greedy codes are the likeliest of what the whole network says, without any cache."""
    draw = pipeline(order)
    found = draw("red", guidance_scale=2.5, temperature=0, num_inference_steps=1 if order == "masked" else None)
    codes = draw(
        "red",
        guidance_scale=2.5,
        temperature=0,
        output_type="latent",
        num_inference_steps=1 if order == "masked" else None,
    )
    codes = codes.images[:, 0]
    states, nothing = (draw.conditioner(draw.device)([text]).states for text in ("red", ""))
    seen = codes if order == "raster" else torch.full_like(codes, 16)
    without, with_prompt = (draw.transformer(seen, one) for one in (nothing, states))
    assert torch.equal((without + 2.5 * (with_prompt - without)).argmax(1), codes)
    pixels = draw.vqvae.decode_from_indices(codes)
    wanted = ((pixels[0] / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(found.images[0]), wanted)


@pytest.mark.parametrize("order", ORDERS)
def test_a_folder_draws_the_same(order: str, tmp_path: Path) -> None:
    draw = pipeline(order)
    draw.register_defaults(guidance_scale=2.0)
    draw.save_pretrained(tmp_path / "model")
    again = TokenPipeline.from_pretrained(tmp_path / "model")
    again.set_progress_bar_config(disable=True)
    assert again.defaults["guidance_scale"] == 2.0
    assert np.array_equal(*(np.asarray(one("a red thing", seed=1).images[0]) for one in (draw, again)))


def test_without_text(tmp_path: Path) -> None:
    vae = autoencoder()
    classes = ClassTokenPipeline(transformer("masked", vae, num_classes=2), vae, {0: "cat", 1: "dog"})
    classes.save_pretrained(tmp_path / "classes")
    classes = ClassTokenPipeline.from_pretrained(tmp_path / "classes")
    cats = [classes(label, seed=0, guidance_scale=3.0, output_type="latent").images for label in ("cat", 0, "dog")]
    assert torch.equal(cats[0], cats[1])
    assert not torch.equal(cats[0], cats[2])
    plain = UnconditionalTokenPipeline(transformer("raster", vae), vae)
    plain.save_pretrained(tmp_path / "plain")
    plain = UnconditionalTokenPipeline.from_pretrained(tmp_path / "plain")
    two = plain(2, seed=3, output_type="latent").images
    assert torch.equal(plain(1, seed=4, output_type="latent").images[0], two[1])


@pytest.mark.parametrize("order", ORDERS)
def test_painting_keeps_codes(order: str) -> None:
    draw = pipeline(order, TokenInpaintPipeline)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (5, 4, 11, 16))  # pixels 5 to 10 are in codes 2 to 5
    own = draw.vqvae.encode_to_indices(draw.image_processor.preprocess(picture))
    painted = draw("red", image=picture, mask_image=mask, seed=0, output_type="latent").images[:, 0]
    hidden = torch.zeros(1, 8, 8, dtype=torch.bool)
    hidden[:, 2:8, 2:6] = True
    assert torch.equal(painted[~hidden], own[~hidden])
    assert (painted[hidden] != own[hidden]).any()


@pytest.mark.parametrize("order", ORDERS)
def test_a_drawing_is_watched(order: str) -> None:
    draw = pipeline(order)
    steps = list(draw.stream("red", seed=0, **({} if order == "raster" else {"num_inference_steps": 4})))
    assert len(steps) == (65 if order == "raster" else 5)
    first, last = np.asarray(steps[0].preview()[0]), np.asarray(steps[-1].preview()[0])
    assert first.shape == (16, 16, 3)
    if order == "raster":
        assert (first[2:] == 127).all() or (first[2:] == 128).all()  # grey, not drawn yet
    assert np.array_equal(last, np.asarray(steps[-1].output.images[0]))


def test_another_autoencoder_is_refused(tmp_path: Path) -> None:
    draw = pipeline("raster")
    draw.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trained for another autoencoder: its codes have the digest"):
        TokenPipeline.from_pretrained(tmp_path, vqvae=autoencoder(seed=4))
    small = {**VAE, "latent_channels": 3}
    with pytest.raises(ValueError, match=r"it knows 16 codes, and this FSQModel has 8"):
        TokenPipeline.from_pretrained(tmp_path, vqvae=FSQModel(**small, levels=(2, 2, 2)))
    half = TokenPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)  # the same codes all the same
    assert half.vqvae.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 0}, "top_p must be above 0 and at most 1"),
        ({"top_k": 0}, "top_k must be a whole number from 1"),
        ({"temperature": -1}, "temperature must be a number from 0"),
        ({"height": 32, "width": 32}, "16 x 16 codes are more than the 8 x 8"),
        ({"num_inference_steps": 3}, "draws 64 codes one after the other"),
        ({"variation_seed": 1, "variation_strength": 0.5}, "variation_seed is of diffusion"),
        ({"guidance_interval": (0.1, 2.0)}, "guidance_interval is of diffusion"),
        ({"target_size": (8, 8)}, "target_size is for SDXL"),
    ],
)
def test_what_codes_cannot_have_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline("raster")("red", **options)
