"""What an autoencoder is trained for: likeness, what its bottleneck asks for, and to deceive a judge of patches."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.models.bottlenecks import GumbelQuantizer
from latentdiff.models.codebooks import CodebookLearner
from latentdiff.models.discriminator import PatchDiscriminator, deceiving_loss, gradient_penalty, judging_loss
from latentdiff.models.logit_laplace import LogitLaplace
from latentdiff.training.config import AutoencoderSettings
from latentdiff.training.perceptual import PerceptualLoss


class AutoencoderObjective(nn.Module):
    """The loss of an autoencoder: reconstruction (L1, L2, likelihood, perceptual), bottleneck, and discriminator.

    The bottleneck's losses carry their own names; ``kl``, ``commitment`` and ``uniform_kl`` have weights in the
    settings, and a ``codebook`` that learns by moving averages needs no loss.

    Attributes:
        statistics: of the last pass, by name: every part of the loss before its weight, what the bottleneck says, and
            the balance found for the discriminator.
    """

    def __init__(
        self, autoencoder: Any, settings: AutoencoderSettings, discriminator: PatchDiscriminator | None = None
    ) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.settings = settings
        self._discriminator = [discriminator]  # in a list: it is trained by itself
        self.statistics: dict[str, Tensor] = {}
        self.weights = {
            "kl": settings.kl_weight,
            "commitment": settings.commitment_weight,
            "codebook": float(settings.codebook == "learned"),
            "uniform_kl": settings.gumbel_kl_weight,
        }
        self.perceptual: PerceptualLoss | None = None
        if settings.perceptual_weight > 0:
            self.perceptual = PerceptualLoss(settings.perceptual_network)
        self.learner: CodebookLearner | None = None
        if settings.kind == "vq":
            autoencoder.quantize.distance = settings.codebook_distance
            decay = settings.codebook_decay if settings.codebook == "ema" else None
            self.learner = CodebookLearner(
                autoencoder.quantize, decay, settings.codebook_start, settings.codebook_restart
            )

    def forward(self, pixels: Tensor, generator: list[torch.Generator] | None = None, step: int = 0) -> Any:
        """One pass.

        Args:
            pixels: (B, 3, H, W) in [-1, 1].
            generator: one for each picture.
            step: optimizer steps so far.

        Returns:
            The loss, a float32 scalar. With a discriminator: it; the same without its part; and, once it has begun,
            what `Judge` takes.
        """
        self._anneal(step)
        output = self.autoencoder(pixels, sample_posterior=True, generator=generator)
        if self.learner is not None and self.training:
            self.learner.observe(output.encoded, output.bottleneck.indices)
        likeness = self._likeness(output, pixels)
        loss = likeness
        for name, value in output.bottleneck.losses.items():
            loss = loss + self.weights[name] * value.float()
            self.statistics[name] = value.detach()
        self.statistics |= output.bottleneck.statistics
        discriminator = self._discriminator[0]
        if discriminator is None:
            return loss
        if step < self.settings.discriminator_start:
            return loss, loss, None
        deceiving = deceiving_loss(discriminator.judge(output.sample).float())
        balance = self._balance(likeness, deceiving)
        self.statistics |= {"deceiving": deceiving.detach(), "adaptive_weight": balance}
        whole = loss + self.settings.discriminator_weight * balance * deceiving
        return whole, loss, (pixels, output.sample.detach())

    def _likeness(self, output: Any, pixels: Tensor) -> Tensor:
        sample = output.sample
        difference = sample.float() - pixels
        l1, l2 = difference.abs().mean(), difference.square().mean()
        self.statistics = {"l1": l1.detach(), "l2": l2.detach()}
        loss = self.settings.l1_weight * l1 + self.settings.l2_weight * l2
        if self.settings.logit_laplace_weight > 0:
            nll = LogitLaplace(output.raw).nll(pixels).mean()
            self.statistics["nll"] = nll.detach()
            loss = loss + self.settings.logit_laplace_weight * nll
        if self.perceptual is not None:
            distance = self.perceptual(sample, pixels)
            self.statistics["perceptual"] = distance.detach()
            loss = loss + self.settings.perceptual_weight * distance
        return loss

    def _balance(self, likeness: Tensor, deceiving: Tensor) -> Tensor:
        """How much weaker the discriminator's gradient is at the last layer. VQGAN (Esser et al. 2021), Eq. 7.

        Held below ``adaptive_weight_limit``: where the likeness is nearly perfect, or the discriminator's gradient
        nearly gone, the quotient means nothing and grows without bound.
        """
        if not self.settings.adaptive_weight or not self.training:
            return likeness.new_ones(())
        last = self.autoencoder.decoder.conv_out.weight
        likes, deceives = (
            torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (likeness, deceiving)
        )
        return (likes / (deceives + 1e-6)).clamp(max=self.settings.adaptive_weight_limit).detach()

    def _anneal(self, step: int) -> None:
        """DALL-E's discrete VAE (Ramesh et al. 2021), App. A.2."""
        quantizer = self.autoencoder.bottleneck
        if isinstance(quantizer, GumbelQuantizer):
            first, last = self.settings.gumbel_temperature, self.settings.gumbel_temperature_end
            share = min(step / self.settings.gumbel_steps, 1.0)
            quantizer.temperature = last + (first - last) * 0.5 * (1 + math.cos(math.pi * share))

    def after_update(self, sound: bool) -> None:
        """Called by the run after every update; `sound`: it was made."""
        if self.learner is not None:
            self.learner.update() if sound else self.learner.forget()

    def report(self) -> dict[str, float]:
        """The statistics as plain numbers, and those of the codebook over its recent updates."""
        figures = {name: float(value) for name, value in self.statistics.items()}
        return figures | (self.learner.statistics() if self.learner is not None else {})


class Judge(nn.Module):
    """The discriminator's own objective.

    Attributes:
        statistics: of the last pass: its loss, its mean logits, the share of patches that it tells rightly.
    """

    def __init__(self, discriminator: PatchDiscriminator, settings: AutoencoderSettings) -> None:
        super().__init__()
        self.discriminator = discriminator
        self.settings = settings
        self.statistics: dict[str, Tensor] = {}

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """real, fake: (B, 3, H, W). Returns a float32 scalar."""
        penalised = self.settings.r1_weight > 0
        real = real.detach().requires_grad_(penalised)
        of_real, of_fake = self.discriminator(real).float(), self.discriminator(fake).float()
        loss = judging_loss(of_real, of_fake, self.settings.discriminator_loss)
        right = 0.5 * ((of_real > 0).float().mean() + (of_fake < 0).float().mean())
        self.statistics = {
            "judging": loss.detach(),
            "logits_real": of_real.mean().detach(),
            "logits_fake": of_fake.mean().detach(),
            "told_rightly": right.detach(),
        }
        if penalised:
            penalty = gradient_penalty(of_real, real)
            self.statistics["r1"] = penalty.detach()
            loss = loss + 0.5 * self.settings.r1_weight * penalty
        return loss

    def report(self) -> dict[str, float]:
        """The statistics as plain numbers."""
        return {name: float(value) for name, value in self.statistics.items()}
