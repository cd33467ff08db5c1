"""Real parts for the contract tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from importlib import import_module
from types import ModuleType

import pytest
from redis import Redis
from tests.contract.workers import APP, worker
from tests.watching import until

from workerpool_operator import salvage
from workerpool_operator.local.redis_server import RedisServer, private_redis
from workerpool_routing import WorkerPool, wire


@pytest.fixture(scope="module", autouse=True)
def _own_tasks() -> Iterator[None]:
    """Celery hands the tasks of every app to every later one: those of a test file stay in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("celery._state._on_app_finalizers", set())
        yield


@pytest.fixture(scope="session", autouse=True)
def _patience() -> Iterator[None]:
    """What a test asks once has to be answered on a busy machine too; an API waits a quarter of a second, and refuses."""
    defaults = WorkerPool.__init__.__kwdefaults__
    assert defaults
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(defaults, "timeout", 5.0)
        yield


@pytest.fixture(scope="session")
def _redis_server_url() -> Iterator[str]:
    with private_redis() as server:
        yield server.url


@pytest.fixture
def redis_url(_redis_server_url: str) -> str:
    """An empty Redis that no other program uses."""
    with Redis.from_url(_redis_server_url) as client:
        client.flushall()
    return _redis_server_url


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    """A Redis of the module's own, to be paused."""
    with private_redis() as server:
        yield server


@pytest.fixture(scope="module")
def url(redis_server: RedisServer) -> str:
    """Where it is."""
    return redis_server.url


@pytest.fixture(scope="module")
def jobs(url: str) -> ModuleType:
    """The app as an API process has it. The variable goes again: for Celery it outdoes the broker of every other app."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CELERY_BROKER_URL", url)
        sys.modules.pop(APP, None)
        return import_module(APP)


@pytest.fixture
def short_life(monkeypatch: pytest.MonkeyPatch) -> float:
    """The seconds after which this process takes a silent worker for lost; workers report as often as ever."""
    seconds = 4
    monkeypatch.setattr(wire, "PRESENCE_LIFE_MS", 1000 * seconds)
    monkeypatch.setattr(salvage, "UNRENEWED_SECONDS", seconds)
    return seconds


@pytest.fixture(scope="module")
def two_tiers(url: str, jobs: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The app, with a worker on either tier that no test kills."""
    log = tmp_path_factory.mktemp("workers")
    with ExitStack() as stack:
        stack.enter_context(worker(url, "gpu", "gpu-jobs", "gpu-a", log))
        stack.enter_context(worker(url, "cpu", "cpu-jobs", "cpu-a", log))
        until(lambda: {w.worker for w in jobs.pool.workers().values()} == {"gpu-a", "cpu-a"}, "both workers report")
        yield jobs
