"""What a denoiser is trained for: the losses of the diffusion process, as a module whose forward returns a number."""

from typing import Any

from accelerate.utils import gather
from torch import Tensor, nn

from latentdiff.diffusion import GaussianDiffusion
from latentdiff.diffusion.bounds import gaussian_log_likelihood
from latentdiff.diffusion.losses import LogLikelihood, simple_loss, training_losses
from latentdiff.diffusion.timesteps import LossSecondMoment


class DenoiserObjective(nn.Module):
    """The loss that a process says: DDPM's simple one, the hybrid one of learned variances, or another.

    With ``variance_type="learned_range"`` the network gives 2C channels.

    Args:
        unet: called with latents, timesteps and ``encoder_hidden_states`` or ``class_labels``; ``.sample`` is the
            prediction.
        process: says what is predicted.
        min_snr_gamma: weigh the error of the prediction by min-SNR-gamma (Hang et al. 2023); None: not at all. A
            bound is not weighted.
        p2_gamma: weigh it by P2 (Choi et al. 2022) with k = 1 instead; 0: not at all.
        timestep_sampler: draws the timesteps in training, by the losses of those before.
        log_likelihood: of the last step of a bound; the default suits latents.
        text_encoder: of transformers, where the text is trained; `forward` then takes tokens. It is part of this
            module so that what wraps the module, for several processes, sees its parameters.
        takes_text: False: the network knows no text, but maybe classes.
    """

    def __init__(
        self,
        unet: nn.Module,
        process: GaussianDiffusion,
        min_snr_gamma: float | None = None,
        text_encoder: nn.Module | None = None,
        *,
        p2_gamma: float = 0.0,
        timestep_sampler: LossSecondMoment | None = None,
        log_likelihood: LogLikelihood = gaussian_log_likelihood,
        takes_text: bool = True,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.process = process
        self.min_snr_gamma, self.p2_gamma = min_snr_gamma, p2_gamma
        self.text_encoder = text_encoder
        self.timestep_sampler = timestep_sampler
        self.takes_text = takes_text
        self.log_likelihood = log_likelihood
        self._seen: list[tuple[Tensor, Tensor]] = []  # timesteps and losses of the passes of an update

    def forward(
        self,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        encoder_hidden_states: Tensor | None = None,
        loss_weight: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        timestep_draws: Tensor | None = None,
        class_labels: Tensor | None = None,
        *,
        held_out: bool = False,
    ) -> Tensor:
        """The loss of a batch, a float32 scalar: the mean over B of loss_weight times each picture's loss.

        Args:
            latents, noise: (B, C, h, w); clean scaled latents, and what is mixed into them.
            timesteps: (B,) long, in [0, T - 1].
            encoder_hidden_states: (B, L, D), where the text is not trained.
            loss_weight: (B,); by default 1.
            input_ids, attention_mask: (B, L), where it is.
            timestep_draws: (B,), uniform in [0, 1), from which a `timestep_sampler` draws other timesteps.
            class_labels: (B,) long, for a network that is told classes.
            held_out: return (B,) squared errors instead, without any weight and without the bound, which can be
                compared between runs. (An argument, because only ``forward`` passes through what wraps a module for
                several processes.)
        """
        drawn: Tensor | None = None
        if self.timestep_sampler is not None and timestep_draws is not None and not held_out:
            timesteps, drawn = (x.to(latents.device) for x in self.timestep_sampler.draw(timestep_draws))
        inputs = (
            latents,
            noise,
            timesteps,
            encoder_hidden_states,
            loss_weight,
            input_ids,
            attention_mask,
            class_labels,
        )
        losses = self.per_sample(*inputs, held_out=held_out)
        if drawn is not None:
            self._seen.append((timesteps, losses.detach()))
            losses = losses * drawn
        return losses if held_out else losses.mean()

    def after_update(self, sound: bool) -> None:
        """Called by the run after every update; `sound`: it was made."""
        if self.timestep_sampler is not None:
            for timesteps, losses in self._seen if sound else []:
                self.timestep_sampler.update(gather(timesteps), gather(losses))
        self._seen.clear()

    def per_sample(
        self,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        encoder_hidden_states: Tensor | None = None,
        loss_weight: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        class_labels: Tensor | None = None,
        *,
        held_out: bool = False,
    ) -> Tensor:
        """Each picture's loss, with its weights or, if `held_out`, without any: (B,) float32. Arguments as above."""
        told = {} if class_labels is None else {"class_labels": class_labels}
        if self.takes_text:
            told["encoder_hidden_states"] = self.text_states(encoder_hidden_states, input_ids, attention_mask)
        prediction = self.predict(latents, noise, timesteps, told)
        if held_out:
            return simple_loss(self.process, prediction, latents, timesteps, noise)
        weight: Tensor | float = 1.0
        if self.p2_gamma:
            weight = self.process.p2_weight(timesteps, self.p2_gamma)
        elif self.min_snr_gamma is not None:
            weight = self.process.min_snr_weight(timesteps, self.min_snr_gamma)
        losses = training_losses(self.process, prediction, latents, timesteps, noise, weight, self.log_likelihood)
        return losses if loss_weight is None else losses * loss_weight

    def text_states(
        self, encoder_hidden_states: Tensor | None, input_ids: Tensor | None, attention_mask: Tensor | None
    ) -> Tensor:
        """(B, L, D): those given, or those of the tokens.

        Raises:
            ValueError: there are neither, or both.
        """
        if (encoder_hidden_states is None) == (input_ids is None):
            raise ValueError("the objective needs either encoder_hidden_states or input_ids")
        if encoder_hidden_states is not None:
            return encoder_hidden_states
        if self.text_encoder is None:
            raise ValueError("input_ids were given to an objective that has no text_encoder")
        return self.text_encoder(input_ids, attention_mask=attention_mask).last_hidden_state

    def predict(self, latents: Tensor, noise: Tensor, timesteps: Tensor, told: dict[str, Tensor]) -> Tensor:
        """What the network makes of the noisy latents: (B, C, h, w) float32, or 2C channels with the variances.

        Raises:
            ValueError: another number of channels.
        """
        output: Any = self.unet(self.process.q_sample(latents, timesteps, noise), timesteps, **told)
        prediction = output.sample.float()
        wanted = latents.shape[1] * (2 if self.process.learns_variance else 1)
        if prediction.shape[1] != wanted:
            raise ValueError(
                f"the network gives {prediction.shape[1]} channels for latents with {latents.shape[1]}; the process "
                f"has variance_type={self.process.variance_type!r}, which needs out_channels={wanted}"
            )
        return prediction
