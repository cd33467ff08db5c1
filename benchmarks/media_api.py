"""Puts a bounded load on the sample API and accounts for every job: ``python -m benchmarks.media_api [requests]``."""

from __future__ import annotations

import asyncio
import io
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from statistics import quantiles

import httpx2 as httpx
from PIL import Image
from redis import Redis

from workerpool_operator.local.redis_server import free_port, private_redis
from workerpool_routing.wire import Keyspace, Policy, TierPolicy

CONCURRENT = 100
GPU, CPU = TierPolicy("gpu", "gpu-tasks", accelerated=True), TierPolicy("cpu", "celery", accelerated=False)
KEYS = Keyspace("default/media")


def picture() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 48), 60).save(file, "PNG")
    return file.getvalue()


async def load(url: str, requests: int) -> tuple[Counter[int], set[str], list[float]]:
    """Statuses, task ids and seconds of that many uploads, a hundred at a time."""
    statuses, ids, seconds, content = Counter[int](), set[str](), list[float](), picture()
    rest = iter(range(requests))

    async def client(http: httpx.AsyncClient) -> None:
        for n in rest:
            started = time.perf_counter()
            answer = await http.post("/process/file", files={"file": content}, data={"gpu": ("true", "false")[n % 2]})
            seconds.append(time.perf_counter() - started)
            statuses[answer.status_code] += 1
            if answer.status_code == 202:
                ids.add(answer.json()["task_id"])

    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        while True:
            with suppress(httpx.TransportError):
                await http.get("/api/v1/status/workers")
                break
            await asyncio.sleep(0.1)
        await asyncio.gather(*(client(http) for _ in range(CONCURRENT)))
    return statuses, ids, seconds


def main(requests: int) -> int:
    """Run it; 1 unless every request was accepted and is one job in a queue and on the ledger."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "examples.media.api:api", "--port", str(port), "--log-level", "warning"]
    with private_redis() as server, tempfile.TemporaryDirectory() as media, Redis.from_url(server.url) as client:
        client.set(KEYS.policy, Policy((GPU, CPU)).dump())
        environment = {**os.environ, "CELERY_BROKER_URL": server.url, "MEDIA_DIR": media}
        with subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[1]) as api:
            try:
                started = time.perf_counter()
                statuses, ids, seconds = asyncio.run(load(f"http://127.0.0.1:{port}", requests))
                took = time.perf_counter() - started
            finally:
                api.terminate()
        queued = client.llen(GPU.queue) + client.llen(CPU.queue)
        known = sum(client.exists(KEYS.job(task_id)) for task_id in ids)
    cuts = quantiles(seconds, n=100)
    print(f"{requests} uploads, {CONCURRENT} at a time, in {took:.0f} s: statuses {dict(statuses)}, {len(ids)} task ids,")
    print(f"{queued} messages queued, {known} on the ledger; p50 {cuts[49] * 1000:.0f} ms, p99 {cuts[98] * 1000:.0f} ms")
    return int(not statuses[202] == len(ids) == queued == known == requests)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000))
