"""Where a user's caches are: what is made again if it is missing."""

import os
import sys
from pathlib import Path

VARIABLE = "LATENTDIFF_CACHE"


def shared_folder() -> Path:
    """``LATENTDIFF_CACHE``, or "latentdiff" where this system keeps a user's caches."""
    if own := os.environ.get(VARIABLE):
        return Path(own).expanduser().absolute()
    usual = {"darwin": "~/Library/Caches", "win32": os.environ.get("LOCALAPPDATA") or "~/AppData/Local"}
    place = os.environ.get("XDG_CACHE_HOME") or usual.get(sys.platform, "~/.cache")
    return Path(place).expanduser().absolute() / "latentdiff"
