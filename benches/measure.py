"""Runs a command, and measures what it takes."""

import os
import subprocess
import threading
import time
from dataclasses import dataclass


@dataclass
class Run:
    """A finished command: exit status, output, wall and CPU seconds, and the peak of its anonymous memory in bytes."""

    status: int
    out: str
    err: str
    seconds: float
    cpu: float
    peak: int


def anonymous(pid):
    """Anonymous bytes of a process now: private memory that no file backs."""
    try:
        with open(f"/proc/{pid}/status") as f:
            return next((int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon:")), 0)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0


def measured(command, env=None, limit=None):
    """Runs a command. After `limit` seconds it is killed, and its status is that of SIGKILL."""
    start, before = time.perf_counter(), os.times()
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, env=env) as process:
        peak, ended = 0, threading.Event()

        def watch():
            nonlocal peak
            while not ended.wait(0.005):
                peak = max(peak, anonymous(process.pid))
                if limit and time.perf_counter() - start > limit:
                    process.kill()

        watcher = threading.Thread(target=watch)
        watcher.start()
        out, err = process.communicate()
        seconds = time.perf_counter() - start
        ended.set()
        watcher.join()
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Run(process.returncode, out, err, seconds, cpu, peak)
