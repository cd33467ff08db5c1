"""Runs in the pods: an app whose jobs take as long as they are told, and a client of it and of the media service.

``python jobs.py submit COUNT``, ``hold``, ``stay TIER GATE...``, ``require GATE...`` and ``states``; ``since``: when workers came
up; ``upload COUNT`` sends real files to the media service; ``open GATE`` and ``marks``: what pods tell one another by files that
all of them see.
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from celery import Celery

from workerpool_routing import WorkerPool

URL = os.environ["CELERY_BROKER_URL"]
TIER = os.environ.get("WORKERPOOL_TIER", "none")
MARKS = Path(os.environ["MEDIA_DIR"]) / "marks"

if "BESIDE_MEDIA" in os.environ:
    from examples.media.tasks import app, pool
else:
    app = Celery("jobs", broker=URL, backend=URL)
    app.conf.update(broker_connection_retry_on_startup=True)
    pool = WorkerPool(os.environ["MEDIA_POOL"], app, timeout=5)


@app.task  # type: ignore[untyped-decorator]
def work() -> str:
    """Run for a second and tell the tier."""
    time.sleep(1)
    return TIER


@app.task  # type: ignore[untyped-decorator]
def hold() -> str:
    """On a GPU run until released, elsewhere for no time; leave a mark and tell the tier.

    So whatever a test does while it is held happens while it runs, however long that takes.
    """
    while TIER == "gpu" and not (MARKS / "released").exists():
        time.sleep(0.1)
    mark(f"ended-{TIER}")
    return TIER


@app.task  # type: ignore[untyped-decorator]
def stay(gate: str) -> str:
    """Run until a gate is opened, on whatever tier, and tell the tier."""
    while not (MARKS / gate).exists():
        time.sleep(0.1)
    return TIER


def mark(name: str) -> None:
    MARKS.mkdir(parents=True, exist_ok=True)
    (MARKS / name).touch()


def submit(count: int) -> list[str | None]:
    """Ask for a GPU that many times; the task ids."""
    return [pool.submit(work, accelerated=True).task_id for _ in range(count)]


def submit_held() -> str | None:
    """A job that a GPU is to hold; the task id. One that was sent elsewhere, for want of news of the GPUs, does not count."""
    while (decision := pool.submit(hold, accelerated=True)).tier != "gpu":
        time.sleep(1)
    return decision.task_id


def submit_staying(tier: str, gates: list[str]) -> list[str | None]:
    """Ask for a GPU for jobs that stay, one for each gate, as soon as a new one would go to that tier; the task ids."""
    while pool.should_accelerate(stay).tier != tier:
        time.sleep(0.1)
    return [pool.submit(stay, (gate,), accelerated=True).task_id for gate in gates]


def require_staying(gates: list[str]) -> list[str | None]:
    """Jobs that stay, one for each gate, on GPUs and nowhere else; the task ids."""
    return [pool.submit(stay, (gate,), accelerated="required").task_id for gate in gates]


def states(tasks: list[str]) -> list[dict[str, Any] | None]:
    """What the ledger and the result backend hold of each job; None for one that nobody knows."""
    found: list[dict[str, Any] | None] = []
    for task in tasks:
        job = pool.job(task)
        if job is None:
            found.append(None)
        else:
            result = app.AsyncResult(task).result
            runs = [asdict(run) for run in job.runs]
            kept = {"state": job.state, "tier": job.tier, "reason": job.reason, "starts": job.starts, "owner": job.owner}
            found.append({**kept, "runs": runs, "result": result})
    return found


def upload(count: int) -> list[dict[str, Any]]:
    """Send that many pictures and recordings, three of four asking for a GPU; the service's answers."""
    import httpx2
    from examples.media import samples

    files = sorted(samples.write(Path("/tmp/samples"), 3).iterdir())
    address = f"http://{os.environ['MEDIA_API_SERVICE_HOST']}:8000"

    def send(number: int) -> dict[str, Any]:
        file = files[number % len(files)].read_bytes()
        key = {"Idempotency-Key": f"upload-{number}"}
        wish = {"gpu": "true" if number % 4 else "false"}
        while True:
            # The key makes a repeated upload the same job, so that an answer that got lost does not matter.
            with suppress(httpx2.TransportError):
                answer = httpx2.post(f"{address}/process/file", files={"file": file}, data=wish, headers=key, timeout=60)
                if answer.status_code != httpx2.codes.SERVICE_UNAVAILABLE:
                    return {"status": answer.status_code, **answer.json()}
            time.sleep(1)  # what Retry-After asks for

    with ThreadPoolExecutor(8) as senders:
        return list(senders.map(send, range(count)))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["submit", count]:
            print(json.dumps(submit(int(count))))
        case ["hold"]:
            print(json.dumps(submit_held()))
        case ["stay", tier, *gates]:
            print(json.dumps(submit_staying(tier, gates)))
        case ["require", *gates]:
            print(json.dumps(require_staying(gates)))
        case ["since"]:
            print(json.dumps({owner: worker.since for owner, worker in pool.workers().items()}))
        case ["open", gate]:
            mark(gate)
        case ["marks"]:
            print(json.dumps([path.name for path in MARKS.glob("*")]))
        case ["upload", count]:
            print(json.dumps(upload(int(count))))
        case _:
            print(json.dumps(states(json.load(sys.stdin)), default=str))
