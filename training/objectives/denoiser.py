"""The objective of a denoiser: the losses of the diffusion process."""

from accelerate.utils import gather
from torch import Tensor, nn

from latentdiff.diffusion import GaussianDiffusion
from latentdiff.diffusion.bounds import gaussian_log_likelihood
from latentdiff.diffusion.losses import LogLikelihood, simple_loss, training_losses
from latentdiff.diffusion.timesteps import LossSecondMoment
from latentdiff.training.batch.batches import Conditioning, DiffusionBatch, Tokens
from latentdiff.training.objectives.objective import Objective, Result


class DenoiserObjective(Objective[DiffusionBatch]):
    """The loss that a process names: DDPM's simple one, the hybrid one of learned variances, or another.

    With ``variance_type="learned_range"`` the network gives 2C channels.

    Args:
        denoiser: called with latents, timesteps and the fields of a `Conditioning`; ``.sample`` is the prediction.
        process: says what is predicted.
        min_snr_gamma: weigh the error of the prediction by min-SNR-gamma (Hang et al. 2023); None: not at all. A
            bound is not weighted.
        text_encoder: of transformers, where the text is trained; batches then hold `Tokens`. It is part of this module
            so that what wraps the module, for several processes, sees its parameters.
        p2_gamma: weigh the error by P2 (Choi et al. 2022) with k = 1 instead; 0: not at all.
        timestep_sampler: draws the timesteps in training, by the losses of those before.
        log_likelihood: of the last step of a bound; the default suits latents.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        process: GaussianDiffusion,
        min_snr_gamma: float | None = None,
        text_encoder: nn.Module | None = None,
        *,
        p2_gamma: float = 0.0,
        timestep_sampler: LossSecondMoment | None = None,
        log_likelihood: LogLikelihood = gaussian_log_likelihood,
    ) -> None:
        super().__init__()
        self.denoiser, self.process = denoiser, process
        self.min_snr_gamma, self.p2_gamma = min_snr_gamma, p2_gamma
        self.text_encoder, self.timestep_sampler = text_encoder, timestep_sampler
        self.log_likelihood = log_likelihood
        self._seen: list[tuple[Tensor, Tensor]] = []  # timesteps and losses of the passes of an update

    def training_loss(self, batch: DiffusionBatch) -> Result:
        """The mean over B of loss_weight times each picture's loss."""
        if self.timestep_sampler is None:
            loss = self.per_sample(batch, batch.timesteps(self.process)).mean()
            return Result(loss, loss.detach(), {})
        timesteps, weights = (drawn.to(batch.latents.device) for drawn in self.timestep_sampler.draw(batch.draws))
        losses = self.per_sample(batch, timesteps)
        self._seen.append((timesteps, losses.detach()))
        loss = (losses * weights).mean()
        return Result(loss, loss.detach(), {})

    def held_out_loss(self, batch: DiffusionBatch) -> Result:
        """``val_loss``: squared errors without any weight and without the bound, which can be compared between runs."""
        timesteps = batch.timesteps(self.process)
        prediction = self.predict(batch, timesteps)
        losses = simple_loss(self.process, prediction, batch.latents, timesteps, batch.noise)
        return Result(losses.mean(), losses.mean().detach(), {"val_loss": losses})

    def after_update(self, made: bool) -> None:
        """Let the sampler of timesteps know the losses of the update."""
        if self.timestep_sampler is not None:
            for timesteps, losses in self._seen if made else []:
                self.timestep_sampler.update(gather(timesteps), gather(losses))
        self._seen.clear()

    def per_sample(self, batch: DiffusionBatch, timesteps: Tensor) -> Tensor:
        """Each picture's loss at `timesteps` (B,), with its weights: (B,) float32."""
        prediction = self.predict(batch, timesteps)
        weight: Tensor | float = 1.0
        if self.p2_gamma:
            weight = self.process.p2_weight(timesteps, self.p2_gamma)
        elif self.min_snr_gamma is not None:
            weight = self.process.min_snr_weight(timesteps, self.min_snr_gamma)
        losses = training_losses(
            self.process, prediction, batch.latents, timesteps, batch.noise, weight, self.log_likelihood
        )
        return losses * batch.loss_weight

    def predict(self, batch: DiffusionBatch, timesteps: Tensor) -> Tensor:
        """What the network makes of the noisy latents: (B, C, h, w) float32, or 2C channels with the variances.

        Raises:
            ValueError: another number of channels, or tokens without a text encoder.
        """
        noisy = self.process.q_sample(batch.latents, timesteps, batch.noise)
        prediction = self.denoiser(noisy, timesteps, **self.conditioning(batch.condition).arguments()).sample.float()
        wanted = batch.latents.shape[1] * (2 if self.process.learns_variance else 1)
        if prediction.shape[1] != wanted:
            raise ValueError(
                f"the network gives {prediction.shape[1]} channels for latents with {batch.latents.shape[1]}; the "
                f"process has variance_type={self.process.variance_type!r}, which needs out_channels={wanted}"
            )
        return prediction

    def conditioning(self, condition: Conditioning | Tokens) -> Conditioning:
        """What the denoiser is given: as it is, or the text states of tokens."""
        if isinstance(condition, Conditioning):
            return condition
        if self.text_encoder is None:
            raise ValueError("the batch holds tokens, and this objective has no text_encoder to read them")
        states = self.text_encoder(condition.input_ids, attention_mask=condition.attention_mask).last_hidden_state
        return Conditioning(encoder_hidden_states=states)
