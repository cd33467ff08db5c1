"""The library's own connection to the app's broker, with time-outs, so that no call hangs if Redis does not answer."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import redis
from celery import Celery
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelManagedConnection

from workerpool_routing.errors import NotConfigured, PoolUnavailable
from workerpool_routing.ledger import Call, script
from workerpool_routing.wire import PRIORITY_STEPS, Keyspace, Milliseconds

logger = logging.getLogger("workerpool_routing")

REQUEST_TIMEOUT_SECONDS = 0.25
"""How long an API request waits for Redis."""

WORKER_TIMEOUT_SECONDS = 5.0
WORKER_RETRIES = 8
"""A worker outlasts a restart of Redis: it tries again for about ten seconds."""

_BACKOFF = ExponentialBackoff(cap=2, base=0.1)

_REFUSALS = {
    "READONLY": "it is a replica, so broker_url has to lead to its master",
    "UNBLOCKED": "it has become a replica, so broker_url has to lead to its master",
    "OOM": "raise its maxmemory, or remove what fills it",
    "MISCONF": "it cannot save to its disk: see its log",
    "LOADING": "it reads its data, and will answer",
    "MASTERDOWN": "it is a replica without a master",
    "NOREPLICAS": "too few of its replicas are connected",
    "NOAUTH": "broker_url has no password",
    "WRONGPASS": "broker_url has another user or password",
    "NOPERM": "the user in broker_url may not do this",
    "BUSY": "somebody's script keeps it busy",
}
"""By the code with which Redis answers that it does not do something now: what that means, or what to do."""


class Refused(PoolUnavailable):
    """Redis answers, and takes no writes now."""


class Connection:
    """Scripts and plain commands on the broker of one app; safe to share between threads and to use after a fork."""

    def __init__(self, app: Celery, *, patient: bool, timeout: float = REQUEST_TIMEOUT_SECONDS) -> None:
        """``patient``: retry as a worker does, and wait while Redis refuses, rather than answer within ``timeout`` seconds as an
        API must.
        """
        self._app = app
        self._patient = patient
        self.timeout = WORKER_TIMEOUT_SECONDS if patient else timeout
        self._client: Any = None
        self._scripts: dict[str, Any] = {}
        self._ahead: float | None = None

    @property
    def client(self) -> Any:
        """The redis-py client; the app's configuration is read at first use."""
        if self._client is None:
            # An API may repeat what a broken connection has cut off, and must not wait for a second time-out.
            impatient = Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,))
            self._client = connect(
                self._app,
                decode_responses=True,
                encoding_errors="surrogateescape",  # what is no text in a queue comes back as it went in, and ends no call
                socket_timeout=self.timeout,
                socket_connect_timeout=self.timeout,
                retry=Retry(_BACKOFF, WORKER_RETRIES) if self._patient else impatient,
            )
        return self._client

    def run(self, name: str, call: Call) -> Any:
        """Run one of the scripts; raises :class:`PoolUnavailable`, or redis.ResponseError when the script itself fails."""
        if name not in self._scripts:
            self._scripts[name] = self.client.register_script(script(name))
        failures = 0
        while True:
            try:
                with unavailable_when_down():
                    return self._scripts[name](keys=call.keys, args=call.args)
            except Refused as refused:
                self.client.connection_pool.disconnect(inuse_connections=False)  # after a failover, the address leads elsewhere
                if not self._patient:
                    raise
                if not failures:
                    logger.warning("%s; asked again until it does", refused)
                failures += 1
                time.sleep(_BACKOFF.compute(failures))

    def now(self) -> Milliseconds:
        """Redis's time, reckoned by this host's monotonic clock; Redis is asked only the first time."""
        if self._ahead is None:
            with unavailable_when_down():
                seconds, micros = self.client.time()
            self.set_clock(Milliseconds(seconds * 1000 + micros // 1000))
        assert self._ahead is not None
        return Milliseconds(int(time.monotonic() * 1000 + self._ahead))

    def set_clock(self, now: Milliseconds) -> None:
        """Note the time that Redis has just told."""
        self._ahead = now - time.monotonic() * 1000


@contextmanager
def unavailable_when_down() -> Iterator[None]:
    """Translate everything that means "not now" into :class:`PoolUnavailable`."""
    try:
        yield
    except redis.ResponseError as error:
        # If a command within a script is refused, Redis 6 quotes the refusal; Redis 7 answers with it, and redis-py then takes
        # the code out of the text.
        said = f"{error.status_code or ''} {error}".strip()
        if advice := next((advice for code, advice in _REFUSALS.items() if code in said), None):
            raise Refused(f"Redis refuses: {said.partition(' script: ')[0].rstrip('.')} ({advice})") from error
        raise
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise PoolUnavailable(f"Redis does not answer: {error}") from error


def connect(app: Celery, **options: Any) -> Any:
    """A client of the app's broker, as Kombu would connect to it; raises :class:`NotConfigured` if it is not Redis, or its URL is
    not valid.
    """
    url = app.conf.broker_write_url or app.conf.broker_url or ""
    urls = [part for one in ([url] if isinstance(url, str) else url) for part in one.split(";")]
    transport = app.conf.broker_transport_options or {}
    ssl = app.conf.broker_use_ssl
    try:
        if urls[0].startswith("sentinel://"):
            return _sentinel(urls, transport, options, ssl)
        return redis.Redis.from_url(_url(urls[0], encrypted=bool(ssl)), **options, **(ssl if isinstance(ssl, Mapping) else {}))
    except ValueError:  # not chained: its text may quote a part of the password
        raise NotConfigured("broker_url cannot be read; a password with any of :/?#[]@ in it has to be percent-encoded") from None


def _url(url: str, *, encrypted: bool) -> str:
    """The same address as redis-py spells it."""
    if not url.startswith(("redis://", "rediss://", "unix://", "redis+socket://")):
        scheme = url.partition("://")[0] if "://" in url else "none"
        raise NotConfigured(
            f"broker_url: a WorkerPool needs a redis://, rediss:// or sentinel:// broker, this app has {scheme!r}"
        )
    url = url.replace("redis+socket://", "unix://", 1)
    url = url.replace("redis://", "rediss://", 1) if encrypted else url
    address = urlsplit(url)
    query = {
        key: value.lower().removeprefix("cert_") if key == "ssl_cert_reqs" else value for key, value in parse_qsl(address.query)
    }
    return address._replace(query=urlencode(query)).geturl()


class _MasterConnection(SentinelManagedConnection):
    """Disconnects after a time-out, so that the sentinels are asked again and a late answer is not taken for the next one's.

    Every other connection of redis-py does so by itself; the one to a sentinel's master stays connected.
    """

    def read_response(self, *args: Any, disconnect_on_error: bool | None = True, **options: Any) -> Any:
        return super().read_response(*args, disconnect_on_error=disconnect_on_error, **options)


class _MasterSSLConnection(_MasterConnection, redis.SSLConnection):
    pass


def _sentinel(urls: list[str], transport: Mapping[str, Any], options: dict[str, Any], ssl: Any) -> Any:
    """The master that the sentinels name; user, password and database are those of the first URL, as in Kombu."""
    if "master_name" not in transport:
        raise NotConfigured("broker_transport_options: a sentinel:// broker needs master_name")
    addresses = [urlsplit(url) for url in urls]
    timeouts = {key: options[key] for key in ("socket_timeout", "socket_connect_timeout")} | {"retry": Retry(NoBackoff(), 0)}
    sentinels: Any = Sentinel(  # type: ignore[no-untyped-call]
        [(address.hostname, address.port or 26379) for address in addresses],
        sentinel_kwargs={**timeouts, **transport.get("sentinel_kwargs", {})},
    )
    first = addresses[0]
    return sentinels.master_for(
        transport["master_name"],
        username=unquote(first.username) if first.username else None,
        password=unquote(first.password) if first.password else None,
        db=int(first.path.strip("/") or 0),
        connection_class=_MasterSSLConnection if ssl else _MasterConnection,
        **options,
        **(ssl if isinstance(ssl, Mapping) else {}),
    )


def keyspace(pool: str, app: Celery) -> Keyspace:
    """The names of the pool's keys, by the app's own transport options."""
    options = app.conf.broker_transport_options or {}
    steps = tuple(options.get("priority_steps") or PRIORITY_STEPS)
    return Keyspace(pool, options.get("global_keyprefix", ""), steps)
