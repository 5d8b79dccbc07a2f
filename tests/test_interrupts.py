"""Ctrl-C while the program begins."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

BEGIN = "from latentdiff.__main__ import heed_interrupts; heed_interrupts(); "
SWALLOWING = """
try:
    import interrupted
except BaseException as error:
    raise RuntimeError(f"Failed to import interrupted because of {error!r}")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals are other ones there")
@pytest.mark.parametrize(
    ("program", "status", "said"),
    [
        (f"{BEGIN} import swallowing", 130, ""),
        (f"{BEGIN} import os, signal; os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT, "KeyboardInterrupt"),
    ],
    ids=["within an import that makes another error of it", "later, as usual"],
)
def test_ctrl_c(program: str, status: int, said: str, tmp_path: Path) -> None:
    (tmp_path / "swallowing.py").write_text(SWALLOWING)
    (tmp_path / "interrupted.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    command = [sys.executable, "-c", program]

    def as_in_a_terminal() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=60, preexec_fn=as_in_a_terminal
    )
    assert done.returncode == status, done.stderr
    assert done.stderr.strip().split("\n")[-1] == said
