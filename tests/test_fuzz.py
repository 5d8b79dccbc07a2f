"""Changed copies of good files, for a minute; see `fuzz` for what is a fault.

``LATENTDIFF_FUZZ_SECONDS`` sets the time, ``LATENTDIFF_FUZZ_SEED`` where it begins. On its own, keeping the files that
showed a fault: ``python tests/support/fuzz.py --seconds 300 --keep FOLDER``.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("resource")

SCRIPT = Path(__file__).parent / "support" / "fuzz.py"


@pytest.mark.slow
def test_readers_refuse_what_they_cannot_read(tmp_path: Path) -> None:
    """In a process of its own, whose memory is limited and which ends if one file takes too long."""
    seconds = os.environ.get("LATENTDIFF_FUZZ_SECONDS", "60")
    seed = os.environ.get("LATENTDIFF_FUZZ_SEED", "0")
    done = subprocess.run(
        [sys.executable, SCRIPT, "--seconds", seconds, "--seed", seed, "--keep", tmp_path / "found"],
        capture_output=True,
        text=True,
        timeout=float(seconds) + 300,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert "0 faults" in done.stdout
