"""Every pipeline draws on a GPU what it draws on the processor, in each precision, wherever its weights are."""

import copy
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from recorded import Recorder
from tiny import UNET, VAE, bert_parts, clip_parts, tiny_pipeline
from tiny_sdxl import tiny_refiner, tiny_sdxl
from tiny_transformers import dit_folder, pixart_folder
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from latentdiff import (
    AutoencoderKL,
    ClassConditionalPipeline,
    ImageToImagePipeline,
    ImageVariationPipeline,
    InpaintPipeline,
    SuperResolutionPipeline,
    TextToImagePipeline,
    TokenPipeline,
    UnconditionalPipeline,
    UNet2DConditionModel,
    VQModel,
)
from latentdiff.diffusion import GaussianDiffusion, RectifiedFlow
from latentdiff.models import NoisyClassifier, TokenTransformer, UNet2DModel
from latentdiff.pipelines.core.step_runner import StepRunner

PICTURE = Image.linear_gradient("L").convert("RGB").resize((16, 16))
MASK = Image.new("L", (16, 16), 0)
MASK.paste(255, (0, 0, 8, 16))
CALL: dict[str, Any] = {"num_inference_steps": 4, "seed": 3, "output_type": "pt"}
FAR = {torch.float32: 4e-3, torch.float16: 2e-2, torch.bfloat16: 0.1}
"""How far pixels in [0, 1] may be from the processor's in float32; convolutions on a GPU use TF32."""
LABELLED = {
    "sample_size": 16,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}


def unet(**changes: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(**{**UNET, **changes}).eval()


def stable(kind: Any, channels: int = 4, **parts: Any) -> Any:
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    more = clip_parts() if "image_encoder" not in parts else {"safety_checker": None}
    own = unet(in_channels=channels, **parts.pop("unet", {}))
    return kind(vae=AutoencoderKL(**VAE).eval(), unet=own, scheduler=scheduler, **more, **parts)


def upscaler() -> Any:
    low = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    return stable(SuperResolutionPipeline, 7, low_res_scheduler=low, unet={"num_class_embeds": 50})


def varied() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=16)
    reader = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    encoder = CLIPVisionModelWithProjection(config).eval()
    return stable(ImageVariationPipeline, image_encoder=encoder, feature_extractor=reader)


def without_text(**more: Any) -> UNet2DModel:
    return UNet2DModel(**LABELLED, up_block_types=("AttnUpBlock2D", "UpBlock2D"), **more).eval()


def classes() -> Any:
    guide = NoisyClassifier(**LABELLED, num_classes=3, attention_head_dim=8, attn_norm_num_groups=8).eval()
    scheduler = GaussianDiffusion("cosine", 100).scheduler("DDIMScheduler")
    names = {0: "cat", 1: "dog", 2: "bird"}
    return ClassConditionalPipeline(
        unet=without_text(num_class_embeds=4), scheduler=scheduler, classifier=guide, id2label=names
    )


def opened(kind: Any, save: Callable[[Path], Any]) -> Any:
    """Of a folder that `save` writes as diffusers has it."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "model")
        return kind.from_pretrained(Path(folder) / "model")


def flow() -> Any:
    pipeline = tiny_pipeline("clip")
    pipeline.scheduler = RectifiedFlow(shift=2.0).scheduler()
    return pipeline


def of_codes(order: str) -> Any:
    vae = VQModel(**VAE, num_vq_embeddings=16).eval()
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16}
    transformer = TokenTransformer(vae.codes, 8, order=order, **sizes).eval()
    return TokenPipeline(vae, **bert_parts(), transformer=transformer)


KINDS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "text": (lambda: tiny_pipeline("clip"), {"prompt": ["a red thing", "cup"], "guidance_scale": (3.0, 2.0)}),
    "masked text": (tiny_pipeline, {"prompt": ["a red thing", "cup"], "guidance_scale": 3.0}),
    "codes": (lambda: tiny_pipeline(autoencoder="vq"), {"prompt": "cup", "output_type": "latent"}),
    "image": (lambda: stable(ImageToImagePipeline), {"prompt": "cup", "image": PICTURE, "strength": 0.6}),
    "paint": (lambda: stable(InpaintPipeline), {"prompt": "cup", "image": PICTURE, "mask_image": MASK}),
    "paint, 9 channels": (lambda: stable(InpaintPipeline, 9), {"prompt": "", "image": PICTURE, "mask_image": MASK}),
    "larger": (upscaler, {"prompt": "cup", "image": PICTURE}),
    "variation": (varied, {"image": PICTURE, "guidance_scale": 2.0}),
    "class": (classes, {"class_labels": ["dog", "cat"], "guidance_scale": 2.0, "classifier_scale": 0.5}),
    "flow": (flow, {"prompt": ["a red thing", "cup"], "guidance_scale": 3.0}),
    "sdxl": (lambda: opened(TextToImagePipeline, tiny_sdxl().save_pretrained), {"prompt": "a cup"}),
    "sdxl, refiner": (
        lambda: opened(ImageToImagePipeline, tiny_refiner(tiny_sdxl()).save_pretrained),
        {"prompt": "a cup", "image": PICTURE, "strength": 0.6},
    ),
    "dit": (lambda: opened(ClassConditionalPipeline, dit_folder), {"class_labels": [3, 999]}),
    "pixart": (lambda: opened(TextToImagePipeline, pixart_folder), {"prompt": "a red cup"}),
    "nothing": (lambda: UnconditionalPipeline(without_text(), diffusers.DDIMScheduler()), {"batch_size": 2}),
}
SCHEDULERS = ["DDPM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "UniPCMultistep", "PNDM", "LCM"]


def made(kind: str) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(7)
    make, call = KINDS[kind]
    pipeline = make()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, {**CALL, **call}


def drawn(pipeline: Any, call: dict[str, Any]) -> Tensor:
    return pipeline(**call).images.detach().float().cpu()


def text_on(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Any], Tensor]:
    """A pipeline on the device, a call, and what the processor draws by it."""
    pipeline, call = made("text")
    expected = drawn(pipeline, call)
    return pipeline.to(device, dtype), call, expected


def close(found: Tensor, expected: Tensor, most: float) -> None:
    assert found.isfinite().all()
    difference = (found - expected).abs().flatten()
    assert difference.quantile(0.99) <= most  # random weights let single pixels jump
    assert difference.mean() <= most / 2


@pytest.mark.parametrize("dtype", FAR)
@pytest.mark.parametrize("kind", KINDS)
def test_it_draws_as_on_the_processor(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    pipeline, call = made(kind)
    expected = drawn(pipeline, call)
    assert isinstance(pipeline, TextToImagePipeline) or kind not in ("text", "masked text", "codes")
    found = drawn(copy.deepcopy(pipeline).to(device, dtype), call)
    scale = 1 if call["output_type"] == "pt" else float(expected.abs().max())
    close(found, expected, FAR[dtype] * scale)


@pytest.mark.parametrize("dtype", FAR)
@pytest.mark.parametrize("order", ["raster", "masked"])
def test_a_prior_over_codes_draws_as_on_the_processor(order: str, dtype: torch.dtype, device: torch.device) -> None:
    """Which code is drawn may hang by a hair, so what is compared is what the network says of each."""
    torch.manual_seed(7)
    pipeline = of_codes(order)
    pipeline.set_progress_bar_config(disable=True)
    codes, states = torch.randint(0, 16, (2, 8, 8)), torch.randn(2, 12, 16)
    with torch.no_grad():
        expected = pipeline.transformer(codes, states)
        pipeline.to(device, dtype)
        found = pipeline.transformer(codes.to(device), states.to(device, dtype))
    close(found.float().cpu(), expected, FAR[dtype] * float(expected.abs().max()))
    call: dict[str, Any] = {"seed": 3, "output_type": "latent", "guidance_scale": 2.0}
    call |= {} if order == "raster" else {"num_inference_steps": 4}
    drawn_twice = [pipeline(["red", "a cup"], **call).images.cpu() for _ in range(2)]
    assert torch.equal(*drawn_twice)
    assert 0 <= int(drawn_twice[0].min()) <= int(drawn_twice[0].max()) < 16


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler(name: str, device: torch.device) -> None:
    pipeline, call = made("text")
    pipeline.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(pipeline.scheduler.config)
    expected = drawn(pipeline, call)
    close(drawn(pipeline.to(device), call), expected, 2e-2)


def test_noise_of_the_device_is_drawn_there(device: torch.device) -> None:
    pipeline, call, _ = text_on(device, torch.float16)
    call = {**call, "seed": None}
    pictures = [pipeline(**call, generator=torch.Generator(device).manual_seed(1)).images for _ in range(2)]
    assert pictures[0].device.type == device.type
    torch.testing.assert_close(*pictures, atol=1e-2, rtol=0)


def offload(name: str, **options: Any) -> Callable[[Any, torch.device], None]:
    return lambda pipeline, device: getattr(pipeline, name)(device=device, **options)


def in_groups(level: str, stream: bool) -> Callable[[Any, torch.device], None]:
    def place(pipeline: Any, device: torch.device) -> None:
        options = {"offload_type": level, "num_blocks_per_group": 1, "use_stream": stream and device.type == "cuda"}
        pipeline.unet.enable_group_offload(device, torch.device("cpu"), **options)
        for network in (pipeline.vae, pipeline.text_encoder):
            network.to(device)

    return place


PLACES: dict[str, Callable[[Any, torch.device], None]] = {
    "model": offload("enable_model_cpu_offload"),
    "sequential": offload("enable_sequential_cpu_offload"),
    "blocks": in_groups("block_level", False),
    "leaves": in_groups("leaf_level", False),
    "leaves, in a stream": in_groups("leaf_level", True),
}


@pytest.mark.parametrize("way", PLACES)
@pytest.mark.parametrize("kind", ["text", "image", "paint, 9 channels"])
def test_offloading_changes_no_picture(kind: str, way: str, device: torch.device) -> None:
    if device.type == "cpu" and way in ("model", "sequential"):
        pytest.skip("offloads from an accelerator only")
    pipeline, call = made(kind)
    expected = drawn(pipeline, call)
    PLACES[way](pipeline, device)
    for _ in range(2):
        close(drawn(pipeline, call), expected, FAR[torch.float32])
    if way == "model":
        assert pipeline.unet.device.type == "cpu"


CHANGES: dict[str, Callable[[Any], Any]] = {
    "slices": lambda pipeline: (pipeline.vae.enable_slicing(), pipeline.unet.set_attention_slice("max")),
    "tiles": lambda pipeline: pipeline.vae.enable_tiling(),
    "channels last": lambda pipeline: [
        network.to(memory_format=torch.channels_last) for network in (pipeline.unet, pipeline.vae)
    ],
    "fused": lambda pipeline: (pipeline.unet.fuse_qkv_projections(), pipeline.vae.fuse_qkv_projections()),
    "half weights": lambda pipeline: pipeline.unet.enable_layerwise_casting(torch.float16, torch.float32),
}


@pytest.mark.parametrize("change", CHANGES)
def test_ways_of_computing_change_no_picture(change: str, device: torch.device) -> None:
    pipeline, call, expected = text_on(device)
    CHANGES[change](pipeline)
    close(drawn(pipeline, call), expected, 2e-2)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "in place"])
def test_compiled_networks_draw_the_same(mode: str, device: torch.device) -> None:
    if device.type == "cpu" and mode != "in place":
        pytest.skip("takes minutes on a processor; 'in place' rehearses it")
    pipeline, call, expected = text_on(device, torch.float16)
    if mode == "in place":
        pipeline.unet.compile(backend="inductor" if device.type == "cuda" else "eager")
    else:  # CUDA graphs, in the second of them
        pipeline.unet = torch.compile(pipeline.unet, mode=mode)
        pipeline.vae.decoder = torch.compile(pipeline.vae.decoder, mode=mode)
    for _ in range(3):
        close(drawn(pipeline, call), expected, FAR[torch.float16])


def recorded(device: torch.device) -> StepRunner:
    return StepRunner(compiled=False, graphs=True, record=None if device.type == "cuda" else Recorder())


@pytest.mark.parametrize(
    "kind", ["text", "masked text", "image", "paint, 9 channels", "flow", "sdxl", "dit", "pixart", "class"]
)
def test_recorded_steps_draw_the_same(kind: str, device: torch.device) -> None:
    pipeline, call = made(kind)
    pipeline.to(device, torch.float16)
    expected = drawn(pipeline, call)
    pipeline.step_runner = recorded(device)
    for _ in range(2):
        close(drawn(pipeline, call), expected, FAR[torch.float16])


def test_recorded_steps_follow_the_weights(device: torch.device) -> None:
    pipeline, call, _ = text_on(device)
    call["guidance_scale"] = 3.0
    runner = pipeline.step_runner = recorded(device)

    def check() -> None:
        found, pipeline.step_runner = drawn(pipeline, call), None
        close(found, drawn(pipeline, call), FAR[torch.float32])
        pipeline.step_runner = runner

    check()
    pipeline.to("cpu")
    check()
    pipeline.to(device)
    check()
    call["prompt"] = ["cup", "a red thing"]
    check()
    call["prompt"] = "cup"
    check()
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False), "style")
    check()
    call["cross_attention_kwargs"] = {"scale": 0.3}
    check()


def test_threads_may_share_a_recorded_pipeline(device: torch.device) -> None:
    pipeline, call, _ = text_on(device, torch.float16)
    calls = [{**call, "guidance_scale": 3.0, "prompt": ["cup"] * count} for count in (1, 2, 3, 1, 2, 3)]
    expected = [drawn(pipeline, one) for one in calls]
    pipeline.step_runner = recorded(device)
    with ThreadPoolExecutor(3) as pool:
        for found, wanted in zip(pool.map(lambda one: drawn(pipeline, one), calls), expected, strict=True):
            close(found, wanted, FAR[torch.float16])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_optimized_pipelines_draw_the_same(
    dtype: torch.dtype, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTDIFF_CACHE", str(tmp_path))
    pipeline, call, expected = text_on(device, dtype if device.type == "cuda" else torch.float32)
    given = {name: call[name] for name in ("prompt", "guidance_scale")}
    found = pipeline.optimize(**given, max_error=0.02)
    assert found.speedup >= 1
    if device.type == "cuda":
        assert "float16" in str(found)
        assert found.way.graphs
        assert pipeline.step_runner is not None
    close(drawn(pipeline, call), expected, FAR[torch.bfloat16])
    assert pipeline.optimize(**given, max_error=0.02).remembered or dtype == torch.float32


def test_a_compiled_and_recorded_step_draws_the_same(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("is recorded on a GPU only")
    pipeline, call, expected = text_on(device, torch.float16)
    pipeline.step_runner = StepRunner(compiled=True, graphs=True)
    for _ in range(2):
        close(drawn(pipeline, call), expected, FAR[torch.float16])


def test_no_step_waits_for_the_gpu(device: torch.device) -> None:
    pipeline, call, _ = text_on(device, torch.float16)
    steps = pipeline.stream(**call)
    next(steps)
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        for progress in steps:
            if progress.step == 2:
                break
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def test_too_large_a_picture_is_explained_and_memory_is_free_again(device: torch.device) -> None:
    pipeline, call, expected = text_on(device)
    with pytest.raises(RuntimeError, match="memory") as caught:
        pipeline("cup", height=2**24, width=2**24)
    assert any("enable_model_cpu_offload" in note for note in caught.value.__notes__)
    if device.type == "cuda":
        assert isinstance(caught.value, torch.OutOfMemoryError)
    del caught
    close(drawn(pipeline, call), expected, FAR[torch.float32])
