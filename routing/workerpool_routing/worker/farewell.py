"""The end of a worker's grace period: jobs that have not ended go back to their queue before the SIGKILL comes."""

from __future__ import annotations

import logging
import os
import signal
from threading import Timer
from typing import Any

from celery.worker import state

from workerpool_routing.errors import PoolUnavailable
from workerpool_routing.worker.fencing import FencedRequest

logger = logging.getLogger("workerpool_routing.worker")

LONGEST_MARGIN_SECONDS = 10.0


class Farewell:
    """The warm shutdown of one worker, from the signal on.

    Args:
        grace_seconds: from SIGTERM to SIGKILL; infinite if it is not known.
    """

    def __init__(self, grace_seconds: float) -> None:
        self._after = grace_seconds - min(LONGEST_MARGIN_SECONDS, grace_seconds / 4)
        self._timer: Timer | None = None

    def begin(self) -> None:
        """Start the clock: the worker was told to stop, and finishes its jobs while there is time."""
        if self._timer is None and self._after != float("inf"):
            self._timer = Timer(self._after, self._cut_off)
            self._timer.daemon = True
            self._timer.start()

    def _cut_off(self) -> None:
        unfinished = [request for request in tuple(state.reserved_requests) if isinstance(request, FencedRequest)]
        given_back = [request for request in unfinished if self._give_back(request)]
        logger.warning("the grace period ends: %d unfinished jobs went back to their queue", len(given_back))
        os.kill(os.getpid(), signal.SIGQUIT)

    def _give_back(self, request: Any) -> bool:
        try:
            return bool(request.give_back())
        except PoolUnavailable as unavailable:
            logger.warning("not given back task_id=%s: %s", request.id, unavailable)
            return False
