"""What of Accelerate's configuration does not work is refused."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import FullyShardedDataParallelPlugin
from tiny import UNET

from latentdiff.diffusion import GaussianDiffusion
from latentdiff.models import UNet2DConditionModel
from latentdiff.training.loop.distributed import check_spreading
from latentdiff.training.objectives.diffusion import DenoiserObjective

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


def test_an_objective_knows_the_layers_that_are_spread_one_by_one() -> None:
    objective = DenoiserObjective(UNet2DConditionModel(**UNET), GaussianDiffusion())
    assert objective._no_split_modules == ["BasicTransformerBlock", "ResnetBlock2D", "UpBlock"]


@pytest.mark.parametrize("file", CONFIGURATIONS, ids=lambda file: file.stem)
def test_the_documented_configurations_are_accelerates(file: Path) -> None:
    config = load_config_from_file(str(file))
    assert config.distributed_type.value == yaml.safe_load(file.read_text())["distributed_type"]
