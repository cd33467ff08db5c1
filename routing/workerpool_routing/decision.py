"""The answer to "where does this job go", as callers and logs see it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from math import ceil, inf, isinf

from workerpool_routing import metrics
from workerpool_routing.admission import Admission
from workerpool_routing.decide import Reason, Request, explain
from workerpool_routing.errors import Overloaded
from workerpool_routing.wire import CAPACITY_LIFE_MS

logger = logging.getLogger("workerpool_routing")

LOG_FIELDS = ("pool", "task_id", "task", "tier", "queue", "content_type", "reason", "expected_wait")
"""The attributes of the log record that each decision makes; its message has the same as ``key=value``."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a job goes, and why.

    Attributes:
        task_id: None if nothing was submitted.
        tier: None while nothing is known of the pool.
        queue: where its message waits.
        reason: from the closed list.
        message: the reason in a sentence, with the numbers behind it.
        expected_wait: estimated seconds until it starts; None while no worker is ready or starting. Before a job has ended on a
            tier, each counts as one second there (a quarter of one on an accelerated tier). Before a worker has started, a start
            counts as 30 s (under ``workerpool dev``: twice what another one took).
    """

    task_id: str | None
    tier: str | None
    queue: str
    reason: Reason
    message: str
    expected_wait: float | None = None


def decision(admission: Admission, request: Request) -> Decision:
    """Put an admission into words; raises :class:`Overloaded` if it is a refusal."""
    message = explain(admission.reason, admission.tier, admission.load)
    if admission.reason is Reason.OVERLOADED:
        # Without any slot there is no wait to reckon with: the operator will have published a new capacity by then.
        seconds = CAPACITY_LIFE_MS / 1000 if isinf(admission.wait) else admission.wait - (request.limit or 0)
        raise Overloaded(message, retry_after=max(1, ceil(seconds)), reason=admission.reason)
    wait = None if admission.wait == inf else admission.wait
    return Decision(admission.task_id or None, admission.tier, admission.queue, admission.reason, message, wait)


def undecided(task_id: str | None, queue: str) -> Decision:
    """The decision while nothing is known of the pool: the app's own routing applies."""
    return Decision(task_id, None, queue, Reason.POLICY_UNKNOWN, explain(Reason.POLICY_UNKNOWN, queue))


def log(pool: str, request: Request, decided: Decision | None) -> None:
    """Log and count one decision; None is a refusal."""
    task_id, tier, queue, reason, wait = (
        (decided.task_id, decided.tier, decided.queue, decided.reason, decided.expected_wait)
        if decided
        else (None, None, None, Reason.OVERLOADED, None)
    )
    metrics.count(pool, tier, reason)
    values = (pool, task_id, request.task, tier, queue, request.content_type, reason, wait)
    fields = dict(zip(LOG_FIELDS, values, strict=True))
    words = " ".join(f"{key}=%s" for key in LOG_FIELDS)
    logger.info(f"{'routed' if decided else 'refused'} {words}", *values, extra=fields)
