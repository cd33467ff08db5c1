"""Two files for the probes of a pod: ``alive`` is as old as the worker's last sign of life, ``ready`` exists while it takes jobs.

No probe asks the broker: while Redis is away the worker waits for it, and a restart would not help.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from celery.worker import state

TICK_SECONDS = 1.0
STUCK_SECONDS = 10.0
"""A loop that has not turned for this long is stuck, unless it runs a task itself or waits for the broker."""


class Probes:
    """Writes the files of one worker; without a directory, none."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._consumer: Any = None
        self._turned = time.monotonic()
        if directory:
            directory.mkdir(parents=True, exist_ok=True)
            self.gone()

    def watch(self, consumer: Any) -> None:
        """Follow the loop of this consumer; a new connection cancels what was followed before."""
        self._consumer = consumer
        self._turn()
        if self._directory:
            consumer.timer.call_repeatedly(TICK_SECONDS, self._turn)

    def touch(self, *, ready: bool) -> None:
        """Renew ``alive`` if the worker is, and let ``ready`` say whether it takes jobs; from any thread."""
        if not self._directory:
            return
        if self._lives():
            (self._directory / "alive").touch()
        if ready:
            (self._directory / "ready").touch()
        else:
            (self._directory / "ready").unlink(missing_ok=True)

    def gone(self) -> None:
        """Take no more jobs."""
        if self._directory:
            (self._directory / "ready").unlink(missing_ok=True)

    def _turn(self) -> None:
        self._turned = time.monotonic()

    def _lives(self) -> bool:
        if time.monotonic() - self._turned < STUCK_SECONDS:
            return True
        pool = self._consumer.pool
        runs_itself = pool.body_can_be_buffer and bool(state.active_requests)  # solo: the loop is busy with the task
        return runs_itself or self._consumer.task_consumer is None
