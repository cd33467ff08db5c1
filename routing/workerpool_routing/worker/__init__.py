"""The library in a worker process: in-flight keys of the tier, presence, and the fence around every task.

:func:`install` connects the parts to Celery's signals; each part has a module of its own.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from uuid import uuid4

from celery import Celery, signals
from celery.concurrency import get_implementation

from workerpool_routing.connection import Connection
from workerpool_routing.errors import NotConfigured, PoolUnavailable
from workerpool_routing.wire import (
    ENV_GRACE,
    ENV_POOL,
    ENV_PROBES,
    ENV_QUEUE,
    ENV_TIER,
    ENV_WORKER,
    PRESENCE_LIFE_MS,
    VISIBILITY_TIMEOUT_SECONDS,
    unacked_keys,
)
from workerpool_routing.worker import transport
from workerpool_routing.worker.attempt import WorkerLife
from workerpool_routing.worker.farewell import Farewell
from workerpool_routing.worker.fencing import fence, note_retry, settle_unknown
from workerpool_routing.worker.presence import PresenceReporter
from workerpool_routing.worker.probes import Probes

if TYPE_CHECKING:
    from workerpool_routing.pool import WorkerPool

logger = logging.getLogger("workerpool_routing.worker")

_OWNER = "WORKERPOOL_OWNER"
"""Set by the main process for children that start as fresh interpreters, which belong to the same worker life."""


def install(pool: WorkerPool, app: Celery, environ: Mapping[str, str]) -> None:
    """Make this process a worker of one tier; raises :class:`NotConfigured` if the environment is incomplete."""
    if missing := [name for name in (ENV_QUEUE, ENV_WORKER) if name not in environ]:
        raise NotConfigured(f"{', '.join(missing)}: the environment of a worker names its tier but lacks this")
    tier, worker = environ[ENV_TIER], environ[ENV_WORKER]
    _configure(app, pool.name, tier)
    owner = os.environ.setdefault(_OWNER, f"{worker}.{uuid4().hex[:6]}")
    child = WorkerLife(pool, tier, owner, Connection(app, patient=True))
    life = WorkerLife(pool, tier, owner, Connection(app, patient=False))
    transport.use(life)
    probes = Probes(Path(environ[ENV_PROBES]) if environ.get(ENV_PROBES) else None)
    reporter = PresenceReporter(life, worker=worker, queue=environ[ENV_QUEUE], probes=probes)
    farewell = Farewell(float(environ.get(ENV_GRACE) or "inf"))

    def start_fencing(**_: Any) -> None:
        for task in app.tasks.values():
            fence(task, child, life)

    def start_main(sender: Any, **_: Any) -> None:
        refuse_what_cannot_be_kept(life, sender)
        start_fencing()

    def shut_down(**_: Any) -> None:
        reporter.retire()
        farewell.begin()

    def unknown(message: Any, name: str, **_: Any) -> None:
        settle_unknown(life, message, name)

    def rejected(message: Any, exc: Exception | None, **_: Any) -> None:
        task_id = str((message.headers or {}).get("id") or uuid4())
        raw = str(getattr(message, "_raw", ""))
        reason = f"not a task message: {exc!r}"
        life.soon(partial(life.set_aside, task_id, reason=reason, message=raw, tag=message.delivery_tag))

    app.on_after_finalize.connect(start_fencing, weak=False)  # a child that starts as a fresh interpreter gets no worker_init
    signals.worker_init.connect(start_main, weak=False)
    signals.worker_ready.connect(reporter.start, weak=False)
    signals.worker_shutting_down.connect(shut_down, weak=False)
    signals.worker_shutdown.connect(reporter.stop, weak=False)
    signals.before_task_publish.connect(note_retry, weak=False)
    signals.task_unknown.connect(unknown, weak=False)
    signals.task_rejected.connect(rejected, weak=False)


def expect(name: str, environ: Mapping[str, str]) -> None:
    """Note that the app has this pool, and refuse to start a worker whose environment names a pool that the app does not have."""
    _names.add(name)

    def check(**_: Any) -> None:
        given = environ.get(ENV_POOL, "")
        if given not in _names:
            _refuse(f"{ENV_POOL}={given!r}: the app has {', '.join(map(repr, sorted(_names)))}; the two names must be the same")

    signals.worker_init.connect(check, weak=False)


_names: set[str] = set()


def _configure(app: Celery, pool: str, tier: str) -> None:
    options = app.conf.broker_transport_options or {}
    visibility = options.get("visibility_timeout", VISIBILITY_TIMEOUT_SECONDS)
    if visibility < PRESENCE_LIFE_MS / 1000:
        logger.warning(
            "broker_transport_options.visibility_timeout=%s is below %s s, in which a worker renews its messages: %s is used",
            visibility, PRESENCE_LIFE_MS / 1000, VISIBILITY_TIMEOUT_SECONDS,
        )  # fmt: skip
        visibility = VISIBILITY_TIMEOUT_SECONDS
    app.conf.update(
        task_acks_late=True,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_transport_options={
            "polling_interval": 0.5,
            **options,
            **unacked_keys(pool, tier),
            "visibility_timeout": visibility,
            "unacked_restore_interval": 5,
            "unacked_restore_throttle": 1,
        },
    )


def refuse_what_cannot_be_kept(life: WorkerLife, controller: Any) -> None:
    """Check how the worker was started: exit with one line if the fence could not work, and correct what can be corrected."""
    try:
        life.pool.check_configuration()
    except NotConfigured as lost:
        _refuse(str(lost))
    try:
        policy = life.policy
    except PoolUnavailable:
        policy = None  # Celery waits for its broker; the tier cannot be checked now
    if policy and policy.tiers and policy.tier(life.tier) is None:
        tiers = ", ".join(tier.name for tier in policy.tiers)
        _refuse(f"{ENV_TIER}={life.tier!r}: pool {life.pool.name} has the tiers {tiers}")
    kind = get_implementation(controller.pool_cls).__module__.rpartition(".")[2]
    if kind in ("eventlet", "gevent"):
        _refuse(f"worker_pool={kind!r}: a WorkerPool needs -P prefork, solo or threads")
    if getattr(controller, "pool_start_method", "fork") != "fork":
        _refuse("worker_pool_start_method='spawn': a WorkerPool needs 'fork', or -P solo or -P threads")
    if controller.prefetch_multiplier != 1:
        logger.warning(
            "--prefetch-multiplier=%s is not used: a worker of a pool takes no more than it can run",
            controller.prefetch_multiplier,
        )
        controller.prefetch_multiplier = 1


def _refuse(why: str) -> NoReturn:
    raise SystemExit(f"workerpool: {why}")
