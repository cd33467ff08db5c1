"""The library's own Redis connection: the app's broker, with time-outs, so that no call hangs on a server that does not
answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis
from celery import Celery
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.retry import Retry

from workerpool_routing.errors import NotConfigured, PoolUnavailable
from workerpool_routing.ledger import Call, script
from workerpool_routing.wire import PRIORITY_STEPS, Keyspace

REQUEST_TIMEOUT_SECONDS = 0.25
"""How long an API request waits for Redis."""

WORKER_TIMEOUT_SECONDS = 5.0
WORKER_RETRIES = 8
"""A worker outlasts a restart of Redis: it tries again for about ten seconds."""

_REFUSALS = ("READONLY", "OOM", "MISCONF", "LOADING", "MASTERDOWN", "NOREPLICAS", "NOPERM", "BUSY")


class Connection:
    """Scripts and plain commands on the broker of one app; safe to share between threads and to use after a fork."""

    def __init__(self, app: Celery, *, patient: bool) -> None:
        """``patient``: retry as a worker does, rather than answer at once as an API must."""
        self._app = app
        self._patient = patient
        self._client: Any = None
        self._scripts: dict[str, Any] = {}

    @property
    def client(self) -> Any:
        """The redis-py client; the app's configuration is read at first use."""
        if self._client is None:
            self._client = redis.Redis.from_url(
                broker_url(self._app),
                decode_responses=True,
                socket_timeout=WORKER_TIMEOUT_SECONDS if self._patient else REQUEST_TIMEOUT_SECONDS,
                socket_connect_timeout=WORKER_TIMEOUT_SECONDS if self._patient else REQUEST_TIMEOUT_SECONDS,
                retry=Retry(ExponentialBackoff(cap=2, base=0.1), WORKER_RETRIES) if self._patient else Retry(NoBackoff(), 1),
            )
        return self._client

    def run(self, name: str, call: Call) -> Any:
        """Run one of the scripts; raises :class:`PoolUnavailable`, or redis.ResponseError when the script itself fails."""
        if name not in self._scripts:
            self._scripts[name] = self.client.register_script(script(name))
        with unavailable_when_down():
            return self._scripts[name](keys=call.keys, args=call.args)


@contextmanager
def unavailable_when_down() -> Iterator[None]:
    """Translate everything that means "not now" into :class:`PoolUnavailable`."""
    try:
        yield
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise PoolUnavailable(f"Redis does not answer: {error}") from error
    except redis.ResponseError as error:
        if any(refusal in str(error) for refusal in _REFUSALS):
            raise PoolUnavailable(f"Redis refuses: {error}") from error
        raise


def broker_url(app: Celery) -> str:
    """The app's broker; raises :class:`NotConfigured` when that is not Redis."""
    url = app.conf.broker_write_url or app.conf.broker_url or ""
    url = url if isinstance(url, str) else url[0]
    if not url.startswith(("redis://", "rediss://", "unix://", "redis+socket://")):
        scheme = url.partition("://")[0] or "none"
        raise NotConfigured(f"broker_url: a WorkerPool needs a redis:// or rediss:// broker, this app has {scheme!r}")
    return url.replace("redis+socket://", "unix://", 1)


def keyspace(pool: str, app: Celery) -> Keyspace:
    """The pool's keys, by the app's own transport options."""
    options = app.conf.broker_transport_options or {}
    steps = tuple(options.get("priority_steps") or PRIORITY_STEPS)
    return Keyspace(pool, options.get("global_keyprefix", ""), steps)
