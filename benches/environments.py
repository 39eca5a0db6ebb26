"""Environments of Python that hold rivals, one each, made from rivals-*.txt."""

import pathlib
import subprocess
import sys

from measure import measured

HERE = pathlib.Path(__file__).resolve().parent


def environment(name, folder):
    """The Python of a rival's environment in `folder`, which is made if it is not there yet, or the error that keeps it
    from being made."""
    done = folder / "installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        run = measured([folder / "bin/pip", "install", "--quiet", "-r", HERE / f"rivals-{name}.txt"])
        if run.status:
            return None, run.err
        done.touch()
    return folder / "bin/python", None
