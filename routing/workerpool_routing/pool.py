"""`WorkerPool`: the one line beside the Celery app, in API pods and in workers."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from uuid import uuid4

import redis
from celery import Celery, Task
from kombu.exceptions import OperationalError

from workerpool_routing import admission
from workerpool_routing.admission import Admission, Entry
from workerpool_routing.connection import Connection, keyspace, unavailable_when_down
from workerpool_routing.decide import Choice, Reason, Request, preselect
from workerpool_routing.decision import Decision, decision, log
from workerpool_routing.errors import NoAcceleratedTier, NotConfigured, PoolUnavailable
from workerpool_routing.hook import RoutingHook
from workerpool_routing.ledger import Call, Job
from workerpool_routing.policy import PolicySource
from workerpool_routing.wire import ENV_POOL, ENV_TIER, HEADER, Keyspace, Milliseconds, Policy, Presence, TierPolicy, Wish

logger = logging.getLogger("workerpool_routing")

PUBLISH_TIMEOUT_SECONDS = 5.0
"""How long Kombu may take for one step of a publish; its own default is to wait for ever."""

_RESERVED = ("queue", "exchange", "routing_key", "expires", "task_id", "router")


class WorkerPool:
    """One pool of workers behind a Celery app.

    Args:
        name: ``namespace/name`` of the WorkerPool resource.
        app: the Celery app; its broker must be Redis.
        tiers: the tiers in order of preference, for a pool that no operator manages; else the operator publishes them.

    In a process that the operator or ``workerpool dev`` started as a worker of this pool, the tasks of the app are fenced and the
    worker reports its presence; in any other, jobs are routed. Nothing is read from Redis until the first job.
    """

    def __init__(self, name: str, app: Celery, *, tiers: Sequence[TierPolicy] = ()) -> None:
        if not re.fullmatch(r"[a-z0-9][-a-z0-9.]*/[a-z0-9][-a-z0-9.]*", name):
            raise NotConfigured(f"WorkerPool name {name!r}: give namespace/name of the WorkerPool resource, such as ml/media")
        self.name = name
        self._app = app
        self.given = Policy(tuple(tiers)) if tiers else None
        in_worker = os.environ.get(ENV_POOL) == name and ENV_TIER in os.environ
        self._connection = Connection(app, patient=False)
        self._source: PolicySource | None = None
        if ENV_TIER in os.environ:
            from workerpool_routing.worker import expect

            expect(name, os.environ)
        if in_worker:
            from workerpool_routing.worker import install  # only workers pay for it

            install(self, app, os.environ)
        else:
            timeouts = {"socket_timeout": PUBLISH_TIMEOUT_SECONDS, "socket_connect_timeout": PUBLISH_TIMEOUT_SECONDS}
            app.conf.broker_transport_options = {**timeouts, **(app.conf.broker_transport_options or {})}
        RoutingHook(self).install(app)

    @property
    def keys(self) -> Keyspace:
        """The names of the pool's keys."""
        return self._policy_source.keys

    @property
    def connection(self) -> Connection:
        """The library's connection to the broker."""
        return self._connection

    @property
    def policy(self) -> Policy | None:
        """The pool's policy as this process knows it; raises :class:`PoolUnavailable`."""
        return self._policy_source.get()

    @property
    def _policy_source(self) -> PolicySource:
        if self._source is None:
            self._source = PolicySource(self._connection, keyspace(self.name, self._app), self.given)
        return self._source

    def submit(
        self,
        task: Task,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        accelerated: Wish = False,
        content_type: str | None = None,
        deadline: float | None = None,
        **options: Any,
    ) -> Decision:
        """Admit one job, route it and publish it.

        Args:
            task: a task of the app.
            args: its positional arguments.
            kwargs: its keyword arguments.
            accelerated: True when an accelerator helps, "required" when the job can run nowhere else.
            content_type: what it works on, as a MIME type or its main part; types that gain nothing go to the plain tier.
            deadline: seconds from now by which it must have started, else it expires.
            options: further options of ``apply_async``.

        Raises:
            PoolUnavailable: Redis did not answer in time; nothing was queued.
            NoAcceleratedTier: the job requires an accelerator that the pool does not have.
        """
        if taken := [name for name in _RESERVED if name in options]:
            raise TypeError(f"submit() chooses {', '.join(taken)} itself; use apply_async() to choose them")
        request, task_id = Request(task.name, accelerated, content_type), str(uuid4())
        admitted = self.admit(request, task_id)
        decided = self._decision(admitted, task_id)
        if admitted:
            headers = options.get("headers") or {}
            options["headers"] = {**headers, HEADER: {**headers.get(HEADER, {}), "attempt": 1}}
            options["queue"] = decided.queue
        try:
            task.apply_async(args, kwargs, task_id=task_id, expires=deadline, retry=False, **options)
        except (OperationalError, redis.RedisError) as error:
            self._withdraw(task_id)
            raise PoolUnavailable(f"the job could not be published: {error}") from error
        log(decided, request)
        return decided

    def should_accelerate(self, task: Task, *, accelerated: Wish = True, content_type: str | None = None) -> Decision:
        """Decide as :meth:`submit` would, and change nothing."""
        return self._decision(self.admit(Request(task.name, accelerated, content_type), None), None)

    def admit(self, request: Request, task_id: str | None) -> Admission | None:
        """Decide, and write the job to the ledger when it has an id; None when nothing is known of the pool."""
        policy = self.policy
        if policy is None:
            return None
        choice = preselect(policy, request)
        if isinstance(choice, Choice) and request.accelerated == "required" and not choice.tier.accelerated:
            raise NoAcceleratedTier(f"{request.task} requires an accelerator, and no tier of pool {self.name} has one")
        try:
            return self.record(choice, request, task_id)
        except redis.ResponseError:
            logger.exception("pool %s: the admission script failed, the last tier takes %s", self.name, request.task)
            return Admission(Choice(policy.tiers[-1], Reason.ADMISSION_FAILED, policy.tiers[-1]))

    def record(self, choice: Choice | tuple[TierPolicy, TierPolicy], request: Request, task_id: str | None) -> Admission:
        """Run the admission script."""
        entry = Entry(task_id, request.task, request.accelerated == "required") if task_id else None
        reply = self._connection.run("admit", Call([], [admission.argument(self.keys, choice, entry)]))
        return admission.parse(choice, reply)

    def _decision(self, admitted: Admission | None, task_id: str | None) -> Decision:
        return decision(admitted, task_id, self._app.conf.task_default_queue)

    def _withdraw(self, task_id: str) -> None:
        """Forget a job that was never published; what cannot be forgotten now expires by itself."""
        try:
            policy = self.policy
            with unavailable_when_down(), self._connection.client.pipeline() as pipe:
                pipe.delete(self.keys.job(task_id))
                for tier in policy.tiers if policy else ():
                    pipe.zrem(self.keys.spilled(tier.name), task_id)
                pipe.execute()
        except PoolUnavailable:
            logger.warning("job %s was not published and stays on the ledger until it expires", task_id)

    def job(self, task_id: str) -> Job | None:
        """The ledger's entry of a job, None when it has none (any more)."""
        with unavailable_when_down():
            return Job.load(task_id, self._connection.client.hgetall(self.keys.job(task_id)))

    def workers(self) -> dict[str, Presence]:
        """The live workers, by owner."""
        policy = self.policy
        with unavailable_when_down(), self._connection.client.pipeline(transaction=False) as pipe:
            pipe.time()
            for tier in policy.tiers if policy else ():
                pipe.hgetall(self.keys.presence(tier.name))
            (seconds, micros), *tiers = pipe.execute()
        now = Milliseconds(seconds * 1000 + micros // 1000)
        reports = (Presence.load(raw) for tier in tiers for raw in tier.values())
        return {report.owner: report for report in reports if report.alive(now)}

    def has_accelerated_workers(self) -> bool:
        """Whether an accelerated worker has a free slot."""
        return _free(self.workers().values(), self.policy)

    def queue_length(self, queue: str) -> int:
        """Messages that wait in a queue, over all priority steps."""
        with unavailable_when_down(), self._connection.client.pipeline(transaction=False) as pipe:
            for name in self.keys.queue_lists(queue):
                pipe.llen(name)
            return sum(pipe.execute())

    def status(self) -> dict[str, Any]:
        """Workers and queues as plain data, for a status endpoint; a tier's type is ``gpu`` when it is accelerated, else
        ``cpu``.
        """
        policy, workers = self.policy, self.workers()
        tiers = {tier.name: tier for tier in policy.tiers} if policy else {}
        kinds = {owner: "gpu" if tiers[report.tier].accelerated else "cpu" for owner, report in workers.items()}
        return {
            "workers": {
                "total": len(workers),
                "gpu": sum(kind == "gpu" for kind in kinds.values()),
                "cpu": sum(kind == "cpu" for kind in kinds.values()),
                "details": {
                    owner: {
                        "type": kinds[owner], "active_tasks": report.busy, "max_tasks": report.slots, "queues": [report.queue]
                    }
                    for owner, report in workers.items()
                },
            },
            "queues": {
                tier.queue: {
                    "length": self.queue_length(tier.queue),
                    "workers": sum(report.queue == tier.queue for report in workers.values()),
                }
                for tier in tiers.values()
            },
            "gpu_available": _free(workers.values(), policy),
        }  # fmt: skip


def _free(workers: Iterable[Presence], policy: Policy | None) -> bool:
    accelerated = {tier.name for tier in policy.tiers if tier.accelerated} if policy else set()
    return any(worker.tier in accelerated and worker.busy < worker.slots for worker in workers)
