"""A master that sentinels name, and its loss: API, operator and workers go over to the next one without a restart."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from celery import Celery
from click.testing import CliRunner
from e2e.cluster.ports import reserve_port
from redis import Redis, SSLConnection
from tests.contract.workers import worker
from tests.seeds import make_pool
from tests.watching import until

from workerpool_operator import broker as broker_module
from workerpool_operator import dev, planning
from workerpool_operator.broker import TIMEOUT_SECONDS, RedisBroker
from workerpool_operator.cli import main
from workerpool_operator.local.redis_server import RedisServer, find_redis_server, private_redis
from workerpool_operator.model import API_VERSION
from workerpool_operator.observation import BrokerReading, Unavailable
from workerpool_operator.ports import Pool, Report
from workerpool_routing import PoolUnavailable, Reason, Tier, WorkerPool
from workerpool_routing.connection import Connection
from workerpool_routing.errors import NotConfigured
from workerpool_routing.ledger import State
from workerpool_routing.wire import Capacity, TierCapacity, wake_channel

pytestmark = pytest.mark.contract

MASTER = "main"
TRANSPORT = {"master_name": MASTER}
CAPACITY = Capacity({"gpu": TierCapacity(startable=1)})


@dataclass(frozen=True, slots=True)
class Watched:
    """A master and its replica, and the sentinel that watches them; the first of the URLs leads nowhere."""

    master: RedisServer
    replica: RedisServer
    port: int

    @property
    def url(self) -> str:
        return f"sentinel://127.0.0.1:1/2;sentinel://127.0.0.1:{self.port}/2"

    def replicated(self) -> None:
        with Redis.from_url(self.master.url) as client:
            until(lambda: client.wait(1, 1000) == 1, "the replica has everything")


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    with private_redis() as master, private_redis() as replica, Redis.from_url(replica.url, decode_responses=True) as client:
        with Redis.from_url(master.url) as to:
            to.config_set("repl-diskless-sync", "yes")
            to.config_set("repl-diskless-sync-delay", 0)  # else it waits for more replicas
        client.config_set("repl-diskless-load", "on-empty-db")  # and leaves no file
        client.replicaof("127.0.0.1", str(master.port))
        until(lambda: client.info("replication")["master_link_status"] == "up", "the replica follows its master")
        with sentinel_of(master, tmp_path) as port:
            yield Watched(master, replica, port)
        with suppress(ProcessLookupError):
            os.kill(master.pid, signal.SIGCONT)


@contextmanager
def sentinel_of(master: RedisServer, directory: Path) -> Iterator[int]:
    port, conf = reserve_port(), directory / "sentinel.conf"
    conf.write_text(
        f"port {port}\nbind 127.0.0.1\nsentinel monitor {MASTER} 127.0.0.1 {master.port} 1\n"
        f"sentinel down-after-milliseconds {MASTER} 1000\nsentinel failover-timeout {MASTER} 2000\n"
    )
    process = subprocess.Popen([find_redis_server(), conf, "--sentinel"], stdout=subprocess.DEVNULL, cwd=directory)
    try:
        with Redis(port=port, decode_responses=True) as client:
            until(lambda: knows_a_replica(client), "the sentinel knows master and replica")
        yield port
    finally:
        process.terminate()
        process.wait(60)


def knows_a_replica(client: Redis) -> bool:
    with suppress(Exception):
        return any(replica["flags"] == "slave" for replica in client.sentinel_slaves(MASTER))
    return False


TIMEOUT = 1.0
"""Of the API, in seconds: a call that is made once has to be answered on a busy machine too."""


def pool_on(url: str, transport: Mapping[str, str] = TRANSPORT, tiers: tuple[Tier, ...] | None = None) -> WorkerPool:
    app = Celery("api", broker=url, set_as_current=False)
    app.conf.broker_transport_options = dict(transport)

    @app.task(name="media.index", shared=False)  # type: ignore[untyped-decorator]
    def index(path: str) -> str:
        return path

    return WorkerPool("test/media", app, tiers=tiers, timeout=TIMEOUT)


def submit(pool: WorkerPool) -> str:
    return str(pool.submit(pool._app.tasks["media.index"], ("a",), accelerated=True).task_id)


def test_the_library_and_kombu_find_the_same_master(watched: Watched) -> None:
    pool = pool_on(watched.url, tiers=(Tier("gpu", "gpu-jobs", accelerated=True), Tier("cpu", "cpu-jobs", accelerated=False)))
    task = pool._app.tasks["media.index"]
    started = time.monotonic()
    submitted = submit(pool)
    assert time.monotonic() - started < 4 * TIMEOUT, "a sentinel that is gone is not waited for"
    plain = task.apply_async(("b",), headers={"workerpool": {"accelerated": True}}).id
    with pool._app.connection_for_read() as connection:
        for task_id in (submitted, plain):
            message = connection.default_channel.basic_get("cpu-jobs")
            assert message.headers["id"] == task_id
            message.ack()
            job = pool.job(task_id)
            assert job is not None
            assert (job.tier, job.reason) == ("cpu", Reason.NO_CAPACITY)
    with Redis.from_url(watched.master.url.replace("/0", "/2")) as client:
        assert client.keys("workerpool:*")


def test_sentinels_without_the_name_of_their_master_are_refused() -> None:
    with pytest.raises(NotConfigured, match="master_name"):
        pool_on("sentinel://127.0.0.1:1/0", {}).queue_length("cpu-jobs")


def test_the_master_is_spoken_to_through_tls_where_the_app_says_so() -> None:
    app = Celery("api", broker="sentinel://127.0.0.1:1/0", set_as_current=False)
    app.conf.update(broker_transport_options=dict(TRANSPORT), broker_use_ssl={"ssl_ca_certs": "/ca.pem"})
    pool = Connection(app, patient=False).client.connection_pool
    assert issubclass(pool.connection_class, SSLConnection)
    assert pool.connection_kwargs["ssl_ca_certs"] == "/ca.pem"


async def read(broker: RedisBroker, address: str, pool: Pool) -> BrokerReading | Unavailable:
    """What the operator sees, in bounded time: a dead sentinel, a living one and the master each have theirs, twice."""
    async with asyncio.timeout(6 * TIMEOUT_SECONDS):
        answer = await broker.read(address, [pool])
    return answer if isinstance(answer, Unavailable) else answer[pool.id]


async def heard(url: str, wake: asyncio.Event, api: WorkerPool) -> None:
    """Return when a submitted job has woken the operator, which subscribes at its own time."""
    with Redis.from_url(url, decode_responses=True) as client:
        async with asyncio.timeout(30):
            while not client.pubsub_numsub(wake_channel(""))[0][1]:  # noqa: ASYNC110 it is Redis who knows
                await asyncio.sleep(0.02)
            wake.clear()
            submit(api)
            await wake.wait()


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_operator_and_api_go_over_to_the_next_master(
    watched: Watched, fault: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_module, "SUBSCRIPTION_SECONDS", 2.0)

    async def scenario() -> None:
        wake = asyncio.Event()
        broker, api = RedisBroker(wake), pool_on(watched.url)
        pool = make_pool("", broker={"url": watched.url, "master_name": MASTER})
        address = pool.spec.broker.address(watched.url)
        try:
            before = await read(broker, address, pool)
            assert isinstance(before, BrokerReading)
            assert before.database == 2
            assert await broker.publish(address, pool, planning.policy(pool.spec), CAPACITY) is None
            await heard(watched.master.url, wake, api)
            first = submit(api)
            watched.replicated()
            os.kill(watched.master.pid, fault)

            _, refused = await asyncio.to_thread(admitted_again, lambda: submit(api))
            assert refused, "there was a time without a master"
            assert api.job(first) is not None, "what the replica had is there"

            unread: list[str] = []
            while isinstance(after := await read(broker, address, pool), Unavailable):
                unread.append(after.why)
                assert len(unread) < 50
            assert after.run_id != before.run_id
            assert all(f"127.0.0.1:{watched.port}" in why or "sentinels" in why for why in unread)
            assert await broker.publish(address, pool, planning.policy(pool.spec), CAPACITY) is None
            await heard(watched.replica.url, wake, api)
        finally:
            await broker.close()

    asyncio.run(scenario())


def admitted_again(submitted: Callable[[], str]) -> tuple[str, list[str]]:
    """The task id of the first job that the next master admits, and what was said until then."""
    refused: list[str] = []
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        started = time.monotonic()
        try:
            return submitted(), refused
        except PoolUnavailable as error:
            refused.append(str(error))
        assert time.monotonic() - started < 10 * TIMEOUT, "an answer within a few time-outs, whatever happens"
        time.sleep(0.05)
    pytest.fail("not admitted again within 60 s")


def test_the_operator_names_the_sentinels_that_know_no_master(watched: Watched) -> None:
    async def scenario() -> None:
        broker = RedisBroker(asyncio.Event())
        url = f"sentinel://api:s3cret-Pa55@127.0.0.1:{watched.port}/2"
        pool = make_pool("", broker={"url": url, "master_name": "another"})
        try:
            answer = await read(broker, pool.spec.broker.address(url), pool)
        finally:
            await broker.close()
        assert isinstance(answer, Unavailable)
        assert answer.why.startswith(f"the master of the sentinels at 127.0.0.1:{watched.port} cannot be reached: ")
        assert "another" in answer.why
        assert "s3cret" not in answer.why

    asyncio.run(scenario())


def test_a_worker_goes_over_to_the_next_master(watched: Watched, redis_url: str, tmp_path: Path) -> None:
    url = f"sentinel://127.0.0.1:{watched.port}/2"
    tiers = (Tier("gpu", "gpu-jobs", accelerated=True), Tier("cpu", "cpu-jobs", accelerated=False))
    app = Celery("api", broker=url, backend=redis_url, set_as_current=False)
    app.conf.broker_transport_options = dict(TRANSPORT)

    @app.task(name="tests.contract.jobs.work", shared=False)  # type: ignore[untyped-decorator]
    def work(endings: dict[str, str]) -> None: ...

    pool = WorkerPool("test/jobs", app, tiers=tiers)

    def done(task_id: str | None) -> bool:
        with suppress(PoolUnavailable):
            job = pool.job(str(task_id))
            return job is not None and job.state is State.DONE
        return False

    env = {"JOBS_BACKEND": redis_url, "JOBS_TRANSPORT": '{"master_name": "main"}'}
    with worker(url, "cpu", "cpu-jobs", "w", tmp_path, env=env):
        first = pool.submit(work, ({},)).task_id
        until(lambda: done(first), "a job is done")
        watched.replicated()
        os.kill(watched.master.pid, signal.SIGKILL)
        second, _ = admitted_again(lambda: str(pool.submit(work, ({},)).task_id))
        until(lambda: done(second), "a job is done under the next master")


def test_the_commands_take_sentinels(watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sentinel://127.0.0.1:{watched.port}/2"
    pool = make_pool("", app="tests.contract.jobs", broker={"url": url, "master_name": MASTER})
    written = {
        "apiVersion": API_VERSION, "kind": "WorkerPool", "metadata": {"namespace": "test", "name": "media"},
        "spec": pool.spec.model_dump(mode="json", by_alias=True, exclude_none=True),
    }  # fmt: skip
    file = tmp_path / "pool.json"
    file.write_text(json.dumps(written))
    assert CliRunner().invoke(main, ["check", "-f", str(file)]).exit_code == 0

    monkeypatch.setenv("JOBS_TRANSPORT", json.dumps(TRANSPORT))
    api = pool_on(url)

    async def known_in_dev() -> None:
        async with dev.session(pool, directory=tmp_path, reporter=Silent(), broker_url=f"{url};{url}"), asyncio.timeout(60):
            while await asyncio.to_thread(lambda: api.policy) is None:  # noqa: ASYNC110 it is Redis who knows
                await asyncio.sleep(0.05)

    asyncio.run(known_in_dev())
    task_id = submit(api)
    told = CliRunner().invoke(main, ["job", task_id, "-f", str(file)])
    assert (told.exit_code, told.output.split()[0]) == (0, task_id)


class Silent:
    async def report(self, report: Report) -> None:
        pass
