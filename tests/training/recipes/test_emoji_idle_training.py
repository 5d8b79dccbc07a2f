"""Training in the background: one process at the lowest priority that is paused, resumed, stopped and begun again."""

import os
import sys
import time
from pathlib import Path

import pytest

from latentdiff.training.recipes.emoji import idle_training

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux's scheduling classes")


def state(process: int) -> str:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


def wait_for(process: int, states: str) -> None:
    for _ in range(200):
        if state(process) in states:
            return
        time.sleep(0.05)
    raise AssertionError(f"{process} is {state(process)}, not one of {states}")


def test_start_pause_resume_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # a stand-in for the environment's Python that runs forever under the recipe's name
    python = tmp_path / "python"
    python.write_text(f'#!{sys.executable}\nimport time\nprint("going on", flush=True)\ntime.sleep(60)\n')
    python.chmod(0o755)
    monkeypatch.setattr(idle_training, "prepare", lambda folder, repository: python)
    folder = tmp_path / "run"
    with pytest.raises(SystemExit, match="nothing runs"):
        idle_training.main(["status", str(folder)])
    with pytest.raises(SystemExit, match="say what to run"):
        idle_training.main(["start", str(folder)])
    idle_training.main(["start", str(folder), "--", "burst.refine", "a", "b"])
    process = idle_training.running(folder)
    assert process is not None
    try:
        assert os.sched_getscheduler(process) == os.SCHED_IDLE
        with pytest.raises(SystemExit, match="already"):
            idle_training.main(["start", str(folder), "--", "burst.refine"])
        idle_training.main(["pause", str(folder)])
        wait_for(process, "T")
        idle_training.main(["resume", str(folder)])
        wait_for(process, "SR")
        for _ in range(1200):  # the least of all priorities, perhaps on a busy machine
            if (folder / "output.txt").read_text():
                break
            time.sleep(0.05)
        idle_training.main(["status", str(folder)])
        assert "going on" in capsys.readouterr().out
    finally:
        idle_training.main(["stop", str(folder)])
    for _ in range(200):
        if idle_training.running(folder) is None:
            break
        time.sleep(0.05)
    assert idle_training.running(folder) is None


def test_another_process_with_the_same_number_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "process").write_text(str(os.getpid()))
    assert idle_training.running(tmp_path) is None
