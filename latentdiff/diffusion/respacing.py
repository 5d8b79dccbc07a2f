"""Fewer steps of the same process: which timesteps are kept."""

from collections.abc import Sequence
from itertools import accumulate


def space_timesteps(num_timesteps: int, sections: int | str | Sequence[int]) -> list[int]:
    """Timesteps to keep of 0, ..., T - 1, in rising order. Improved DDPM (Nichol & Dhariwal 2021), Sec. 4.

    Args:
        num_timesteps: T.
        sections: how many to keep, evenly spread with both ends; or several counts, one for each of as many sections
            of equal length, such as ``[10, 10, 5]`` or ``"10,10,5"``; or ``"ddim50"``, 50 at a fixed stride from 0
            (DDIM, Song et al. 2021).

    Raises:
        ValueError: there are fewer timesteps, or `sections` is none of these.
    """
    if isinstance(sections, str) and sections.startswith("ddim"):
        return strided(num_timesteps, whole_numbers(sections[4:])[0])
    counts = whole_numbers(sections) if isinstance(sections, str) else sections
    counts = [counts] if isinstance(counts, int) else list(counts)
    if not 1 <= len(counts) <= num_timesteps:
        raise ValueError(f"{num_timesteps} timesteps cannot be divided into {len(counts)} sections")
    length, longer = divmod(num_timesteps, len(counts))
    kept: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        size = length + (i < longer)
        if not 1 <= count <= size:
            raise ValueError(f"{count} timesteps cannot be kept of a section of {size} (of {num_timesteps} in all)")
        stride = (size - 1) / (count - 1) if count > 1 else 0.0
        kept += [start + round(place) for place in accumulate([0.0] + [stride] * (count - 1))]  # as the released code
        start += size
    return kept


def strided(num_timesteps: int, count: int) -> list[int]:
    for stride in range(1, num_timesteps + 1):
        kept = range(0, num_timesteps, stride)
        if len(kept) == count:
            return list(kept)
    raise ValueError(f"there is no stride at which just {count} of {num_timesteps} timesteps lie")


def whole_numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"{text!r} is not a number of timesteps, or several with commas between them, or 'ddimN'")
    return [int(part) for part in parts]
