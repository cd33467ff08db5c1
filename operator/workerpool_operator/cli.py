"""The command ``workerpool``."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn, TypeVar

import click
from rich.console import Console

from workerpool_operator import dev as dev_mode
from workerpool_operator import manifest
from workerpool_operator.broker import RedisBroker
from workerpool_operator.live import LiveView
from workerpool_operator.local.redis_server import RedisServerError
from workerpool_operator.model import Scaling
from workerpool_operator.observation import Unavailable
from workerpool_operator.ports import Pool
from workerpool_operator.reaper import Reaper
from workerpool_operator.reconcile import TICK_SECONDS
from workerpool_routing.ledger import Job, State

_OUTPUT = click.Path(dir_okay=False, writable=True, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_pool_file = click.option("--file", "-f", "file", type=_FILE, required=True, help="A YAML file with one WorkerPool.")
_other_redis = click.option("--broker-url", metavar="URL", help="Use this Redis in place of the file's.")

T = TypeVar("T")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="celery-workerpool")
def main() -> None:
    """GPU and CPU Celery workers as one pool, on Kubernetes and on a laptop.

    To begin with: `check` a WorkerPool, then try it on this machine with `dev`. In a cluster, `run` is what the operator's pod
    executes. `explain` and `job` tell why a pool, or one job of it, is as it is.
    """


@main.command(short_help="Run the operator (this is what its pod executes).")
@click.option("--namespace", "-n", "namespaces", multiple=True, metavar="NAMESPACE",
              help="Serve the WorkerPools of this namespace only; may be repeated. Default: all namespaces.")  # fmt: skip
@click.option("--port", default=8080, show_default=True, help="Port of /metrics, /healthz and /readyz.")
@click.option(
    "--lease-name", metavar="NAME", default="celery-workerpool", show_default=True,
    help="The Lease that elects the one operator that acts.",
)  # fmt: skip
@click.option(
    "--lease-namespace", metavar="NAMESPACE",
    help="Namespace of that Lease. Default: the pod's own, or `default` outside a cluster.",
)  # fmt: skip
def run(namespaces: Sequence[str], port: int, lease_name: str, lease_namespace: str | None) -> None:
    """Run the operator in the cluster of this pod, or in that of KUBECONFIG.

    Several operators may run with the same Lease: the one that holds it acts, the others stand by and take over when it stops
    or dies.
    """
    # kopf and the client take a second to import
    from workerpool_operator.main import Options
    from workerpool_operator.main import run as run_operator

    run_operator(Options(tuple(namespaces), port, lease_name, lease_namespace))


@main.command(short_help="Validate a WorkerPool file, without a cluster.")
@_pool_file
def check(file: Path) -> None:
    """Validate a WorkerPool without a cluster: print its tiers, or every problem by the field's name (exit code 2)."""
    pool = _read(file)
    click.echo(f"{file}: WorkerPool {pool.id} is valid")
    width = max(len(tier.name) for tier in pool.spec.tiers)
    for tier in pool.spec.tiers:
        accelerator = f", {tier.accelerator.count} x {tier.accelerator.resource}" if tier.accelerator else ""
        click.echo(
            f"  {tier.name:<{width}}  queue {tier.queue}, {tier.replicas.min} to {tier.replicas.max} workers "
            f"with {tier.concurrency} slot{'s' if tier.concurrency > 1 else ''} each{accelerator}"
        )


@main.command(short_help="Run a WorkerPool on this machine, with local processes.")
@_pool_file
@click.option("--broker-url", metavar="URL", help="Use this Redis. Default: start a private one; the file's is never used.")
@click.option("--logs", type=click.Path(file_okay=False, path_type=Path), help="Where the workers log. Default: a new directory.")
@click.option("--debug", is_flag=True, help="Print a traceback when something goes wrong.")
def dev(file: Path, broker_url: str | None, logs: Path | None, debug: bool) -> None:
    """Run a WorkerPool on this machine: a real Redis, Celery workers as local processes, and the operator's own decisions.

    Start it in the directory where `celery -A APP` would find the app, and point your API at the broker URL that it prints.
    Ctrl-C ends it: the workers finish their jobs first; a second Ctrl-C does not wait for them.
    """
    pool = _read(file)
    directory = logs or Path(tempfile.mkdtemp(prefix=f"workerpool-{pool.name}-"))
    try:
        asyncio.run(_dev(pool, directory, broker_url))
    except Exception as error:
        if debug:
            raise
        foreseen = isinstance(error, dev_mode.CannotStart | RedisServerError | OSError)
        _fail(str(error) if foreseen else f"{type(error).__name__}: {error}; --debug shows where")
    except KeyboardInterrupt:
        sys.exit(130)


@main.command(short_help="Replay a day of jobs through the scaling rule, and KEDA's.")
@click.option("--trace", "trace_file", type=_FILE, help="Jobs from a CSV with arrival_s and service_s (or exec_s), in seconds.")
@click.option("--column", "columns", multiple=True, metavar="NAME=COLUMN",
              help="What the CSV calls arrival_s or service_s; may be repeated.")  # fmt: skip
@click.option("--synthetic", type=click.Choice(["images", "bursts", "steady"]), help="Made-up jobs of this kind.")
@click.option("--from-redis", is_flag=True, help="The jobs of the last hour, as far as the ledger of the --pool still has them.")
@click.option("--broker-url", metavar="URL", help="With --from-redis: use this Redis in place of the pool's.")
@click.option("--pool", "pool_file", type=_FILE, help="A YAML file with one WorkerPool; its first tier is simulated.")
@click.option("--policy", "policies", multiple=True, type=click.Choice(["workerpool", "keda", "keda-inflight", "bound"]),
              help="A rule to show; may be repeated. Default: all.")  # fmt: skip
@click.option("--start-seconds", type=click.FloatRange(min=0), default=45.0, show_default=True,
              help="Seconds from the order of a worker until it is ready.")  # fmt: skip
@click.option("--target-wait", type=click.IntRange(min=0), help="Seconds within which a job should start. Default: the pool's.")
@click.option("--slots", type=click.IntRange(min=1), help="Jobs that one worker runs at a time. Default: the pool's.")
@click.option("--seed", default=0, show_default=True, help="Random seed of the made-up jobs.")
@click.option("--json", "json_file", type=_OUTPUT, help="Also write the table as JSON.")
@click.option("--plot", "plot_file", type=_OUTPUT, help="Also draw arrivals, replicas and waits, as PNG.")
def simulate(
    trace_file: Path | None,
    columns: Sequence[str],
    synthetic: str | None,
    from_redis: bool,
    broker_url: str | None,
    pool_file: Path | None,
    policies: Sequence[str],
    start_seconds: float,
    target_wait: int | None,
    slots: int | None,
    seed: int,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Replay a day of jobs: how many workers would have been ordered, how long jobs would have waited, what it would have cost.

    Give the jobs by one of --trace, --synthetic and --from-redis. The operator's own rule decides, next to KEDA's (by queue
    length, or by what is in flight too) and to a lower bound: the least that any rule could pay (needs SciPy).

    
      workerpool simulate --synthetic bursts
      workerpool simulate --trace jobs.csv --pool workerpool.yaml --plot day.png
      workerpool simulate --from-redis --pool workerpool.yaml
    """
    from workerpool_operator.simulation import command, trace
    from workerpool_operator.simulation.compare import Setting

    if sum((trace_file is not None, synthetic is not None, from_redis)) != 1:
        _fail("give one of --trace FILE, --synthetic NAME and --from-redis")
    pool = _read(pool_file) if pool_file else None
    tier, notes = command.chosen(pool.spec.tiers[0] if pool else None)
    if target_wait is None:
        target_wait = (pool.spec.scaling if pool else Scaling()).target_wait_seconds
    try:
        if trace_file:
            jobs = command.load(trace_file, command.mapping(columns))
        elif synthetic:
            jobs = trace.SYNTHETIC[synthetic](seed)
        elif pool:
            address = _address(pool, broker_url)
            jobs, note = command.replayed(pool.id, tier.name, _from_redis(lambda redis: redis.ended_jobs(address, pool)))
            notes.append(note)
        else:
            _fail("--from-redis needs --pool FILE: it names the ledger, and the tier")
        setting = Setting(start_seconds, target_wait, slots or tier.concurrency)
        request = command.Request(jobs, setting, tier, policies or command.NAMES, notes)
        command.simulate(request, Console(), json_file, plot_file)
    except (command.CannotSimulate, trace.BadTrace, OSError) as error:
        _fail(str(error))


def _from_redis(ask: Callable[[RedisBroker], Awaitable[T | Unavailable]]) -> T:
    """The answer to one question; where Redis has none, the command ends with the reason."""

    async def answer() -> T | Unavailable:
        broker = RedisBroker(asyncio.Event())
        try:
            return await ask(broker)
        finally:
            await broker.close()

    found = asyncio.run(answer())
    if isinstance(found, Unavailable):
        _fail(found.why)
    return found


@main.command(short_help="Recover jobs of lost workers where no operator runs.")
@_pool_file
@_other_redis
def sweep(file: Path, broker_url: str | None) -> None:
    """Take over jobs from lost workers and republish lost messages, for a pool without an operator. Ctrl-C ends it.

    It is safe to run beside an operator, or beside a second sweep.
    """
    pool = _read(file)
    address = _address(pool, broker_url)
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    with suppress(KeyboardInterrupt):
        asyncio.run(_sweep(pool, address))


async def _sweep(pool: Pool, url: str) -> None:
    broker = RedisBroker(asyncio.Event())
    reaper = Reaper(broker)
    click.echo(f"sweeping {pool.id} at {dev_mode.shown(url)}")
    down = ""
    while True:
        answer = await broker.read(url, [pool])
        reading = answer if isinstance(answer, Unavailable) else answer[pool.id]
        reaper.saw(pool, reading)
        if isinstance(reading, Unavailable):
            if reading.why != down:
                click.echo(reading.why, err=True)
            down = reading.why
        else:
            down = ""
            await reaper.reap(pool, url, reading)
        await asyncio.sleep(TICK_SECONDS)


@main.command(short_help="Tell why a pool is as it is, and where a job would go.")
@click.argument("pool", required=False, metavar="[POOL]")
@click.option("--file", "-f", "file", type=_FILE, help="A file with one WorkerPool and its status, in place of the API server.")
@click.option("--broker-url", metavar="URL", help="Use this Redis in place of the pool's.")
def explain(pool: str | None, file: Path | None, broker_url: str | None) -> None:
    """Tell why a pool is as it is: its workers, where its jobs went, and what a new job would get. Changes nothing.

    POOL is namespace/name, as in WorkerPool("ml/media", app). It is looked up in the cluster of this pod, or in that of
    KUBECONFIG. If Redis cannot be reached from here, forward its port and give --broker-url, or ask in the operator's pod:

    
      workerpool explain ml/media
      kubectl exec -n celery-workerpool deploy/celery-workerpool -- workerpool explain ml/media

    Without a cluster, give the file that `workerpool dev` names when it starts, or the output of `kubectl get wp media -o yaml`:

    
      workerpool explain -f /tmp/workerpool-media-x1y2/workerpool.json

    The sentences are those of the pool's status and its conditions. For one job, see `workerpool job`.
    """
    from workerpool_operator import explain as asked  # the client of the API server takes a while to import
    from workerpool_operator.explain_view import render

    if (pool is None) == (file is None):
        _fail("give POOL, as namespace/name, or -f FILE with a WorkerPool and its status")
    try:
        if file is not None:
            found = _read(file)
            url: str | Unavailable = _address(found, broker_url)
        else:
            assert pool is not None
            found, url = asyncio.run(asked.look_up(pool))
            url = _address(found, broker_url) if broker_url else url
        known = asyncio.run(asked.gather(found, url))
    except asked.CannotExplain as error:
        _fail(str(error))
    Console().print(render(known))


@main.command(short_help="Tell what became of one job, start by start.")
@click.argument("task_id")
@_pool_file
@_other_redis
def job(task_id: str, file: Path, broker_url: str | None) -> None:
    """Tell what became of one job: where it was admitted and why, every start, and how each ended.

    TASK_ID is Celery's; `submit()` returns it as `decision.task_id`. The ledger keeps a job for an hour after its end.
    """
    pool = _read(file)
    address = _address(pool, broker_url)
    found = _from_redis(lambda redis: redis.job(address, pool, task_id))
    if found is None:
        _fail(f"{task_id}: not on the ledger of pool {pool.id}: never admitted, or ended more than an hour ago")
    for line in told(found):
        click.echo(line)


def _address(pool: Pool, broker_url: str | None) -> str:
    try:
        broker = dev_mode.at(broker_url, pool.spec.broker) if broker_url else pool.spec.broker
    except dev_mode.CannotStart as error:
        _fail(str(error))
    if broker.url is None:
        _fail("spec.broker.urlFrom: the Secret can only be read in a cluster; give --broker-url")
    return broker.address(broker.url)


def told(job: Job) -> list[str]:
    """The life of a job, a line for each thing that happened."""

    def at(time: int) -> str:
        return datetime.fromtimestamp(time / 1000, UTC).isoformat(sep=" ", timespec="milliseconds")[:-6]

    lines = [f"{job.task_id}  {job.task}  {job.state}, attempt {job.attempt}, on {job.tier} because {job.reason}"]
    if admitted := job.times.get(State.ADMITTED):
        lines.append(f"{at(admitted)}  admitted, wanted {job.wanted}{', required' if job.required else ''}")
    for run in job.runs:
        lines.append(f"{at(run.began)}  attempt {run.attempt} starts on {run.tier}, {run.owner}")
        if run.ended:
            lines.append(f"{at(run.ended)}  attempt {run.attempt} ends: {run.how}{', ' + run.error if run.error else ''}")
    ended = max((time for state, time in job.times.items() if state.ended), default=None)
    return [*lines, f"{at(ended)}  the job is {job.state}"] if ended and job.state.ended else lines


async def _dev(pool: Pool, directory: Path, broker_url: str | None) -> None:
    console = Console()
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    with suppress(asyncio.CancelledError), LiveView(console) as view:
        async with dev_mode.session(pool, directory=directory, reporter=view, broker_url=broker_url) as session:
            url = dev_mode.shown(session.broker_url)
            for line in (
                f"broker  {url}",
                f"logs    {directory}",
                f"status  workerpool explain -f {directory / dev_mode.STATUS_FILE}",
                f"in the API: CELERY_BROKER_URL={url}, WorkerPool({pool.id!r}, app)",
            ):
                console.print(line, markup=False, highlight=False, soft_wrap=True)
            try:
                await asyncio.Event().wait()
            finally:
                console.print("stopping: workers finish what they have; Ctrl-C again cuts them off", highlight=False)


def _read(file: Path) -> Pool:
    pool = manifest.parse(file.read_text(errors="replace"))
    if isinstance(pool, list):
        _fail(f"{file} is not a valid WorkerPool:", *(f"  {problem}" for problem in pool))
    return pool


def _fail(*lines: str) -> NoReturn:
    for line in lines:
        click.echo(line, err=True)
    sys.exit(2)
