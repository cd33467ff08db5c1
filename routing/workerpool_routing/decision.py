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
"""The attributes of the one log record that each decision makes; its message holds the same as ``key=value``."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a job goes, and why.

    Attributes:
        task_id: None when nothing was submitted.
        tier: None when nothing is known of the pool.
        queue: where its message waits.
        reason: from the closed list.
        message: the reason in a sentence, with the numbers that it stands on.
        expected_wait: seconds until it starts, as far as is known: until a job has ended on a tier each counts as one second
            there, a quarter of one where it is accelerated, and until a worker has started a start as 30 s, or under
            ``workerpool dev`` as long as another took; None while no worker is there or on its way.
    """

    task_id: str | None
    tier: str | None
    queue: str
    reason: Reason
    message: str
    expected_wait: float | None = None


def decision(admission: Admission, request: Request) -> Decision:
    """Put an admission into words; raises :class:`Overloaded` where it is a refusal."""
    message = explain(admission.reason, admission.tier, admission.load)
    if admission.reason is Reason.OVERLOADED:
        # Without any slot there is nothing to reckon with: by then what the operator knows has been renewed.
        seconds = CAPACITY_LIFE_MS / 1000 if isinf(admission.wait) else admission.wait - (request.limit or 0)
        raise Overloaded(message, retry_after=max(1, ceil(seconds)), reason=admission.reason)
    wait = None if admission.wait == inf else admission.wait
    return Decision(admission.task_id or None, admission.tier, admission.queue, admission.reason, message, wait)


def undecided(task_id: str | None, queue: str) -> Decision:
    """The decision where nothing is known of the pool."""
    return Decision(task_id, None, queue, Reason.POLICY_UNKNOWN, explain(Reason.POLICY_UNKNOWN, queue))


def log(pool: str, request: Request, decided: Decision | None) -> None:
    """One record and one count for each decision; None: it was refused."""
    values = (
        pool,
        decided.task_id if decided else None,
        request.task,
        decided.tier if decided else None,
        decided.queue if decided else None,
        request.content_type,
        decided.reason if decided else Reason.OVERLOADED,
        decided.expected_wait if decided else None,
    )
    metrics.count(pool, decided.tier if decided else None, decided.reason if decided else Reason.OVERLOADED)
    fields = dict(zip(LOG_FIELDS, values, strict=True))
    words = " ".join(f"{key}=%s" for key in LOG_FIELDS)
    logger.info(f"{'routed' if decided else 'refused'} {words}", *values, extra=fields)
