"""`workerpool dev` as its users run it: a process of its own, with a real app, real workers and its private Redis."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from tests.seeds import TEMPLATE
from tests.watching import processes

from workerpool_operator.model import API_VERSION, KIND

PATIENCE_SECONDS = 120.0
"""On a busy machine; less than the tasks last that are to be cut off."""


WORKERPOOL = Path(sys.executable).with_name("workerpool")


APP = """
import time
from celery import Celery
from workerpool_routing import WorkerPool

app = Celery("tasks")
pool = WorkerPool("default/tiny", app)

@app.task
def work(path, seconds):
    with open(path, "x") as file:
        time.sleep(seconds)
        file.write("done")
"""


class Dev:
    """A running `workerpool dev`; what it prints is kept in a file."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path, mark: str) -> None:
        self.process, self._output, self._mark = process, output, mark

    @property
    def printed(self) -> str:
        return self._output.read_text()

    def until_it_prints(self, pattern: str) -> re.Match[str]:
        found = until(lambda: re.search(pattern, self.printed, re.MULTILINE), lambda: self.printed)
        assert isinstance(found, re.Match)
        return found

    @property
    def broker_url(self) -> str:
        return self.until_it_prints(r"^broker +(redis://\S+)$")[1]

    def processes(self) -> dict[int, str]:
        """Of the command and all that it started; redis-server writes over its environment, but its title holds its port."""
        printed = re.search(r"^broker +redis://(127\.0\.0\.1:\d+)/", self.printed, re.MULTILINE)
        return dict(processes(self._mark, *([f"redis-server {printed[1]}"] if printed else [])))


def until(condition: Callable[[], Any], otherwise: Callable[[], object]) -> Any:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.05)
    return found


def write_pool(directory: Path, *, gpu: dict[str, Any] | None = None, **spec: Any) -> None:
    (directory / "tasks.py").write_text(APP)
    tiers = [
        {"name": "gpu", "queue": "gpu-tasks", "accelerator": {"resource": "nvidia.com/gpu"}, "template": TEMPLATE, **(gpu or {})},
        {"name": "cpu", "queue": "celery", "template": TEMPLATE},
    ]
    # Nobody listens there: dev mode brings its own.
    broker = {"url": "redis://redis.example:6379/0"}
    resource = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": "tiny"},
        "spec": {"app": "tasks", "broker": broker, "tiers": tiers, **spec},
    }
    (directory / "pool.yaml").write_text(yaml.safe_dump(resource))


@contextmanager
def dev(directory: Path, *options: str) -> Iterator[Dev]:
    mark, output = f"mark-{uuid.uuid4().hex}", directory / "printed"
    command = [str(WORKERPOOL), "dev", "-f", "pool.yaml", "--logs", "logs", *options]
    with output.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=directory,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "MARK": mark},
            start_new_session=True,
        )
    running = Dev(process, output, mark)
    try:
        yield running
    finally:
        process.kill()
        process.wait()
        until(lambda: not running.processes(), running.processes)
