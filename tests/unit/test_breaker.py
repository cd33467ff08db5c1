"""When an accelerated tier is taken out of routing, how it is tried again, and when it comes back."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from workerpool_operator import breaker
from workerpool_operator.breaker import (
    LEAST_FAILURES,
    LONGEST_PAUSE_SECONDS,
    PAUSE_SECONDS,
    SUCCESSES_TO_CLOSE,
    TRIALS_AT_ONCE,
    WINDOW,
    Decision,
)
from workerpool_operator.observation import NEVER_OPENED, NO_ATTEMPTS, Attempts, Breaker, BreakerState
from workerpool_routing.wire import Milliseconds

pytestmark = pytest.mark.unit

CLOSED, OPEN, HALF_OPEN = BreakerState
NOON = Milliseconds(1_700_000_000_000)
BROKEN = Attempts(0, 6, 5, 0)


def after(seconds: float) -> Milliseconds:
    return Milliseconds(NOON + round(seconds * 1000))


def decide(
    state: Breaker = NEVER_OPENED, attempts: Attempts = NO_ATTEMPTS, now: Milliseconds = NOON, in_flight: int = 0
) -> Decision:
    return breaker.decide(state, attempts, in_flight, now)


def opened(times: int = 1) -> Breaker:
    return Breaker(OPEN, NOON, times)


def on_trial(times: int = 1) -> Breaker:
    return Breaker(HALF_OPEN, NOON, times, since=NOON)


@dataclass
class Tier:
    """A tier with its breaker, a pass after every step, and its attempts counted as the scripts count them."""

    kept: Decision = field(default_factory=lambda: Decision(NEVER_OPENED, NO_ATTEMPTS))
    now: Milliseconds = NOON
    states: list[BreakerState] = field(default_factory=lambda: [CLOSED])

    @property
    def state(self) -> BreakerState:
        return self.kept.breaker.state

    def look(self, seconds: float = 0.0) -> None:
        self.now = Milliseconds(self.now + round(seconds * 1000))
        self.kept = breaker.decide(self.kept.breaker, self.kept.attempts, 0, self.now)
        if self.state is not self.states[-1]:
            self.states.append(self.state)

    def ends(self, what: str, began: Milliseconds | None = None) -> None:
        if (self.now if began is None else began) >= self.kept.breaker.since:
            attempts = self.kept.attempts
            self.kept = replace(self.kept, attempts=replace(attempts, **{what: getattr(attempts, what) + 1}))
        self.look()


@pytest.mark.parametrize(
    ("attempts", "state"),
    [
        (NO_ATTEMPTS, CLOSED),
        (Attempts(WINDOW), CLOSED),
        (Attempts(0, LEAST_FAILURES - 1, LEAST_FAILURES - 1), CLOSED),
        (Attempts(0, LEAST_FAILURES, LEAST_FAILURES), OPEN),
        (Attempts(5, 5, 5), OPEN),
        (Attempts(6, 5, 5), CLOSED),
        (Attempts(0, 2 * LEAST_FAILURES - 1), CLOSED),
        (Attempts(0, 2 * LEAST_FAILURES), OPEN),
        (Attempts(10, 10), CLOSED),
        (Attempts(6, 14), OPEN),
        (Attempts(0, 7, 3), OPEN),
        (Attempts(0, 20, 0, 20), CLOSED),
        (Attempts(0, 20, 0, 8), CLOSED),
        (Attempts(0, 10, 5, 5), OPEN),
        (Attempts(5, 9, 4, 5), CLOSED),
        (Attempts(0, -1, 0, 0), CLOSED),
        (Attempts(0, 0.3, 0.1, 20), CLOSED),
    ],
    ids=[
        "nothing ended", "all went well", "too few", "just enough", "exactly the rate", "below the rate",
        "too few that are only suspected", "twice as many, all of them suspected",
        "a half of suspicions is not a half of failures", "more of them are", "some known, the others taken to be alike",
        "all their own fault", "many their own fault, and those not known taken to be alike",
        "half of the failures are the jobs' own", "the jobs' own failures do not count",
        "an expired job took back what was forgotten", "verdicts on what was forgotten",
    ],
)  # fmt: skip
def test_a_tier_is_taken_out_by_what_is_known_and_half_of_what_is_suspected(attempts: Attempts, state: BreakerState) -> None:
    decision = decide(attempts=attempts)
    assert decision.breaker.state is state
    assert decision.limit == (0 if state is OPEN else None)
    assert bool(decision.message) == (state is OPEN)


def test_the_sentence_says_what_was_counted_and_when_it_is_tried_again() -> None:
    assert decide(attempts=Attempts(1, 7, 5, 1)).message == (
        "7 of its latest 8 attempts failed, 5 of these jobs succeeded on another tier and 1 failed there too: out of routing, "
        "after 30 s single jobs try it"
    )
    assert decide(opened(), BROKEN, after(12)).message == decide(opened(), BROKEN).message, "no news while nothing happens"
    assert decide(on_trial(), Attempts(2)).message == "single jobs try it, 2 of 3 have succeeded"
    assert decide(on_trial(), Attempts(3)).message == "3 single jobs that tried it succeeded: back in routing"


@pytest.mark.parametrize(("times", "pause"), [(1, 30), (2, 60), (3, 120), (5, 480), (6, 600), (1_000, 600)])
def test_it_stays_out_for_a_pause_that_doubles_up_to_the_longest(times: int, pause: float) -> None:
    assert decide(opened(times), BROKEN, after(pause - 0.001)).limit == 0
    tried = decide(opened(times), BROKEN, after(pause))
    assert tried.breaker == Breaker(HALF_OPEN, after(pause), times, since=after(pause)), "what began before does not count"
    assert (tried.attempts, tried.limit) == (NO_ATTEMPTS, TRIALS_AT_ONCE)


def test_a_failed_trial_opens_it_again_at_once_for_twice_as_long() -> None:
    again = decide(on_trial(), Attempts(SUCCESSES_TO_CLOSE, 1), after(1))
    assert (again.breaker.state, again.breaker.opened, again.limit) == (OPEN, 2, 0)
    assert again.breaker.since == NOON, "how the job of the trial ends elsewhere still counts"
    assert decide(again.breaker, again.attempts, after(1 + 2 * PAUSE_SECONDS - 0.001)).breaker.state is OPEN
    assert decide(again.breaker, again.attempts, after(1 + 2 * PAUSE_SECONDS)).breaker.state is HALF_OPEN


def test_a_trial_that_failed_by_its_own_fault_is_followed_by_the_next_at_once() -> None:
    tier = Tier(Decision(on_trial(times=3), NO_ATTEMPTS))
    for end in ("succeeded", "succeeded", "failed", "refuted"):
        tier.ends(end)
    assert (tier.state, tier.kept.breaker.opened, tier.kept.limit) == (HALF_OPEN, 3, TRIALS_AT_ONCE)
    tier.ends("succeeded")
    assert tier.state is CLOSED, "the successes before it still count"


def test_enough_successful_trials_take_it_back_in() -> None:
    tier = Tier(Decision(on_trial(), NO_ATTEMPTS))
    for _ in range(SUCCESSES_TO_CLOSE):
        tier.look(1)
        assert (tier.state, tier.kept.limit) == (HALF_OPEN, TRIALS_AT_ONCE)
        tier.ends("succeeded")
    assert (tier.state, tier.kept.limit, tier.kept.attempts) == (CLOSED, None, NO_ATTEMPTS)


def test_a_trial_waits_for_no_job_that_the_tier_still_held() -> None:
    limits, state = [], opened()
    for now, in_flight in ((30.0, 2), (31.0, 3), (40.0, 2), (50.0, 1), (51.0, 2), (60.0, 0), (61.0, 1)):
        tried = decide(state, BROKEN if state.state is OPEN else NO_ATTEMPTS, after(now), in_flight)
        limits.append(tried.limit)
        state = tried.breaker
    assert limits == [3, 3, 3, 2, 2, 1, 1], "one more than what has been there since the trial began"


def test_what_began_before_the_trial_says_nothing_about_it() -> None:
    tier = Tier(Decision(on_trial(), NO_ATTEMPTS))
    for end in ("succeeded", "confirmed", "refuted", "failed"):
        tier.ends(end, began=after(-1))
    assert (tier.state, tier.kept.attempts) == (HALF_OPEN, NO_ATTEMPTS)


def test_a_tier_that_breaks_soon_after_it_came_back_stays_out_longer_and_later_begins_anew() -> None:
    back = Breaker(CLOSED, NOON, opened=2, since=NOON)
    assert decide(back, BROKEN, after(60)).breaker.opened == 3
    assert decide(back, BROKEN, after(LONGEST_PAUSE_SECONDS)).breaker.opened == 1


def test_jobs_that_fail_everywhere_do_not_end_a_trial_where_such_are_known_until_too_many_do() -> None:
    own_fault = replace(BROKEN, failed=14, confirmed=1, refuted=12)
    tried = decide(opened(), own_fault, after(PAUSE_SECONDS))
    assert tried.attempts == Attempts(0, WINDOW / 2, 0, WINDOW / 2)
    tier, failed = Tier(tried, now=after(PAUSE_SECONDS)), 0
    while tier.state is HALF_OPEN:
        tier.ends("failed")
        failed += 1
    assert 1 < failed <= WINDOW / 2, "a tier that broke is noticed before anything is known of these"
    tier = Tier(tried, now=after(PAUSE_SECONDS))
    tier.ends("failed")
    tier.ends("confirmed")
    assert tier.state is OPEN, "one that it did is enough"
    tier = Tier(tried, now=after(PAUSE_SECONDS))
    for end in ("failed", "succeeded", "failed", "succeeded", "succeeded", "succeeded"):
        tier.ends(end)
    assert tier.state is CLOSED


def test_a_suspicion_that_was_wrong_is_over_as_soon_as_that_is_known() -> None:
    tier = Tier()
    for _ in range(20):
        tier.ends("succeeded")
    while tier.state is CLOSED:
        tier.ends("failed")
    for _ in range(30):
        tier.ends("refuted")
    assert tier.states == [CLOSED, OPEN, HALF_OPEN, CLOSED]
    assert tier.now == NOON, "the successes before the suspicion are enough"


@pytest.mark.parametrize("state", BreakerState)
def test_a_clock_that_was_set_back_does_not_make_a_pause_longer(state: BreakerState) -> None:
    ahead = Breaker(state, after(86_400), 1, since=after(86_400))
    now = decide(ahead, BROKEN if state is OPEN else NO_ATTEMPTS)
    assert (now.breaker.at, now.breaker.since) == (NOON, NOON), "and what begins from now on counts"
    assert decide(now.breaker, now.attempts, after(PAUSE_SECONDS)).breaker.state is (HALF_OPEN if state is OPEN else state)


@pytest.mark.parametrize(("verdicts", "failures"), [(True, 15), (False, 23)], ids=["confirmed at once", "only suspected"])
def test_a_tier_that_always_worked_and_breaks_is_out_after_a_known_number_of_jobs(verdicts: bool, failures: int) -> None:
    tier = Tier()
    for _ in range(1_000):
        tier.ends("succeeded")
    count = 0
    while tier.state is CLOSED:
        tier.ends("failed")
        if verdicts:
            tier.ends("confirmed")
        count += 1
    assert 1 < count <= failures


counts = st.floats(0, 1_000)


@st.composite
def ended(draw: st.DrawFn) -> Attempts:
    confirmed, refuted = draw(counts), draw(counts)
    return Attempts(draw(counts), confirmed + refuted + draw(counts), confirmed, refuted)


breakers = st.builds(
    Breaker,
    st.sampled_from(BreakerState),
    st.integers(-100_000, 2_000_000).map(lambda ago: Milliseconds(NOON - ago)),
    st.integers(0, 50),
    st.just(Milliseconds(0)),
)


@settings(deadline=None)
@example(Breaker(), Attempts(223.8828125, 550.248046875, 223.8828125, 326.365234375))
@given(breakers, ended())
def test_two_that_decide_at_once_or_one_after_the_other_come_to_the_same_limit(state: Breaker, attempts: Attempts) -> None:
    first = decide(state, attempts)
    assert decide(state, attempts) == first
    second = decide(first.breaker, first.attempts)
    if first.breaker.state is state.state:
        assert (second.breaker, second.limit) == (first.breaker, first.limit)


@settings(deadline=None)
@given(breakers, ended())
def test_whatever_was_counted_the_record_stays_small_and_whole_and_the_limit_fits_the_state(
    state: Breaker, attempts: Attempts
) -> None:
    decision = decide(state, attempts)
    kept = decision.attempts
    assert kept.succeeded + kept.failed <= WINDOW + 1e-6
    assert min(kept.succeeded, kept.failed, kept.confirmed, kept.refuted) >= 0
    assert kept.confirmed + kept.refuted <= kept.failed + 1e-6
    assert decision.limit == {CLOSED: None, OPEN: 0, HALF_OPEN: TRIALS_AT_ONCE}[decision.breaker.state]


@settings(deadline=None)
@given(st.integers(0, 20), st.lists(st.sampled_from(["its own fault", "success"]), max_size=200))
def test_jobs_that_fail_everywhere_take_no_tier_out(lag: int, jobs: list[str]) -> None:
    """Provided that fewer are under way at a time than it takes to suspect a tier."""
    tier, undecided = Tier(), 0
    for job in jobs:
        tier.ends("succeeded" if job == "success" else "failed")
        undecided += job != "success"
        while undecided > min(lag, 2 * LEAST_FAILURES - 2):
            tier.ends("refuted")
            undecided -= 1
    assert tier.states == [CLOSED]


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=0, max_size=60), st.integers(0, 15))
def test_a_driver_that_broke_costs_one_fallback_a_trial_and_comes_back_once_it_is_mended(before: list[bool], trials: int) -> None:
    tier, cost = Tier(), 0
    for good in before:
        if tier.state is CLOSED:
            tier.ends("succeeded" if good else "failed")
    while tier.state is CLOSED:
        tier.ends("failed")
        tier.ends("confirmed")
        cost += 1
    assert cost <= WINDOW
    waited = []
    for _ in range(trials):
        began = tier.now
        while tier.state is OPEN:
            tier.look(PAUSE_SECONDS)
        waited.append((tier.now - began) / 1000)
        tier.ends("failed")
        tier.ends("confirmed")
        assert tier.state is OPEN, "one job tried it, and no more"
    assert all(one <= other <= LONGEST_PAUSE_SECONDS for one, other in pairwise(waited))
    while tier.state is OPEN:
        tier.look(PAUSE_SECONDS)
    for _ in range(SUCCESSES_TO_CLOSE):
        tier.ends("succeeded")
    assert tier.state is CLOSED
