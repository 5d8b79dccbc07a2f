"""Where a user's caches are: what is made again if it is missing."""

import math
import os
import sys
from pathlib import Path

VARIABLE = "LATENTDIFF_CACHE"


def gigabytes(variable: str, usual: float) -> int:
    """Bytes that a variable of the environment allows. Raises ValueError if it is no number of gigabytes."""
    text = os.environ.get(variable) or str(usual)
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not 0 <= limit < math.inf:
        raise ValueError(f"{variable}={text}: a number of gigabytes is expected, such as {usual:g}")
    return int(limit * 1e9)


def shared_folder() -> Path:
    """``LATENTDIFF_CACHE``, or "latentdiff" where this system keeps a user's caches."""
    if own := os.environ.get(VARIABLE):
        return Path(own).expanduser().absolute()
    usual = {"darwin": "~/Library/Caches", "win32": os.environ.get("LOCALAPPDATA") or "~/AppData/Local"}
    place = os.environ.get("XDG_CACHE_HOME") or usual.get(sys.platform, "~/.cache")
    return Path(place).expanduser().absolute() / "latentdiff"
