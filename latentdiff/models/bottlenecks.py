"""What stands between encoder and decoder: a Gaussian (KL) or codes (VQ, Gumbel, FSQ), under one contract.

A bottleneck is a module that takes the encoder's output, (B, C', h, w), and returns a ``BottleneckOutput``: latents,
named losses, statistics. A trainer adds up the losses, each times its own weight, and need not know which bottleneck it
trains.
"""

import math
from collections.abc import Sequence
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
    """Scalars to minimise, by name."""
    statistics: dict[str, Tensor]
    """Scalars to report, by name; without gradient."""
    indices: Tensor | None = None
    """(B, h, w) int64, the codes; None without a codebook."""


class DiagonalGaussianDistribution:
    """The encoder's posterior q(z|x), a normal distribution with its own mean and variance for every latent element.

    Args:
        parameters: (B, 2C, h, w), mean and log-variance in this order; the log-variance is clamped to [-30, 20].
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

    Loss ``kl``: summed over C, h, w, mean over the batch, as in Latent Diffusion (Rombach et al. 2022, Appendix G). It
    therefore grows with the size of the latents. The paper's weight, about 1e-6, is relative to a reconstruction loss
    summed over pixel values; who takes their mean divides this by their number.
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


MOST_DISTANCES = 1 << 24  # in memory at a time


class VectorQuantizer(nn.Module):
    """Every latent vector replaced by the nearest of a codebook. VQ-VAE (van den Oord et al. 2017), Eq. 1 to 3.

    Losses ``commitment``, which pulls the encoder's output to the codes, and ``codebook``, which pulls the codes to the
    encoder's output. Their weights are those of Latent Diffusion's and diffusers' models, 1 and ``beta``; the paper has
    them the other way round. Their sum is diffusers' ``commit_loss``.
    Statistics: ``perplexity`` (the exponential of the entropy of the codes in this batch) and ``codes_used``, the
    share of the codebook that occurs in it.

    Attributes:
        distance: "euclidean", or "cosine" to learn on the unit sphere (ViT-VQGAN, Yu et al. 2022, Sec. 3.2). It
            matters in training only: with codes of length 1 both distances choose the same code, and so does diffusers.

    Raises:
        ValueError: there are no codes, or they have no dimensions.
    """

    def __init__(self, codes: int, dim: int, beta: float = 0.25) -> None:
        super().__init__()
        if codes < 1 or dim < 1:
            raise ValueError(f"a codebook needs at least one code and one dimension, not {codes} of {dim}")
        self.codes, self.beta = codes, beta
        self.distance = "euclidean"
        self.embedding = nn.Embedding(codes, dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / codes, 1.0 / codes)

    def nearest(self, h: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, h, w), the index of the nearest code to each vector."""
        vectors = h.permute(0, 2, 3, 1).flatten(0, 2).float()  # (B h w, C)
        # Through the module, not its weight: offloaded weights are present only while their module is called.
        codes = self.embedding(torch.arange(self.embedding.num_embeddings, device=h.device)).float()
        if self.distance == "cosine":
            vectors, codes = F.normalize(vectors, dim=1), F.normalize(codes, dim=1)
        rows = max(MOST_DISTANCES // len(codes), 32)
        indices = [torch.cdist(part, codes).argmin(dim=1) for part in vectors.split(rows)]
        return torch.cat(indices).view(h.shape[0], *h.shape[2:])

    def lookup(self, indices: Tensor) -> Tensor:
        """(B, h, w) -> (B, C, h, w)."""
        codes = self.embedding(indices).permute(0, 3, 1, 2)
        return F.normalize(codes, dim=1) if self.distance == "cosine" else codes

    def forward(self, h: Tensor, sample: bool = True, generator: Generators = None) -> BottleneckOutput:
        """(B, C, h, w) -> latents (B, C, h, w). Nothing is random; ``sample`` and ``generator`` are unused."""
        if self.distance == "cosine":
            h = F.normalize(h, dim=1)
        indices = self.nearest(h)
        codes = self.lookup(indices)
        losses = {
            "commitment": F.mse_loss(h, codes.detach()),
            "codebook": self.beta * F.mse_loss(codes, h.detach()),
        }
        latents = h + (codes - h).detach()  # straight through: the decoder's gradient passes to the encoder
        return BottleneckOutput(latents, losses, usage(indices, self.embedding.num_embeddings), indices)


class GumbelQuantizer(nn.Module):
    """Codes sampled from the encoder's distribution, relaxed so that gradients pass. DALL-E's discrete VAE.

    Zero-Shot Text-to-Image Generation (Ramesh et al. 2021), Sec. 2.1 and App. A.2; Categorical Reparameterization with
    Gumbel-Softmax (Jang et al. 2017), Eq. 2. In evaluation, or without ``sample``, the likeliest code is taken.

    Loss ``uniform_kl``: the divergence of the encoder's distribution from the uniform one, in nats, mean over places.
    Statistics: as `VectorQuantizer`'s, of the likeliest codes.

    Attributes:
        temperature: of the relaxation, above 0; the smaller the nearer to single codes.
        hard: one code forward, the relaxed ones' gradient backward (straight through).
    """

    def __init__(self, in_channels: int, codes: int, dim: int) -> None:
        super().__init__()
        if codes < 1 or dim < 1:
            raise ValueError(f"a codebook needs at least one code and one dimension, not {codes} of {dim}")
        self.codes, self.temperature, self.hard = codes, 1.0, False
        self.proj = nn.Conv2d(in_channels, codes, 1)
        self.embedding = nn.Embedding(codes, dim)

    def nearest(self, h: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, h, w), the likeliest code at each position."""
        return self.proj(h).argmax(dim=1)

    def lookup(self, indices: Tensor) -> Tensor:
        """(B, h, w) -> (B, D, h, w)."""
        return self.embedding(indices).permute(0, 3, 1, 2)

    def forward(self, h: Tensor, sample: bool = True, generator: Generators = None) -> BottleneckOutput:
        """(B, C, h, w) -> latents (B, D, h, w): of drawn codes in training with ``sample``, else of the likeliest."""
        logits = self.proj(h)  # (B, K, h, w)
        indices = logits.argmax(dim=1)
        log_q = logits.float().log_softmax(dim=1)
        uniform_kl = (log_q.exp() * (log_q + math.log(logits.shape[1]))).sum(dim=1).mean()
        if self.training and sample:
            noise = -torch.empty_like(log_q).exponential_().log() if generator is None else gumbel(log_q, generator)
            soft = ((log_q + noise) / self.temperature).softmax(dim=1)
            if self.hard:
                one = F.one_hot(soft.argmax(dim=1), soft.shape[1]).movedim(-1, 1).to(soft)
                soft = one + soft - soft.detach()
            codes = self.embedding(torch.arange(logits.shape[1], device=h.device))
            latents = torch.einsum("bkhw,kd->bdhw", soft.to(codes.dtype), codes)
        else:
            latents = self.lookup(indices)
        return BottleneckOutput(latents, {"uniform_kl": uniform_kl}, usage(indices, logits.shape[1]), indices)


def gumbel(like: Tensor, generator: torch.Generator | list[torch.Generator]) -> Tensor:
    """Gumbel noise of the shape of `like`, each image's from its own generator of a list."""
    shape = like.shape
    if isinstance(generator, list):
        parts = [torch.empty(shape[1:], device=g.device).exponential_(generator=g) for g in generator]
        drawn = torch.stack([part.to(like.device) for part in parts])
    else:
        drawn = torch.empty(shape, device=generator.device).exponential_(generator=generator).to(like.device)
    return -drawn.log()


class FiniteScalarQuantizer(nn.Module):
    """Every channel rounded to one of a few levels; the codes are all combinations, and none can die.

    Finite Scalar Quantization (Mentzer et al. 2023), Eq. 1 and 2 and App. A.1. No losses.
    Statistics: as `VectorQuantizer`'s.

    Args:
        levels: of each channel, 2 or more, such as (8, 5, 5, 5) for 1000 codes.
    """

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        if not levels or any(level < 2 for level in levels):
            raise ValueError(f"levels must be numbers of 2 or more, not {tuple(levels)}")
        self.levels = tuple(levels)
        self.codes = math.prod(levels)

    def _of(self, values: Sequence[float], like: Tensor) -> Tensor:
        return torch.tensor(values, device=like.device, dtype=torch.float32).view(-1, 1, 1)

    def bound(self, h: Tensor) -> Tensor:
        """Any values (B, C, h, w) -> the same shape, channel i between its lowest and its highest level, float32."""
        half = self._of([(level - 1) * (1 - 1e-3) / 2 for level in self.levels], h)
        offset = self._of([0.5 * (level % 2 == 0) for level in self.levels], h)
        return torch.tanh(h.float() + torch.tan(offset / half)) * half - offset

    def digits(self, h: Tensor) -> Tensor:
        """(B, C, h, w) -> whole numbers of the same shape, channel i from 0 to levels[i] - 1."""
        return self.bound(h).round() + self._of([level // 2 for level in self.levels], h)

    def nearest(self, h: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, h, w), the index of the combination of levels; the first channel is the lowest digit."""
        return (self.digits(h) * self._of(self._places(), h)).sum(dim=1).long()

    def lookup(self, indices: Tensor) -> Tensor:
        """(B, h, w) -> (B, C, h, w), float32 in [-1, 1]."""
        digits = [indices // place % level for place, level in zip(self._places(), self.levels, strict=True)]
        halves = self._of([level // 2 for level in self.levels], indices)
        return (torch.stack(digits, dim=1) - halves) / halves

    def _places(self) -> list[int]:
        return [math.prod(self.levels[:i]) for i in range(len(self.levels))]

    def forward(self, h: Tensor, sample: bool = True, generator: Generators = None) -> BottleneckOutput:
        """(B, C, h, w) -> latents of the same shape in [-1, 1]. Nothing is random."""
        bounded = self.bound(h)
        rounded = bounded + (bounded.round() - bounded).detach()
        latents = (rounded / self._of([level // 2 for level in self.levels], h)).to(h.dtype)
        indices = self.nearest(h)
        return BottleneckOutput(latents, {}, usage(indices, self.codes), indices)


@torch.no_grad()
def usage(indices: Tensor, codes: int) -> dict[str, Tensor]:
    """Of the indices of one batch: ``perplexity``, and ``codes_used`` as a share of all `codes`."""
    counts = torch.zeros(codes, device=indices.device)
    counts = counts.scatter_add(0, indices.flatten(), torch.ones(indices.numel(), device=indices.device))
    shares = counts / indices.numel()  # (codes,)
    entropy = -torch.xlogy(shares, shares).sum()
    return {"perplexity": entropy.exp(), "codes_used": (counts > 0).float().mean()}
