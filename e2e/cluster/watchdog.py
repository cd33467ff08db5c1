"""Ends a control plane whose owner is gone, however it went, and removes its directory.

Run as ``python watchdog.py DIRECTORY`` by the owner, which holds the other end of standard input; the kernel closes it when the
owner dies. The servers share the watchdog's process group, so none can be missed: not even one that is just starting.
"""

import os
import shutil
import signal
import sys
import time
from pathlib import Path


def main(directory: Path) -> None:
    """Wait for the end of standard input, then clean up."""
    sys.stdin.buffer.read()
    group = os.getpgrp()
    if os.fork():
        signal.pause()
    os.setsid()
    os.killpg(group, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while directory.exists() and time.monotonic() < deadline:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
