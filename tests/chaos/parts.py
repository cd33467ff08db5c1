"""The parts that chaos is made of: a Redis that can be killed, a line that can be cut, workers that can be stopped anyhow."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml
from e2e.cluster.ports import reserve_port
from redis import Redis, RedisError

from workerpool_operator.local.guardian import Guardian, kill_group
from workerpool_operator.local.redis_server import find_redis_server
from workerpool_routing.ledger import Job
from workerpool_routing.wire import HEADER, Keyspace

ROOT = Path(__file__).parents[2]
KEYS = Keyspace("test/chaos")


guardian = cache(Guardian)
"""Ends what this process has started, however this process ends."""


def start(command: Sequence[str | Path], log: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a process in a group of its own, to be ended by :func:`end`; its output is added to that file."""
    wrapped = guardian().wrap([str(part) for part in command])
    with log.open("ab") as output:
        return subprocess.Popen(
            wrapped, stdin=guardian().pipe, stdout=output, stderr=output, env=env, cwd=ROOT, start_new_session=True
        )  # fmt: skip


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL the whole group."""
    kill_group(process.pid)
    process.wait()
    guardian().release(process.pid)


@dataclass
class Server:
    """A redis-server on a port of its own, which may keep what it has."""

    keeps: bool
    directory: Path
    port: int = field(default_factory=reserve_port)
    process: Any = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self) -> Any:
        return Redis.from_url(self.url, decode_responses=True, socket_timeout=5)

    def start(self) -> None:
        options = ["--bind", "127.0.0.1", "--port", str(self.port), "--save", "", "--dir", str(self.directory)]
        keep = ["--appendonly", "yes", "--appendfsync", "always"] if self.keeps else ["--appendonly", "no"]
        log = self.directory / "redis.log"
        self.process = start([find_redis_server(), *options, *keep], log)
        while self.process.poll() is None:
            with contextlib.suppress(RedisError), self.client() as client:
                client.ping()
                return
            time.sleep(0.05)
        raise RuntimeError(f"redis-server has ended: {log.read_text()}")

    def kill(self) -> None:
        end(self.process)


class Line:
    """A TCP proxy in front of Redis whose connections can all be cut, and kept cut for a while."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._open = True
        self._sockets: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, seconds: float) -> None:
        self._open = False
        for one in list(self._sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        time.sleep(seconds)
        self._open = True

    def close(self) -> None:
        self.cut(0)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if not self._open:
                    near.close()
                    continue
                try:
                    far = socket.create_connection(("127.0.0.1", self._target))
                except OSError:
                    near.close()
                    continue
                self._sockets |= {near, far}
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        """Pass on what comes; each of a connection's two threads closes the socket that it reads."""
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)
        self._sockets.discard(source)
        source.close()


class Worker:
    """One Celery worker in a process group of its own."""

    def __init__(self, url: str, tier: str, log: Path, *, slots: int = 1, plain: bool = False) -> None:
        self.tier = tier
        self.name = name = f"{tier}-{uuid4().hex[:5]}"
        environment = {**os.environ, "CELERY_BROKER_URL": url, "WORKERPOOL_TIER": tier}
        if plain:
            environment["CHAOS_PLAIN"] = "1"
        else:
            environment |= {"WORKERPOOL_POOL": KEYS.pool, "WORKERPOOL_WORKER": name, "WORKERPOOL_QUEUE": f"{tier}-jobs"}
        celery = [sys.executable, "-m", "celery", "-A", "tests.chaos.app", "worker", "-Q", f"{tier}-jobs", "-c", str(slots)]
        options = ["-n", f"{name}@chaos", "--without-gossip", "--without-mingle", "-l", "WARNING"]
        self.process = start([*celery, *options], log / f"{name}.log", environment)

    def children(self) -> list[int]:
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        end(self.process)


@contextmanager
def sweeping(url: str, log: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The sweep command, as users start it; a list, so that chaos may replace it."""
    template = {"spec": {"containers": [{"name": "worker"}]}}
    tiers: list[dict[str, Any]] = [{"name": tier, "queue": f"{tier}-jobs", "template": template} for tier in ("gpu", "cpu")]
    tiers[0]["accelerator"] = {"resource": "nvidia.com/gpu"}
    resource = {
        "apiVersion": "workerpool.dev/v1alpha1", "kind": "WorkerPool", "metadata": {"namespace": "test", "name": "chaos"},
        "spec": {"app": "tests.chaos.app", "broker": {"url": url}, "tiers": tiers},
    }  # fmt: skip
    file = log / "pool.yaml"
    file.write_text(yaml.safe_dump(resource))
    running = [start_sweep(file)]
    try:
        yield running
    finally:
        end(running[0])


def start_sweep(file: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from workerpool_operator.cli import main; main()", "sweep", "-f", str(file)]
    return start(command, file.parent / "sweep.log")


def publish(client: Any, count: int, seconds: float = 0.0, how: str = "", *, plain: bool = False) -> list[str]:
    """Admit jobs to the accelerated tier and queue them, as the library does one by one; return their ids."""
    ids = [str(uuid4()) for _ in range(count)]
    body = base64.b64encode(json.dumps([[seconds, how], {}, {}]).encode()).decode()
    at, _ = client.time()
    with client.pipeline(transaction=False) as pipe:
        for task_id in ids:
            headers = {"id": task_id, "task": "tests.chaos.app.work", "retries": 0, "lang": "py", "root_id": task_id}
            headers |= {} if plain else {HEADER: {"attempt": 1}}
            info = {"exchange": "", "routing_key": "gpu-jobs"}
            properties = {"delivery_tag": task_id, "delivery_info": info, "delivery_mode": 2, "priority": 0,
                          "body_encoding": "base64", "correlation_id": task_id}  # fmt: skip
            message = json.dumps(
                {"body": body, "content-type": "application/json", "content-encoding": "utf-8", "headers": headers,
                 "properties": properties}
            )  # fmt: skip
            if not plain:
                entry = {"version": 1, "state": "admitted", "attempt": 1, "task": "tests.chaos.app.work", "tier": "gpu"}
                entry |= {"wanted": "gpu", "required": 0, "reason": "FreeSlot", "admitted_at": at * 1000}
                pipe.hset(KEYS.job(task_id), mapping={**entry, "message": message, "queue": "gpu-jobs"})
                pipe.zadd(KEYS.waiting("gpu"), {task_id: at * 1000})
            pipe.lpush("gpu-jobs", message)
        pipe.execute()
    return ids


def job(client: Any, task_id: str) -> Job | None:
    """The ledger's entry."""
    return Job.load(task_id, client.hgetall(KEYS.job(task_id)))
