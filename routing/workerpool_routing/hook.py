"""Plain ``delay()``, ``apply_async()``, ``send_task()`` and canvases, routed through Celery's own hooks.

The router function sees neither the task id nor the message, ``before_task_publish`` cannot change the queue: so the first
decides, and the second, which Celery calls right after it in the same thread, writes the ledger.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from celery import Celery, signals

from workerpool_routing.admission import Admission
from workerpool_routing.decide import Request
from workerpool_routing.decision import decision, log
from workerpool_routing.wire import HEADER, Policy

if TYPE_CHECKING:
    from workerpool_routing.pool import WorkerPool

logger = logging.getLogger("workerpool_routing")


@dataclass(frozen=True, slots=True)
class _Routed:
    by: RoutingHook
    request: Request
    admission: Admission


_routed: ContextVar[_Routed | None] = ContextVar("workerpool_routed", default=None)


class RoutingHook:
    """Routes what ``routing.tasks`` names; never raises and never refuses: whatever goes wrong, the app's own routing holds."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool

    def install(self, app: Celery) -> None:
        """Put the router before the app's own, and listen to what it publishes."""
        own = app.conf.task_routes
        rest = [] if own is None else list(own) if isinstance(own, list | tuple) else [own]
        app.conf.task_routes = [self.route, *rest]
        signals.before_task_publish.connect(self._record, weak=False)

    def route(
        self, name: str, _args: Sequence[Any], _kwargs: Mapping[str, Any], options: dict[str, Any], **_: Any
    ) -> dict[str, Any] | None:
        """Choose the queue of one message, as Celery's ``task_routes`` asks for it; None leaves it to the app's own routes."""
        _routed.set(None)
        if any(options.get(given) for given in ("queue", "exchange", "routing_key")):
            return None
        try:
            request = _request(self._pool.policy, name, (options.get("headers") or {}).get(HEADER) or {})
            admission = self._pool.admit(request, None) if request else None
        except Exception:  # an error here would break a chain that nobody watches
            logger.exception("pool %s cannot route %s, the app's own routing holds", self._pool.name, name)
            return None
        if request is None or admission is None:
            return None
        _routed.set(_Routed(self, request, admission))
        return {"queue": admission.choice.tier.queue}

    def _record(self, sender: str, headers: dict[str, Any], **_: Any) -> None:
        routed = _routed.get()
        if routed is None or routed.by is not self or routed.request.task != sender:
            return
        _routed.set(None)
        try:
            self._pool.record(routed.admission.choice, routed.request, headers["id"])
        except Exception:  # the message itself may still be published: unfenced, like any plain one
            logger.exception("job %s is not on the ledger: a lost attempt of it falls to the visibility time-out", headers["id"])
            return
        headers[HEADER] = {**(headers.get(HEADER) or {}), "attempt": 1}
        log(decision(routed.admission, headers["id"], ""), routed.request)


def _request(policy: Policy | None, name: str, wishes: Mapping[str, Any]) -> Request | None:
    """What one call asks for: its own header first, then the pool's policy for the task; None when neither names it."""
    if policy is None:
        return None
    named = next((task for task in policy.tasks if fnmatchcase(name, task.name)), None)
    if named is None and "accelerated" not in wishes:
        return None
    default = named.accelerated if named else False
    return Request(name, wishes.get("accelerated", default), wishes.get("content_type"))
