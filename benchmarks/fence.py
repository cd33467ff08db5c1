"""What the fence costs on an empty task: the same worker and the same jobs, with and without it, in turn.

``python -m benchmarks.fence [jobs] [rounds]``
"""

from __future__ import annotations

import statistics
import sys
import time
from contextlib import ExitStack

from tests.chaos.suite import scene


def seconds_per_job(jobs: int, *, plain: bool) -> float:
    """From the first job done to the last, one process, one slot."""
    with ExitStack() as stack:
        stage = scene(stack, plain=plain, keeps=False, gpus=1)
        stage.publish(20)
        while stage.open():
            time.sleep(0.05)
        stage.publish(jobs)
        began = time.perf_counter()
        while stage.open():
            time.sleep(0.1)
        return (time.perf_counter() - began) / jobs


def main(jobs: int, rounds: int) -> None:
    pairs = [(seconds_per_job(jobs, plain=True), seconds_per_job(jobs, plain=False)) for _ in range(rounds)]
    plain, fenced = (statistics.median(column) * 1000 for column in zip(*pairs, strict=True))
    ratio = statistics.median(fenced / plain for plain, fenced in pairs)
    print(f"{jobs} empty jobs, median of {rounds}: plain {plain:.2f} ms, fenced {fenced:.2f} ms a job: "
          f"{fenced - plain:+.2f} ms, {100 * (1 - 1 / ratio):.0f} % less throughput")  # fmt: skip


if __name__ == "__main__":
    main(*(int(argument) for argument in (*sys.argv[1:], "3000", "3")[:2]))
