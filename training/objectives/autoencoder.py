"""The objectives of an autoencoder (likeness, bottleneck, discriminator) and of the discriminator against it."""

import math
from typing import Any

import torch
from torch import Tensor

from latentdiff.models.bottlenecks import GumbelQuantizer
from latentdiff.models.codebook_learning import CodebookLearner
from latentdiff.models.codes import LogitLaplace
from latentdiff.models.discriminator import PatchDiscriminator, adversarial_loss, discriminator_loss, gradient_penalty
from latentdiff.training.batch.batch_types import PixelBatch
from latentdiff.training.objectives.objective import Objective, RealAndFake, Result
from latentdiff.training.objectives.perceptual import PerceptualLoss
from latentdiff.training.settings import AutoencoderSettings

Figures = dict[str, Tensor]


class AutoencoderObjective(Objective[PixelBatch]):
    """The loss of an autoencoder: reconstruction (L1, L2, likelihood, perceptual), bottleneck, and discriminator.

    The bottleneck's losses carry their own names; ``kl``, ``commitment`` and ``uniform_kl`` have weights in the
    settings, and a ``codebook`` that learns by moving averages needs no loss. The likeness is a mean over pixel values;
    ``kl``, a sum over latents, is divided by their number, so that its weight is the one beside a sum over them: Latent
    Diffusion's (Rombach et al. 2022, Appendix G).

    Figures: every part of the loss before its weight, what the bottleneck says, and with a discriminator
    ``adversarial_loss`` and ``adaptive_weight``, the balance found for it.

    Args:
        discriminator: adds its loss; it is trained by an objective of its own.
    """

    def __init__(
        self, autoencoder: Any, settings: AutoencoderSettings, discriminator: PatchDiscriminator | None = None
    ) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.settings = settings
        self._discriminator = [discriminator]  # in a list, so that it is no part of this module
        self.weights = {
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

    @property
    def subject(self) -> Any:
        """What reconstructs pictures, called as an autoencoder."""
        return self.autoencoder

    def training_loss(self, batch: PixelBatch) -> Result:
        """The loss, and without the discriminator's part the watched one."""
        self._anneal(batch.step)
        output = self.subject(batch.pixels, sample_posterior=True, generator=batch.generators())
        if self.learner is not None and self.training:
            self.learner.observe(output.encoded, output.bottleneck.indices)
        likeness, figures = self._likeness(output, batch.pixels)
        loss = likeness
        weights = {**self.weights, "kl": self.settings.kl_weight / batch.pixels[0].numel()}
        for name, value in output.bottleneck.losses.items():
            loss = loss + weights[name] * value.float()
            figures[name] = value.detach()
        figures |= output.bottleneck.statistics
        discriminator = self._discriminator[0]
        if discriminator is None or batch.step < self.settings.discriminator_start:
            return Result(loss, loss.detach(), figures)
        adversarial = adversarial_loss(discriminator.judge(output.sample).float())
        balance = self._balance(likeness, adversarial)
        figures |= {"adversarial_loss": adversarial.detach(), "adaptive_weight": balance}
        whole = loss + self.settings.discriminator_weight * balance * adversarial
        return Result(whole, loss.detach(), figures, RealAndFake(batch.pixels, output.sample.detach()))

    def _likeness(self, output: Any, pixels: Tensor) -> tuple[Tensor, Figures]:
        """How far the reconstruction is from the pixels, weighted, and the parts of that."""
        sample = output.sample
        difference = sample.float() - pixels
        l1, l2 = difference.abs().mean(), difference.square().mean()
        figures = {"l1": l1.detach(), "l2": l2.detach()}
        loss = self.settings.l1_weight * l1 + self.settings.l2_weight * l2
        if self.settings.logit_laplace_weight > 0:
            nll = LogitLaplace(output.raw).nll(pixels).mean()
            figures["nll"] = nll.detach()
            loss = loss + self.settings.logit_laplace_weight * nll
        if self.perceptual is not None:
            distance = self.perceptual(sample, pixels)
            figures["perceptual"] = distance.detach()
            loss = loss + self.settings.perceptual_weight * distance
        return loss, figures

    def _balance(self, likeness: Tensor, adversarial: Tensor) -> Tensor:
        """How much weaker the discriminator's gradient is at the last layer. VQGAN (Esser et al. 2021), Eq. 7.

        Held below ``adaptive_weight_limit``: where the likeness is nearly perfect, or the discriminator's gradient
        nearly gone, the quotient means nothing and grows without bound.
        """
        if not self.settings.adaptive_weight or not self.training:
            return likeness.new_ones(())
        last = self.autoencoder.last_weight
        of_likeness, of_adversarial = (
            torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (likeness, adversarial)
        )
        return (of_likeness / (of_adversarial + 1e-6)).clamp(max=self.settings.adaptive_weight_limit).detach()

    def _anneal(self, step: int) -> None:
        """DALL-E's discrete VAE (Ramesh et al. 2021), App. A.2."""
        quantizer = self.autoencoder.bottleneck
        if isinstance(quantizer, GumbelQuantizer):
            first, last = self.settings.gumbel_temperature, self.settings.gumbel_temperature_end
            share = min(step / self.settings.gumbel_steps, 1.0)
            quantizer.temperature = last + (first - last) * 0.5 * (1 + math.cos(math.pi * share))

    def after_update(self, made: bool) -> None:
        """Let the codebook learn from the vectors of the update."""
        if self.learner is not None:
            self.learner.update() if made else self.learner.forget()

    def recent_figures(self) -> dict[str, float]:
        """How many codes are in use; see `CodebookLearner.statistics`."""
        return {} if self.learner is None else self.learner.statistics()


class DiscriminatorObjective(Objective[RealAndFake]):
    """The loss by which a discriminator learns to distinguish real patches from reconstructed ones.

    Figures: ``discriminator_loss``, the mean logits of both, ``discriminator_accuracy`` (the share of patches that it
    classifies correctly) and ``r1``, the gradient penalty before its weight.
    """

    def __init__(self, discriminator: PatchDiscriminator, settings: AutoencoderSettings) -> None:
        super().__init__()
        self.discriminator = discriminator
        self.settings = settings

    def training_loss(self, batch: RealAndFake) -> Result:
        """The loss of real and reconstructed pictures, and the penalty if there is one."""
        penalised = self.settings.r1_weight > 0
        real = batch.real.detach().requires_grad_(penalised)
        of_real, of_fake = self.discriminator(real).float(), self.discriminator(batch.fake).float()
        loss = discriminator_loss(of_real, of_fake, self.settings.discriminator_loss)
        accuracy = 0.5 * ((of_real > 0).float().mean() + (of_fake < 0).float().mean())
        figures = {
            "discriminator_loss": loss.detach(),
            "logits_real": of_real.mean().detach(),
            "logits_fake": of_fake.mean().detach(),
            "discriminator_accuracy": accuracy.detach(),
        }
        if penalised:
            penalty = gradient_penalty(of_real, real)
            figures["r1"] = penalty.detach()
            loss = loss + 0.5 * self.settings.r1_weight * penalty
        return Result(loss, loss.detach(), figures)
