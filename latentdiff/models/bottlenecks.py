"""What stands between encoder and decoder: a Gaussian (KL) or a codebook (VQ), under one contract.

A bottleneck is a module that takes what the encoder says, (B, C', h, w), and gives a ``BottleneckOutput``: latents,
named losses, statistics. A trainer adds up the losses it finds, each times its own weight, and need not know which
bottleneck it trains.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

Generators = torch.Generator | list[torch.Generator] | None


class BottleneckOutput(NamedTuple):
    latents: Tensor
    """(B, C, h, w), what the decoder receives; gradients reach the encoder through it."""
    losses: dict[str, Tensor]
    """Scalars to be minimised, by name."""
    statistics: dict[str, Tensor]
    """Scalars to look at, by name; without gradient."""


class DiagonalGaussianDistribution:
    """The encoder's posterior q(z|x), a normal distribution with its own mean and variance for every latent element.

    Args:
        parameters: (B, 2C, h, w), mean and log-variance one after the other; the log-variance is held in [-30, 20].
    """

    def __init__(self, parameters: Tensor) -> None:
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)  # (B, C, h, w) each
        self.logvar = logvar.clamp(-30.0, 20.0)

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        return torch.exp(self.logvar)

    def sample(self, generator: Generators = None) -> Tensor:
        """(B, C, h, w), drawn with ``generator``, or each image with its own of a list."""
        noise = randn_tensor(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + self.std * noise

    def mode(self) -> Tensor:
        return self.mean

    def kl(self, other: "DiagonalGaussianDistribution | None" = None) -> Tensor:
        """KL divergence from ``other``, or from the standard normal, in nats: (B,), summed over C, h, w.

        Auto-Encoding Variational Bayes (Kingma & Welling 2014), Appendix B.
        """
        if other is None:
            return 0.5 * (self.mean.square() + self.var - 1.0 - self.logvar).sum(dim=(1, 2, 3))
        distance = (self.mean - other.mean).square() / other.var
        return 0.5 * (distance + self.var / other.var - 1.0 - self.logvar + other.logvar).sum(dim=(1, 2, 3))

    def nll(self, sample: Tensor, dims: tuple[int, ...] = (1, 2, 3)) -> Tensor:
        """Negative log-likelihood of ``sample`` in nats, summed over ``dims``."""
        log_two_pi = 1.8378770664093453
        return 0.5 * (log_two_pi + self.logvar + (sample - self.mean).square() / self.var).sum(dim=dims)


class GaussianBottleneck(nn.Module):
    """Latents drawn from the posterior, and its divergence from the standard normal.

    Loss ``kl``: summed over C, h, w, mean over the batch, as in Latent Diffusion (Rombach et al. 2022, Appendix G),
    where it is weighted by about 1e-6. It therefore grows with the size of the latents.
    Statistics: ``latent_mean``, ``latent_std``, and ``posterior_std``, the mean width of the posterior.
    """

    def forward(self, moments: Tensor, sample: bool = True, generator: Generators = None) -> BottleneckOutput:
        """(B, 2C, h, w) -> latents (B, C, h, w): a draw, or the mean without ``sample``."""
        posterior = DiagonalGaussianDistribution(moments)
        latents = posterior.sample(generator) if sample else posterior.mode()
        in_float = DiagonalGaussianDistribution(moments.float())
        with torch.no_grad():
            statistics = {
                "latent_mean": latents.float().mean(),
                "latent_std": latents.float().std(),
                "posterior_std": in_float.std.mean(),
            }
        return BottleneckOutput(latents, {"kl": in_float.kl().mean()}, statistics)


class VectorQuantizer(nn.Module):
    """Every latent vector replaced by the nearest of a codebook. VQ-VAE (van den Oord et al. 2017), Eq. 1 to 3.

    Losses ``commitment``, which draws the encoder to its codes, and ``codebook``, which draws the codes to the
    encoder's output. The weights are those of Latent Diffusion's and diffusers' models, 1 and ``beta``; the paper has
    them the other way round. Their sum is diffusers' ``commit_loss``.
    Statistics: ``perplexity`` (the exponential of the entropy of the codes in this batch) and ``codes_used``, the
    share of the codebook that occurs in it.
    """

    def __init__(self, codes: int, dim: int, beta: float = 0.25) -> None:
        super().__init__()
        self.beta = beta
        self.embedding = nn.Embedding(codes, dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / codes, 1.0 / codes)

    def nearest(self, h: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, h, w), the index of the nearest code to each vector."""
        vectors = h.permute(0, 2, 3, 1).flatten(0, 2)  # (B h w, C)
        # Not the weight itself: where weights are offloaded, a module has them only while it is called.
        codes = self.embedding(torch.arange(self.embedding.num_embeddings, device=h.device))
        distances = torch.cdist(vectors.float(), codes.float())  # (B h w, codes)
        return distances.argmin(dim=1).view(h.shape[0], *h.shape[2:])

    def lookup(self, indices: Tensor) -> Tensor:
        """(B, h, w) -> (B, C, h, w)."""
        return self.embedding(indices).permute(0, 3, 1, 2)

    def forward(self, h: Tensor, sample: bool = True, generator: Generators = None) -> BottleneckOutput:
        """(B, C, h, w) -> latents (B, C, h, w). ``sample`` and ``generator`` are the contract's: nothing is random."""
        indices = self.nearest(h)
        codes = self.lookup(indices)
        losses = {
            "commitment": F.mse_loss(h, codes.detach()),
            "codebook": self.beta * F.mse_loss(codes, h.detach()),
        }
        latents = h + (codes - h).detach()  # straight through: the decoder's gradient passes to the encoder
        return BottleneckOutput(latents, losses, self.usage(indices))

    @torch.no_grad()
    def usage(self, indices: Tensor) -> dict[str, Tensor]:
        counts = torch.zeros(self.embedding.num_embeddings, device=indices.device)
        counts = counts.scatter_add(0, indices.flatten(), torch.ones(indices.numel(), device=indices.device))
        shares = counts / indices.numel()  # (codes,)
        entropy = -torch.xlogy(shares, shares).sum()
        return {"perplexity": entropy.exp(), "codes_used": (counts > 0).float().mean()}
