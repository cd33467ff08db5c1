"""Real parts for the contract tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from redis import Redis

from workerpool_operator.local.redis_server import private_redis


@pytest.fixture(scope="module", autouse=True)
def _own_tasks() -> Iterator[None]:
    """Celery hands the tasks of every app to every later one: those of a test file stay in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("celery._state._on_app_finalizers", set())
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
