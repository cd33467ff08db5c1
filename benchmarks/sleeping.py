"""The app of ``benchmarks/outage.py``: jobs that last as long as they are told, and longer without an accelerator."""

from __future__ import annotations

import os
import time
from typing import Any

from celery import Celery
from redis import Redis

from workerpool_routing import WorkerPool

SLOWDOWN = 6.0
ENDS = "ends"
"""A hash in Redis: how often each job has come to its end."""

URL = os.environ.get("CELERY_BROKER_URL", "redis://127.0.0.1:1/0")
TIER = os.environ.get("WORKERPOOL_TIER", "none")

app = Celery("sleeping", broker=URL, backend=URL)
app.conf.worker_hijack_root_logger = False
pool = WorkerPool("bench/outage", app)
client: Any = Redis.from_url(URL)


@app.task(bind=True)  # type: ignore[untyped-decorator]
def work(self: Any, seconds: float) -> None:
    """Take that long on an accelerator, and count the end."""
    time.sleep(seconds if TIER == "gpu" else SLOWDOWN * seconds)
    client.hincrby(ENDS, self.request.id, 1)
