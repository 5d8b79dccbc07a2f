"""Model folders that are broken, or made to do harm: refused with a message, nothing run, nothing written."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from latentdiff import TextToImagePipeline, UNet2DConditionModel
from latentdiff.interchange.embeddings import convert_embedding
from latentdiff.interchange.lora.formats import convert_lora
from latentdiff.text.load import load_text_encoder


class Mine:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


CODE = "import pathlib\npathlib.Path({mark!r}).touch()\nclass Evil:\n    pass\n"


def change_index(folder: Path, **values: Any) -> None:
    file = folder / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def change_config(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def pickled_unet(folder: Path, mark: Path) -> None:
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Mine(mark)))


def pickled_text_encoder(folder: Path, mark: Path) -> None:
    (folder / "text_encoder/model.safetensors").unlink()
    (folder / "text_encoder/pytorch_model.bin").write_bytes(pickle.dumps(Mine(mark)))


def pickle_called_safetensors(folder: Path, mark: Path) -> None:
    (folder / "vae/diffusion_pytorch_model.safetensors").write_bytes(pickle.dumps(Mine(mark)))


def code_for_a_component(folder: Path, mark: Path) -> None:
    (folder / "unet/evil.py").write_text(CODE.format(mark=str(mark)))
    change_index(folder, unet=["evil", "Evil"])


def code_for_the_pipeline(folder: Path, mark: Path) -> None:
    (folder / "evil.py").write_text(CODE.format(mark=str(mark)))
    (folder / "pipeline.py").write_text(CODE.format(mark=str(mark)))
    change_index(folder, _class_name=["evil", "Evil"])


def any_module(folder: Path, mark: Path) -> None:
    change_index(folder, tokenizer=["antigravity", "fly_fly"])


def component_outside(folder: Path, mark: Path) -> None:
    change_index(folder, **{"../outside": ["transformers", "CLIPTextModel"]})


def shard_outside(folder: Path, mark: Path) -> None:
    (folder / "unet/diffusion_pytorch_model.safetensors").rename(folder / "moved.safetensors")
    index = {"metadata": {}, "weight_map": {"conv_in.weight": "../moved.safetensors"}}
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def shard_missing(folder: Path, mark: Path) -> None:
    index = {"metadata": {}, "weight_map": {"conv_in.weight": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def header_without_end(folder: Path, mark: Path) -> None:
    (folder / "vae/diffusion_pytorch_model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")


def deep_json(folder: Path, mark: Path) -> None:
    (folder / "scheduler/scheduler_config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


def index_is_a_list(folder: Path, mark: Path) -> None:
    (folder / "model_index.json").write_text("[]")


def other_widths(folder: Path, mark: Path) -> None:
    change_config(folder / "unet/config.json", block_out_channels=[16, 64])


def more_layers(folder: Path, mark: Path) -> None:
    change_config(folder / "unet/config.json", layers_per_block=2)


def wrong_kind_of_value(folder: Path, mark: Path) -> None:
    change_config(folder / "vae/config.json", latent_channels="four")


def unknown_key(folder: Path, mark: Path) -> None:
    change_config(folder / "unet/config.json", atention_head_dim=4)


def text_encoder_of_wrong_types(folder: Path, mark: Path) -> None:
    change_config(folder / "text_encoder/config.json", hidden_act=[])


def text_encoder_of_wrong_width(folder: Path, mark: Path) -> None:
    change_config(folder / "text_encoder/config.json", hidden_size=32)


def tokenizer_with_nan(folder: Path, mark: Path) -> None:
    """Which Python's JSON has, and that of tokenizers has not."""
    change_config(folder / "tokenizer/tokenizer.json", version=float("nan"))


def scheduler_of_wrong_types(folder: Path, mark: Path) -> None:
    change_config(folder / "scheduler/scheduler_config.json", beta_start=[1])


def scheduler_of_many_steps(folder: Path, mark: Path) -> None:
    change_config(folder / "scheduler/scheduler_config.json", num_train_timesteps=10**9)


def no_tokenizer(folder: Path, mark: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    del index["tokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index))


def unknown_default(folder: Path, mark: Path) -> None:
    change_index(folder, _generation_defaults={"sampler": 3})


def less_than_no_step(folder: Path, mark: Path) -> None:
    change_index(folder, _generation_defaults={"num_inference_steps": -5})


def pipe_in_the_tokenizer(folder: Path, mark: Path) -> None:
    os.mkfifo(folder / "tokenizer/added_tokens.json")


def weights_that_link_to_themselves(folder: Path, mark: Path) -> None:
    (folder / "text_encoder/model.safetensors").unlink()
    (folder / "text_encoder/model.safetensors").symlink_to("model.safetensors")


def device_for_a_config(folder: Path, mark: Path) -> None:
    (folder / "unet/config.json").unlink()
    (folder / "unet/config.json").symlink_to("/dev/zero")


HARM: list[tuple[Callable[[Path, Path], None], str]] = [
    (pickled_unet, "unet"),
    (pickled_text_encoder, "text_encoder|safetensors"),
    (pickle_called_safetensors, "diffusion_pytorch_model.safetensors is damaged"),
    (code_for_a_component, r"unet is of 'evil'; only components of diffusers and transformers"),
    (code_for_the_pipeline, r"the pipeline needs code of its own, evil.py, which is not run"),
    (any_module, r"tokenizer is of 'antigravity'"),
    (component_outside, r"'\.\./outside' is no name for a component"),
    (shard_outside, r"names the shard '\.\./moved.safetensors', which is not a file beside it"),
    (shard_missing, r"00001-of-00002.safetensors is missing"),
    (header_without_end, "vae/diffusion_pytorch_model.safetensors is damaged"),
    (deep_json, "scheduler_config.json is damaged"),
    (index_is_a_list, "model_index.json is damaged: a JSON object is expected, not a list"),
    (other_widths, r"model/unet: the weights do not fit config.json: \S+ should have the shape \[.*\], and has \["),
    (more_layers, r"model/unet: the weights do not fit config.json: "),
    (wrong_kind_of_value, "latent_channels"),
    (text_encoder_of_wrong_types, r"/model.*hidden_act"),
    (text_encoder_of_wrong_width, r"/model"),
    (tokenizer_with_nan, r"/model"),
    (scheduler_of_wrong_types, r"/model"),
    (scheduler_of_many_steps, r"scheduler_config\.json: num_train_timesteps=1000000000 should be"),
    (no_tokenizer, r"/model.*tokenizer"),
    (unknown_default, r"/model: unknown default 'sampler'"),
    (less_than_no_step, "num_inference_steps must be a whole number from 1, not -5"),
    (pipe_in_the_tokenizer, r"added_tokens\.json is a pipe or a device"),
    (weights_that_link_to_themselves, r"text_encoder.*model\.safetensors|/model/text_encoder"),
    (device_for_a_config, r"unet/config\.json is a (pipe or a device|link that leads out of)"),
    (unknown_key, "unknown config key 'atention_head_dim'; did you mean 'attention_head_dim'"),
]


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(("harm", "message"), HARM, ids=[harm.__name__ for harm, _ in HARM])
def test_is_refused(folder: Path, tmp_path: Path, harm: Callable[[Path, Path], None], message: str) -> None:
    harm(folder, tmp_path / "mark")
    before = contents(tmp_path)
    with pytest.raises((ValueError, OSError, TypeError), match=message):
        TextToImagePipeline.from_pretrained(folder)
    assert contents(tmp_path) == before
    assert not (tmp_path / "mark").exists()


def test_code_for_other_loaders_is_not_run(folder: Path, tmp_path: Path) -> None:
    for part in ("tokenizer", "text_encoder"):
        (folder / part / "evil.py").write_text(CODE.format(mark=str(tmp_path / "mark")))
    change_config(folder / "tokenizer/tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    change_config(folder / "text_encoder/config.json", auto_map={"AutoModel": "evil.Evil"})
    assert type(TextToImagePipeline.from_pretrained(folder)) is TextToImagePipeline
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        ("lora", {"lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.ones(32, 2)}, "no down .A. matrix"),
        ("lora", {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.full((2, 32), torch.nan)}, ""),
        ("embedding", {"<new>": torch.ones(2, 7)}, r"has the shape \(2, 7\); this text encoder's are 16 wide"),
        ("embedding", {"a": torch.ones(2, 16)}, "the word 'a' is known already"),
        ("embedding", {"b": torch.ones(2, 16)}, "b already in tokenizer vocabulary"),
    ],
)
def test_adapters_that_do_not_fit_are_named(
    name: str, tensors: dict[str, torch.Tensor], message: str, folder: Path, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / f"{name}.safetensors")
    pipeline = TextToImagePipeline.from_pretrained(folder)
    pipeline.tokenizer.add_tokens("a")
    load = pipeline.load_lora_weights if name == "lora" else pipeline.load_textual_inversion
    with pytest.raises(ValueError, match=rf"{name}\.safetensors.*{message}"):
        load(tmp_path / f"{name}.safetensors")
    if name == "lora":
        with pytest.raises(ValueError, match=rf"{name}\.safetensors.*{message}"):
            convert_lora(tmp_path / "lora.safetensors", tmp_path / "out.safetensors", "kohya")


def test_word_of_an_embedding_that_is_no_word(tmp_path: Path) -> None:
    torch.save({"string_to_param": {"*": torch.ones(2, 16)}, "name": {"a": 1}}, tmp_path / "word.pt")
    with pytest.raises(ValueError, match=r"word\.pt: \{'a': 1\} cannot be a word"):
        convert_embedding(tmp_path / "word.pt", tmp_path / "out.safetensors", allow_pickle=True)


@pytest.mark.parametrize("harm", [text_encoder_of_wrong_types, tokenizer_with_nan, pipe_in_the_tokenizer])
def test_text_encoder_alone(folder: Path, tmp_path: Path, harm: Callable[[Path, Path], None]) -> None:
    harm(folder, tmp_path / "mark")
    with pytest.raises(ValueError, match=r"/model"):
        load_text_encoder(folder)


def test_length_of_prompts_that_is_no_number(folder: Path) -> None:
    change_config(folder / "tokenizer/tokenizer_config.json", model_max_length=[])
    for load in (load_text_encoder, TextToImagePipeline.from_pretrained):
        with pytest.raises(ValueError, match=r"model.*: its model_max_length is '\[\]'; it should be a number"):
            load(folder)


@pytest.mark.parametrize("content", ["[[]]", "{", '{"sample_size": {"a": 1}}', "pipe"])
def test_network_alone(content: str, folder: Path) -> None:
    (folder / "unet/config.json").unlink()
    if content == "pipe":
        os.mkfifo(folder / "unet/config.json")
    else:
        (folder / "unet/config.json").write_text(content)
    with pytest.raises(ValueError, match=r"/model/unet"):
        UNet2DConditionModel.from_pretrained(folder / "unet")


def test_adapter_that_links_to_itself(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").symlink_to("a.safetensors")
    pipeline = TextToImagePipeline.from_pretrained(folder)
    for load in (pipeline.load_lora_weights, pipeline.load_textual_inversion):
        with pytest.raises((ValueError, OSError), match=r"a\.safetensors"):
            load(tmp_path / "a.safetensors")
