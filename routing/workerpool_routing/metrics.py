"""Counts decisions for Prometheus if prometheus-client is installed; otherwise does nothing."""

from __future__ import annotations

from functools import cache
from threading import Lock
from typing import TYPE_CHECKING

from workerpool_routing.decide import Reason

if TYPE_CHECKING:
    from prometheus_client import Counter, Histogram

_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25)
_once = Lock()


def count(pool: str, tier: str | None, reason: Reason) -> None:
    """``workerpool_decisions_total{pool,tier,reason}``; a refused job has no tier."""
    if instruments := _instruments():
        instruments[0].labels(pool, tier or "", reason).inc()


def took(pool: str, seconds: float) -> None:
    """``workerpool_decision_seconds{pool}``: from the request to Redis's answer."""
    if instruments := _instruments():
        instruments[1].labels(pool).observe(seconds)


def _instruments() -> tuple[Counter, Histogram] | None:
    with _once:
        return _registered()


@cache
def _registered() -> tuple[Counter, Histogram] | None:
    """Import prometheus-client at the first decision, so that the library's own import stays short."""
    try:
        from prometheus_client import Counter, Histogram
    except ImportError:
        return None
    return (
        Counter("workerpool_decisions_total", "Jobs by where they went and why", ("pool", "tier", "reason")),
        Histogram("workerpool_decision_seconds", "Time from the question to Redis's answer", ("pool",), buckets=_BUCKETS),
    )
