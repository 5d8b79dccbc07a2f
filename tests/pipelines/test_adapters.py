"""LoRA and new words in our pipelines: the same pictures as diffusers', and nothing loaded that does not fit."""

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import bert_parts, clip_parts

from latentdiff import TextToImagePipeline
from latentdiff.models.loras import lora_scaled
from latentdiff.text import encode_prompts
from latentdiff.text.words import expand_words

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT_TARGETS = {"clip": ["q_proj", "k_proj", "v_proj", "out_proj"], "bert": ["query", "key", "value"]}


def draw(pipeline: Any, prompt: str = "a red car", **options: Any) -> torch.Tensor:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    options = {"num_inference_steps": 3, "guidance_scale": 3.0, **options}
    return pipeline(prompt, latents=noise, output_type="pt", **options).images


def make_lora(pipeline: Any, folder: Path, text: list[str] | None = None, seed: int = 0, rank: int = 3) -> Path:
    """A LoRA with random weights for copies of the pipeline's networks, as diffusers' scripts save it."""
    torch.manual_seed(seed)
    layers: dict[str, Any] = {}
    for name, targets in (("unet", TARGETS), ("text_encoder", text)):
        if targets is None:
            continue
        network = copy.deepcopy(getattr(pipeline, name))
        network.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
        for parameter_name, parameter in network.named_parameters():
            if "lora_" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.3)
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(network)
        layers[f"{name}_lora_adapter_metadata"] = network.peft_config["default"].to_dict()
    type(pipeline).save_lora_weights(folder, **layers)
    return folder / "pytorch_lora_weights.safetensors"


@pytest.fixture
def fresh(pair: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """Pipelines whose networks are their own: adapters change them in place."""

    def make(kind: str = "clip") -> tuple[Any, Any]:
        torch.manual_seed(2)
        ours, theirs = pair(text=bert_parts() if kind == "bert" else clip_parts())
        unets = copy.deepcopy(ours.unet), copy.deepcopy(theirs.unet)
        for pipeline, unet in zip((ours, theirs), unets, strict=True):
            pipeline.unet = unet
        theirs.text_encoder, theirs.tokenizer = copy.deepcopy((ours.text_encoder, ours.tokenizer))
        return ours, theirs

    return make


@pytest.mark.parametrize("kind", ["clip", "bert"])
def test_lora_draws_what_diffusers_draws(fresh: Any, tmp_path: Path, kind: str) -> None:
    ours, theirs = fresh(kind)
    plain = draw(ours)
    file = make_lora(ours, tmp_path, TEXT_TARGETS[kind])
    loaded = ours.load_lora_weights(file)
    if kind == "clip":
        theirs.load_lora_weights(str(file))
    else:  # diffusers' loader knows the names of CLIP only; what it draws with is PEFT's, though
        theirs.unet.load_lora_adapter(
            load_file(file), prefix="unet", metadata={"unet.r": 3, "unet.lora_alpha": 6, "unet.target_modules": TARGETS}
        )
        theirs.text_encoder = ours.text_encoder
    assert len(loaded.matched) == len(load_file(file))
    assert not loaded.unmatched
    changed = draw(ours)
    assert (changed - plain).abs().max() > 0.01
    torch.testing.assert_close(changed, draw(theirs), atol=1e-4, rtol=0)

    weights = {key: value.clone() for key, value in ours.unet.state_dict().items()}
    ours.fuse_lora()
    torch.testing.assert_close(draw(ours), changed, atol=1e-4, rtol=0)
    ours.unfuse_lora()
    for key, value in ours.unet.state_dict().items():
        torch.testing.assert_close(value, weights[key], atol=1e-6, rtol=0)
    torch.testing.assert_close(draw(ours), changed, atol=1e-5, rtol=0)
    ours.unload_lora_weights()
    torch.testing.assert_close(draw(ours), plain, atol=1e-5, rtol=0)


def test_fused_pipeline_is_saved_as_a_plain_one(fresh: Any, tmp_path: Path) -> None:
    ours, _ = fresh("clip")
    ours.load_lora_weights(make_lora(ours, tmp_path / "lora", TEXT_TARGETS["clip"]))
    changed = draw(ours)
    ours.fuse_lora()
    ours.unload_lora_weights()
    ours.save_pretrained(tmp_path / "model")
    assert not any("lora" in key for key in load_file(tmp_path / "model/unet/diffusion_pytorch_model.safetensors"))
    for loader in (TextToImagePipeline, diffusers.StableDiffusionPipeline):
        again = loader.from_pretrained(tmp_path / "model")
        again.set_progress_bar_config(disable=True)
        torch.testing.assert_close(draw(again), changed, atol=1e-4, rtol=0)


def test_several_loras_with_scales(fresh: Any, tmp_path: Path) -> None:
    ours, theirs = fresh("clip")
    files = {name: make_lora(ours, tmp_path / name, seed=i, rank=2 + i) for i, name in enumerate("ab")}
    for name, file in files.items():
        ours.load_lora_weights(file, adapter_name=name)
        theirs.load_lora_weights(str(file), adapter_name=name)
    for pipeline in (ours, theirs):
        pipeline.set_adapters(["a", "b"], [0.5, 0.25])
    both = draw(ours)
    torch.testing.assert_close(both, draw(theirs), atol=1e-4, rtol=0)
    ours.set_adapters("a")
    assert (draw(ours) - both).abs().max() > 0.005

    scaled, _ = fresh("clip")
    scaled.load_lora_weights(files["a"], scale=0.5)
    ours.set_adapters("a", 0.5)
    torch.testing.assert_close(draw(scaled), draw(ours), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["clip", "bert"])
def test_scale_of_one_call_is_diffusers(fresh: Any, tmp_path: Path, kind: str) -> None:
    ours, theirs = fresh(kind)
    file = make_lora(ours, tmp_path / "a", TEXT_TARGETS["clip"] if kind == "clip" else None)
    other = make_lora(ours, tmp_path / "b", seed=1)
    for pipeline in (ours, theirs):
        pipeline.load_lora_weights(str(file), adapter_name="a")
        pipeline.load_lora_weights(str(other), adapter_name="b")
        pipeline.set_adapters(["a", "b"], [0.7, 0.3])
    full = draw(ours)
    half = {"cross_attention_kwargs": {"scale": 0.5}}
    torch.testing.assert_close(draw(ours, **half), draw(theirs, **half), atol=1e-4, rtol=0)
    assert (draw(ours, **half) - full).abs().max() > 0.005
    with lora_scaled([ours.unet, ours.text_encoder], 0.5):
        torch.testing.assert_close(draw(ours), draw(theirs, **half), atol=1e-4, rtol=0)
    with lora_scaled([theirs.unet], 0.0), pytest.raises(ValueError, match="stop"):
        raise ValueError("stop")
    theirs_full = draw(theirs)
    torch.testing.assert_close(draw(ours), full, atol=0, rtol=0)
    torch.testing.assert_close(theirs_full, full, atol=1e-4, rtol=0)


def test_scales_that_end_in_another_order(fresh: Any, tmp_path: Path) -> None:
    """Two drawings at a time, as with ``stream``: what was set before is there again after the last of them."""
    ours, _ = fresh("clip")
    ours.load_lora_weights(make_lora(ours, tmp_path))
    before = draw(ours)
    first, second = lora_scaled([ours.unet], 0.5), lora_scaled([ours.unet], 0.1)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    torch.testing.assert_close(draw(ours), before, atol=0, rtol=0)


def test_hotswap(fresh: Any, tmp_path: Path) -> None:
    ours, _ = fresh("clip")
    ours.load_lora_weights(make_lora(ours, tmp_path / "a"), adapter_name="a")
    second = make_lora(fresh("clip")[0], tmp_path / "b", seed=1)
    ours.load_lora_weights(second, adapter_name="a", hotswap=True)
    other, _ = fresh("clip")
    other.load_lora_weights(second)
    torch.testing.assert_close(draw(ours), draw(other), atol=1e-5, rtol=0)
    uneven = {
        "unet.conv_in.lora_A.weight": torch.ones(1, 4, 3, 3),
        "unet.conv_in.lora_B.weight": torch.ones(16, 1, 1, 1),
    }
    uneven["unet.conv_in.alpha"] = torch.tensor(0.5)
    with pytest.raises(ValueError, match="different strengths"):
        ours.load_lora_weights({**load_file(second), **uneven}, adapter_name="a", hotswap=True)


def test_failing_in_the_second_network_undoes_the_first(fresh: Any, tmp_path: Path, monkeypatch: Any) -> None:
    ours, _ = fresh("clip")
    plain = draw(ours)
    file = make_lora(ours, tmp_path, TEXT_TARGETS["clip"])

    def no_memory(*_: Any, **__: Any) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(type(ours.text_encoder), "eval", no_memory)
    with pytest.raises(MemoryError):
        ours.load_lora_weights(file, adapter_name="a")
    assert ours.get_list_adapters() == {}
    torch.testing.assert_close(draw(ours), plain, atol=1e-6, rtol=0)
    monkeypatch.undo()
    ours.load_lora_weights(file, adapter_name="a")
    assert (draw(ours) - plain).abs().max() > 0.01


def test_adapters_get_one_name_in_all_networks(fresh: Any, tmp_path: Path) -> None:
    ours, _ = fresh("clip")
    ours.load_lora_weights(make_lora(ours, tmp_path / "a"))
    both = make_lora(fresh("clip")[0], tmp_path / "b", TEXT_TARGETS["clip"])
    assert ours.load_lora_weights(both).adapter_name == "default_1"
    assert ours.get_list_adapters() == {"unet": ["default_0", "default_1"], "text_encoder": ["default_1"]}
    with pytest.raises(ValueError, match="adapter 'default_1' already"):
        ours.load_lora_weights(both, adapter_name="default_1")


def test_lora_of_bert_without_metadata(fresh: Any, tmp_path: Path) -> None:
    ours, _ = fresh("bert")
    file = make_lora(ours, tmp_path / "a", TEXT_TARGETS["bert"])
    state = load_file(file)
    ranks = {key: tensor.shape[1] for key, tensor in state.items() if ".lora_B." in key}
    for key, rank in ranks.items():  # alpha is the rank where nothing says otherwise; here it was twice that
        state[key] = state[key] * 2
        assert rank == 3
    ours.load_lora_weights(file)
    expected = draw(ours)
    bare, _ = fresh("bert")
    bare.load_lora_weights(state)
    torch.testing.assert_close(draw(bare), expected, atol=1e-4, rtol=0)


def test_pefts_own_format(fresh: Any, tmp_path: Path) -> None:
    ours, _ = fresh("clip")
    file = make_lora(ours, tmp_path / "a")
    state = {key.replace("unet.", "base_model.model."): value for key, value in load_file(file).items()}
    (tmp_path / "b").mkdir()
    save_file(state, tmp_path / "b" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": "pissa"}
    (tmp_path / "b" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    ours.load_lora_weights(tmp_path / "b")
    other, _ = fresh("clip")
    other.load_lora_weights(file)
    torch.testing.assert_close(draw(ours), draw(other), atol=1e-5, rtol=0)


def test_kohyas_format(fresh: Any, tmp_path: Path) -> None:
    ours, _ = fresh("clip")
    state = {}
    for key, value in load_file(make_lora(ours, tmp_path, TEXT_TARGETS["clip"])).items():
        network, _, rest = key.partition(".")
        module, side = rest.removesuffix(".weight").rsplit(".", 1)
        prefix = "lora_unet_" if network == "unet" else "lora_te_text_model_"
        name = prefix + module.replace(".", "_")
        state[f"{name}.lora_{'down' if side == 'lora_A' else 'up'}.weight"] = value
        state[f"{name}.alpha"] = torch.tensor(6.0)
    save_file(state, tmp_path / "kohya.safetensors")
    loaded = ours.load_lora_weights(tmp_path / "kohya.safetensors")
    assert not loaded.unmatched
    other, _ = fresh("clip")
    other.load_lora_weights(tmp_path / "pytorch_lora_weights.safetensors")
    torch.testing.assert_close(draw(ours), draw(other), atol=1e-4, rtol=0)


def test_lora_of_another_model_is_refused(fresh: Any, tmp_path: Path, caplog: Any) -> None:
    ours, _ = fresh("clip")
    plain = draw(ours)
    state = load_file(make_lora(ours, tmp_path))
    flux = {key.replace("unet.", "transformer."): value for key, value in state.items()}
    with pytest.raises(ValueError, match=r"none of the \d+ keys .*transformer.*unet or text_encoder"):
        ours.load_lora_weights(flux)
    wide = {key: torch.cat([value, value], 1) if "lora_A" in key else value for key, value in state.items()}
    with pytest.raises(ValueError, match=r"made for a weight of shape \(16, 32\) and this model's is \(16, 16\)"):
        ours.load_lora_weights(wide)
    with pytest.raises(ValueError, match="no tensors"):
        ours.load_lora_weights({})
    assert ours.get_list_adapters() == {}
    torch.testing.assert_close(draw(ours), plain, atol=0, rtol=0)
    some = {**state, "unet.no.such.place.lora_A.weight": torch.zeros(3, 4)}
    with caplog.at_level(logging.WARNING):
        assert ours.load_lora_weights(some).unmatched == ["unet.no.such.place.lora_A.weight"]
    assert "1 of its keys" in caplog.text


def test_only_whole_safetensors_files_are_read(fresh: Any, tmp_path: Path) -> None:
    ours, _ = fresh("clip")
    torch.save({}, tmp_path / "lora.bin")
    with pytest.raises(ValueError, match=r"only safetensors files"):
        ours.load_lora_weights(tmp_path / "lora.bin")
    with pytest.raises(ValueError, match=r"only safetensors files"):
        ours.load_lora_weights(tmp_path, weight_name="lora.bin")
    with pytest.raises(FileNotFoundError, match="no safetensors file there"):
        ours.load_lora_weights(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        ours.load_lora_weights(tmp_path / "missing")
    (tmp_path / "inner").mkdir()
    outside = make_lora(ours, tmp_path / "outside")
    for name in ("../outside/pytorch_lora_weights.safetensors", str(outside), "..\\\\x.safetensors"):
        with pytest.raises(ValueError, match="leads out of the folder"):
            ours.load_lora_weights(tmp_path / "inner", weight_name=name)
    with pytest.raises(ValueError, match=r"subfolder='\.\./outside' leads out of the folder"):
        ours.load_lora_weights(tmp_path / "inner", subfolder="../outside")
    file = make_lora(ours, tmp_path)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="damaged"):
        ours.load_lora_weights(tmp_path)
    for name in ("x", "y"):
        save_file({"a": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    file.unlink()
    with pytest.raises(ValueError, match=r"several files .*weight_name"):
        ours.load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="safetensors file"):
        ours.save_lora_weights(tmp_path, unet_lora_layers={"a": torch.zeros(1)}, safe_serialization=False)


def test_saved_lora_says_rank_and_alpha(fresh: Any, tmp_path: Path) -> None:
    file = make_lora(fresh("clip")[0], tmp_path)
    with safe_open(file, "pt") as stream:
        config = json.loads(stream.metadata()["lora_adapter_metadata"])
    assert (config["unet.r"], config["unet.lora_alpha"]) == (3, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]


@pytest.mark.parametrize("kind", ["clip", "bert"])
@pytest.mark.parametrize("count", [1, 3])
def test_new_word_draws_what_diffusers_draws(fresh: Any, tmp_path: Path, kind: str, count: int) -> None:
    ours, theirs = fresh(kind)
    plain = draw(ours, "a <cup>")
    save_file({"<cup>": torch.randn(count, 16)}, tmp_path / "learned_embeds.safetensors")
    ours.load_textual_inversion(tmp_path)
    theirs.load_textual_inversion(str(tmp_path / "learned_embeds.safetensors"))
    changed = draw(ours, "a <cup>")
    assert (changed - plain).abs().max() > 1e-3
    torch.testing.assert_close(changed, draw(theirs, "a <cup>"), atol=1e-4, rtol=0)
    torch.testing.assert_close(changed, draw(ours, "a <cup>" if count == 1 else "a <cup> <cup>_1 <cup>_2"))

    ours.save_pretrained(tmp_path / "model")
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(again, "a <cup>"), changed, atol=1e-4, rtol=0)
    ours.unload_textual_inversion()
    torch.testing.assert_close(draw(ours, "a <cup>"), plain, atol=1e-5, rtol=0)


def test_all_tokens_of_a_new_word_are_seen(fresh: Any) -> None:
    ours, _ = fresh("bert")
    ours.load_textual_inversion({"<cup>": torch.randn(2, 16)})
    assert expand_words(["a <cup>, <cup>", "a car"], ours.tokenizer) == ["a <cup> <cup>_1, <cup> <cup>_1", "a car"]
    once, before = expand_words(["<cup>"], ours.tokenizer), encode_prompts(["<cup>"], ours.tokenizer, ours.text_encoder)
    assert expand_words(once, ours.tokenizer) == once
    with torch.no_grad():
        ours.text_encoder.get_input_embeddings().weight[-1] += 1
    assert not torch.equal(encode_prompts(["<cup>"], ours.tokenizer, ours.text_encoder), before)


def test_rows_of_new_words_are_not_drawn_like_the_old_ones(fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes seconds at SDXL's size."""
    ours, _ = fresh("clip")
    kind = type(ours.text_encoder)
    monkeypatch.setattr(kind, "_init_added_embeddings_weights_with_mean", lambda *_: pytest.fail("drawn"))
    ours.load_textual_inversion({"<cup>": torch.randn(2, 16)})
    assert "resize_token_embeddings" not in vars(ours.text_encoder)


def test_bad_embeddings_are_refused(fresh: Any, tmp_path: Path) -> None:
    ours, _ = fresh("bert")
    with pytest.raises(ValueError, match=r"'<cup>' has the shape \(2, 8\); this text encoder's are 16 wide"):
        ours.load_textual_inversion({"<cup>": torch.zeros(2, 8)})
    with pytest.raises(ValueError, match="already"):
        ours.load_textual_inversion({"red": torch.zeros(1, 16)})
    with pytest.raises(ValueError, match="which word"):
        ours.load_textual_inversion({"emb_params": torch.zeros(1, 16)})
    with pytest.raises(ValueError, match=r"not finite"):
        ours.load_textual_inversion({"<cup>": torch.full((1, 16), torch.nan)})
    with pytest.raises(ValueError, match=r"2 embeddings for the word '<cup>'"):
        ours.load_textual_inversion([{"<cup>": torch.zeros(1, 16)}] * 2)
    assert "<cup>" not in ours.tokenizer.get_vocab()


def test_pickled_embeddings_only_when_asked_for(fresh: Any, tmp_path: Path) -> None:
    ours, theirs = fresh("clip")
    vectors = torch.randn(2, 16)
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "qx"}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"only safetensors files are read.*allow_pickle=True"):
        ours.load_textual_inversion(tmp_path / "x.pt")
    assert "qx" not in ours.tokenizer.get_vocab()
    ours.load_textual_inversion(tmp_path / "x.pt", allow_pickle=True)
    theirs.load_textual_inversion(str(tmp_path / "x.pt"))
    picture = draw(ours, "a qx")
    torch.testing.assert_close(picture, draw(theirs, "a qx"), atol=1e-4, rtol=0)
    save_file({"emb_params": vectors}, tmp_path / "qx.safetensors")
    again, _ = fresh("clip")
    again.load_textual_inversion(tmp_path / "qx.safetensors")
    torch.testing.assert_close(draw(again, "a qx"), picture, atol=1e-6, rtol=0)


def test_words_are_not_numbered_wrongly(fresh: Any) -> None:
    ours, _ = fresh("bert")
    before = len(ours.tokenizer)  # as in real ones of BERT, no special token is the last
    ours.load_textual_inversion([{"<cup>": torch.zeros(1, 16)}, {"<mug>": torch.ones(1, 16)}])
    with pytest.raises(ValueError, match="all new words at once"):
        ours.unload_textual_inversion("<cup>")
    ours.unload_textual_inversion(["<cup>", "<mug>"])
    assert len(ours.tokenizer) == before == len(ours.text_encoder.get_input_embeddings().weight)
