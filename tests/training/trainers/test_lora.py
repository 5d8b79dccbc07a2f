"""LoRA for training: where it goes, what is trained, how it is saved and merged."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from tiny import draw, tiny_pipeline

from latentdiff import TextToImagePipeline
from latentdiff.training.settings import FinetuneSettings
from latentdiff.training.trainers.lora import add_lora, merge_lora, save_lora


def settings(**changes: object) -> FinetuneSettings:
    return FinetuneSettings.load(
        None, {"data": "unused", "output": "unused", "lora_rank": 3, "lora_alpha": 6, **changes}
    )


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def disturb(*networks: torch.nn.Module) -> None:
    """What training would do to the LoRA."""
    for network in networks:
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)


def trained(network: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("text", ["bert", "clip"])
def test_only_the_lora_is_trained_and_at_first_it_changes_nothing(text: str) -> None:
    pipeline = tiny_pipeline(text)
    plain = draw(pipeline)
    add_lora(settings(lora_targets=ATTENTION), pipeline.unet, pipeline.text_encoder)
    for network in (pipeline.unet, pipeline.text_encoder):
        names = trained(network)
        assert names
        assert all(".lora_A." in name or ".lora_B." in name for name in names)
    torch.testing.assert_close(draw(pipeline), plain, atol=1e-6, rtol=0)
    assert {name.rsplit(".lora_", 1)[0].split("transformer_blocks.0.")[1] for name in trained(pipeline.unet)} == {
        f"{attention}.{layer}" for attention in ("attn1", "attn2") for layer in ATTENTION
    }


def test_gradients_reach_every_matrix() -> None:
    pipeline = tiny_pipeline("bert")
    add_lora(settings(), pipeline.unet, pipeline.text_encoder)
    disturb(pipeline.unet, pipeline.text_encoder)
    ids = pipeline.tokenizer("a red thing", return_tensors="pt").input_ids
    states = pipeline.text_encoder(ids).last_hidden_state
    pipeline.unet(torch.randn(1, 4, 8, 8), 5, states).sample.square().mean().backward()
    for network in (pipeline.unet, pipeline.text_encoder):
        assert all(parameter.grad.abs().max() > 0 for parameter in trained(network).values())


def test_matrices_are_float32_in_a_half_precision_network() -> None:
    unet = tiny_pipeline().unet.to(torch.bfloat16)
    add_lora(settings(), unet)
    assert {parameter.dtype for parameter in trained(unet).values()} == {torch.float32}


@pytest.mark.parametrize("targets", [("to_q", "to_v"), ("to_q", "proj_in", "conv1", "ff.net.0.proj", "ff.net.2")])
def test_saved_lora_draws_the_same_in_diffusers(tmp_path: Path, targets: tuple[str, ...]) -> None:
    """Alpha is not the rank, so the file must say it; convolutions as well as linear layers."""
    base = tiny_pipeline("clip")
    base.save_pretrained(tmp_path / "base")
    pipeline = TextToImagePipeline.from_pretrained(tmp_path / "base")
    pipeline.set_progress_bar_config(disable=True)
    add_lora(settings(lora_targets=targets), pipeline.unet, pipeline.text_encoder)
    disturb(pipeline.unet, pipeline.text_encoder)
    changed = draw(pipeline)
    assert (changed - draw(base)).abs().max() > 0.01
    file = save_lora(pipeline, tmp_path / "lora")
    assert [path.name for path in file.parent.iterdir()] == ["pytorch_lora_weights.safetensors"]
    assert any(key.startswith("text_encoder.text_model.encoder.layers") for key in load_file(file))

    for loader in (TextToImagePipeline, diffusers.StableDiffusionPipeline):
        again = loader.from_pretrained(tmp_path / "base")
        again.set_progress_bar_config(disable=True)
        again.load_lora_weights(str(file))
        torch.testing.assert_close(draw(again), changed, atol=1e-4, rtol=0)

    merge_lora(pipeline)
    assert not [name for name, _ in pipeline.unet.named_parameters() if "lora" in name]
    torch.testing.assert_close(draw(pipeline), changed, atol=1e-4, rtol=0)
    pipeline.save_pretrained(tmp_path / "merged")
    plain = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "merged")
    plain.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(plain), changed, atol=1e-4, rtol=0)


def test_lora_of_bert_loads_again(tmp_path: Path) -> None:
    pipeline, base = tiny_pipeline("bert"), tiny_pipeline("bert")
    add_lora(settings(), pipeline.unet, pipeline.text_encoder)
    disturb(pipeline.unet, pipeline.text_encoder)
    loaded = base.load_lora_weights(save_lora(pipeline, tmp_path))
    assert {key.split(".")[0] for key in loaded.matched} == {"unet", "text_encoder"}
    assert not loaded.unmatched
    torch.testing.assert_close(draw(base), draw(pipeline), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("targets", "message"),
    [(("to_q", "to_z"), "no layer 'to_z'; it has .*to_q"), ((), "lora_targets is empty")],
)
def test_wrong_targets_are_named(targets: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_lora(settings(lora_targets=targets), tiny_pipeline().unet)


def test_unknown_text_encoder_is_refused() -> None:
    pipeline = tiny_pipeline()
    with pytest.raises(ValueError, match="not known where a Linear takes a LoRA"):
        add_lora(settings(), pipeline.unet, torch.nn.Linear(2, 2))
