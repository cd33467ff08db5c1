"""A small process that outlives its parent just long enough to end what the parent has started.

The parent holds the writing end of a pipe, and the guardian reads the other end. Each process that is started writes its own id
into the pipe before it executes its command, so it never lives unrecorded. When the pipe closes the parent is gone, however it
ended.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

TERM_SECONDS = 2.0
"""How long orphans have between SIGTERM and SIGKILL."""

_ENTER = 'echo "+$$" >&0 && exec "$@" </dev/null'


class Guardian:
    """Ends the process groups of a parent that can no longer do so itself.

    Start a process with ``start_new_session=True``, :meth:`wrap` around its command, and :attr:`pipe` as its stdin;
    :meth:`release` its group once nothing of it is left.
    """

    def __init__(self) -> None:
        read, self.pipe = os.pipe()
        try:
            # Isolated and by path: it must start fast, and must not depend on the directory that it is started in.
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__],
                stdin=read,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
            )
        finally:
            os.close(read)

    def wrap(self, command: Sequence[str]) -> list[str]:
        """The command of a process that reports itself, then executes ``command`` with an empty stdin."""
        return ["/bin/sh", "-c", _ENTER, "sh", *command]

    def release(self, group: int) -> None:
        """Forget a group: its id may soon be used by another."""
        with suppress(BrokenPipeError):
            os.write(self.pipe, f"-{group}\n".encode())

    def close(self) -> None:
        """End the groups that are still recorded, and the guardian itself."""
        os.close(self.pipe)
        self._process.wait()


def kill_group(group: int) -> None:
    """SIGKILL every process of a group, which may be gone already."""
    # macOS answers "not permitted" for a group of zombies.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    groups: set[int] = set()
    for line in sys.stdin:
        (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
    for group in groups:
        with suppress(ProcessLookupError):
            os.kill(group, signal.SIGTERM)
    deadline = time.monotonic() + TERM_SECONDS
    while any(map(_alive, groups)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for group in groups:
        kill_group(group)


if __name__ == "__main__":
    _main()
