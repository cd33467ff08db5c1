"""The Celery app of the media service: one pool, two tasks, the same on every tier."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from celery import Celery
from examples.media import audio, image

from workerpool_routing import WorkerPool

BROKER_URL = os.environ.get("CELERY_BROKER_URL", "redis://127.0.0.1:6379/0")

# numpy stands in for the GPU: the tier that has the accelerator does the same sums over whole arrays.
ACCELERATED = os.environ.get("WORKERPOOL_TIER") == "gpu"

app = Celery("media", broker=BROKER_URL, backend=BROKER_URL)
app.conf.update(result_expires=3600, broker_connection_retry_on_startup=True)
pool = WorkerPool(os.environ.get("MEDIA_POOL", "default/media"), app)


@app.task  # type: ignore[untyped-decorator]
def measure_image(path: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """Hash, brightness and edges of a picture."""
    return {**image.measure(Path(path), accelerated=ACCELERATED), "metadata": metadata}


@app.task  # type: ignore[untyped-decorator]
def measure_audio(path: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """Loudness, brightness and tempo of a recording."""
    return {**audio.measure(Path(path), accelerated=ACCELERATED), "metadata": metadata}


TASKS = {"image": measure_image, "audio": measure_audio}
