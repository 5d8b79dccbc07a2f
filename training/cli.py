"""The commands of training, gathered: for ``latentdiff`` and for ``accelerate launch -m latentdiff.training``."""

import typer

from latentdiff.training.commands.average import average
from latentdiff.training.commands.cache import cache
from latentdiff.training.commands.caption import caption
from latentdiff.training.commands.doctor import doctor
from latentdiff.training.commands.encode import encode
from latentdiff.training.commands.evaluate import evaluate, likelihood
from latentdiff.training.commands.options import TrainingCommand
from latentdiff.training.commands.settings import settings
from latentdiff.training.commands.train import autoencoder, classifier, denoiser, distill, finetune, prior

AGAIN = "Repeat a command to go on where it stopped."

train = typer.Typer(
    no_args_is_help=True, help=f"Train an autoencoder, then a denoiser on its latents, or a prior on its codes. {AGAIN}"
)
train.command(cls=TrainingCommand)(autoencoder)
train.command(cls=TrainingCommand)(denoiser)
train.command(cls=TrainingCommand)(classifier)
train.command(cls=TrainingCommand)(prior)

launched = typer.Typer(name="latentdiff.training", no_args_is_help=True, help=f"Training, on several devices. {AGAIN}")
for command in (autoencoder, denoiser, classifier, prior, finetune, distill, encode):
    launched.command(cls=TrainingCommand)(command)


def add_commands(app: typer.Typer) -> None:
    """Add the commands of training and measuring to the program's own."""
    app.add_typer(train, name="train")
    for command in (finetune, distill, average, settings, caption, encode, doctor, cache, evaluate, likelihood):
        app.command(cls=TrainingCommand)(command)
