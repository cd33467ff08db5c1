"""The answer to "where does this job go", as callers and logs see it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from workerpool_routing.admission import Admission
from workerpool_routing.decide import Reason, Request, explain

logger = logging.getLogger("workerpool_routing")


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a job goes, and why.

    Attributes:
        task_id: None when nothing was submitted.
        tier: None when nothing is known of the pool.
        queue: where its message waits.
        reason: from the closed list.
        message: the reason in a sentence, with the numbers that it stands on.
    """

    task_id: str | None
    tier: str | None
    queue: str
    reason: Reason
    message: str


def decision(admission: Admission | None, task_id: str | None, default_queue: str) -> Decision:
    """Put an admission into words; without one the app's default queue takes the job."""
    if admission is None:
        return Decision(task_id, None, default_queue, Reason.POLICY_UNKNOWN, explain(Reason.POLICY_UNKNOWN, default_queue))
    tier, reason = admission.choice.tier, admission.choice.reason
    message = explain(reason, tier.name, admission.accelerated, admission.plain)
    return Decision(task_id, tier.name, tier.queue, reason, message)


def log(decided: Decision, request: Request) -> None:
    """One line for each job that was routed."""
    logger.info(
        "routed task_id=%s task=%s tier=%s queue=%s content_type=%s reason=%s",
        decided.task_id, request.task, decided.tier, decided.queue, request.content_type, decided.reason,
    )  # fmt: skip
