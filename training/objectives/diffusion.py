"""The objectives of what learns from noisy latents: denoisers and classifiers."""

import torch.nn.functional as F
from accelerate.utils import gather
from torch import Tensor, nn

from latentdiff.conditioning import Conditioning
from latentdiff.diffusion.process import Process
from latentdiff.diffusion.timesteps import LossSecondMoment
from latentdiff.text.two_encoders import penultimate, side_by_side, zeroed
from latentdiff.training.batch.batch_types import DiffusionBatch, Tokens
from latentdiff.training.objectives.objective import Objective, Result


class TwoTextEncoders(nn.Module):
    """SDXL's text encoders as one module, the first before the second."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, tokens: Tokens) -> Conditioning:
        """States (B, L, D1 + D2), pooled embeddings (B, D') and sizes (B, 6)."""
        assert tokens.second is not None
        found = side_by_side([penultimate(self.first, tokens.input_ids), penultimate(self.second, tokens.second)])
        found = found if tokens.empty is None else zeroed(found, tokens.empty)
        return found.replace(time_ids=tokens.time_ids)


class DenoiserObjective(Objective[DiffusionBatch]):
    """The loss of a diffusion process, which says how noise is mixed in and what is predicted.

    Args:
        denoiser: called with noisy latents, times and the arguments of a `Conditioning`; ``.sample`` is the prediction.
        process: whose loss it is.
        min_snr_gamma: weigh the error of the prediction by min-SNR-gamma (Hang et al. 2023); None: not at all. A
            bound is not weighted.
        text_encoder: of transformers, where the text is trained; batches then hold `Tokens`. It is part of this module
            so that what wraps the module, for several processes, sees its parameters.
        p2_gamma: weigh the error by P2 (Choi et al. 2022) with k = 1 instead; 0: not at all.
        timestep_sampler: draws the timesteps in training, by the losses of those before.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        process: Process,
        min_snr_gamma: float | None = None,
        text_encoder: nn.Module | None = None,
        *,
        p2_gamma: float = 0.0,
        timestep_sampler: LossSecondMoment | None = None,
    ) -> None:
        super().__init__()
        self.denoiser, self.process = denoiser, process
        self.min_snr_gamma, self.p2_gamma = min_snr_gamma, p2_gamma
        self.text_encoder, self.timestep_sampler = text_encoder, timestep_sampler
        self._seen: list[tuple[Tensor, Tensor]] = []  # timesteps and losses of the passes of an update

    def training_loss(self, batch: DiffusionBatch) -> Result:
        """The mean over B of loss_weight times each picture's loss."""
        if self.timestep_sampler is None:
            loss = self.per_sample(batch, batch.times(self.process)).mean()
            return Result(loss, loss.detach(), {})
        timesteps, weights = (drawn.to(batch.latents.device) for drawn in self.timestep_sampler.draw(batch.draws))
        losses = self.per_sample(batch, timesteps)
        self._seen.append((timesteps, losses.detach()))
        loss = (losses * weights).mean()
        return Result(loss, loss.detach(), {})

    def held_out_loss(self, batch: DiffusionBatch) -> Result:
        """``val_loss``: squared errors without any weight and without the bound, which can be compared between runs."""
        times = batch.times(self.process, held_out=True)
        losses = self.process.error(self.predict(batch, times), batch.latents, batch.noise, times, **batch.masked())
        return Result(losses.mean(), losses.mean().detach(), {"val_loss": losses})

    def after_update(self, made: bool) -> None:
        """Let the sampler of timesteps know the losses of the update."""
        if self.timestep_sampler is not None:
            for timesteps, losses in self._seen if made else []:
                self.timestep_sampler.update(gather(timesteps), gather(losses))
        self._seen.clear()

    def per_sample(self, batch: DiffusionBatch, times: Tensor) -> Tensor:
        """Each picture's loss at `times` (B,), with its weights: (B,) float32."""
        prediction = self.predict(batch, times)
        weight: Tensor | float = 1.0
        if self.p2_gamma:
            weight = self.process.p2_weight(times, self.p2_gamma)
        elif self.min_snr_gamma is not None:
            weight = self.process.min_snr_weight(times, self.min_snr_gamma)
        losses = self.process.loss(prediction, batch.latents, batch.noise, times, weight, **batch.masked())
        return losses * batch.loss_weight

    def predict(self, batch: DiffusionBatch, times: Tensor) -> Tensor:
        """What the network makes of the noisy latents: (B, C, h, w) float32, or more channels if the process asks.

        Raises:
            ValueError: another number of channels, or tokens without a text encoder.
        """
        noisy = self.process.mix(batch.latents, batch.noise, times)
        given = self.conditioning(batch.condition).arguments()
        prediction = self.denoiser(noisy, timestep=self.process.model_time(times), **given).sample.float()
        channels = batch.latents.shape[1]
        wanted = self.process.prediction_channels(channels)
        if prediction.shape[1] != wanted:
            raise ValueError(
                f"the network gives {prediction.shape[1]} channels for latents with {channels}; the process "
                f"({self.process.name}) needs out_channels={wanted}: twice as many where it learns variances"
            )
        return prediction

    def conditioning(self, condition: Conditioning | Tokens) -> Conditioning:
        """What the denoiser is given: as it is, or the text states of tokens."""
        if isinstance(condition, Conditioning):
            return condition
        if self.text_encoder is None:
            raise ValueError("the batch holds tokens, and this objective has no text_encoder to read them")
        if isinstance(self.text_encoder, TwoTextEncoders):
            found: Conditioning = self.text_encoder(condition)
            return found
        states = self.text_encoder(condition.input_ids, attention_mask=condition.attention_mask).last_hidden_state
        return Conditioning(states=states)


class ClassifierObjective(Objective[DiffusionBatch]):
    """Cross-entropy of the class, in nats, of pictures with noise as the process mixes it in.

    ADM (Dhariwal & Nichol 2021), Sec. 4.3.

    Args:
        classifier: called with (noisy latents, timesteps).
        process: that of the model to be guided.
    """

    def __init__(self, classifier: nn.Module, process: Process) -> None:
        super().__init__()
        self.classifier, self.process = classifier, process

    def training_loss(self, batch: DiffusionBatch) -> Result:
        """The mean over B of loss_weight times each picture's loss."""
        losses, _ = self._losses(batch, batch.times(self.process))
        loss = (losses * batch.loss_weight).mean()
        return Result(loss, loss.detach(), {})

    def held_out_loss(self, batch: DiffusionBatch) -> Result:
        """``val_loss``, and ``val_accuracy``: whether the class was found."""
        losses, found = self._losses(batch, batch.times(self.process, held_out=True))
        return Result(losses.mean(), losses.mean().detach(), {"val_loss": losses, "val_accuracy": found.to(losses)})

    def _losses(self, batch: DiffusionBatch, times: Tensor) -> tuple[Tensor, Tensor]:
        """Of each picture the loss, (B,) float32, and whether its class is the likeliest, (B,) bool."""
        assert isinstance(batch.condition, Conditioning)
        labels = batch.condition.labels
        assert labels is not None
        noisy = self.process.mix(batch.latents, batch.noise, times)
        logits = self.classifier(noisy, self.process.model_time(times))
        return F.cross_entropy(logits.float(), labels, reduction="none"), logits.argmax(1) == labels
