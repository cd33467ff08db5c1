"""Whether an accelerated tier takes part in routing: a circuit breaker, as a pure rule.

Why this evidence and these numbers: ``docs/adr/0013-circuit-breaker.md``.

A job that fails on an accelerated tier runs once more on a plain one. How it ends there says whose fault it was: where it ends
well the tier's, where it fails again its own. Until that is known the tier is suspected by half, or by as much as is known of the
others. Losses count like exceptions; what a drain or a shutdown gives back does not.

* *Closed*: all jobs. It opens when at least :data:`LEAST_FAILURES` of the latest :data:`WINDOW` attempts are failures, and these
  are :data:`RATE` of them.
* *Open*: none. What was only suspected and turns out to be the jobs' own fault ends it at once; else the pause does.
* *Half-open*: :data:`TRIALS_AT_ONCE` job at a time, beside those that the tier still held. :data:`SUCCESSES_TO_CLOSE` good ends
  close it; a failure opens it again, for twice as long, up to :data:`LONGEST_PAUSE_SECONDS`, unless jobs are known to have failed
  by their own fault of late: then one that is confirmed does, or as many undecided ones as make up :data:`_DOUBT`.

All that the rule knows stands in Redis, so that the next operator goes on where the last one stopped, and two at once write the
same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from workerpool_operator.observation import NO_ATTEMPTS, Attempts, Breaker, BreakerState
from workerpool_routing.wire import Milliseconds

RATE = 0.5
"""The part of the attempts that fail from which on a tier is taken out: it then costs more runs than it saves."""

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
"""So many failures of the tier keep it out: what a single undecided one counts while nothing else is known."""

_ROUNDING = 1e-9
"""Counts that are scaled to the window differ by less from pass to pass: it does not open a tier later that it did not before."""


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
    """The latest :data:`WINDOW`, and no verdict on a failure that has been forgotten."""
    confirmed, refuted = max(0.0, attempts.confirmed), max(0.0, attempts.refuted)
    succeeded, failed = max(0.0, attempts.succeeded), max(attempts.failed, confirmed + refuted)
    part = min(1.0, WINDOW / (succeeded + failed)) if succeeded + failed else 1.0
    return Attempts(part * succeeded, part * failed, part * confirmed, part * refuted)


def _carried(attempts: Attempts) -> Attempts:
    """What is known beyond a change of state: of late jobs have failed by their own fault. It is half a window at most, so that
    what breaks now still shows.
    """
    own = min(attempts.refuted, WINDOW / 2)
    return replace(NO_ATTEMPTS, failed=own, refuted=own)


def _failures(attempts: Attempts) -> float:
    """Those of the tier, the undecided by as much as the others say; nothing says: half."""
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
