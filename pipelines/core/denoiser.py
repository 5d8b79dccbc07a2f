"""A network with what conditions it, and guidance between two of its predictions: what sampling asks at every step."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers.utils.torch_utils import is_compiled_module
from torch import Tensor

from latentdiff.conditioning import Conditioning, GuidedConditioning
from latentdiff.diffusion.guidance import ClassifierFreeGuidance
from latentdiff.models.loras import lora_lock, lora_scaled
from latentdiff.models.time_embedding import timestep_features
from latentdiff.pipelines.core.step_runner import StepRunner, network_state

ChangePrediction = Callable[[Tensor, Tensor, Any], Tensor]
"""(prediction, what the network saw, timestep) -> another prediction."""

DIFFUSERS_TRANSFORMERS = "diffusers.models.transformers"
"""Where networks are defined that take a timestep for each entry, and not a single one."""


class GuidedDenoiser:
    """Latents and a timestep in, a prediction out: a conditioned network under classifier-free guidance.

    What a network of ours makes of the conditions (keys and values of its cross-attentions) is computed once, and not
    at every step. A network of diffusers, or a compiled one, is called as a whole.

    Args:
        network: any UNet of ours or diffusers'.
        conditioning: of B images; with active guidance of both, what to draw and what to keep away from.
        guidance: may be replaced between steps.
        change: what becomes of the guided prediction, such as a classifier's guidance.
        lora_scale: how strongly the network's LoRAs act; None: as they are set.
        runner: runs the steps of a network that works in parts; None: they run as they are.
    """

    def __init__(
        self,
        network: Any,
        conditioning: GuidedConditioning,
        guidance: ClassifierFreeGuidance,
        change: ChangePrediction | None = None,
        lora_scale: float | None = None,
        runner: StepRunner | None = None,
    ) -> None:
        self.network, self.guidance, self.change, self.lora_scale = network, guidance, change, lora_scale
        self.in_parts = getattr(network, "works_in_parts", False) and not is_compiled_module(network)
        self.runner = runner if self.in_parts else None
        self.conditioning = conditioning

    @property
    def conditioning(self) -> GuidedConditioning:
        return self._conditioning

    @conditioning.setter
    def conditioning(self, value: GuidedConditioning) -> None:
        self._conditioning = value
        self._prepare()

    @property
    def joint_states(self) -> Tensor | None:
        """The text states as callbacks get them: of both sides of guidance, what to keep away from first."""
        return self._both[0].states

    def _prepare(self) -> None:
        joint, prepared = self._conditioning.joint, None
        if self.in_parts:
            with loras_at(self.lora_scale, self.network):
                prepared = self.network.prepare(joint)
        self._look_at_network()
        self._both = joint, prepared
        self._prepared_from = self._depends_on()
        count = self._conditioning.positive.batch_size
        guided = self._conditioning.negative is not None and count is not None
        rows = slice(count if guided else 0, None)
        self._positive = joint.select(rows), None if prepared is None else prepared.select(rows)

    def _depends_on(self) -> list[Any]:
        if not self.in_parts:
            return []
        versions = [version(tensor) for _, tensor in self._both[0].items()]
        with loras_at(None, self.network):
            return [*versions, *weights_state(self.network.prepared_by())]

    def refresh(self) -> None:
        """Compute anew what was computed once, if conditions, weights or LoRAs were changed between steps."""
        if self._depends_on() != self._prepared_from:
            self._prepare()
        else:
            self._look_at_network()

    def _look_at_network(self) -> None:
        """Know what a recorded step depends on."""
        if self.runner is not None:
            with loras_at(self.lora_scale, self.network):
                self._state = network_state(self.network)

    def __call__(self, latents: Tensor, timestep: Any, guided: bool = True) -> Tensor:
        """(B, C, h, w) -> the guided prediction, (B, C, h, w).

        After it come learned variances, if the network has any, as they are with the prompt: guidance shifts the mean.
        With ``guided=False`` it is the plain prediction with the prompt.

        Raises:
            ValueError: guidance is active, and nothing says what to keep away from.
        """
        prediction = self._guided(latents, timestep) if guided and self.guidance.active else None
        if prediction is None:
            prediction = self._predict(*self._positive, latents, timestep)
        return prediction if self.change is None else self.change(prediction, latents, timestep)

    def _guided(self, latents: Tensor, timestep: Any) -> Tensor:
        if self._conditioning.negative is None:
            raise ValueError(
                f"a guidance scale of {self.guidance.scale} needs embeddings of the negative prompt too; a callback "
                f"that leaves them out must also set the scale to 1"
            )
        without, with_prompt = self._predict(*self._both, torch.cat([latents] * 2), timestep).chunk(2)
        if with_prompt.shape[1] != 2 * latents.shape[1]:
            return self.guidance(without, with_prompt)
        (without, _), (with_prompt, variance) = without.chunk(2, dim=1), with_prompt.chunk(2, dim=1)
        return torch.cat([self.guidance(without, with_prompt), variance], dim=1)

    def _predict(self, given: Conditioning, prepared: Any, latents: Tensor, timestep: Any) -> Tensor:
        """(B, C, h, w) -> the network's prediction, (B, C, h, w), or (B, 2C, h, w) with learned variances."""
        if given.channels is not None:
            latents = torch.cat([latents, given.channels], dim=1)
        if isinstance(timestep, Tensor):
            timestep = timestep.to(latents.device, non_blocking=True)  # or the GPU's work would be waited for
        with loras_at(self.lora_scale, self.network):
            if not self.in_parts:
                if type(self.network).__module__.startswith(DIFFUSERS_TRANSFORMERS):
                    timestep = torch.as_tensor(timestep, device=latents.device).reshape(-1).expand(len(latents))
                return self.network(latents, timestep=timestep, return_dict=False, **given.arguments())[0]
            time = self.network.embed_time(timestep, class_labels=given.labels, timestep_cond=given.guidance)
            if self.runner is not None:
                return self.runner(self.network, self._state, latents, time, prepared)
            return self.network.denoise(latents, time, prepared)


def loras_at(scale: float | None, network: Any) -> AbstractContextManager[Any]:
    """Within, the LoRAs of the network act as strongly as `scale` says; None: as they are set, in all threads."""
    if scale is not None:
        return lora_scaled([network], scale)
    return nullcontext() if getattr(network, "peft_config", None) is None else lora_lock(network)


def guidance_embedding(scales: Tensor, dim: int) -> Tensor:
    """Guidance scales (B,) -> (B, dim), for a UNet that guides itself: sinusoids of 1000 (scale - 1).

    On Distillation of Guided Diffusion Models (Meng et al. 2023), Sec. 3; the layout is that of diffusers' LCM.
    """
    return timestep_features((scales - 1) * 1000.0, dim, flip_sin_to_cos=False, freq_shift=1)


def weights_state(modules: Any) -> list[Any]:
    """What differs after the modules' weights were changed in place or replaced, or their LoRAs switched or scaled."""
    state: list[Any] = []
    for module in modules:
        for part in module.modules():
            scaling = getattr(part, "scaling", None)  # PEFT's: a LoRA layer's, by adapter
            if isinstance(scaling, dict):
                merged, active = getattr(part, "merged_adapters", ()), getattr(part, "active_adapters", ())
                state.append((dict(scaling), list(active), getattr(part, "disable_adapters", False), list(merged)))
        for weight in module.parameters():
            state.append((weight.data_ptr(), version(weight)))
    return state


def version(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place; None where torch does not count."""
    return None if tensor.is_inference() else tensor._version
