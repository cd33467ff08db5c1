"""Whether an accelerated tier takes part in routing: a circuit breaker, as a pure rule.

Why this evidence and these numbers: ``docs/adr/0013-circuit-breaker.md``.

A job that fails on an accelerated tier runs once more on a plain one. If it succeeds there, the failure was the tier's fault; if
it fails again, it was the job's own. Until that is known the failure counts in part: by half, or by the share that the tier had
in those failures that are decided. Losses count like exceptions; what a drain or a shutdown gives back does not count.

* *Closed*: the tier gets all jobs. The breaker opens when at least :data:`LEAST_FAILURES` of the latest :data:`WINDOW` attempts
  failed by the tier's fault, and these are at least the part :data:`RATE` of them.
* *Open*: the tier gets no jobs until a pause is over, or until the failures turn out to be the jobs' own fault.
* *Half-open*: the tier gets :data:`TRIALS_AT_ONCE` job at a time, beside those that it still held. After
  :data:`SUCCESSES_TO_CLOSE` successes the breaker closes. After a failure it opens again, for twice as long, up to
  :data:`LONGEST_PAUSE_SECONDS`. If jobs have lately failed by their own fault, it takes a failure that is decided to be the
  tier's, or several undecided ones that add up to :data:`_DOUBT`.

All that the rule knows stands in Redis, so that the next operator goes on where the last one stopped, and two at once write the
same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from workerpool_operator.observation import NO_ATTEMPTS, Attempts, Breaker, BreakerState
from workerpool_routing.wire import Milliseconds

RATE = 0.5
"""From this part of failed attempts on, a tier is taken out of routing: it costs more runs than it saves."""

WINDOW = 20
"""So many attempts count: few enough that a driver that breaks shows after some twenty, whatever went well before."""

LEAST_FAILURES = 5
"""From fewer nothing is concluded: a node that is lost with the few jobs on it is no broken driver."""

PAUSE_SECONDS = 30.0
"""From the first opening to the first trial: about what a driver, or a device plugin, takes to come back after a reset."""

LONGEST_PAUSE_SECONDS = 600.0
"""Each trial that fails costs a job its fallback, so the pauses grow; but no repair is noticed later than this."""

TRIALS_AT_ONCE = 1
"""How many jobs may lose their fallback before it is known whether the tier works again."""

SUCCESSES_TO_CLOSE = 3
"""One alone may have met the one good device among broken ones."""

_DOUBT = 0.5
"""So many failures of the tier keep it out of routing: what a single undecided one counts while none is decided."""

_ROUNDING = 1e-9
"""Counts that are scaled to the window change by less than this from pass to pass, and such a change must not open the
breaker."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What holds from now on.

    Attributes:
        breaker: its state.
        attempts: what goes on to count of those that were read.
        limit: how many jobs the tier may have at once; None where nothing limits them.
        message: why, in a sentence; empty while there is nothing to say.
    """

    breaker: Breaker
    attempts: Attempts
    limit: int | None = None
    message: str = ""


def decide(breaker: Breaker, attempts: Attempts, in_flight: int, now: Milliseconds) -> Decision:
    """Go from one state to the next, or stay.

    Args:
        breaker: as it was left.
        attempts: how those ended that count since then.
        in_flight: jobs that the tier's workers hold.
        now: Redis's time.
    """
    if now < breaker.at:  # another Redis, or a clock that was set back
        breaker = replace(breaker, at=now, since=min(breaker.since, now))
    attempts = _kept(attempts)
    doubted = _failures(attempts) >= _DOUBT
    match breaker.state:
        case BreakerState.CLOSED:
            failures = _failures(attempts)
            if failures >= LEAST_FAILURES and failures >= (RATE - _ROUNDING) * (attempts.succeeded + failures):
                recent = _seconds(breaker, now) < LONGEST_PAUSE_SECONDS
                return _opened(breaker, attempts, breaker.opened + 1 if recent else 1, now)
            return Decision(breaker, attempts)
        case BreakerState.OPEN if not doubted:
            tried = Breaker(BreakerState.HALF_OPEN, now, max(0, breaker.opened - 1), now, in_flight)
            return _half_opened(tried, replace(_carried(attempts), succeeded=attempts.succeeded))
        case BreakerState.OPEN if _seconds(breaker, now) >= _pause(breaker.opened):
            return _half_opened(Breaker(BreakerState.HALF_OPEN, now, breaker.opened, now, in_flight), _carried(attempts))
        case BreakerState.OPEN:
            return _open(breaker, attempts)
        case BreakerState.HALF_OPEN if doubted:
            return _opened(breaker, attempts, breaker.opened + 1, now)
        case BreakerState.HALF_OPEN if attempts.succeeded >= SUCCESSES_TO_CLOSE:
            message = f"{SUCCESSES_TO_CLOSE} single jobs that tried it succeeded: back in routing"
            return Decision(Breaker(BreakerState.CLOSED, now, breaker.opened, now), _carried(attempts), message=message)
        case BreakerState.HALF_OPEN:
            # An older job may take hours, and a hung one never ends: no trial waits for it.
            return _half_opened(replace(breaker, older=min(breaker.older, in_flight)), attempts)


def _kept(attempts: Attempts) -> Attempts:
    """The attempts, scaled down to :data:`WINDOW` of them, and with no more verdicts than failures."""
    confirmed, refuted = max(0.0, attempts.confirmed), max(0.0, attempts.refuted)
    succeeded, failed = max(0.0, attempts.succeeded), max(attempts.failed, confirmed + refuted)
    part = min(1.0, WINDOW / (succeeded + failed)) if succeeded + failed else 1.0
    return Attempts(part * succeeded, part * failed, part * confirmed, part * refuted)


def _carried(attempts: Attempts) -> Attempts:
    """What still counts after a change of state: the jobs that have lately failed by their own fault. They are half a window at
    most, so that a tier that breaks now still shows.
    """
    own = min(attempts.refuted, WINDOW / 2)
    return replace(NO_ATTEMPTS, failed=own, refuted=own)


def _failures(attempts: Attempts) -> float:
    """The failures that are the tier's fault. Undecided ones count by Laplace's rule of succession, so by half if none is
    decided.
    """
    undecided = attempts.failed - attempts.confirmed - attempts.refuted
    return attempts.confirmed + undecided * (attempts.confirmed + 1) / (attempts.confirmed + attempts.refuted + 2)


def _pause(opened: int) -> float:
    return float(min(LONGEST_PAUSE_SECONDS, PAUSE_SECONDS * 2 ** min(max(0, opened - 1), 16)))


def _seconds(breaker: Breaker, now: Milliseconds) -> float:
    return (now - breaker.at) / 1000


def _opened(breaker: Breaker, attempts: Attempts, opened: int, now: Milliseconds) -> Decision:
    return _open(Breaker(BreakerState.OPEN, now, opened, breaker.since), attempts)


def _open(breaker: Breaker, attempts: Attempts) -> Decision:
    message = (
        f"{attempts.failed:.0f} of its latest {attempts.succeeded + attempts.failed:.0f} attempts failed, "
        f"{attempts.confirmed:.0f} of these jobs succeeded on another tier and {attempts.refuted:.0f} failed there too: "
        f"out of routing, after {_pause(breaker.opened):.0f} s single jobs try it"
    )
    return Decision(breaker, attempts, 0, message)


def _half_opened(breaker: Breaker, attempts: Attempts) -> Decision:
    message = f"single jobs try it, {min(attempts.succeeded, SUCCESSES_TO_CLOSE):.0f} of {SUCCESSES_TO_CLOSE} have succeeded"
    return Decision(breaker, attempts, TRIALS_AT_ONCE + breaker.older, message)
