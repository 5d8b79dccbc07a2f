"""Train on in the background: in a clone and environment of its own, at the lowest priority, while the code changes.

    python -m latentdiff.training.recipes.emoji.idle_training start FOLDER -- burst.refine WEIGHTS BUNDLE STATE
    python -m latentdiff.training.recipes.emoji.idle_training status FOLDER      # or pause, resume, stop

`start` clones this repository at its last commit into FOLDER/clone, installs it into FOLDER/environment, and runs a
module of the recipe there; after a stop it starts the same clone and environment again, so the module must go on where
it stopped. It gets the processor when nothing else wants it (Linux only), and one thread. Pause it to time anything.
"""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

RECIPE = "latentdiff.training.recipes.emoji"
SIGNALS = {"pause": signal.SIGSTOP, "resume": signal.SIGCONT, "stop": signal.SIGTERM}


def prepare(folder: Path, repository: Path) -> Path:
    """Clone and environment in `folder`, made if they are not there; returns the environment's Python.

    Raises:
        subprocess.CalledProcessError: git or pip failed.
    """
    clone, environment = folder / "clone", folder / "environment"
    python = environment / "bin" / "python"
    if not clone.exists():
        subprocess.run(["git", "clone", "--quiet", str(repository), str(clone)], check=True)
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    if subprocess.run([str(python), "-c", "import latentdiff"], capture_output=True, check=False).returncode:
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "-e", f"{clone}[recipes]"], check=True)
    return python


def start(folder: Path, python: Path, module: str, arguments: Sequence[str]) -> int:
    """Run `module` of the recipe at the lowest priority; its output goes to `folder/output.txt`. Returns its number."""
    command = [str(python), "-m", f"{RECIPE}.{module}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (folder / "output.txt").open("ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
        )
    lower(process.pid)
    (folder / "process").write_text(str(process.pid), encoding="utf-8")
    return process.pid


def lower(process: int) -> None:
    """Give a process the idle scheduling class, and its session the least weight.

    Linux weighs sessions ("autogroups") against each other before it looks at classes within one.
    """
    os.sched_setscheduler(process, os.SCHED_IDLE, os.sched_param(0))
    autogroup = Path(f"/proc/{process}/autogroup")
    if autogroup.exists():
        autogroup.write_text("19", encoding="ascii")


def running(folder: Path) -> int | None:
    """The number of the process that `start` began in `folder`, if it still runs."""
    try:
        process = int((folder / "process").read_text(encoding="utf-8"))
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        command = Path(f"/proc/{process}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return None
    return process if state != "Z" and RECIPE.encode() in command else None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="idle_training", description="Train on in the background.")
    parser.add_argument("what", choices=("start", "status", *SIGNALS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repository", type=Path, default=Path.cwd(), help="what to clone")
    parser.add_argument("command", nargs="*", help="after --: a module of the recipe and its arguments")
    options = parser.parse_args(arguments)
    process = running(options.folder)
    if options.what == "start":
        if process is not None:
            sys.exit(f"idle_training: process {process} runs in {options.folder} already; stop it first")
        if not options.command:
            sys.exit("idle_training: say what to run, such as -- burst.refine WEIGHTS BUNDLE STATE")
        options.folder.mkdir(parents=True, exist_ok=True)
        try:
            python = prepare(options.folder, options.repository)
        except subprocess.CalledProcessError as error:
            sys.exit(f"idle_training: {' '.join(error.cmd[:4])} ... failed with {error.returncode}")
        process = start(options.folder, python, options.command[0], options.command[1:])
    elif process is None:
        sys.exit(f"idle_training: nothing runs in {options.folder}")
    elif options.what in SIGNALS:
        os.kill(process, SIGNALS[options.what])
    output = (options.folder / "output.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    print(f"process {process}; {output[-1] if output else 'no output yet'}")


if __name__ == "__main__":
    main()
