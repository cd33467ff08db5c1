"""Two files for a pod's probes: ``alive`` is touched while the worker is well, ``ready`` exists while it takes jobs.

No probe asks the broker: while Redis is away the worker waits for it, and a restart would not help.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from celery.worker import state

TICK_SECONDS = 1.0
STUCK_SECONDS = 10.0
"""An event loop that has not turned for so long is stuck, unless it runs a task itself or waits for the broker."""


class Probes:
    """Writes the two files into ``directory``; writes nothing if that is None."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._consumer: Any = None
        self._turned = time.monotonic()
        if directory:
            directory.mkdir(parents=True, exist_ok=True)
            self.gone()

    def watch(self, consumer: Any) -> None:
        """Watch the event loop of this consumer. Called again after each reconnect, which cancels the consumer's timers."""
        self._consumer = consumer
        self._turn()
        if self._directory:
            consumer.timer.call_repeatedly(TICK_SECONDS, self._turn)

    def touch(self, *, ready: bool) -> None:
        """Touch ``alive`` if the worker is well, and create or remove ``ready``. May be called from any thread."""
        if not self._directory:
            return
        if self._lives():
            (self._directory / "alive").touch()
        if ready:
            (self._directory / "ready").touch()
        else:
            (self._directory / "ready").unlink(missing_ok=True)

    def gone(self) -> None:
        """Remove ``ready``: the worker takes no more jobs."""
        if self._directory:
            (self._directory / "ready").unlink(missing_ok=True)

    def _turn(self) -> None:
        self._turned = time.monotonic()

    def _lives(self) -> bool:
        if time.monotonic() - self._turned < STUCK_SECONDS:
            return True
        pool = self._consumer.pool
        runs_itself = pool.body_can_be_buffer and bool(state.active_requests)  # solo: the loop is busy with the task
        return runs_itself or self._consumer.connection is None
