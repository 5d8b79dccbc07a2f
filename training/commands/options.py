"""What is said of an option that a command has not, where what it means is given in another way."""

from typing import Any

from typer.core import TyperCommand

from latentdiff.training.commands.settings import Kind, settings_of

OTHERWISE = {
    **dict.fromkeys(("max_pictures", "pictures", "num_pictures", "number", "limit"), "count"),
    **dict.fromkeys(("sample_steps", "num_inference_steps"), "steps"),
    **dict.fromkeys(("sample_guidance_scale", "guidance_scale"), "guidance"),
}
"""Of the commands that measure: what their options are called elsewhere."""


class TrainingCommand(TyperCommand):
    """A command of training or measuring."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raises ValueError for an option that it has not, if what it means can be given."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if type(error).__name__ != "NoSuchOption":  # typer's, or click's where typer has none
                raise
            option = str(getattr(error, "option_name", ""))
            how = self._otherwise(option.lstrip("-").replace("-", "_"))
            if how is None:
                raise
            raise ValueError(f"{self.name} has no option {option}: {how}") from None

    def _otherwise(self, key: str) -> str | None:
        """How `key` is given to this command; None: not at all."""
        if self.name in tuple(Kind):
            from latentdiff.training.settings.base import ALIASES

            known = settings_of(str(self.name)).model_fields
            return f"settings are given as {key}=VALUE" if {key, ALIASES.get(key)} & set(known) else None
        other = OTHERWISE.get(key)
        has = {option for parameter in self.params for option in parameter.opts}
        return f"here it is --{other}" if f"--{other}" in has else None
