"""The worker's side: exact in-flight keys, presence, and attempts that are fenced by the ledger."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from celery import Celery, signals

from workerpool_routing.connection import Connection
from workerpool_routing.errors import NotConfigured
from workerpool_routing.wire import (
    ENV_QUEUE,
    ENV_TIER,
    ENV_WORKER,
    VISIBILITY_TIMEOUT_SECONDS,
    unacked_keys,
)
from workerpool_routing.worker.attempt import WorkerLife
from workerpool_routing.worker.fencing import fence
from workerpool_routing.worker.presence import PresenceReporter

if TYPE_CHECKING:
    from workerpool_routing.pool import WorkerPool


def install(pool: WorkerPool, app: Celery, environ: Mapping[str, str]) -> None:
    """Make this process a worker of one tier; raises :class:`NotConfigured` when the environment is incomplete."""
    if missing := [name for name in (ENV_QUEUE, ENV_WORKER) if name not in environ]:
        raise NotConfigured(f"{', '.join(missing)}: the environment of a worker names its tier but lacks this")
    tier = environ[ENV_TIER]
    app.conf.update(
        task_acks_late=True,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        broker_transport_options={
            **(app.conf.broker_transport_options or {}),
            **unacked_keys(pool.name, tier),
            "visibility_timeout": VISIBILITY_TIMEOUT_SECONDS,
            "unacked_restore_interval": 5,
            "unacked_restore_throttle": 1,
        },
    )
    owner = f"{environ[ENV_WORKER]}.{uuid4().hex[:6]}"
    child = WorkerLife(pool, tier, owner, Connection(app, patient=True))
    main = WorkerLife(pool, tier, owner, Connection(app, patient=False))
    reporter = PresenceReporter(main, worker=environ[ENV_WORKER], queue=environ[ENV_QUEUE])

    def start_fencing(**_: Any) -> None:
        for task in app.tasks.values():
            fence(task, child, main)

    def give_back(how: str, **_: Any) -> None:
        reporter.retire()
        if how == "Cold":
            main.release_all()

    signals.worker_init.connect(start_fencing, weak=False)
    signals.worker_ready.connect(reporter.start, weak=False)
    signals.worker_shutting_down.connect(give_back, weak=False)
    signals.worker_shutdown.connect(reporter.stop, weak=False)
