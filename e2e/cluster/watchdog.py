"""Ends a control plane or cluster whose owner is gone, however it went, and removes its directory and its cgroups.

Run as ``python watchdog.py DIRECTORY [CGROUP]`` by the owner, which holds the other end of standard input; the kernel closes it
when the owner dies. The servers share the watchdog's process group, so none can be missed: not even one that is just starting.
"""

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

PATIENCE_SECONDS = 120


def main(directory: Path, cgroup: str = "") -> None:
    """Wait for the end of standard input, then clean up."""
    sys.stdin.buffer.read()
    group = os.getpgrp()
    if os.fork():
        signal.pause()
    os.setsid()
    os.killpg(group, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while _left(directory, cgroup) and time.monotonic() < deadline:
        time.sleep(0.02)


def _left(directory: Path, cgroup: str) -> bool:
    """Remove what can be removed by now, and say whether something is still there."""
    shutil.rmtree(directory, ignore_errors=True)
    roots = [path for pattern in (cgroup, f"*/{cgroup}") for path in Path("/sys/fs/cgroup").glob(pattern)] if cgroup else []
    for root in roots:
        for path, _, _ in os.walk(root, topdown=False):
            with contextlib.suppress(OSError):
                Path(path).rmdir()
    return directory.exists() or any(root.exists() for root in roots)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
