"""Single files: drawing after the way there and back, options, parts of other files, and odd files."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from kinds import VAE, make_model, same, weights
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latentdiff import InpaintPipeline, SuperResolutionPipeline, TextToImagePipeline, VQModel

DRAWING = {"num_inference_steps": 2, "output_type": "pt", "seed": 3}
PICTURE = Image.linear_gradient("L").convert("RGB").resize((16, 16))


@pytest.fixture
def model(clip: dict[str, Any], tmp_path: Path) -> Callable[[str], Any]:
    """Makes a pipeline and saves it as ``own.safetensors``, and without our header as ``bare.safetensors``."""

    def make(kind: str) -> Any:
        pipeline = make_model(kind, clip)
        pipeline.save_single_file(tmp_path / "own.safetensors")
        save_file(load_file(tmp_path / "own.safetensors"), tmp_path / "bare.safetensors")
        return pipeline

    return make


def draw(pipeline: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    if isinstance(pipeline, InpaintPipeline):
        return pipeline("sun", PICTURE, PICTURE.convert("L"), **DRAWING).images
    if isinstance(pipeline, SuperResolutionPipeline):
        return pipeline("sun", PICTURE.resize((8, 8)), noise_level=5, **DRAWING).images
    return pipeline("sun", **DRAWING).images


@pytest.mark.parametrize("kind", ["sd1", "sd2", "inpainting", "upscaler", "uneven"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_folder_file_folder(model: Callable[[str], Any], tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    pipeline = model(kind)
    pipeline.save_pretrained(tmp_path / "first")
    pipeline = type(pipeline).from_pretrained(tmp_path / "first", dtype=dtype)
    pipeline.save_single_file(tmp_path / "file.safetensors")
    again = type(pipeline).from_single_file(tmp_path / "file.safetensors", tokenizer=pipeline.tokenizer, dtype=None)
    assert (again.unet.dtype, again.vae.dtype, again.text_encoder.dtype) == (dtype,) * 3
    again.save_pretrained(tmp_path / "second")
    last = type(pipeline).from_pretrained(tmp_path / "second", dtype=dtype)
    same(weights(last), weights(pipeline))
    if dtype == torch.float32:
        assert torch.equal(draw(last), draw(pipeline))


def test_an_upscaler_comes_back_with_its_noise(model: Callable[[str], Any], tmp_path: Path) -> None:
    pipeline = model("upscaler")
    pipeline.register_to_config(max_noise_level=9)
    pipeline.low_res_scheduler = diffusers.DDPMScheduler(beta_start=0.003)
    pipeline.scheduler = diffusers.EulerDiscreteScheduler(beta_end=0.5)
    pipeline.save_single_file(tmp_path / "new.safetensors")
    again = SuperResolutionPipeline.from_single_file(tmp_path / "new.safetensors", tokenizer=pipeline.tokenizer)
    assert again.config.max_noise_level == 9
    assert again.low_res_scheduler.config.beta_start == 0.003
    assert type(again.scheduler) is diffusers.EulerDiscreteScheduler
    assert again.scheduler.config.beta_end == 0.5
    bare = SuperResolutionPipeline.from_single_file(tmp_path / "bare.safetensors", tokenizer=pipeline.tokenizer)
    assert bare.low_res_scheduler.config.beta_schedule == "squaredcos_cap_v2"
    assert (bare.vae.config.scaling_factor, bare.scheduler.config.prediction_type) == (0.08333, "v_prediction")
    assert (bare.unet.config.sample_size, bare.config.max_noise_level) == (128, 350)


@pytest.mark.parametrize("kind", ["inpainting", "upscaler"])
def test_diffusers_pipelines_read_our_file(model: Callable[[str], Any], tmp_path: Path, kind: str) -> None:
    pipeline = model(kind)
    pipeline.save_pretrained(tmp_path / "folder")
    theirs = getattr(diffusers, pipeline.saved_class_name).from_single_file(
        str(tmp_path / "own.safetensors"), config=str(tmp_path / "folder"), local_files_only=True,
        text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer,
    )  # fmt: skip
    theirs.set_progress_bar_config(disable=True)
    same(theirs.unet.state_dict(), pipeline.unet.state_dict())
    same(theirs.vae.state_dict(), pipeline.vae.state_dict())


def test_what_stable_diffusion_2_predicts_is_assumed_aloud(
    model: Callable[[str], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = model("sd2")
    load = TextToImagePipeline.from_single_file
    with caplog.at_level(logging.WARNING, "latentdiff"):
        read = load(tmp_path / "bare.safetensors", tokenizer=pipeline.tokenizer)
        assert (read.scheduler.config.prediction_type, read.unet.config.sample_size) == ("v_prediction", 96)
        assert read.vae.config.sample_size == 192
        assert "give prediction_type='epsilon' (--prediction-type)" in caplog.text
        caplog.clear()
        told = load(tmp_path / "bare.safetensors", tokenizer=pipeline.tokenizer, prediction_type="epsilon")
        own = load(tmp_path / "own.safetensors", tokenizer=pipeline.tokenizer)
    assert (told.scheduler.config.prediction_type, told.unet.config.sample_size) == ("epsilon", 64)
    assert (own.scheduler.config.prediction_type, own.unet.config.sample_size) == ("epsilon", 8)
    assert not caplog.text


def test_options_go_before_what_the_file_says(model: Callable[[str], Any], tmp_path: Path) -> None:
    pipeline = model("sd1")
    scheduler = diffusers.PNDMScheduler()
    for name in ("own", "bare"):
        read = TextToImagePipeline.from_single_file(
            tmp_path / f"{name}.safetensors",
            tokenizer=pipeline.tokenizer,
            sample_size=4,
            scaling_factor=0.25,
            attention_head_dim=4,
            prediction_type="sample",
            torch_dtype=torch.bfloat16,
        )
        assert (read.unet.config.sample_size, read.unet.config.attention_head_dim) == (4, 4)
        assert (read.vae.config.scaling_factor, read.scheduler.config.prediction_type) == (0.25, "sample")
        assert read.unet.dtype == torch.bfloat16
    read = TextToImagePipeline.from_single_file(
        tmp_path / "own.safetensors", scheduler=scheduler, unet=pipeline.unet, text_encoder=None
    )
    assert (read.scheduler.config.skip_prk_steps, read.text_encoder, read.tokenizer) == (False, None, None)
    assert read.unet is pipeline.unet
    with pytest.raises(TypeError, match="unknown argument 'half'"):
        TextToImagePipeline.from_single_file(tmp_path / "own.safetensors", half=True)
    with pytest.raises(TypeError, match="unknown argument 'prediction_typ'; did you mean prediction_type"):
        TextToImagePipeline.from_single_file(tmp_path / "own.safetensors", prediction_typ="epsilon")
    with pytest.raises(ValueError, match="prediction_type='noise' is not known"):
        TextToImagePipeline.from_single_file(tmp_path / "own.safetensors", prediction_type="noise")


def test_an_autoencoder_of_another_file(model: Callable[[str], Any], tmp_path: Path) -> None:
    pipeline = model("sd1")
    state = load_file(tmp_path / "own.safetensors")
    start = "first_stage_model."
    alone = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
    save_file(alone | {"loss.discriminator.weight": torch.ones(2)}, tmp_path / "vae.safetensors")
    rest = {key: value for key, value in state.items() if not key.startswith(start)}
    save_file(rest, tmp_path / "rest.safetensors")
    read = TextToImagePipeline.from_single_file(
        tmp_path / "rest.safetensors", vae=tmp_path / "vae.safetensors", tokenizer=pipeline.tokenizer
    )
    same(weights(read), weights(pipeline))
    theirs = diffusers.AutoencoderKL.from_single_file(
        str(tmp_path / "vae.safetensors"), config=str(folder_of(read, tmp_path))
    )
    same(theirs.state_dict(), pipeline.vae.state_dict())


def folder_of(pipeline: Any, tmp_path: Path) -> Path:
    pipeline.vae.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_an_autoencoder_with_a_codebook(model: Callable[[str], Any], tmp_path: Path) -> None:
    pipeline = model("sd1")
    torch.manual_seed(0)
    attention = {"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}
    attention |= {"up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"]}
    pipeline.vae = VQModel(**{**VAE, **attention}, num_vq_embeddings=16, vq_embed_dim=3).eval()
    pipeline.save_single_file(tmp_path / "vq.safetensors")
    save_file(load_file(tmp_path / "vq.safetensors"), tmp_path / "bare.safetensors")
    for name in ("vq", "bare"):
        read = TextToImagePipeline.from_single_file(tmp_path / f"{name}.safetensors", tokenizer=pipeline.tokenizer)
        same(read.vae.state_dict(), pipeline.vae.state_dict())
        assert isinstance(read.vae, VQModel)
        assert read.vae.config.scaling_factor == (0.18215 if name == "vq" else 1.0)  # as the original code has it


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.diffusion_model.input_blocks.4.1.fuser.weight": torch.ones(1)},
            r"1 weights have no place in the UNet, such as model.diffusion_model.input_blocks.4.1.fuser.weight",
        ),
        ({"first_stage_model.encoder.norm_in.weight": torch.ones(1)}, r"no place in the autoencoder"),
        (
            {"model.diffusion_model.out.2.bias": torch.ones(4, dtype=torch.int8)},
            r"out.2.bias is of torch.int8; quantised weights are not supported",
        ),
        (
            {"cond_stage_model.transformer.text_model.final_layer_norm.bias": torch.ones(3)},
            r"final_layer_norm.bias should have the shape \[16\], and has \[3\]",
        ),
        (
            {"model.diffusion_model.time_embed.0.bias": None},
            r"1 weights of the UNet are missing, such as model.diffusion_model.time_embed.0.bias",
        ),
        ({"model.diffusion_model.out.2.weight": None}, r"model.diffusion_model.out.2.weight is missing; the file is"),
        ({"first_stage_model.decoder.conv_in.weight": None}, r"stage_model.decoder.conv_in.weight is missing; the"),
        (
            {"cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": None},
            r"position_embedding.weight is missing; the file is incomplete, or of another kind of model",
        ),
    ],
)
def test_weights_that_do_not_fit(
    model: Callable[[str], Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    pipeline = model("sd1")
    state = {**load_file(tmp_path / "own.safetensors"), **changes}
    save_file({key: value for key, value in state.items() if value is not None}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        TextToImagePipeline.from_single_file(tmp_path / "odd.safetensors", tokenizer=pipeline.tokenizer)
    assert str(caught.value).startswith(str(tmp_path / "odd.safetensors"))


@pytest.mark.parametrize(
    ("part", "config", "message"),
    [
        ("unet", {"block_out_channels": [32, 64, 64]}, "should have the shape"),
        ("unet", {"layers": 3}, "unknown config key 'layers'"),
        ("unet", {"block_out_channels": "many"}, "safetensors: "),
        ("vae", {"latent_channels": 10**6}, "should have the shape"),
        ("vae", {"down_block_types": ["evil"]}, "safetensors: "),
        ("text_encoder", {"num_hidden_layers": 7}, "weights of the text encoder are missing"),
        ("text_encoder", {"hidden_size": -1}, "safetensors: "),
        ("scheduler", {"_class_name": "os.systemScheduler"}, "names a os.systemScheduler, which is none of diffusers'"),
        ("scheduler", {"_class_name": "UNet2DModel"}, "which is none of diffusers' schedulers"),
        ("scheduler", {"num_train_timesteps": "x"}, "its DDIMScheduler: num_train_timesteps='x' should be a whole"),
        ("scheduler", {"num_train_timesteps": 10**9}, "its DDIMScheduler: num_train_timesteps=1000000000 should be"),
        ("scheduler", {"beta_start": "x"}, "the config of its DDIMScheduler is damaged"),
    ],
)
def test_a_header_that_does_not_fit(
    model: Callable[[str], Any], tmp_path: Path, part: str, config: dict[str, Any], message: str
) -> None:
    pipeline = model("sd1")
    from latentdiff.pipelines.storage.single_file_pipelines import header_of

    header = json.loads(header_of(pipeline)["latentdiff"])
    header[part] |= config
    save_file(load_file(tmp_path / "own.safetensors"), tmp_path / "odd.safetensors", {"latentdiff": json.dumps(header)})
    with pytest.raises(ValueError, match=message):
        TextToImagePipeline.from_single_file(tmp_path / "odd.safetensors", tokenizer=pipeline.tokenizer)


def test_a_header_cannot_name_code(model: Callable[[str], Any], tmp_path: Path) -> None:
    """transformers' configs can name attention kernels on the hub, and more."""
    pipeline = model("sd1")
    from latentdiff.pipelines.storage.single_file_pipelines import header_of

    header = json.loads(header_of(pipeline)["latentdiff"])
    header["text_encoder"] |= {"attn_implementation": "somebody/kernel", "auto_map": {"AutoModel": "a--b.C"}}
    save_file(load_file(tmp_path / "own.safetensors"), tmp_path / "odd.safetensors", {"latentdiff": json.dumps(header)})
    read = TextToImagePipeline.from_single_file(tmp_path / "odd.safetensors", tokenizer=pipeline.tokenizer)
    assert read.text_encoder.config._attn_implementation == pipeline.text_encoder.config._attn_implementation
    assert not hasattr(read.text_encoder.config, "auto_map")


def test_a_shape_without_values_is_refused(model: Callable[[str], Any], tmp_path: Path) -> None:
    pipeline = model("sd1")
    state = load_file(tmp_path / "own.safetensors")
    torch.save({**state, "model.diffusion_model.out.2.bias": torch.empty(4, device="meta")}, tmp_path / "odd.ckpt")
    with pytest.raises(ValueError, match=r"out.2.bias has a shape, but no values"):
        TextToImagePipeline.from_single_file(tmp_path / "odd.ckpt", tokenizer=pipeline.tokenizer, allow_pickle=True)


def test_another_tokenizer_than_clips_is_in_the_file(model: Callable[[str], Any], tmp_path: Path) -> None:
    pipeline, file = model("sd1"), tmp_path / "model.safetensors"
    pipeline.tokenizer.add_tokens("<new>")
    pipeline.save_single_file(file)
    again = TextToImagePipeline.from_single_file(file)
    assert again.tokenizer.get_vocab() == pipeline.tokenizer.get_vocab()
    assert again.tokenizer.model_max_length == pipeline.tokenizer.model_max_length
    prompts = ["a <new> sun", "(b)"]
    assert again.tokenizer(prompts).input_ids == pipeline.tokenizer(prompts).input_ids
    with safe_open(file, "pt") as stream:
        metadata = stream.metadata()
    content = json.loads(metadata["latentdiff.tokenizer"])
    for change, message in (
        ({"../mark.json": "{}"}, r"'\.\./mark\.json' is no name for a file"),
        ({"tokenizer/evil.py": ""}, "is no name for a file"),
        ({"tokenizer/tokenizer.json": "no JSON"}, "tokenizer.json is damaged"),
    ):
        bad = json.dumps({**content, "texts": {**content["texts"], **change}})
        save_file(load_file(file), tmp_path / "bad.safetensors", {**metadata, "latentdiff.tokenizer": bad})
        with pytest.raises(ValueError, match=rf"bad\.safetensors.*{message}"):
            TextToImagePipeline.from_single_file(tmp_path / "bad.safetensors")


def test_a_loaded_lora_is_not_lost_in_silence(model: Callable[[str], Any], tmp_path: Path) -> None:
    from peft import LoraConfig

    pipeline = model("sd1")
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"the unet has LoRAs loaded, .*; call unload_lora_weights"):
        pipeline.save_single_file(tmp_path / "lora.safetensors")
    assert not (tmp_path / "lora.safetensors").exists()


def test_a_pickle_on_the_hub_is_not_even_fetched() -> None:
    with pytest.raises(ValueError, match=r"model.ckpt is a pickle, which is only read if asked for"):
        TextToImagePipeline.from_single_file("somebody/model/model.ckpt")


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("a/b/c.safetensors", ("a/b", None, "c.safetensors")),
        ("https://huggingface.co/a/b/blob/main/d/c.safetensors", ("a/b", "main", "d/c.safetensors")),
        ("https://hf.co/a/b/resolve/fp16/c.safetensors?download=true", ("a/b", "fp16", "c.safetensors")),
        ("https://elsewhere.example/a/b/c.safetensors", None),
        ("file.safetensors", None),
    ],
)
def test_places_on_the_hub(source: str, wanted: Any) -> None:
    from latentdiff.interchange.single_file import ON_THE_HUB

    match = ON_THE_HUB.fullmatch(source)
    assert (match and match.groups()) == wanted
