"""Pictures that training or an evaluation draws and keeps: what is there already is not drawn again."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from latentdiff.interchange.png import read_settings, save_picture


@dataclass(frozen=True)
class Drawing:
    """One picture to draw.

    Args:
        file: where it is kept, a PNG.
        settings: how it is drawn; kept in the file, and compared when the drawing is wanted again.
    """

    file: Path
    settings: Mapping[str, Any]

    def is_there(self) -> bool:
        """Whether the file holds this very drawing.

        Raises:
            FileExistsError: it holds something that latentdiff did not draw.
        """
        found = read_settings(self.file)
        if found is None and self.file.exists():
            raise FileExistsError(f"{self.file} was not drawn by latentdiff; move it away, or choose another --output")
        return found is not None and {key: found.get(key) for key in self.settings} == dict(self.settings)


def missing(drawings: Sequence[Drawing]) -> list[Drawing]:
    """Those that are not there, or were drawn with other settings."""
    return [drawing for drawing in drawings if not drawing.is_there()]


def draw(
    drawings: Sequence[Drawing],
    output_of: Callable[[Sequence[Drawing]], Any],
    batch_size: int,
    kept: Mapping[str, Any] | None = None,
    things: str = "pictures",
) -> None:
    """Draw and keep `drawings`.

    Args:
        output_of: draws some of them at once: what a pipeline's call gives, with PIL images.
        kept: further settings for the files, which are not compared.
        things: what is drawn, for the progress bar.

    Raises:
        ValueError: a network gave values that are not finite; nothing is written of the pictures that it was drawing.
    """
    with tqdm(
        total=len(drawings), desc=f"drawing {things}", unit="", disable=None, leave=False, dynamic_ncols=True
    ) as bar:
        for start in range(0, len(drawings), batch_size):
            batch = drawings[start : start + batch_size]
            output = output_of(batch)
            if any(getattr(output, "nan_detected", None) or ()):
                raise ValueError(
                    f"{batch[0].file}, or one drawn with it, would be spoilt: a network gave values that are "
                    f"not finite; the warning says which, and what helps"
                )
            for drawing, picture in zip(batch, output.images, strict=True):
                save_picture(picture, drawing.file, {**drawing.settings, **(kept or {})})
            bar.update(len(batch))
