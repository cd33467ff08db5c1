"""The whole system on one laptop: the operator's own pass, with local processes in place of Deployments."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from kombu.utils.url import sanitize_url
from pydantic import ValidationError

from workerpool_operator.broker import RedisBroker
from workerpool_operator.local.guardian import Guardian, kill_group
from workerpool_operator.local.launch import Launch, launch, unsupported
from workerpool_operator.local.process import last_words
from workerpool_operator.local.redis_server import private_redis
from workerpool_operator.local.workers import LocalWorkers
from workerpool_operator.model import API_VERSION, KIND, Broker
from workerpool_operator.observation import Unavailable
from workerpool_operator.ports import Pool, Report, Reporter
from workerpool_operator.reconcile import Reconciler

APP_CHECK_SECONDS = 30.0

STATUS_FILE = "workerpool.json"
"""A file beside the logs: the WorkerPool with its status, as the API server would keep it."""


class CannotStart(Exception):
    """Dev mode could not start, and has left nothing running; the message says what is wrong, and what to do."""


@dataclass(frozen=True, slots=True)
class Session:
    """What a running dev mode is made of."""

    broker_url: str
    pool: Pool
    workers: LocalWorkers
    reconciler: Reconciler


@asynccontextmanager
async def session(pool: Pool, *, directory: Path, reporter: Reporter, broker_url: str | None = None) -> AsyncIterator[Session]:
    """Run a pool inside the block; at its end stop the workers, each within its grace period.

    Args:
        pool: the pool; the broker that it names is replaced.
        directory: where the workers' logs and :data:`STATUS_FILE` go.
        reporter: is called after every pass.
        broker_url: of a Redis that is running; None starts a private one.

    Raises:
        CannotStart: Redis, the app or the template cannot be used here.
        RedisServerError: there is no redis-server to start.
    """
    async with AsyncExitStack() as stack:
        url = broker_url or stack.enter_context(private_redis()).url
        pool = replace(pool, spec=pool.spec.model_copy(update={"broker": at(url, pool.spec.broker)}), status={})
        if problems := unsupported(pool.spec):
            raise CannotStart("\n".join(map(str, problems)))
        wake = asyncio.Event()
        redis = RedisBroker(wake)
        stack.push_async_callback(redis.close)
        if isinstance(answer := await redis.read(pool.spec.broker.address(url), [pool]), Unavailable):
            raise CannotStart(f"{answer.why}. Correct --broker-url, or leave it out to get a private Redis.")
        await _check_app(pool)
        workers = LocalWorkers(directory, wake)
        stack.push_async_callback(workers.close)
        reconciler = Reconciler(
            urls=_OneUrl(pool.spec.broker.address(url)),
            broker=redis,
            workers=workers,
            reporter=_StatusKept(directory / STATUS_FILE, reporter),
            wake=wake,
        )
        reconciler.pools[pool.id] = pool
        passes = asyncio.create_task(reconciler.run())
        try:
            yield Session(url, pool, workers, reconciler)
        finally:
            passes.cancel()
            with suppress(asyncio.CancelledError):
                await passes


@dataclass(frozen=True, slots=True)
class _OneUrl:
    url: str

    async def broker_url(self, pool: Pool) -> str | Unavailable:  # noqa: ARG002 the port's signature
        return self.url


@dataclass(frozen=True, slots=True)
class _StatusKept:
    """A reporter that also writes the resource and its status to a file, for ``workerpool explain``."""

    path: Path
    reporter: Reporter

    async def report(self, report: Report) -> None:
        self._write(report)
        await self.reporter.report(report)

    def _write(self, report: Report) -> None:
        pool = report.pool
        spec = pool.spec.model_dump(mode="json", by_alias=True, exclude_none=True)
        spec["broker"]["url"] = shown(spec["broker"]["url"])
        metadata = {"name": pool.name, "namespace": pool.namespace, "generation": pool.generation}
        resource = {
            "apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": spec, "status": report.status.dump(),
        }  # fmt: skip
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(resource, indent=1))
        new.replace(self.path)


def shown(url: str) -> str:
    """The URL, or the URLs of sentinels, without passwords."""
    return ";".join(sanitize_url(part) for part in url.partition("#")[0].split(";"))


def at(url: str, broker: Broker) -> Broker:
    """The same broker at the address of ``--broker-url``; raises :class:`CannotStart` if that is not valid."""
    master = broker.master_name if url.startswith("sentinel://") else None
    try:
        return Broker.model_validate({**broker.model_dump(), "url": url, "url_from": None, "master_name": master})
    except ValidationError:  # not chained: its text repeats the URL, which may contain a password
        raise CannotStart(
            "--broker-url: must begin with redis:// or rediss://, or with sentinel:// if the file has spec.broker.masterName"
        ) from None


async def _check_app(pool: Pool) -> None:
    """Load the app once, as a worker would, so that a wrong module is one message and not a worker that keeps dying."""
    start = launch(pool, pool.spec.tiers[0], "check")
    if "-A" not in start.command:
        return
    until_app = start.command[: start.command.index("-A") + 2]
    try:
        async with asyncio.timeout(APP_CHECK_SECONDS):
            status, output = await _run([*until_app, "report"], start)
    except TimeoutError:
        message = f"spec.app: {pool.spec.app} was not imported within {APP_CHECK_SECONDS:.0f} s"
        raise CannotStart(f"{message}; celery -A {pool.spec.app} report shows what it waits for") from None
    if status:
        said = last_words(output).rstrip(".") or "it said nothing"
        raise CannotStart(
            f"spec.app: {pool.spec.app} cannot be loaded from {start.directory}: {said}. "
            "Start in the directory from which Python can import it, with its dependencies installed."
        )


async def _run(command: list[str], start: Launch) -> tuple[int | None, str]:
    """Run a command as a worker would run; return its exit status and output. It does not outlive the call, or this process."""
    guardian = Guardian()
    try:
        process = await asyncio.create_subprocess_exec(
            *guardian.wrap(command),
            env={name: value for name, value in start.environment.items() if not name.startswith("WORKERPOOL_")},
            cwd=start.directory,
            stdin=guardian.pipe,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            output, _ = await process.communicate()
        finally:
            kill_group(process.pid)
            await process.wait()
    finally:
        guardian.close()
    return process.returncode, output.decode(errors="replace")
