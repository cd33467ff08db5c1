"""What the fence costs on an empty task: the same worker and the same jobs, with and without it, in turn.

``python -m benchmarks.fence [jobs] [rounds]``
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.chaos.parts import KEYS, Server, Worker, publish


def seconds_per_job(jobs: int, *, plain: bool) -> float:
    """One process, one slot, and nothing beside it but Redis; from the first job to the last acknowledgement."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        server = Server(keeps=False, directory=Path(directory))
        server.start()
        worker = Worker(server.url, "gpu", Path(directory), plain=plain)
        try:
            with server.client() as client:
                run(client, 50, plain=plain)
                return run(client, jobs, plain=plain) / jobs
        finally:
            worker.kill()
            server.kill()


def run(client: Any, jobs: int, *, plain: bool) -> float:
    publish(client, jobs, plain=plain)
    in_flight = "unacked" if plain else KEYS.unacked("gpu")
    began = time.perf_counter()
    while client.llen("gpu-jobs") or client.hlen(in_flight):
        time.sleep(0.02)
    return time.perf_counter() - began


def main(jobs: int, rounds: int) -> None:
    os.environ["CHAOS_UNCOUNTED"] = "1"
    pairs = [(seconds_per_job(jobs, plain=True), seconds_per_job(jobs, plain=False)) for _ in range(rounds)]
    plain, fenced = (statistics.median(column) * 1000 for column in zip(*pairs, strict=True))
    ratio = statistics.median(fenced / plain for plain, fenced in pairs)
    print(f"{jobs} empty jobs, median of {rounds}: plain {plain:.2f} ms, fenced {fenced:.2f} ms a job: "
          f"{fenced - plain:+.2f} ms, {100 * (1 - 1 / ratio):.0f} % less throughput")  # fmt: skip


if __name__ == "__main__":
    main(*(int(argument) for argument in (*sys.argv[1:], "3000", "5")[:2]))
