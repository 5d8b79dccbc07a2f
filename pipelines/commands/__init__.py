"""The commands that draw and convert, each in a module of its own."""

import typer


def add_commands(app: typer.Typer) -> None:
    """Add ``generate``, ``replay``, ``many`` and ``convert`` to a program."""
    from latentdiff.pipelines.commands.convert import convert
    from latentdiff.pipelines.commands.generate import generate
    from latentdiff.pipelines.commands.many import many
    from latentdiff.pipelines.commands.replay import replay

    for command in (generate, replay, many, convert):
        app.command()(command)
