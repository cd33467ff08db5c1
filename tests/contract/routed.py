"""The app of the tests of Celery's own ways in: its policy comes from Redis, so the pool routes by name of task."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery

from workerpool_routing import WorkerPool

URL = os.environ.get("CELERY_BROKER_URL", "redis://127.0.0.1:1/0")
TIER = os.environ.get("WORKERPOOL_TIER", "none")

app = Celery("routed", broker=URL, backend=URL)
app.conf.update(
    broker_connection_retry_on_startup=True,
    beat_schedule={"often": {"task": "routed.where", "schedule": 0.2, "args": [["beat"]]}},
)
pool = WorkerPool("test/routed", app)


@app.task(name="routed.where")  # type: ignore[untyped-decorator]
def where(before: list[str]) -> list[str]:
    """Add the tier that runs it."""
    return [*before, TIER]


@app.task(name="routed.merge")  # type: ignore[untyped-decorator]
def merge(parts: list[list[str]]) -> list[str]:
    """Join what a group has made."""
    return [*(tier for part in parts for tier in part), TIER]


@app.task(name="routed.again", bind=True, max_retries=2)  # type: ignore[untyped-decorator]
def again(self: Any) -> list[Any]:
    """Ask for a retry, then say where it was run and how often."""
    if self.request.retries < 2:
        raise self.retry(countdown=0)
    return [TIER, self.request.retries]


@app.task(name="other.where")  # type: ignore[untyped-decorator]
def other(before: list[str]) -> list[str]:
    """A task that nobody named."""
    return [*before, TIER]
