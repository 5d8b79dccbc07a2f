"""The objective of a discriminator, which an autoencoder is trained against."""

from latentdiff.models.discriminator import PatchDiscriminator, discriminator_loss, gradient_penalty
from latentdiff.training.objectives.objective import Objective, RealAndFake, Result
from latentdiff.training.settings import AutoencoderSettings


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
