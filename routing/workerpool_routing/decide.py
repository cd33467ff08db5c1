"""Which tier a job goes to, and why: a pure rule.

What needs no measurement is decided by :func:`preselect`; the rest, :func:`place`, stands a second time in ``lua/admit.lua``,
where it runs beside the data. A test drives both with generated inputs and holds them equal.

The rule: a job that did not ask for an accelerator, or whose content type gains nothing from one, goes to the first plain tier; a
required one to the first accelerated tier, whatever the load. Any other goes to the accelerated tier while that has a free
slot, or while slots may still start and its queue is no more than :data:`MARGIN` longer than the plain one; else it spills.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from workerpool_routing.wire import Policy, TierPolicy, Wish

MARGIN = 5
"""By how many waiting jobs the accelerated queue may be longer than the plain one while service times are unknown."""


class Reason(StrEnum):
    """Why a job is where it is: the closed list that answers, logs, status and counters use."""

    NOT_REQUESTED = "NotRequested"
    CONTENT_TYPE_GAINS_NOTHING = "ContentTypeGainsNothing"
    REQUIRED = "Required"
    ONLY_TIER = "OnlyTier"
    FREE_SLOT = "FreeSlot"
    SLOT_STARTING = "SlotStarting"
    NO_CAPACITY = "NoCapacity"
    QUEUE_TOO_LONG = "QueueTooLong"
    POLICY_UNKNOWN = "PolicyUnknown"
    ADMISSION_FAILED = "AdmissionFailed"
    ATTEMPT_FAILED = "AttemptFailed"
    ATTEMPT_LOST = "AttemptLost"


SPILLS = frozenset({Reason.NO_CAPACITY, Reason.QUEUE_TOO_LONG})
"""The answers of :func:`place` that send a job away from the tier it wanted."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the caller asks for; ``content_type`` may be a MIME type or its main part, None when unknown."""

    task: str
    accelerated: Wish
    content_type: str | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """A tier, the reason, and the tier that the job would have had with unlimited capacity."""

    tier: TierPolicy
    reason: Reason
    wanted: TierPolicy


@dataclass(frozen=True, slots=True)
class Load:
    """One tier as the admission script measures it; ``ready`` and ``coming`` are slots, not workers."""

    waiting: int
    in_flight: int
    ready: int
    coming: int

    @property
    def free(self) -> int:
        """Ready slots that no job has or waits for."""
        return self.ready - self.in_flight - self.waiting


def preselect(policy: Policy, request: Request) -> Choice | tuple[TierPolicy, TierPolicy]:
    """Choose without measuring, or return the accelerated and the plain tier between which :func:`place` has to choose."""
    accelerated, plain = policy.accelerated_tier(), policy.plain_tier()
    if accelerated is None or plain is None:
        only = policy.tiers[0]
        return Choice(only, Reason.ONLY_TIER, only)
    if not request.accelerated:
        return Choice(plain, Reason.NOT_REQUESTED, plain)
    if request.accelerated == "required":
        return Choice(accelerated, Reason.REQUIRED, accelerated)
    if request.content_type is not None and not gains(policy, request.content_type):
        return Choice(plain, Reason.CONTENT_TYPE_GAINS_NOTHING, plain)
    return accelerated, plain


def gains(policy: Policy, content_type: str) -> bool:
    """Whether content of that type runs faster on an accelerator; only the main type counts."""
    return content_type.partition("/")[0].strip().lower() in map(str.lower, policy.accelerated_content_types)


def place(accelerated: Load, plain: Load) -> Reason:
    """Choose between the two tiers by what they hold; one of :data:`SPILLS` means the plain one."""
    if accelerated.free > 0:
        return Reason.FREE_SLOT
    if accelerated.coming <= 0:
        return Reason.NO_CAPACITY
    if accelerated.waiting > plain.waiting + MARGIN:
        return Reason.QUEUE_TOO_LONG
    return Reason.SLOT_STARTING


def explain(reason: Reason, tier: str, accelerated: Load | None = None, plain: Load | None = None) -> str:
    """The decision in a sentence for people."""
    if accelerated is None or plain is None:
        return f"{tier}: {_WORDS[reason]}"
    return (
        f"{tier}: {_WORDS[reason]} ({accelerated.ready} slots ready, {accelerated.coming} may still start, "
        f"{accelerated.in_flight} in flight, {accelerated.waiting} waiting; {plain.waiting} waiting on the plain tier)"
    )


_WORDS = {
    Reason.NOT_REQUESTED: "the job did not ask for an accelerator",
    Reason.CONTENT_TYPE_GAINS_NOTHING: "content of this type gains nothing from an accelerator",
    Reason.REQUIRED: "the job requires an accelerator",
    Reason.ONLY_TIER: "the pool has no other kind of tier",
    Reason.FREE_SLOT: "the accelerated tier has a free slot",
    Reason.SLOT_STARTING: "an accelerated slot is starting or may be started, and few jobs wait for it",
    Reason.NO_CAPACITY: "no accelerated slot is free and none can be started",
    Reason.QUEUE_TOO_LONG: f"the accelerated queue is more than {MARGIN} jobs longer",
    Reason.POLICY_UNKNOWN: "nothing is known of the pool, the app's own routing holds",
    Reason.ADMISSION_FAILED: "the admission script failed, the last tier takes the job",
    Reason.ATTEMPT_FAILED: "its accelerated attempt failed",
    Reason.ATTEMPT_LOST: "the worker of its last attempt was lost",
}
