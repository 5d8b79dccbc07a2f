"""The processes of one training, as Accelerate sees them, and weights that FSDP has spread over them."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    parse_flag_from_env,
)
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

from latentdiff.pipelines.distributed import by_deepspeed, on_cpu, processes
from latentdiff.training.settings import RunSettings

logger = logging.getLogger(__name__)

PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
"""What a tracker needs one of."""
PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}


def check_surroundings(settings: RunSettings) -> None:
    """Raises ValueError for settings that need a package or a device that is not here."""
    for tracker in settings.report_to:
        if not any(find_spec(package) for package in PACKAGES[tracker]):
            raise ValueError(f"report_to={tracker} needs the package {tracker}: pip install {tracker}")
    if settings.mixed_precision == "fp16" and processes().device.type == "cpu":
        raise ValueError("mixed_precision=fp16 needs a GPU; processors train in float32 or with mixed_precision=bf16")


def log_start(accelerator: Accelerator, settings: RunSettings) -> None:
    """Say how many processes train where, and how many pictures one update has."""
    count, accumulated = accelerator.num_processes, settings.gradient_accumulation_steps
    logger.info(
        "training on %s in %s; an update has %d pictures: batch_size %d x %d accumulated x %d process%s",
        *(accelerator.device.type, PRECISIONS[settings.mixed_precision], settings.batch_size * accumulated * count),
        *(settings.batch_size, accumulated, count, "es" * (count > 1)),
    )
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", settings.mixed_precision):
        logger.warning("Accelerate's configuration asks for %s; settings alone count: mixed_precision=%s", asked, asked)


def accelerator_of(settings: RunSettings) -> Accelerator:
    """The Accelerator for these settings; where it runs is Accelerate's own configuration."""
    if AcceleratorState._shared_state.get("_mixed_precision", settings.mixed_precision) != settings.mixed_precision:
        AcceleratorState._reset_state()  # it would hold a second training of this process to the first one's precision
    if by_deepspeed():
        check_deepspeed(settings)
        processes()  # on processors, with what they talk by
    accelerator = Accelerator(
        cpu=on_cpu(),
        mixed_precision=settings.mixed_precision,
        # Not as a number: launchers set a variable that would count more.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=settings.gradient_accumulation_steps),
        step_scheduler_with_optimizer=False,
        log_with=list(settings.report_to) or None,
        project_config=ProjectConfiguration(str(settings.folder), str(settings.folder / "logs")),
    )
    spread_on_processors(accelerator)
    if accelerator.distributed_type == DistributedType.FSDP:
        check_spreading(accelerator.state.fsdp_plugin)
    if (plugin := accelerator.state.deepspeed_plugin) is not None:
        if plugin.zero_stage == 3:
            raise ValueError("DeepSpeed's ZeRO stage 3 is not supported; set zero_stage to 2, or use FSDP version 2")
        plugin.gradient_clipping = settings.max_grad_norm
        # It asks for the size, since it is shown no data loader; it clips and accumulates by itself.
        plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": settings.batch_size,
            "gradient_clipping": settings.max_grad_norm,
            "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        }
        if settings.mixed_precision == "bf16":  # by autocasting, as elsewhere: weights and averages stay in float32
            autocast = {"enabled": True, "dtype": PRECISIONS["bf16"]}
            plugin.deepspeed_config |= {"bf16": {"enabled": False}, "torch_autocast": autocast}
    return accelerator


def check_deepspeed(settings: RunSettings) -> None:
    """Raises ValueError for what does not work with DeepSpeed, or where Accelerate would pass over it."""
    if on_cpu():
        raise ValueError(
            "Accelerate's configuration asks for DeepSpeed and for processors (use_cpu, ACCELERATE_USE_CPU), where it "
            "passes over DeepSpeed; set use_cpu: false: where there is no GPU DeepSpeed then trains on them"
        )
    if settings.mixed_precision == "fp16":
        raise ValueError("mixed_precision=fp16 does not work with DeepSpeed; use mixed_precision=bf16 or no")
    if settings.on_bad_loss == "skip":
        raise ValueError(
            "on_bad_loss=skip does not work with DeepSpeed, which changes the weights before the loss is looked at; "
            "use on_bad_loss=stop, or FSDP version 2"
        )


def spread_on_processors(accelerator: Accelerator) -> None:
    """Choose FSDP if the configuration asks for it: on processors torch has it, and Accelerate passes over it."""
    if accelerator.distributed_type == DistributedType.MULTI_CPU and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        plugin = FullyShardedDataParallelPlugin()
        if accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(accelerator.mixed_precision)
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP


def check_spreading(plugin: FullyShardedDataParallelPlugin) -> None:
    """Raises ValueError for what of Accelerate's configuration of FSDP does not work here."""
    if plugin.fsdp_version != 2:
        raise ValueError("FSDP version 1 is not supported; set fsdp_version: 2 in Accelerate's configuration")
    policy = getattr(plugin.auto_wrap_policy, "func", plugin.auto_wrap_policy)
    if policy is size_based_auto_wrap_policy:
        raise ValueError(
            "fsdp_auto_wrap_policy: SIZE_BASED_WRAP takes lists of layers for layers; set TRANSFORMER_BASED_WRAP in "
            "Accelerate's configuration, without fsdp_transformer_layer_cls_to_wrap: the networks know their layers"
        )


def in_parts(accelerator: Accelerator) -> bool:
    """Whether a part of the optimizer's state, if no more, is in each process alone."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def spread_modules(objective: nn.Module) -> list[Any]:
    """The modules whose weights FSDP has spread over the processes."""
    return [module for module in objective.modules() if isinstance(module, FSDPModule)]


@contextmanager
def whole_parameters(objective: nn.Module) -> Iterator[None]:
    """With spread weights: every process has all of them, so that parts of the objective can be called alone."""
    spread = spread_modules(objective)
    for module in spread:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in spread:
            module.reshard()
            module.set_reshard_after_forward(module is not objective, recurse=False)
