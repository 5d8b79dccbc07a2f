"""What a single file says that its model predicts counts, in its header or by tensors that are marks."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import make_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latentdiff import TextToImagePipeline

MARK = torch.zeros(0)


@pytest.fixture(scope="module")
def files(clip: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A pipeline of each kind, and its weights."""
    folder, found = tmp_path_factory.mktemp("files"), {}
    for kind in ("sd1", "sd2"):
        pipeline = make_model(kind, clip)
        pipeline.save_single_file(folder / f"{kind}.safetensors")
        found[kind] = (pipeline, load_file(folder / f"{kind}.safetensors"))
    return found


CASES: dict[str, tuple[str, dict[str, str], dict[str, torch.Tensor], tuple[str, int, bool]]] = {
    "sd1": ("sd1", {}, {}, ("epsilon", 64, False)),
    "sd1, header v": ("sd1", {"modelspec.prediction_type": "v"}, {}, ("v_prediction", 64, False)),
    "sd1, header epsilon": ("sd1", {"modelspec.prediction_type": "Epsilon"}, {}, ("epsilon", 64, False)),
    "sd1, mark": ("sd1", {}, {"v_pred": MARK}, ("v_prediction", 64, False)),
    "sd1, marks": ("sd1", {}, {"v_pred": MARK, "ztsnr": MARK}, ("v_prediction", 64, True)),
    "sd1, zero SNR without v": ("sd1", {}, {"ztsnr": MARK}, ("epsilon", 64, False)),
    "sd1, resolution": ("sd1", {"modelspec.resolution": "768x768"}, {}, ("epsilon", 96, False)),
    "sd1, odd resolution": ("sd1", {"modelspec.resolution": "999x999"}, {}, ("epsilon", 64, False)),
    "sd1, not square": ("sd1", {"modelspec.resolution": "768x512"}, {}, ("epsilon", 64, False)),
    "sd2, header epsilon": ("sd2", {"modelspec.prediction_type": "epsilon"}, {}, ("epsilon", 64, False)),
    "sd2, header v": ("sd2", {"modelspec.prediction_type": "v-prediction"}, {}, ("v_prediction", 96, False)),
    "sd2, 512": ("sd2", {"modelspec.architecture": "stable-diffusion-v2-512"}, {}, ("epsilon", 64, False)),
    "sd2, 768": ("sd2", {"modelspec.architecture": "stable-diffusion-v2-768-v"}, {}, ("v_prediction", 96, False)),
    "sd2, marks": ("sd2", {}, {"v_pred": MARK, "ztsnr": MARK}, ("v_prediction", 96, True)),
}


@pytest.mark.parametrize("case", CASES)
def test_what_the_file_says_counts(
    case: str, files: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kind, header, marks, wanted = CASES[case]
    pipeline, weights = files[kind]
    save_file(weights | marks, tmp_path / "model.safetensors", header)
    torch.save({"state_dict": weights | marks}, tmp_path / "model.ckpt")
    with caplog.at_level(logging.WARNING, "latentdiff"):
        for name in ("model.safetensors", *([] if header else ["model.ckpt"])):
            read = TextToImagePipeline.from_single_file(
                tmp_path / name, tokenizer=pipeline.tokenizer, allow_pickle=name.endswith("ckpt")
            )
            config = read.scheduler.config
            assert (config.prediction_type, read.unet.config.sample_size, config.rescale_betas_zero_snr) == wanted
            assert config.timestep_spacing == ("trailing" if wanted[2] else "leading")
    assert "does not say" not in caplog.text


def test_the_caller_and_the_yaml_file_come_first(files: dict[str, Any], tmp_path: Path) -> None:
    pipeline, weights = files["sd2"]
    save_file(weights, tmp_path / "model.safetensors", {"modelspec.prediction_type": "v"})
    (tmp_path / "model.yaml").write_text("model: {params: {parameterization: eps, image_size: 64}}")
    for more in ({"prediction_type": "epsilon"}, {"original_config": tmp_path / "model.yaml"}):
        read = TextToImagePipeline.from_single_file(
            tmp_path / "model.safetensors", tokenizer=pipeline.tokenizer, **more
        )
        assert (read.scheduler.config.prediction_type, read.unet.config.sample_size) == ("epsilon", 64)


def test_zero_terminal_snr_goes_with_what_is_predicted(files: dict[str, Any], tmp_path: Path) -> None:
    pipeline, weights = files["sd1"]
    for marks, prediction, wanted in (
        ({"v_pred": MARK, "ztsnr": MARK}, "epsilon", False),
        ({"ztsnr": MARK}, "v_prediction", True),
        ({"v_pred": MARK}, "v_prediction", False),
    ):
        save_file(weights | marks, tmp_path / "model.safetensors")
        read = TextToImagePipeline.from_single_file(
            tmp_path / "model.safetensors", tokenizer=pipeline.tokenizer, prediction_type=prediction
        )
        config = read.scheduler.config
        assert (config.prediction_type, config.rescale_betas_zero_snr) == (prediction, wanted)


def test_what_is_predicted_must_be_known(files: dict[str, Any], tmp_path: Path) -> None:
    pipeline, weights = files["sd1"]
    save_file(weights, tmp_path / "model.safetensors", {"modelspec.prediction_type": "flow"})
    with pytest.raises(ValueError, match=r"model\.safetensors says that it predicts 'flow', .*give prediction_type="):
        TextToImagePipeline.from_single_file(tmp_path / "model.safetensors", tokenizer=pipeline.tokenizer)
    read = TextToImagePipeline.from_single_file(
        tmp_path / "model.safetensors", tokenizer=pipeline.tokenizer, prediction_type="epsilon"
    )
    assert read.scheduler.config.prediction_type == "epsilon"


def test_a_unet_alone_is_of_its_kind(files: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in a file with the UNet alone, where the text encoder does not say that it is Stable Diffusion 2."""
    for kind, prediction, size in (("sd1", "epsilon", 64), ("sd2", "v_prediction", 96)):
        pipeline, weights = files[kind]
        unet = {name: tensor for name, tensor in weights.items() if name.startswith("model.diffusion_model.")}
        save_file(unet, tmp_path / f"{kind}.safetensors")
        parts = {name: getattr(pipeline, name) for name in ("vae", "text_encoder", "tokenizer")}
        caplog.clear()
        with caplog.at_level(logging.WARNING, "latentdiff"):
            read = TextToImagePipeline.from_single_file(tmp_path / f"{kind}.safetensors", **parts)
        assert (read.scheduler.config.prediction_type, read.unet.config.sample_size) == (prediction, size)
        assert ("does not say whether it predicts v" in caplog.text) == (kind == "sd2")


def test_our_files_say_it_too(files: dict[str, Any], tmp_path: Path) -> None:
    pipeline = TextToImagePipeline(**files["sd1"][0].components)
    for prediction, name in (("epsilon", "epsilon"), ("v_prediction", "v"), ("sample", "sample")):
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, prediction_type=prediction)
        pipeline.save_single_file(tmp_path / "model.safetensors", overwrite=True)
        with safe_open(tmp_path / "model.safetensors", "pt") as stream:
            assert stream.metadata()["modelspec.prediction_type"] == name
