"""Routing of plain ``delay()``, ``apply_async()``, ``send_task()`` and canvases, through Celery's own hooks.

No hook of Celery's sees everything, so there are three steps, all in the publishing thread:

1. The router function may choose the queue, but knows neither task id nor message: it decides, and takes a lease so that the job
   counts at once.
2. ``before_task_publish`` has the message, but cannot change the queue any more: it writes the ledger.
3. ``after_task_publish`` comes when Celery has put the message into the queue, where it is counted: it releases the lease.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from celery import Celery, signals

from workerpool_routing.admission import Admission, Entry, Question
from workerpool_routing.content import main_type
from workerpool_routing.decide import Candidates, Request
from workerpool_routing.decision import decision, log
from workerpool_routing.errors import NotConfigured
from workerpool_routing.ledger import fenced
from workerpool_routing.message import serialise
from workerpool_routing.wire import HEADER, Policy, TierPolicy, Wish, carried

if TYPE_CHECKING:
    from workerpool_routing.pool import WorkerPool

logger = logging.getLogger("workerpool_routing")


@dataclass(frozen=True, slots=True)
class _Routed:
    by: RoutingHook
    request: Request
    admission: Admission
    tier: TierPolicy
    wanted: TierPolicy
    encoding: Mapping[str, Any]
    lease: str
    fenced: bool


_routed: ContextVar[_Routed | None] = ContextVar("workerpool_routed", default=None)


class RoutingHook:
    """Routes the tasks that ``routing.tasks`` names. Never raises and never refuses: if anything goes wrong, the app's own
    routing applies; a job that requires an accelerator waits on the accelerated tier of the last policy that was read.
    """

    def __init__(self, pool: WorkerPool, app: Celery) -> None:
        self._pool = pool
        self._app = app
        self._known: Policy | None = None
        self._checked = False

    def install(self) -> None:
        """Put the router in front of the app's own routes, and connect the two signals."""
        own = self._app.conf.task_routes
        rest = [] if own is None else list(own) if isinstance(own, list | tuple) else [own]
        self._app.conf.task_routes = [self.route, *rest]
        signals.before_task_publish.connect(self._record, weak=False)
        signals.after_task_publish.connect(self._release, weak=False)

    def is_in(self, task_routes: object) -> bool:
        """Whether an app with these routes asks the router."""
        return isinstance(task_routes, list | tuple) and self.route in task_routes

    def route(
        self, name: str, _args: Sequence[Any], _kwargs: Mapping[str, Any], options: dict[str, Any], **_: Any
    ) -> dict[str, Any] | None:
        """Choose the queue of one message, as an entry of Celery's ``task_routes``; None leaves it to the app's own routes."""
        _routed.set(None)
        if any(options.get(given) for given in ("queue", "exchange", "routing_key")):
            return None
        try:
            routed = self._decide(name, options)
        except Exception:  # an error here would break a chain that nobody watches
            logger.exception("pool %s cannot route %s: the app's own routing applies", self._pool.name, name)
            routed = None
        _routed.set(routed)
        tier = routed.tier if routed else self._only_tier(name, options)
        return {"queue": tier.queue} if tier else None

    def _only_tier(self, name: str, options: Mapping[str, Any]) -> TierPolicy | None:
        """Where a message has to wait that nothing was decided on; None leaves it to the app's own routes."""
        known = self._known
        return known.accelerated_tier() if known and _wish(known, name, carried(options.get("headers"))) == "required" else None

    def _decide(self, name: str, options: Mapping[str, Any]) -> _Routed | None:
        policy = self._pool.policy
        self._known = policy or self._known
        request = _request(policy, name, carried(options.get("headers")))
        if policy is None or request is None:
            return None
        candidates, lease = self._pool.candidates(policy, request), str(uuid4())
        admission = self._pool.store.admit(Question(candidates, request, lease=lease, refuses=False))
        tier = next(tier for tier in candidates.tiers if tier.name == admission.tier)
        wanted = candidates.tiers[0] if candidates.tiers[0].accelerated else tier
        conf = self._app.conf
        encoding = {
            "serializer": options.get("serializer") or conf.task_serializer,
            "compression": options.get("compression") or conf.task_compression,
        }
        return _Routed(self, request, admission, tier, wanted, encoding, lease, fenced(name, self._app.tasks.get(name)))

    def _record(self, sender: str, body: Any, headers: dict[str, Any], properties: dict[str, Any], **_: Any) -> None:
        self._check_once()
        routed = self._mine(sender)
        if routed is None:
            return
        try:
            stamped = {**headers, HEADER: {**carried(headers), "attempt": 1}}
            message = serialise(body, stamped, properties, encoding=routed.encoding)
            chosen = Candidates((routed.tier,), reason=routed.admission.reason)
            entry = Entry(headers["id"], message, publish=False, fenced=routed.fenced, wait=routed.admission.wait)
            self._pool.store.admit(Question(chosen, routed.request, entry, wanted=routed.wanted, refuses=False))
        except Exception:  # the message may still be published: without the header it is not fenced, like any plain one
            logger.exception("job %s is not on the ledger: after a loss only the visibility time-out helps", headers["id"])
            return
        if routed.fenced:
            headers[HEADER] = stamped[HEADER]
        log(self._pool.name, routed.request, replace(decision(routed.admission, routed.request), task_id=headers["id"]))

    def _check_once(self) -> None:
        """Tell a process that only calls ``delay()`` what the app has lost: nobody asks a router that is gone."""
        if self._checked:
            return
        self._checked = True
        try:
            self._pool.check_configuration()
        except NotConfigured as error:
            logger.error("%s", error)  # noqa: TRY400 where from does not matter

    def _release(self, sender: str, **_: Any) -> None:
        routed = self._mine(sender)
        if routed is None:
            return
        _routed.set(None)
        try:
            self._pool.store.release(routed.tier.name, routed.lease)
        except Exception:  # the message is in its queue, so the caller's publish has succeeded
            logger.exception("pool %s: a lease could not be released; it expires by itself", self._pool.name)

    def _mine(self, sender: str) -> _Routed | None:
        routed = _routed.get()
        return routed if routed and routed.by is self and routed.request.task == sender else None


def _wish(policy: Policy, name: str, wishes: Mapping[str, Any]) -> Wish | None:
    if "accelerated" in wishes:
        return wishes["accelerated"] or False
    return next((task.accelerated for task in policy.tasks if fnmatchcase(name, task.name)), None)


def _request(policy: Policy | None, name: str, wishes: Mapping[str, Any]) -> Request | None:
    """What one call asks for, by its own header or else by the pool's policy for the task; None if neither says anything."""
    if policy is None:
        return None
    wish = _wish(policy, name, wishes)
    if wish is None:
        return None
    return Request(name, wish, main_type(wishes.get("content_type")), policy.max_wait_seconds)
