"""Warnings, while an autoencoder is trained, of what goes wrong in ways that its loss does not show."""

import logging
from collections.abc import Mapping

logger = logging.getLogger(__name__)

MEMORY = 0.9  # weight of the past, per record
PATIENCE = 20  # records before an alarm, and between two of the same


class Alarms:
    """Warns of a codebook that collapses, of a discriminator that wins, and of pictures that get worse under it.

    `add` takes the figures of every record, `add_validation` those of every validation.
    """

    def __init__(self) -> None:
        self._means: dict[str, float] = {}
        self._seen: dict[str, int] = {}
        self._quiet: dict[str, int] = {}
        self._best: float | None = None

    def add(self, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            seen = self._seen[name] = self._seen.get(name, 0) + 1
            weight = max(1 - MEMORY, 1 / seen)
            self._means[name] = self._means.get(name, 0.0) + weight * (value - self._means.get(name, 0.0))
        self._quiet = {name: left - 1 for name, left in self._quiet.items() if left > 1}
        in_use = self._settled("codes_in_use", figures)
        if in_use is not None and in_use < 0.25:
            self._say(
                "codebook",
                f"the codebook is collapsing: {in_use:.1%} of the codes were used lately. codebook=ema with "
                f"codebook_start=kmeans and codebook_restart=100 keeps them in use; so does kind=fsq",
            )
        accuracy = self._settled("discriminator_accuracy", figures)
        if accuracy is not None and accuracy > 0.95:
            self._say(
                "discriminator",
                f"the discriminator is right about {accuracy:.1%} of the patches, so the autoencoder learns nothing "
                f"from it. Lower discriminator_learning_rate or discriminator_weight, set r1_weight=1, or begin later "
                f"with discriminator_start",
            )

    def add_validation(self, figures: Mapping[str, float], competing: bool) -> None:
        """figures: with ``psnr``. competing: whether the discriminator had begun."""
        psnr = figures.get("psnr")
        if psnr is None:
            return
        if not competing:
            self._best = psnr if self._best is None else max(self._best, psnr)
        elif self._best is not None and psnr < self._best - 2:
            self._say(
                "worse",
                f"since the discriminator began, PSNR fell from {self._best:.1f} to {psnr:.1f} dB. Lower "
                f"discriminator_weight, or adaptive_weight_limit",
            )

    def _settled(self, name: str, figures: Mapping[str, float]) -> float | None:
        return self._means[name] if name in figures and self._seen[name] >= PATIENCE else None

    def _say(self, name: str, message: str) -> None:
        if name not in self._quiet:
            self._quiet[name] = PATIENCE
            logger.warning("%s", message)
