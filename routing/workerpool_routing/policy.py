"""The pool's policy in this process: given in code, or read from Redis and cached for a few seconds."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from workerpool_routing.connection import Connection, unavailable_when_down
from workerpool_routing.wire import Keyspace, Policy, VersionMismatch

KEPT_SECONDS = 5.0
"""A change of the WorkerPool reaches API pods and workers within this time."""

logger = logging.getLogger("workerpool_routing")


@dataclass(slots=True)
class PolicySource:
    """The policy that the operator has published, or the one that was given in code."""

    connection: Connection
    keys: Keyspace
    given: Policy | None = None
    _kept: Policy | None = field(default=None, init=False)
    _read_at: float = field(default=float("-inf"), init=False)

    def get(self) -> Policy | None:
        """The policy; None if there is none that this release understands. Raises PoolUnavailable."""
        if self.given is not None:
            return self.given
        if time.monotonic() - self._read_at >= KEPT_SECONDS:
            self._kept = self._parse(self._read())
            self._read_at = time.monotonic()
        return self._kept

    def _read(self) -> str | None:
        with unavailable_when_down():
            raw: str | None = self.connection.client.get(self.keys.policy)
            return raw

    def _parse(self, raw: str | None) -> Policy | None:
        if raw is None:
            logger.warning("pool %s has no policy in Redis: is its WorkerPool applied, its operator running?", self.keys.pool)
            return None
        try:
            return Policy.load(raw)
        except (VersionMismatch, ValueError) as wrong:
            logger.warning("pool %s: its policy in Redis cannot be read: %s", self.keys.pool, wrong)
            return None
