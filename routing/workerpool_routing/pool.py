"""`WorkerPool`: the one line beside the Celery app, in API pods and in workers."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from inspect import signature
from typing import Any
from uuid import uuid4

import redis
from celery import Celery, Task
from kombu import Producer
from kombu.exceptions import OperationalError

from workerpool_routing.admission import Entry, Question
from workerpool_routing.connection import REQUEST_TIMEOUT_SECONDS, Connection, keyspace
from workerpool_routing.content import main_type
from workerpool_routing.decide import Candidates, Reason, Request, explain, preselect
from workerpool_routing.decision import Decision, decision, log, undecided
from workerpool_routing.errors import NoAcceleratedTier, NotConfigured, Overloaded, PoolUnavailable
from workerpool_routing.hook import RoutingHook
from workerpool_routing.ledger import Job, fenced
from workerpool_routing.message import prepare
from workerpool_routing.store import RedisStore, Store, TierState
from workerpool_routing.wire import ENV_POOL, ENV_TIER, Keyspace, Policy, Presence, TierPolicy, Wish, unacked_keys

logger = logging.getLogger("workerpool_routing")

PUBLISH_TIMEOUT_SECONDS = 1.0
"""Socket time-out for a publish by Celery itself (a plain ``delay()``); Kombu's default is to wait for ever.

Celery retries (``task_publish_retry_policy``), so a publish fails after some five times as long. With less than a second a retry
could publish a second time what a busy Redis has accepted late.
"""

_RESERVED = ("queue", "exchange", "routing_key", "expires", "task_id", "router", "producer", "retry")
_OPTIONS = frozenset(name for function in (Celery.send_task, Producer.publish) for name in signature(function).parameters)


class WorkerPool:
    """One pool of workers behind a Celery app.

    Args:
        name: ``namespace/name`` of the WorkerPool resource.
        app: the Celery app, with its configuration; its broker must be Redis.
        tiers: the tiers in order of preference, for a pool without an operator; otherwise leave it out: the operator publishes
            them.
        timeout: seconds that a call waits for Redis before it raises :class:`PoolUnavailable`.
        fail_open: whether jobs are published even if no decision can be made. While the pool's policy is missing, they go to
            the app's default queue; if the admission script fails, to the last tier. A job that requires an accelerator or has
            an idempotency key is refused even so (:class:`PoolUnavailable`): only a decision can keep that promise. A plain
            ``delay()`` is never refused: the app's own routing applies. If it requires an accelerator, it waits on the
            accelerated tier of the last policy that this process has read.

    In a worker process that the operator or ``workerpool dev`` started for this pool, the app's tasks are fenced and the worker
    reports its presence; in any other process, jobs are routed. Nothing is read from Redis until the first job.
    """

    def __init__(
        self,
        name: str,
        app: Celery,
        *,
        tiers: Sequence[TierPolicy] | None = None,
        timeout: float = REQUEST_TIMEOUT_SECONDS,
        fail_open: bool = True,
    ) -> None:
        if not re.fullmatch(r"[a-z0-9][-a-z0-9.]*/[a-z0-9][-a-z0-9.]*", name):
            raise NotConfigured(f"WorkerPool name {name!r}: give namespace/name of the WorkerPool resource, such as ml/media")
        if timeout <= 0:
            raise NotConfigured(f"timeout {timeout!r}: give the seconds that a call may wait for Redis, more than 0")
        self.name = name
        self._app = app
        self.given = _policy(tiers) if tiers is not None else None
        self._fail_open = fail_open
        self.connection = Connection(app, patient=False, timeout=timeout)
        self._store: Store | None = None
        self._silent_at = float("-inf")
        if ENV_TIER in os.environ:
            from workerpool_routing.worker import expect  # only workers pay for the import

            expect(name, os.environ)
        if ENV_TIER in os.environ and os.environ.get(ENV_POOL) == name:
            from workerpool_routing.worker import install

            install(self, app, os.environ)
            self._options = frozenset(unacked_keys(name, os.environ[ENV_TIER]))
        else:
            timeouts = {"socket_timeout": PUBLISH_TIMEOUT_SECONDS, "socket_connect_timeout": PUBLISH_TIMEOUT_SECONDS}
            app.conf.broker_transport_options = {**timeouts, **(app.conf.broker_transport_options or {})}
            self._options = frozenset(timeouts)
        self._hook = RoutingHook(self, app)
        self._hook.install()

    @property
    def keys(self) -> Keyspace:
        """The names of the pool's keys."""
        return keyspace(self.name, self._app)

    @property
    def store(self) -> Store:
        """Where the pool's state is kept."""
        if self._store is None:
            self._store = RedisStore(self.connection, self.keys, self.given)
        return self._store

    @contextmanager
    def kept_in(self, store: Store) -> Iterator[None]:
        """Keep the state in another store inside the block, as :mod:`workerpool_routing.testing` does."""
        self._store, usual = store, self._store
        try:
            yield
        finally:
            self._store = usual

    def check_configuration(self) -> None:
        """Raise :class:`NotConfigured` if the app has lost what the pool has put into its configuration."""
        conf, lost = self._app.conf, []
        if not self._hook.is_in(conf.task_routes):
            lost.append("task_routes")
        if not self._options <= set(conf.broker_transport_options or ()):
            lost.append("broker_transport_options")
        if lost:
            raise NotConfigured(
                f"{' and '.join(lost)}: replaced after WorkerPool({self.name!r}, app) was made; configure the app first"
            )

    @property
    def policy(self) -> Policy | None:
        """The pool's policy as this process knows it; raises :class:`PoolUnavailable`."""
        return self.store.policy()

    def submit(
        self,
        task: Task,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        accelerated: Wish = False,
        content_type: str | None = None,
        deadline: float | None = None,
        max_wait: float | None = None,
        idempotency_key: str | None = None,
        **options: Any,
    ) -> Decision:
        """Decide where one job goes, write it to the ledger and publish it, all in one round trip to Redis.

        Args:
            task: a task of the app.
            args: its positional arguments.
            kwargs: its keyword arguments.
            accelerated: True if an accelerator helps, "required" if the job can run nowhere else.
            content_type: what it works on, as a MIME type, the main part of one, or a file name. If it is known and not in the
                pool's ``acceleratedContentTypes``, the job goes to a plain tier.
            deadline: seconds from now by which it must have started; otherwise it expires.
            max_wait: the longest expected wait that is accepted, in seconds; None for the pool's ``maxWaitSeconds``.
            idempotency_key: a second call with the same key within a day, or until a day after the job's ETA, returns the first
                decision and queues nothing. An empty key counts as none.
            options: further options of ``apply_async``.

        Raises:
            Overloaded: no tier can start it within ``deadline`` and ``max_wait``; nothing was queued.
            PoolUnavailable: Redis did not answer in time. The job may be queued all the same, if only the answer was lost. With
                an idempotency key it is safe to call again.
            NotConfigured: the broker is not Redis, or the app's configuration was replaced after the WorkerPool was made.
            NoAcceleratedTier: the job requires an accelerator and the pool has no tier with one.
            TypeError: ``task`` is not a task, or ``options`` contain something that submit() chooses itself, or that
                ``apply_async`` does not know.
            ValueError: ``accelerated``, ``deadline``, ``max_wait`` or ``idempotency_key`` has an impossible value.
            kombu.exceptions.EncodeError: the arguments cannot be serialised.
        """
        if not isinstance(task, Task):
            raise TypeError(f"task is {task!r}; give the task itself, as the Celery app has registered it")
        _check(task, options)
        idempotency_key = _key(idempotency_key)
        task_id = str(uuid4())
        publish = partial(self._publish_undecided, task, args, kwargs, task_id, deadline, options)
        if self._app.conf.task_always_eager:
            return publish()
        self.check_configuration()
        request, policy = _request(task, accelerated, content_type, deadline), self.store.policy()
        fail_open = self._fail_open and idempotency_key is None and accelerated != "required"
        if policy is None:
            if not fail_open:
                raise self._cannot_decide("its policy is not in Redis: is the WorkerPool applied, and the operator running?")
            return self._logged(request, publish())
        request = _limited(request, policy, max_wait)
        candidates = self.candidates(policy, request)
        message = prepare(task, args, kwargs, task_id=task_id, expires=deadline, **options)
        entry = Entry(task_id, message, idempotency_key=idempotency_key, fenced=fenced(task.name, task))
        return self._logged(request, self._admit(policy, candidates, request, entry, fail_open=fail_open))

    async def submit_async(self, task: Task, *args: Any, **kwargs: Any) -> Decision:
        """:meth:`submit`, with the same arguments and exceptions, on a thread, so that the event loop never waits for Redis.

        Many calls wait for a thread. If one of them finds that Redis does not answer, those that have waited longer than the
        pool's ``timeout`` raise :class:`PoolUnavailable` without asking Redis again, so that all are answered soon.
        """
        return await asyncio.to_thread(self._submit_in_turn, time.monotonic(), task, *args, **kwargs)

    def _submit_in_turn(self, asked_at: float, task: Task, *args: Any, **kwargs: Any) -> Decision:
        if self._silent_at > asked_at and time.monotonic() - asked_at > self.connection.timeout:
            raise PoolUnavailable("Redis does not answer those who asked before")
        try:
            return self.submit(task, *args, **kwargs)
        except PoolUnavailable:
            self._silent_at = time.monotonic()
            raise

    def should_accelerate(
        self,
        task: Task,
        *,
        accelerated: Wish = True,
        content_type: str | None = None,
        deadline: float | None = None,
        max_wait: float | None = None,
    ) -> Decision:
        """Decide as :meth:`submit` would, with the same exceptions, and queue nothing: the decision has no ``task_id``."""
        request, policy = _request(task, accelerated, content_type, deadline), self.store.policy()
        if policy is None:
            return undecided(None, self._app.conf.task_default_queue)
        request = _limited(request, policy, max_wait)
        try:
            return decision(self.store.admit(Question(self.candidates(policy, request), request)), request)
        except redis.ResponseError:
            logger.exception("pool %s: the admission script failed, the last tier would take %s", self.name, task.name)
            return _last_tier(None, policy)

    def candidates(self, policy: Policy, request: Request) -> Candidates:
        """The tiers that may take a job; raises :class:`NoAcceleratedTier`."""
        candidates = preselect(policy, request)
        if request.accelerated == "required" and not candidates.tiers[0].accelerated:
            raise NoAcceleratedTier(f"{request.task} requires an accelerator, and no tier of pool {self.name} has one")
        return candidates

    def _admit(self, policy: Policy, candidates: Candidates, request: Request, entry: Entry, *, fail_open: bool) -> Decision:
        """Run the admission script; if the script itself fails, the last tier may take the job (``fail_open``)."""
        try:
            return decision(self.store.admit(Question(candidates, request, entry)), request)
        except Overloaded:
            log(self.name, request, None)
            raise
        except redis.ResponseError as error:
            if not fail_open:
                raise self._cannot_decide(f"the admission script failed: {error}") from error
            logger.exception("pool %s: the admission script failed, the last tier takes %s", self.name, request.task)
            self.store.push(policy.tiers[-1].queue, entry.message)
            return _last_tier(entry.task_id, policy)

    def _publish_undecided(
        self,
        task: Task,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None,
        task_id: str,
        deadline: float | None,
        options: Any,
    ) -> Decision:
        """Publish a job by Celery's own routing."""
        try:
            task.apply_async(args, kwargs, task_id=task_id, expires=deadline, retry=False, **options)
        except (OperationalError, redis.RedisError) as error:
            raise PoolUnavailable(f"the job could not be published: {error}") from error
        return undecided(task_id, self._app.conf.task_default_queue)

    def _logged(self, request: Request, decided: Decision) -> Decision:
        log(self.name, request, decided)
        return decided

    def _cannot_decide(self, why: str) -> PoolUnavailable:
        return PoolUnavailable(f"pool {self.name} cannot decide: {why}")

    def job(self, task_id: str) -> Job | None:
        """A job's ledger entry; None if it has none, as one of a task without a fence, or none any more.

        Raises :class:`PoolUnavailable`.
        """
        return self.store.job(task_id)

    def workers(self) -> dict[str, Presence]:
        """The live workers, each with tier, queue, slots and busy slots; empty while the pool's policy is unknown.

        The keys are worker lives: a worker that restarts under the same name has a new one. Raises :class:`PoolUnavailable`.
        """
        return {worker.owner: worker for state in self._state() for worker in state.workers}

    def has_accelerated_workers(self) -> bool:
        """Whether an accelerated worker has a free slot; raises :class:`PoolUnavailable`."""
        return _free(self._state())

    def queue_length(self, queue: str) -> int:
        """Messages waiting in a queue, over all priority steps; raises :class:`PoolUnavailable`."""
        return self.store.queue_length(queue)

    def status(self) -> dict[str, Any]:
        """Workers, queues and tiers as plain data, for a status endpoint.

        ``type`` is ``gpu`` for an accelerated tier and ``cpu`` for any other; ``ready`` and ``starting`` count slots;
        ``oldest_wait`` is the age in seconds of the oldest waiting job, None if no admitted job waits. Raises
        :class:`PoolUnavailable`.
        """
        states = self._state()
        kinds = {worker.owner: _kind(state) for state in states for worker in state.workers}
        return {
            "workers": {
                "total": len(kinds),
                "gpu": sum(kind == "gpu" for kind in kinds.values()),
                "cpu": sum(kind == "cpu" for kind in kinds.values()),
                "details": {
                    worker.owner: {
                        "type": kinds[worker.owner], "active_tasks": worker.busy, "max_tasks": worker.slots,
                        "queues": [worker.queue],
                    }
                    for state in states for worker in state.workers
                },
            },
            "queues": {state.tier.queue: {"length": state.waiting, "workers": len(state.workers)} for state in states},
            "gpu_available": _free(states),
            "tiers": {
                state.tier.name: {
                    "type": _kind(state), "queue": state.tier.queue, "ready": state.ready, "starting": state.starting,
                    "waiting": state.waiting, "in_flight": state.in_flight, "oldest_wait": state.oldest_wait,
                }
                for state in states
            },
        }  # fmt: skip

    def _state(self) -> Sequence[TierState]:
        policy = self.store.policy()
        return self.store.state(policy) if policy else ()


def _policy(tiers: Sequence[TierPolicy]) -> Policy:
    for what in ("name", "queue"):
        seen = [getattr(tier, what) for tier in tiers]
        if twice := next((value for value in seen if seen.count(value) > 1), None):
            raise NotConfigured(f"tiers: two of them have the {what} {twice!r}")
    if not tiers:
        raise NotConfigured("tiers: name at least one, or leave it out where an operator publishes them")
    return Policy(tuple(tiers))


def _request(task: Task, accelerated: Wish, content_type: str | None, deadline: float | None) -> Request:
    if accelerated not in (True, False, "required"):
        raise ValueError(f'accelerated is {accelerated!r}; give True, False or "required"')
    if deadline is not None and not (deadline >= 0 and _is_a_time(deadline)):
        raise ValueError(f"deadline is {deadline!r}; give the seconds from now by which the job must have started")
    return Request(task.name, accelerated, main_type(content_type), deadline)


def _is_a_time(seconds: float) -> bool:
    """Whether a message can say that it expires so many seconds from now."""
    try:
        datetime.now(UTC) + timedelta(seconds=seconds)
    except (OverflowError, ValueError):  # infinite or in another age; not a number
        return False
    return True


def _check(task: Task, options: Mapping[str, Any]) -> None:
    """Refuse options that submit() chooses itself, and slips: Celery would make properties of the message of these."""
    if taken := [name for name in _RESERVED if name in options]:
        raise TypeError(f"submit() chooses {', '.join(taken)} itself; use apply_async() to choose them")
    for name in options.keys() - _OPTIONS - signature(task.apply_async).parameters.keys():
        raise TypeError(f"submit() has no option {name!r}, and neither has apply_async()")


def _key(given: str | None) -> str | None:
    """The idempotency key, if there is one; it often comes from a client's header."""
    try:
        return given if given and given.encode() else None
    except UnicodeEncodeError as error:
        raise ValueError(f"idempotency_key is {given!r}, which is not text: {error.reason}") from error


def _limited(request: Request, policy: Policy, max_wait: float | None) -> Request:
    """The request, limited to the shorter of its deadline and the longest wait that is accepted."""
    if max_wait is not None and not max_wait >= 0:
        raise ValueError(f"max_wait is {max_wait!r}; give the longest expected wait that is accepted, in seconds")
    limits = [request.limit, policy.max_wait_seconds if max_wait is None else max_wait]
    return Request(
        request.task, request.accelerated, request.content_type, min((one for one in limits if one is not None), default=None)
    )


def _last_tier(task_id: str | None, policy: Policy) -> Decision:
    last, reason = policy.tiers[-1], Reason.ADMISSION_FAILED
    return Decision(task_id, last.name, last.queue, reason, explain(reason, last.name))


def _kind(state: TierState) -> str:
    return "gpu" if state.tier.accelerated else "cpu"


def _free(states: Sequence[TierState]) -> bool:
    return any(state.tier.accelerated and worker.busy < worker.slots for state in states for worker in state.workers)
