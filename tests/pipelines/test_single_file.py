"""Single files: out and in again, beside diffusers' own converters, and what is refused."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from kinds import KINDS, VAE, make_model, same, weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import LETTERS
from transformers import BertTokenizer, CLIPTextConfig, CLIPTextModel

from latentdiff import (
    ImageToImagePipeline,
    InpaintPipeline,
    SuperResolutionPipeline,
    TextToImagePipeline,
)
from latentdiff.interchange.single_file import Checkpoint, OriginalSettings, original_text_encoder, vae_config
from latentdiff.interchange.single_file.shapes import text_config, text_kind, unet_config


@pytest.fixture(scope="module")
def model(clip: dict[str, Any]) -> Callable[[str], Any]:
    return lambda kind: make_model(kind, clip)


TEXT_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "max_position_embeddings", "hidden_act", "eos_token_id", "pad_token_id")  # fmt: skip


def config_of(pipeline: Any, part: str) -> dict[str, Any]:
    config = getattr(pipeline, part).config
    if part == "text_encoder":
        return {key: getattr(config, key) for key in TEXT_KEYS}
    return {key: value for key, value in config.items() if not key.startswith("_")}


@pytest.mark.parametrize("kind", KINDS)
def test_out_and_in_again(model: Callable[[str], Any], tmp_path: Path, kind: str) -> None:
    pipeline = model(kind)
    pipeline.register_defaults(num_inference_steps=3)
    pipeline.save_single_file(tmp_path / "model.safetensors")
    again = type(pipeline).from_single_file(tmp_path / "model.safetensors", tokenizer=pipeline.tokenizer)
    same(weights(again), weights(pipeline))
    for part in ("unet", "vae", "text_encoder", "scheduler"):
        assert config_of(again, part).items() >= config_of(pipeline, part).items()
    assert again.defaults["num_inference_steps"] == 3
    if kind in ("sd1", "sd2"):
        again.set_progress_bar_config(disable=True)
        call = {"num_inference_steps": 2, "seed": 0, "output_type": "pt"}
        assert torch.equal(again("sun", **call).images, pipeline("sun", **call).images)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_tell_the_config(model: Callable[[str], Any], tmp_path: Path, kind: str) -> None:
    """Without the header that this package writes, as a file from elsewhere."""
    pipeline = model(kind)
    pipeline.save_single_file(tmp_path / "own.safetensors")
    save_file(load_file(tmp_path / "own.safetensors"), tmp_path / "bare.safetensors")
    bare = Checkpoint(tmp_path / "bare.safetensors")
    assert not bare.header
    found, wanted = unet_config(bare), {**KINDS[kind]}
    for key, value in wanted.items():
        if key != "sample_size":
            assert found[key] == value, key
    for key, value in VAE.items():
        if key != "scaling_factor":
            assert vae_config(bare)[key] == value, key
    text = text_config(bare, text_kind(bare) or "")
    own = pipeline.text_encoder.config
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act"):
        assert text[key] == getattr(own, key), key
    if kind == "uneven":
        return
    again = type(pipeline).from_single_file(tmp_path / "bare.safetensors", tokenizer=pipeline.tokenizer)
    same(weights(again), weights(pipeline))


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_converters_read_what_we_write(model: Callable[[str], Any], tmp_path: Path, kind: str) -> None:
    pipeline = model(kind)
    pipeline.save_single_file(tmp_path / "model.safetensors")
    written = load_file(tmp_path / "model.safetensors")
    same(convert_ldm_vae_checkpoint(dict(written), dict(pipeline.vae.config)), pipeline.vae.state_dict())
    if kind != "uneven":  # diffusers' converter knows one number of layers for all levels only
        config = {**pipeline.unet.config, "class_embed_type": "timestep" if kind == "upscaler" else None}
        if kind == "upscaler":  # it passes over an embedding of whole numbers
            config["class_embed_type"] = None
        found = convert_ldm_unet_checkpoint(dict(written), config)
        own = {key: value for key, value in pipeline.unet.state_dict().items() if "class_embedding" not in key}
        found = {key: value for key, value in found.items() if "class_embedding" not in key}
        same(found, own)
    state = pipeline.text_encoder.state_dict()
    if pipeline.text_encoder.config.hidden_act == "gelu":
        found = convert_open_clip_checkpoint(pipeline.text_encoder, written)
    else:
        found = convert_ldm_clip_checkpoint(written)
    bare = {key.removeprefix("text_model."): value for key, value in found.items() if "position_ids" not in key}
    same(bare, {key.removeprefix("text_model."): value for key, value in state.items()})


def test_diffusers_pipeline_reads_the_file_and_draws_the_same(model: Callable[[str], Any], tmp_path: Path) -> None:
    pipeline = model("sd1")
    pipeline.save_single_file(tmp_path / "model.safetensors")
    pipeline.save_pretrained(tmp_path / "folder")
    theirs = diffusers.StableDiffusionPipeline.from_single_file(
        str(tmp_path / "model.safetensors"), config=str(tmp_path / "folder"), local_files_only=True,
        text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer,
    )  # fmt: skip
    theirs.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    call = {"latents": noise, "num_inference_steps": 2, "output_type": "pt"}
    theirs.scheduler = pipeline.scheduler
    torch.testing.assert_close(theirs("sun", **call).images, pipeline("sun", **call).images, atol=1e-4, rtol=0)


def test_half_precision_and_other_pipelines(model: Callable[[str], Any], tmp_path: Path) -> None:
    pipeline = model("sd1")
    file = tmp_path / "half.safetensors"
    pipeline.save_single_file(file, dtype=torch.float16)
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}
    for kind in (ImageToImagePipeline, InpaintPipeline):
        again = kind.from_single_file(file, tokenizer=pipeline.tokenizer, dtype=torch.bfloat16)
        assert again.unet.dtype == again.vae.dtype == again.text_encoder.dtype == torch.bfloat16
    plain = TextToImagePipeline.from_single_file(file, tokenizer=pipeline.tokenizer)
    for key, tensor in weights(plain).items():
        torch.testing.assert_close(tensor, weights(pipeline)[key], atol=1e-3, rtol=1e-3)


def test_a_whole_open_clip_tower_loses_its_last_layer(model: Callable[[str], Any], tmp_path: Path) -> None:
    pipeline = model("sd2")
    pipeline.save_single_file(tmp_path / "own.safetensors")
    state = load_file(tmp_path / "own.safetensors")
    state["cond_stage_model.model.text_projection"] = torch.zeros(16, 16)
    save_file(state, tmp_path / "whole.safetensors")
    whole = Checkpoint(tmp_path / "whole.safetensors")
    assert text_config(whole, "open_clip")["num_hidden_layers"] == pipeline.text_encoder.config.num_hidden_layers - 1


def test_clips_tokenizer_needs_no_download(model: Callable[[str], Any], tmp_path: Path) -> None:
    pipeline = model("sd1")
    config = {**pipeline.text_encoder.config.to_dict(), "vocab_size": 49408, "max_position_embeddings": 77}
    pipeline.text_encoder = CLIPTextModel(CLIPTextConfig(**config))
    pipeline.save_single_file(tmp_path / "model.safetensors")
    again = TextToImagePipeline.from_single_file(tmp_path / "model.safetensors")
    ids = again.tokenizer("a red car", padding="max_length", max_length=8).input_ids
    assert ids == [49406, 320, 736, 1615, 49407, 49407, 49407, 49407]
    again.save_pretrained(tmp_path / "folder")
    assert TextToImagePipeline.from_pretrained(tmp_path / "folder").tokenizer("a red car").input_ids == ids[:5]


def test_averaged_weights_are_taken_if_asked_for(model: Callable[[str], Any], tmp_path: Path) -> None:
    pipeline = model("sd1")
    pipeline.save_single_file(tmp_path / "own.safetensors")
    state = load_file(tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match="has no averaged weights"):
        TextToImagePipeline.from_single_file(tmp_path / "own.safetensors", tokenizer=pipeline.tokenizer, ema=True)
    for name in [name for name in state if name.startswith("model.diffusion_model.")]:
        state["model_ema." + name.removeprefix("model.").replace(".", "")] = state[name] + 1
    save_file(state, tmp_path / "both.safetensors")
    read = [
        TextToImagePipeline.from_single_file(tmp_path / "both.safetensors", tokenizer=pipeline.tokenizer, ema=ema)
        for ema in (False, True)
    ]
    assert torch.equal(read[0].unet.conv_in.weight + 1, read[1].unet.conv_in.weight)
    assert torch.equal(read[0].vae.decoder.conv_in.weight, read[1].vae.decoder.conv_in.weight)


class Bert(torch.nn.Module):
    """The names of Latent Diffusion's text encoder, written down from its code: x-transformers, pre-norm."""

    def __init__(self, width: int, inner: int, layers: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.token_emb = torch.nn.Embedding(vocabulary, width)
        self.pos_emb = torch.nn.ModuleDict({"emb": torch.nn.Embedding(length, width)})
        self.norm = torch.nn.LayerNorm(width)
        self.to_logits = torch.nn.Linear(width, vocabulary)
        halves: list[torch.nn.Module] = []
        for _ in range(layers):
            attention = torch.nn.ModuleDict(
                {name: torch.nn.Linear(width, inner, bias=False) for name in ("to_q", "to_k", "to_v")}
                | {"to_out": torch.nn.Linear(inner, width)}
            )
            feed = torch.nn.Sequential(torch.nn.Linear(width, 4 * width), torch.nn.GELU())
            net = torch.nn.Sequential(feed, torch.nn.Identity(), torch.nn.Linear(4 * width, width))
            halves.append(torch.nn.ModuleList([torch.nn.LayerNorm(width), attention]))
            halves.append(torch.nn.ModuleList([torch.nn.LayerNorm(width), torch.nn.ModuleDict({"net": net})]))
        self.attn_layers = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(halves)})

    def forward(self, ids: torch.Tensor, heads: int = 8) -> torch.Tensor:
        x = self.token_emb(ids) + self.pos_emb["emb"].weight[: ids.shape[1]]
        for i in range(0, len(self.attn_layers["layers"]), 2):
            (norm, attention), (norm2, feed) = self.attn_layers["layers"][i : i + 2]
            h = norm(x)
            q, k, v = (
                attention[name](h).unflatten(-1, (heads, -1)).transpose(1, 2) for name in ("to_q", "to_k", "to_v")
            )
            mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + attention["to_out"](mixed)
            x = x + feed["net"](norm2(x))
        return self.norm(x)


@torch.no_grad()
def test_latent_diffusions_text_to_image_model(model: Callable[[str], Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *LETTERS, "red", "car", "sun"]
    bert = Bert(width=16, inner=64, layers=3, vocabulary=len(words), length=9).eval()
    model("sd1").save_single_file(tmp_path / "sd1.safetensors")
    state = {key: value for key, value in load_file(tmp_path / "sd1.safetensors").items() if "cond_stage" not in key}
    state |= {f"cond_stage_model.transformer.{key}": value for key, value in bert.state_dict().items()}
    save_file(state, tmp_path / "ldm.safetensors")
    with pytest.raises(ValueError, match="needs the tokenizer of bert-base-uncased"):
        TextToImagePipeline.from_single_file(tmp_path / "ldm.safetensors")
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(tmp_path / "tokenizer")
    pipeline = TextToImagePipeline.from_single_file(tmp_path / "ldm.safetensors", tokenizer=tmp_path / "tokenizer")
    ids = pipeline.tokenizer("a red car", padding="max_length", max_length=9, return_tensors="pt").input_ids
    states, _ = pipeline.encode_prompt("a red car", do_classifier_free_guidance=False)
    torch.testing.assert_close(states, bert(ids), atol=1e-5, rtol=1e-5)

    pipeline.set_progress_bar_config(disable=True)
    call = {
        "num_inference_steps": 2,
        "output_type": "pt",
        "latents": torch.randn(1, 4, 8, 8),
        "height": 16,
        "width": 16,
    }
    picture = pipeline("a red car", **call).images
    pipeline.save_pretrained(tmp_path / "folder")
    again = TextToImagePipeline.from_pretrained(tmp_path / "folder")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again("a red car", **call).images, picture)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    torch.testing.assert_close(theirs("a red car", **call).images, picture, atol=1e-4, rtol=0)
    again.save_single_file(tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_an_original_yaml_tells_what_shapes_do_not(model: Callable[[str], Any], tmp_path: Path) -> None:
    pipeline = model("sd2")
    pipeline.save_single_file(tmp_path / "own.safetensors")
    save_file(load_file(tmp_path / "own.safetensors"), tmp_path / "bare.safetensors")
    (tmp_path / "v2.yaml").write_text(
        "model:\n  base_learning_rate: 1.0e-4\n  target: os.system\n  params:\n    parameterization: v\n"
        "    linear_start: 0.001\n    linear_end: 0.02\n    timesteps: 500\n    image_size: 96\n    scale_factor: 0.3\n"
        "    unet_config:\n      target: evil\n      params:\n        num_heads: -1\n        num_head_channels: 32\n"
    )
    read = TextToImagePipeline.from_single_file(
        tmp_path / "bare.safetensors", tokenizer=pipeline.tokenizer, original_config=tmp_path / "v2.yaml"
    )
    config = read.scheduler.config
    assert (config.prediction_type, config.beta_start, config.num_train_timesteps) == ("v_prediction", 0.001, 500)
    assert (read.unet.config.sample_size, read.vae.config.scaling_factor) == (96, 0.3)
    assert read.unet.config.attention_head_dim == [2, 4, 4]
    chosen = TextToImagePipeline.from_single_file(
        tmp_path / "bare.safetensors", tokenizer=pipeline.tokenizer, prediction_type="v_prediction", sample_size=96
    )
    assert (chosen.scheduler.config.prediction_type, chosen.unet.config.sample_size) == ("v_prediction", 96)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", r"x\.yaml, line 1: not YAML"),
        ("a: 1", "is not the YAML file of a Latent Diffusion model"),
        ("model: {params: {parameterization: w}}", "parameterization='w' is not known"),
        ("model: {params: {timesteps: many}}", "timesteps='many' should be a number"),
        ("model: !!python/object/apply:os.system ['touch mark']", "not YAML .could not determine a constructor"),
    ],
)
def test_other_yaml_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        OriginalSettings.read(tmp_path / "x.yaml")


class Mine:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_a_ckpt_is_read_when_asked_for(model: Callable[[str], Any], tmp_path: Path) -> None:
    pipeline = model("sd1")
    pipeline.save_single_file(tmp_path / "own.safetensors")
    state = load_file(tmp_path / "own.safetensors")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"model.ckpt is a pickle.*allow_pickle=True \(--ckpt\)"):
        TextToImagePipeline.from_single_file(tmp_path / "model.ckpt", tokenizer=pipeline.tokenizer)
    read = TextToImagePipeline.from_single_file(
        tmp_path / "model.ckpt", tokenizer=pipeline.tokenizer, allow_pickle=True
    )
    same(weights(read), weights(pipeline))


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(1)}, "callback": Mine(tmp_path / "mark")}, tmp_path / "evil.ckpt")
    (tmp_path / "old.ckpt").write_bytes(pickle.dumps(Mine(tmp_path / "mark")))
    for name in ("evil.ckpt", "old.ckpt"):
        with pytest.raises(ValueError, match=r"holds more than tensors, which could run code|is damaged"):
            TextToImagePipeline.from_single_file(tmp_path / name, allow_pickle=True)
    assert not (tmp_path / "mark").exists()


def test_other_files_are_refused(model: Callable[[str], Any], tmp_path: Path) -> None:
    pipeline = model("sd1")
    file = tmp_path / "model.safetensors"
    pipeline.save_single_file(file)
    state = load_file(file)
    kinds: list[tuple[dict[str, torch.Tensor], str]] = [
        ({"lora_unet_a.lora_down.weight": torch.ones(1)}, "but a LoRA; load it with pipeline.load_lora_weights"),
        ({"emb_params": torch.ones(1, 4)}, "but an embedding"),
        ({"down_blocks.0.x": torch.ones(1)}, "one network with diffusers' names"),
        ({**state, "conditioner.x": torch.ones(1)}, "is a Stable Diffusion XL model and lacks conditioner.embedders.0"),
        ({"model.diffusion_model.joint_blocks.0.x": torch.ones(1)}, "a Stable Diffusion 3 model, which is not"),
        (
            {**state, "model.diffusion_model.label_emb.0.0.weight": torch.ones(256, 70)},
            r"takes more conditions than a timestep and text \(model.diffusion_model.label_emb.0.0.weight\)",
        ),
        ({"what": torch.ones(1)}, "something else; its first weight is what"),
        (
            {key: value for key, value in state.items() if "middle_block.0" not in key},
            "10 weights of the UNet are missing, such as model.diffusion_model.middle_block.0",
        ),
        (
            {key: value for key, value in state.items() if "first_stage" not in key},
            "has no autoencoder; give one with vae=",
        ),
        ({key: value for key, value in state.items() if "cond_stage" not in key}, "has no text encoder that is known"),
        (
            {**state, "model.diffusion_model.out.2.bias": torch.ones(7)},
            r"model.diffusion_model.out.2.bias should have the shape \[4\], and has \[7\]",
        ),
        (
            {**state, "model.diffusion_model.input_blocks.1.0.in_layers.2.weight": torch.ones(1, 2)},
            "UNet2DConditionModel|should have the shape",
        ),
    ]
    for i, (content, message) in enumerate(kinds):
        save_file({key: value.contiguous() for key, value in content.items()}, tmp_path / f"{i}.safetensors")
        with pytest.raises(ValueError, match=message):
            TextToImagePipeline.from_single_file(tmp_path / f"{i}.safetensors", tokenizer=pipeline.tokenizer)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        TextToImagePipeline.from_single_file(file)
    with pytest.raises(FileNotFoundError, match="no such file"):
        TextToImagePipeline.from_single_file(tmp_path / "nothing.safetensors")
    with pytest.raises(FileNotFoundError, match=r"nothing: no such file; give a .safetensors file"):
        TextToImagePipeline.from_single_file("nothing")


def test_a_model_for_another_pipeline_is_refused(model: Callable[[str], Any], tmp_path: Path) -> None:
    for kind, wrong, message in (
        ("inpainting", TextToImagePipeline, "takes 9 channels and the latents have 4; load it with InpaintPipeline"),
        ("upscaler", ImageToImagePipeline, "load it with SuperResolutionPipeline"),
        ("sd1", SuperResolutionPipeline, "load it with TextToImagePipeline or ImageToImagePipeline"),
    ):
        pipeline = model(kind)
        pipeline.save_single_file(tmp_path / f"{kind}.safetensors")
        with pytest.raises(ValueError, match=message):
            wrong.from_single_file(tmp_path / f"{kind}.safetensors", tokenizer=pipeline.tokenizer)


def test_writing_is_whole_and_replaces_nothing(
    model: Callable[[str], Any], bert: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = model("sd1")
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="is there already"):
        pipeline.save_single_file(file)
    assert file.read_bytes() == b"mine"
    pipeline.save_single_file(file, overwrite=True)
    with safe_open(file, "pt") as stream:
        assert json.loads(stream.metadata()["latentdiff"])["unet"]["block_out_channels"] == [64, 128, 128]
    with pytest.raises(ValueError, match=r"name it model.safetensors"):
        pipeline.save_single_file(tmp_path / "model.ckpt")
    of_bert = TextToImagePipeline(**{**pipeline.components, **bert})
    with pytest.raises(FileExistsError, match="is there already"):
        of_bert.save_single_file(file)
    with pytest.raises(ValueError, match=r"name it model.safetensors"):
        of_bert.save_single_file(tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"not a BertModel, .*; save_pretrained saves any pipeline"):
        original_text_encoder(of_bert.text_encoder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]
