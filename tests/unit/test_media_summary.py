"""What the demo counts, and what it calls a failure."""

from __future__ import annotations

from dataclasses import replace

import pytest
from examples.media.summary import Course, Outcome, problems, same, sparkline, summarise

pytestmark = pytest.mark.unit

ON_GPU = Outcome(
    asked=True, first_tier="gpu", decision_ms=1.0, state="done", tier="gpu", starts={"gpu": 1}, attempt=1, correct=True
)
SPILLED = replace(ON_GPU, first_tier="cpu", tier="cpu", decision_ms=3.0, starts={"cpu": 1})
FELL_BACK = replace(ON_GPU, tier="cpu", decision_ms=2.0, starts={"gpu": 1, "cpu": 1}, attempt=2)
MOVED = replace(ON_GPU, tier="cpu", starts={"cpu": 1})
PLAIN = replace(SPILLED, asked=False)
GOOD = (ON_GPU, SPILLED, FELL_BACK)
PEAK, FINAL = {"gpu": 2, "cpu": 2}, {"gpu": 0, "cpu": 1}
COURSE = Course(drained={"gpu": {"a", "b"}}, outage_seconds=9.04, spilled=3, moved=7, back_seconds=6.26)


def test_a_good_run_is_counted_in_full_and_has_no_problem() -> None:
    summary = summarise((*GOOD, PLAIN), PEAK, FINAL, COURSE, 31.44)
    assert summary == {
        "jobs": {"submitted": 4, "succeeded": 4, "failed": 0, "lost": 0, "ran_twice_on_one_tier": 0},
        "tiers": {
            "gpu": {"jobs": 1, "peak_replicas": 2, "final_replicas": 0},
            "cpu": {"jobs": 3, "peak_replicas": 2, "final_replicas": 1},
        },
        "drained": {"gpu": 2, "cpu": 0},
        "outage": {"seconds": 9.0, "spilled": 3, "moved": 7, "back_after": 6.3},
        "spilled": 1,
        "fell_back": 1,
        "decision_ms_p50": 2.5,
        "seconds": 31.4,
    }
    assert problems(summary) == []


@pytest.mark.parametrize(
    ("outcomes", "peak", "final", "problem"),
    [
        ((*GOOD, replace(ON_GPU, correct=False)), PEAK, FINAL, "1 jobs failed or have a wrong result"),
        ((*GOOD, replace(ON_GPU, state="failed")), PEAK, FINAL, "1 jobs failed or have a wrong result"),
        ((*GOOD, replace(ON_GPU, state="expired")), PEAK, FINAL, "1 jobs failed or have a wrong result"),
        ((*GOOD, replace(ON_GPU, state="claimed")), PEAK, FINAL, "1 jobs have not ended"),
        ((*GOOD, replace(ON_GPU, starts={"gpu": 2})), PEAK, FINAL, "1 jobs started twice on one tier"),
        ((ON_GPU, FELL_BACK, PLAIN), PEAK, FINAL, "no job spilled to the CPU tier"),
        ((ON_GPU, SPILLED, MOVED), PEAK, FINAL, "no job fell back to the CPU tier after its GPU worker was killed"),
        (GOOD, {"gpu": 0, "cpu": 2}, FINAL, "the GPU tier never left zero"),
        (GOOD, PEAK, {"gpu": 1, "cpu": 1}, "the GPU tier did not return to zero: 1 left"),
    ],
)
def test_each_thing_that_goes_wrong_is_named_alone(
    outcomes: tuple[Outcome, ...], peak: dict[str, int], final: dict[str, int], problem: str
) -> None:
    assert problems(summarise(outcomes, peak, final, COURSE, 1.0)) == [problem]


@pytest.mark.parametrize(
    ("course", "problem"),
    [
        (replace(COURSE, drained={}), "no worker was drained"),
        (replace(COURSE, outage_seconds=None), "no outage of the GPU tier sent a job to the CPU tier"),
        (replace(COURSE, spilled=0), "no outage of the GPU tier sent a job to the CPU tier"),
        (replace(COURSE, back_seconds=None), "no job ran on a GPU after the outage"),
    ],
)
def test_a_scene_that_did_not_happen_is_named(course: Course, problem: str) -> None:
    assert problems(summarise(GOOD, PEAK, FINAL, course, 1.0)) == [problem]


def test_a_run_without_jobs_is_no_success() -> None:
    assert "no job was submitted" in problems(summarise((), PEAK, FINAL, COURSE, 1.0))


def test_a_result_is_compared_in_full_and_its_fractions_nearly() -> None:
    expected = {"hash": "a1", "edges": 0.1 + 0.2, "tempo": None}
    assert same({"hash": "a1", "edges": 0.3, "tempo": None}, expected)
    assert not same({"hash": "a2", "edges": 0.3, "tempo": None}, expected)
    assert not same({"hash": "a1", "edges": 0.31, "tempo": None}, expected)
    assert not same({"hash": "a1", "edges": 0.3}, expected)
    assert not same("WorkerLostError", expected)


def test_a_sparkline_shows_the_highest_of_each_span() -> None:
    assert sparkline([(0, 0), (1, 4), (1.5, 1), (2, 8), (4, 0)], 4) == " ▄█ "
    assert sparkline([(0, 8), (4, 0)], 4) == "███ "
    assert sparkline([(3, 0)], 3) == "   "
    assert sparkline([], 3) == ""
