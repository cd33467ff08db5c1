"""The app under chaos; with ``CHAOS_PLAIN`` set it is plain Celery with late acknowledgement, for comparison."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from celery import Celery, signals

from workerpool_routing import Tier, WorkerPool

URL = os.environ.get("CELERY_BROKER_URL", "redis://127.0.0.1:1/0")
TIER = os.environ.get("WORKERPOOL_TIER", "none")
TIERS = (Tier("gpu", "gpu-jobs", accelerated=True), Tier("cpu", "cpu-jobs", accelerated=False))

app = Celery("chaos", broker=URL, backend=URL)
app.conf.update(broker_connection_retry_on_startup=True, worker_hijack_root_logger=False, task_acks_late=True)
if os.environ.get("CHAOS_PLAIN"):
    app.conf.update(worker_prefetch_multiplier=1, worker_disable_prefetch=True)
else:
    pool = WorkerPool("test/chaos", app, tiers=TIERS)


@app.task(time_limit=3)  # type: ignore[untyped-decorator]
def work(seconds: float, how: str = "") -> str:
    """Take some time; on an accelerator, end as told."""
    if seconds:
        time.sleep(seconds)
    if how == "raise" and TIER == "gpu":
        raise RuntimeError("asked to fail")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hang" and TIER == "gpu":
        time.sleep(60)
    return TIER


def accepted(sender: Any, **_: Any) -> None:
    """Count every outcome that Celery has stored."""
    if sender.request.id:
        app.backend.client.hincrby("outcomes", sender.request.id, 1)


if "CHAOS_UNCOUNTED" not in os.environ:
    signals.task_success.connect(accepted)
    signals.task_failure.connect(accepted)
