"""Every kind of broker that Kombu speaks Redis to: the library reaches it as Kombu does, and never shows its password."""

from __future__ import annotations

import datetime as dt
import ipaddress
import logging
import os
import select
import signal
import socket
import ssl
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from redis import Redis

from workerpool_operator.local.redis_server import private_redis
from workerpool_routing import PoolUnavailable, Reason, Tier, WorkerPool
from workerpool_routing.errors import NotConfigured

pytestmark = pytest.mark.contract

TIERS = (Tier("gpu", "gpu-jobs", accelerated=True), Tier("cpu", "cpu-jobs", accelerated=False))
SECRET = "s3cret-Pa55"


def pool_on(url: str, transport: dict[str, Any] | None = None, **conf: Any) -> WorkerPool:
    app = Celery("api", broker=url, set_as_current=False)
    app.conf.update(broker_transport_options=transport or {}, **conf)

    @app.task(name="media.index", shared=False)  # type: ignore[untyped-decorator]
    def index(path: str) -> str:
        return path

    return WorkerPool("ml/media", app, tiers=TIERS, timeout=1)


def check_that_kombu_finds_what_was_submitted(pool: WorkerPool, **options: Any) -> None:
    """One job by ``submit()``, one by Celery's own publish with the same wish: Kombu takes both from the tier's queue."""
    task = pool._app.tasks["media.index"]
    decision = pool.submit(task, ("a",), accelerated=True, **options)
    plain = task.apply_async(("b",), headers={"workerpool": {"accelerated": True}}, **options)
    assert (decision.reason, pool.queue_length("cpu-jobs")) == (Reason.NO_CAPACITY, 2)
    with pool._app.connection_for_read() as connection:
        for task_id, args in ((str(decision.task_id), ["a"]), (plain.id, ["b"])):
            message = connection.default_channel.basic_get("cpu-jobs")
            assert (message.headers["id"], message.payload[0]) == (task_id, args)
            assert message.headers["workerpool"]["attempt"] == 1
            message.ack()
            job = pool.job(task_id)
            assert job is not None
            assert (job.tier, job.wanted) == ("cpu", "gpu")
    assert pool.queue_length("cpu-jobs") == 0


@contextmanager
def tls_in_front_of(port: int, directory: Path) -> Iterator[tuple[int, Path]]:
    """A port that speaks TLS for a server that does not, and the file with its certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = directory / "server.pem"
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    pem.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_accept, args=(listener, context, port), daemon=True).start()
        yield listener.getsockname()[1], pem


def _accept(listener: socket.socket, context: ssl.SSLContext, port: int) -> None:
    with suppress(OSError):
        while True:
            plain, _ = listener.accept()
            threading.Thread(target=_pass_on, args=(context.wrap_socket(plain, server_side=True), port), daemon=True).start()


def _pass_on(near: ssl.SSLSocket, port: int) -> None:
    with near, socket.create_connection(("127.0.0.1", port)) as far, suppress(OSError):
        while True:
            ready = [near] if near.pending() else select.select([near, far], [], [])[0]
            for side in ready:
                if not (data := side.recv(65536)):
                    return
                (far if side is near else near).sendall(data)


def test_rediss_by_its_url(redis_url: str, tmp_path: Path) -> None:
    with tls_in_front_of(int(redis_url.rpartition(":")[2].partition("/")[0]), tmp_path) as (port, pem):
        check_that_kombu_finds_what_was_submitted(
            pool_on(f"rediss://127.0.0.1:{port}/0?ssl_cert_reqs=CERT_REQUIRED&ssl_ca_certs={pem}")
        )


def test_rediss_by_the_apps_settings(redis_url: str, tmp_path: Path) -> None:
    with tls_in_front_of(int(redis_url.rpartition(":")[2].partition("/")[0]), tmp_path) as (port, pem):
        settings = {"ssl_ca_certs": str(pem), "ssl_cert_reqs": ssl.CERT_REQUIRED}
        check_that_kombu_finds_what_was_submitted(pool_on(f"redis://127.0.0.1:{port}/0", broker_use_ssl=settings))


def test_an_acl_user_another_database_and_a_prefix() -> None:
    with private_redis() as server, Redis.from_url(server.url, decode_responses=True) as admin:
        admin.acl_setuser(
            "api", enabled=True, passwords=[f"+{SECRET}"], keys=["prod-*"], channels=["*"],
            commands=["+@all", "-@admin", "-@dangerous"],
        )  # fmt: skip
        url = server.url.replace("redis://", f"redis://api:{SECRET}@").replace("/0", "/3")
        check_that_kombu_finds_what_was_submitted(pool_on(url, {"global_keyprefix": "prod-"}))
        assert admin.keys() == []


def test_priority_steps_of_ones_own(redis_url: str) -> None:
    pool = pool_on(redis_url, {"priority_steps": [0, 5]})
    check_that_kombu_finds_what_was_submitted(pool, priority=7)
    with Redis.from_url(redis_url, decode_responses=True) as client:
        pool.submit(pool._app.tasks["media.index"], ("a",), priority=7)
        assert client.llen("cpu-jobs\x06\x165") == 1


@pytest.mark.parametrize(
    ("url", "error"),
    [
        (f"redis://api:{SECRET}@127.0.0.1:PORT/0", PoolUnavailable),
        (f"redis://api:{SECRET}@127.0.0.1:1/0", PoolUnavailable),
        (f"redis://api:{SECRET}@127.0.0.1:notaport/0", NotConfigured),
        (f"redis://api:x[{SECRET}@127.0.0.1:1/0", NotConfigured),
        (f"amqp://api:{SECRET}@127.0.0.1/0", NotConfigured),
    ],
)
def test_a_password_shows_in_no_error_log_or_repr(
    redis_url: str, url: str, error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    pool = pool_on(url.replace("PORT", redis_url.rpartition(":")[2].partition("/")[0]))
    with caplog.at_level(logging.DEBUG), pytest.raises(error) as raised:
        pool.submit(pool._app.tasks["media.index"], ("a",))
    shown = [
        "".join(traceback.format_exception(raised.value)),
        repr(raised.value),
        caplog.text,
        repr(pool),
        repr(pool.connection),
    ]
    assert [text for text in shown if SECRET in text] == []


@pytest.mark.parametrize("fault", ["stopped", "restarted", "read-only", "out of memory", "scripts flushed"])
def test_a_redis_that_comes_back_is_used_again_without_a_restart_of_the_api(fault: str) -> None:
    with private_redis() as server, Redis.from_url(server.url, decode_responses=True) as client:
        pool = pool_on(server.url)
        task = pool._app.tasks["media.index"]
        pool.submit(task, ("before",))
        if fault == "stopped":
            os.kill(server.pid, signal.SIGSTOP)
        if fault == "restarted":
            client.client_kill_filter(_type="normal", skipme=True)
        if fault == "read-only":
            client.replicaof("127.0.0.1", 1)
        if fault == "out of memory":
            client.config_set("maxmemory", 1)
        if fault == "scripts flushed":
            client.script_flush()
        started = time.monotonic()
        if fault in ("stopped", "read-only", "out of memory"):
            with pytest.raises(PoolUnavailable):
                pool.submit(task, ("during",))
            assert time.monotonic() - started < 10
            os.kill(server.pid, signal.SIGCONT)
            client.replicaof("NO", "ONE")
            client.config_set("maxmemory", 0)
            assert pool.queue_length("cpu-jobs") == 1, "what was refused is not queued afterwards"
        assert pool.submit(task, ("after",)).task_id
        assert pool.queue_length("cpu-jobs") == 2
