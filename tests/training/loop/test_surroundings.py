"""What of Accelerate's configuration does not work is refused."""

from pathlib import Path

import pytest
import yaml
from accelerate import Accelerator, DistributedType
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import FullyShardedDataParallelPlugin
from straight_line import Line, settings
from tiny import UNET

from latentdiff.diffusion import GaussianDiffusion
from latentdiff.models import UNet2DConditionModel
from latentdiff.training.loop.distributed import accelerator_of, check_deepspeed, check_spreading
from latentdiff.training.loop.learner import Learner
from latentdiff.training.objectives.diffusion import DenoiserObjective
from latentdiff.training.settings import DenoiserSettings

CONFIGURATIONS = sorted((Path(__file__).parents[3] / "docs" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fsdp_version": 1, "auto_wrap_policy": "no_wrap"}, "set fsdp_version: 2"),
        ({"fsdp_version": 2, "auto_wrap_policy": "size_based_wrap"}, "SIZE_BASED_WRAP .* set TRANSFORMER_BASED_WRAP"),
    ],
)
def test_what_fsdp_does_not_do_here(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_spreading(FullyShardedDataParallelPlugin(**given))
    for policy in ("transformer_based_wrap", "no_wrap"):
        check_spreading(FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy=policy))


def test_deepspeed_is_not_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Asked for processors too, Accelerate would train without it, and say nothing."""
    settings = DenoiserSettings(data="x", output=str(tmp_path), autoencoder="x")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ValueError, match=r"asks for DeepSpeed and for processors .* set use_cpu: false"):
        accelerator_of(settings)
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    check_deepspeed(settings)
    for name, value in (("on_bad_loss", "skip"), ("mixed_precision", "fp16")):
        with pytest.raises(ValueError, match=f"{name}={value} does not work with DeepSpeed"):
            check_deepspeed(settings.model_copy(update={name: value}))


def test_an_objective_knows_the_layers_that_are_spread_one_by_one() -> None:
    objective = DenoiserObjective(UNet2DConditionModel(**UNET), GaussianDiffusion())
    assert objective._no_split_modules == ["BasicTransformerBlock", "ResnetBlock2D", "UpBlock"]


@pytest.mark.parametrize("file", CONFIGURATIONS, ids=lambda file: file.stem)
def test_the_documented_configurations_are_accelerates(file: Path) -> None:
    config = load_config_from_file(str(file))
    assert config.distributed_type.value == yaml.safe_load(file.read_text())["distributed_type"]


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_a_discriminator_is_not_trained_in_parts(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """DeepSpeed would add its gradients to the wrong network's, and say nothing."""
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(accelerator.state, "distributed_type", DistributedType[kind])
    with pytest.raises(ValueError, match="neither FSDP nor DeepSpeed can train against a discriminator"):
        Learner(accelerator, settings(tmp_path), Line(), Line(), None, tmp_path)
