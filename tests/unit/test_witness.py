"""Silence means loss only after one Redis process has answered for a whole presence life without a gap."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workerpool_operator.observation import Unavailable
from workerpool_operator.witness import LONGEST_GAP_SECONDS, LONGEST_STEP_SECONDS, Witness, look, may_reap
from workerpool_routing.wire import PRESENCE_LIFE_MS, PRESENCE_PERIOD_SECONDS

pytestmark = pytest.mark.unit

LIFE = PRESENCE_LIFE_MS / 1000
DOWN = Unavailable("connection refused")


def watch(*answers: tuple[float, str | Unavailable]) -> Witness | None:
    seen = None
    for now, run_id in answers:
        seen = look(seen, run_id, now, now)
    return seen


def every_second(start: float, end: float, run_id: str = "r1") -> list[tuple[float, str | Unavailable]]:
    return [(start + n, run_id) for n in range(int(end - start) + 1)]


def test_nobody_is_reaped_before_the_first_answer() -> None:
    assert not may_reap(None)
    assert not may_reap(watch((100.0, "r1")))


def test_a_whole_presence_life_of_answers_is_enough_and_less_is_not() -> None:
    assert may_reap(watch(*every_second(100, 100 + LIFE)))
    assert not may_reap(watch(*every_second(100, 99 + LIFE), (99.999 + LIFE, "r1")))


def test_an_outage_starts_the_watch_again() -> None:
    before, after = every_second(0, 60), every_second(62, 62 + LIFE)
    assert not may_reap(watch(*before, (61, DOWN)))
    assert not may_reap(watch(*before, (61, DOWN), *after[:-1]))
    assert may_reap(watch(*before, (61, DOWN), *after))


def test_another_redis_process_starts_the_watch_again() -> None:
    after = every_second(61, 61 + LIFE, "r2")
    assert not may_reap(watch(*every_second(0, 60), *after[:-1]))
    assert may_reap(watch(*every_second(0, 60), *after))


def test_a_gap_between_passes_starts_the_watch_again() -> None:
    assert may_reap(watch(*every_second(0, 60), (60 + LONGEST_GAP_SECONDS, "r1")))
    assert not may_reap(watch(*every_second(0, 60), (60.1 + LONGEST_GAP_SECONDS, "r1")))


def test_passes_that_come_in_quick_succession_do_not_break_the_watch() -> None:
    passes: list[tuple[float, str | Unavailable]] = [(100 + n // 2 * 0.125, "r1") for n in range(2 * 8 * int(LIFE) + 2)]
    assert may_reap(watch(*passes))


def test_a_gap_that_goes_unnoticed_is_too_short_for_presence_to_expire() -> None:
    assert max(LONGEST_GAP_SECONDS, LONGEST_STEP_SECONDS) + PRESENCE_PERIOD_SECONDS < LIFE


def test_a_clock_that_was_set_back_starts_the_watch_again_and_does_not_stop_it() -> None:
    before, after = every_second(3600, 3660), every_second(60, 60 + LIFE)
    assert not may_reap(watch(*before, after[0]))
    assert may_reap(watch(*before, *after))


@pytest.mark.parametrize("jump", [3600.0, -3600.0, LONGEST_STEP_SECONDS])
def test_a_clock_of_redis_that_was_set_starts_the_watch_again(jump: float) -> None:
    seen = None
    for now in range(60):
        seen = look(seen, "r1", now, now)
    assert may_reap(seen)
    for now in range(60, 60 + int(LIFE)):
        seen = look(seen, "r1", now, now + jump)
        assert not may_reap(seen)
    assert may_reap(look(seen, "r1", 60 + LIFE, 60 + LIFE + jump))


answers = st.tuples(st.floats(0, 5), st.sampled_from(["r1", "r1", "r1", "r2", DOWN]))


@settings(max_examples=100)
@given(st.lists(answers, max_size=30))
def test_reaping_needs_a_presence_life_of_close_answers_of_one_process(pauses: list[tuple[float, str | Unavailable]]) -> None:
    now, seen = 0.0, None
    unbroken: list[tuple[float, str]] = []
    for pause, run_id in pauses:
        now += pause
        seen = look(seen, run_id, now, now)
        if unbroken and (run_id != unbroken[-1][1] or now - unbroken[-1][0] > LONGEST_GAP_SECONDS):
            unbroken = []
        if isinstance(run_id, str):
            unbroken.append((now, run_id))
        assert may_reap(seen) == (bool(unbroken) and unbroken[-1][0] - unbroken[0][0] >= LIFE)
