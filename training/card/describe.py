"""What every trainer does with a finished model: its card, and the hub."""

import logging
from pathlib import Path

from latentdiff.training.card.card import push_model, write_model_card
from latentdiff.training.card.kinds import ModelKind
from latentdiff.training.loop.run import TrainingRun
from latentdiff.training.settings import RunSettings

logger = logging.getLogger(__name__)


def describe(
    run: TrainingRun, settings: RunSettings, kind: ModelKind, pictures: int, base_model: str | None = None
) -> None:
    """Write the card of the model in ``settings.output``, and push the model where the settings say so.

    kind, pictures, base_model: see `write_model_card`.
    """
    output = Path(settings.output)
    grids = sorted((run.folder / "samples").glob("step-*.png"))
    write_model_card(
        output,
        kind=kind,
        settings=settings.model_dump(),
        figures=run.figures,
        pictures=pictures,
        steps=run.step,
        base_model=base_model,
        sample_grid=grids[-1] if grids else None,
    )
    if settings.push_to_hub and run.step >= settings.max_steps:
        logger.info("pushed to %s", push_model(output, settings.push_to_hub))
