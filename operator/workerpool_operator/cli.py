"""The command ``workerpool``."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

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


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="celery-workerpool")
def main() -> None:
    """GPU and CPU Celery workers as one pool, on Kubernetes and on a laptop."""


@main.command()
@click.option("--namespace", "-n", "namespaces", multiple=True, help="Watch this namespace only; may be repeated. Default: all.")
@click.option("--port", default=8080, show_default=True, help="Where /metrics, /healthz and /readyz are served.")
@click.option(
    "--lease-name", default="celery-workerpool", show_default=True, help="The Lease by which one of several operators acts."
)
@click.option(
    "--lease-namespace", metavar="NAMESPACE", help="Where that Lease is. Default: the pod's own, or `default` outside a cluster."
)
def run(namespaces: Sequence[str], port: int, lease_name: str, lease_namespace: str | None) -> None:
    """Run the operator against the cluster of this pod, or of KUBECONFIG.

    Of several that name one Lease a single one acts; the others stand by and take over when it stops or dies.
    """
    # kopf and the client take a second to import
    from workerpool_operator.main import Options
    from workerpool_operator.main import run as run_operator

    run_operator(Options(tuple(namespaces), port, lease_name, lease_namespace))


@main.command()
@click.option("--file", "-f", "file", type=_FILE, required=True, help="A YAML file with one WorkerPool.")
def check(file: Path) -> None:
    """Say whether a WorkerPool is valid, without a cluster. Exit 2 when it is not."""
    pool = _read(file)
    click.echo(f"{file}: WorkerPool {pool.id} is valid")
    width = max(len(tier.name) for tier in pool.spec.tiers)
    for tier in pool.spec.tiers:
        accelerator = f", {tier.accelerator.count} x {tier.accelerator.resource}" if tier.accelerator else ""
        click.echo(
            f"  {tier.name:<{width}}  queue {tier.queue}, {tier.replicas.min} to {tier.replicas.max} workers "
            f"of {tier.concurrency} slots{accelerator}"
        )


@main.command()
@click.option("--file", "-f", "file", type=_FILE, required=True, help="A YAML file with one WorkerPool.")
@click.option("--broker-url", metavar="URL", help="Use this Redis in place of the file's; default: a private one.")
@click.option("--logs", type=click.Path(file_okay=False, path_type=Path), help="Where the workers log; default: a new directory.")
@click.option("--debug", is_flag=True, help="Show a traceback for what goes wrong.")
def dev(file: Path, broker_url: str | None, logs: Path | None, debug: bool) -> None:
    """Run a WorkerPool on this machine: real Redis, real workers as local processes, the operator's own decisions.

    Start it where `celery -A APP` would find the app. Point the API at the broker URL that it prints. Ctrl-C ends it:
    workers finish what they have; a second Ctrl-C cuts them off.
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


@main.command()
@click.option("--trace", "trace_file", type=_FILE, help="A CSV with arrival_s and service_s (or exec_s), in seconds.")
@click.option("--column", "columns", multiple=True, metavar="NAME=COLUMN", help="The trace's own name of arrival_s or service_s.")
@click.option("--synthetic", type=click.Choice(["images", "bursts", "steady"]), help="Made-up jobs, where there is no trace.")
@click.option("--from-redis", is_flag=True, help="The jobs of the last hour that the ledger of the --pool still has.")
@click.option("--broker-url", metavar="URL", help="With --from-redis: use this Redis in place of the pool's.")
@click.option("--pool", "pool_file", type=_FILE, help="A YAML file with one WorkerPool; its first tier is simulated.")
@click.option("--policy", "policies", multiple=True, type=click.Choice(["workerpool", "keda", "keda-inflight", "bound"]),
              help="May be repeated. Default: all.")  # fmt: skip
@click.option("--start-seconds", type=click.FloatRange(min=0), default=45.0, show_default=True, help="How long a worker starts.")
@click.option("--target-wait", type=click.IntRange(min=0), help="Seconds within which a job should start. Default: the pool's.")
@click.option("--slots", type=click.IntRange(min=1), help="Jobs that one worker runs at a time. Default: the pool's.")
@click.option("--seed", default=0, show_default=True, help="Of the made-up jobs.")
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
    """Show what a pool would have ordered for a day of jobs, what they would have waited, and what it would have cost.

    The operator's own rule decides, next to KEDA's and to the least that any rule could pay (for which SciPy must be there).
    """
    from workerpool_operator.simulation import command, trace
    from workerpool_operator.simulation.compare import Setting

    if sum((trace_file is not None, synthetic is not None, from_redis)) != 1:
        _fail("give one of --trace FILE, --synthetic NAME and --from-redis")
    pool = _read(pool_file) if pool_file else None
    if from_redis and pool is None:
        _fail("--from-redis needs --pool FILE: it names the ledger, and the tier")
    try:
        tier, notes = command.chosen(pool.spec.tiers[0] if pool else None)
        if trace_file:
            given = command.load(trace_file, command.mapping(columns))
        elif synthetic:
            given = trace.SYNTHETIC[synthetic](seed)
        else:
            assert pool is not None
            given, note = command.replayed(pool.id, tier.name, _ended_jobs(pool, _address(pool, broker_url)))
            notes.append(note)
        setting = Setting(
            start_seconds=start_seconds,
            target_wait=target_wait
            if target_wait is not None
            else (pool.spec.scaling if pool else Scaling()).target_wait_seconds,
            slots=slots or tier.concurrency,
            seed=seed,
        )
        request = command.Request(given, setting, tier, policies or command.NAMES, notes)
        command.simulate(request, Console(), json_file, plot_file)
    except (command.CannotSimulate, OSError) as error:
        _fail(str(error))


def _ended_jobs(pool: Pool, address: str) -> list[Job]:
    async def ask() -> list[Job] | Unavailable:
        broker = RedisBroker(asyncio.Event())
        try:
            return await broker.ended_jobs(address, pool)
        finally:
            await broker.close()

    found = asyncio.run(ask())
    if isinstance(found, Unavailable):
        _fail(found.why)
    return found


@main.command()
@click.option("--file", "-f", "file", type=_FILE, required=True, help="A YAML file with one WorkerPool.")
@click.option("--broker-url", metavar="URL", help="Use this Redis in place of the file's.")
def sweep(file: Path, broker_url: str | None) -> None:
    """Take over jobs from lost workers and find lost messages, where no operator runs. Ctrl-C ends it.

    Every step is safe beside an operator, or a second sweep.
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


@main.command()
@click.argument("pool", required=False, metavar="[POOL]")
@click.option("--file", "-f", "file", type=_FILE, help="A file with one WorkerPool and its status, in place of the API server.")
@click.option("--broker-url", metavar="URL", help="Use this Redis in place of the pool's.")
def explain(pool: str | None, file: Path | None, broker_url: str | None) -> None:
    """Say why a pool is as it is: its workers, where its jobs went, what a new one would get. Changes nothing.

    POOL is namespace/name, as in WorkerPool("ml/media", app). It is looked up in the cluster of this pod, or of KUBECONFIG. Where
    Redis cannot be reached from here, forward its port and give --broker-url, or ask in the operator's pod:

    
      workerpool explain ml/media
      kubectl exec -n celery-workerpool deploy/celery-workerpool -- workerpool explain ml/media

    Without a cluster: the file that `workerpool dev` names at its start, or what `kubectl get wp media -o yaml` has printed.

    
      workerpool explain -f /tmp/workerpool-media-x1y2/workerpool.json

    The sentences are those of the status and its conditions. What became of one job: `workerpool job TASK_ID`.
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


@main.command()
@click.argument("task_id")
@click.option("--file", "-f", "file", type=_FILE, required=True, help="A YAML file with one WorkerPool.")
@click.option("--broker-url", metavar="URL", help="Use this Redis in place of the file's.")
def job(task_id: str, file: Path, broker_url: str | None) -> None:
    """Say what became of one job: where it was admitted and why, every start, and how each ended."""
    pool = _read(file)
    found = asyncio.run(_entry(pool, _address(pool, broker_url), task_id))
    if isinstance(found, Unavailable):
        _fail(found.why)
    if found is None:
        _fail(f"{task_id}: pool {pool.id} has no entry of it (any more)")
    for line in told(found):
        click.echo(line)


async def _entry(pool: Pool, address: str, task_id: str) -> Job | Unavailable | None:
    broker = RedisBroker(asyncio.Event())
    try:
        return await broker.job(address, pool, task_id)
    finally:
        await broker.close()


def _address(pool: Pool, broker_url: str | None) -> str:
    try:
        broker = dev_mode.at(broker_url, pool.spec.broker) if broker_url else pool.spec.broker
    except dev_mode.CannotStart as error:
        _fail(str(error))
    if broker.url is None:
        _fail("spec.broker.urlFrom: needs a cluster; give --broker-url")
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
            lines.append(f"{at(run.ended)}  {run.how}{': ' + run.error if run.error else ''}")
    ended = max((time for state, time in job.times.items() if state.ended), default=None)
    return [*lines, f"{at(ended)}  {job.state}"] if ended and job.state.ended else lines


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
