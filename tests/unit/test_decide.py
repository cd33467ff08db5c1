"""The routing rule: what is decided without measuring, what by measuring, and in which words."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from math import inf, sqrt
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workerpool_routing import admission
from workerpool_routing.admission import Admission, Entry, Question
from workerpool_routing.content import UNKNOWN, main_type
from workerpool_routing.decide import (
    ACCELERATION,
    MARGIN,
    PATIENCE_SECONDS,
    SERVICE_SECONDS,
    SPILLS,
    START_SECONDS,
    Candidates,
    Load,
    Reason,
    Request,
    Verdict,
    assumed_seconds,
    explain,
    gains,
    place,
    preselect,
)
from workerpool_routing.ledger import script
from workerpool_routing.message import Message
from workerpool_routing.wire import Keyspace, Milliseconds, Policy, StartingSlots, TierCapacity, TierPolicy, Wish

pytestmark = pytest.mark.unit

GPU, GPU2 = TierPolicy("gpu", "gpu-tasks", True), TierPolicy("gpu2", "gpu2-tasks", True)
CPU, CPU2 = TierPolicy("cpu", "celery", False), TierPolicy("cpu2", "cpu2-tasks", False)
MIXED = Policy((GPU, GPU2, CPU, CPU2))
KEYS = Keyspace("ml/media", "prod-")
TWO = Candidates((GPU, CPU), accelerated=1)
FOUR = preselect(MIXED, Request("t", True))
IDLE = Load(0, 0, 1)


def soon(slots: int) -> tuple[tuple[int, float], ...]:
    """Slots that are ready after the time that is assumed while none has been seen to start."""
    return ((slots, START_SECONDS),)


@pytest.mark.parametrize(
    ("wish", "content_type", "tiers", "reason"),
    [
        (False, None, (CPU, CPU2), Reason.NOT_REQUESTED),
        (False, "audio", (CPU, CPU2), Reason.NOT_REQUESTED),
        (True, "text", (CPU, CPU2), Reason.CONTENT_TYPE_GAINS_NOTHING),
        (True, "", (CPU, CPU2), Reason.CONTENT_TYPE_GAINS_NOTHING),
        ("required", None, (GPU, GPU2), Reason.REQUIRED),
        ("required", "audio", (GPU, GPU2), Reason.REQUIRED),
        ("required", "text", (GPU, GPU2), Reason.REQUIRED),
    ],
)
def test_what_is_asked_for_says_which_kind_of_tier(
    wish: Wish, content_type: str | None, tiers: tuple[TierPolicy, ...], reason: Reason
) -> None:
    assert preselect(MIXED, Request("t", wish, content_type)) == Candidates(tiers, reason=reason)


@pytest.mark.parametrize("content_type", [None, "audio", "video", "image"])
def test_a_job_that_gains_from_an_accelerator_may_go_anywhere_the_accelerated_tiers_first(content_type: str | None) -> None:
    assert preselect(MIXED, Request("t", True, content_type)) == Candidates((GPU, GPU2, CPU, CPU2), accelerated=2)


@pytest.mark.parametrize("only", [(CPU,), (CPU2, CPU), (GPU,), (GPU2, GPU)])
@pytest.mark.parametrize("wish", [True, False, "required"])
def test_where_all_tiers_are_of_one_kind_they_take_every_job(only: tuple[TierPolicy, ...], wish: Wish) -> None:
    assert preselect(Policy(only), Request("t", wish, "text")) == Candidates(only, reason=Reason.ONLY_TIER)


counts = st.integers(0, 30)
services = st.none() | st.floats(0.01, 100)
groups = st.lists(st.tuples(st.integers(1, 30), st.floats(0, 300)), max_size=4).map(
    lambda found: tuple(sorted(found, key=lambda group: group[1]))
)
existing = st.builds(Load, counts, counts, counts, groups, st.integers(0, 3), services)
loads = st.builds(
    lambda load, startable, later, target: replace(
        load, startable=startable, start_seconds=later + max([0.0, *(at for _, at in load.coming)]), target_seconds=target
    ),
    existing | existing.flatmap(lambda load: services.map(lambda mean: replace(load, mean=mean))),
    counts, st.floats(0, 60), st.floats(0, 600),
)  # fmt: skip
limited = st.builds(replace, loads, limit=st.integers(0, 40))
four_loads = st.tuples(*[loads | limited] * 4)
wishes = st.sampled_from([True, False, "required"])
content_types = st.none() | st.sampled_from(["audio", "audio/mpeg", "text", "text/plain", ""]) | st.text(max_size=10)


@settings(max_examples=200)
@given(wishes, content_types, four_loads, st.none() | st.floats(0, 50), st.booleans(), st.booleans())
def test_a_job_gets_a_tier_of_a_kind_that_it_may_have_whatever_the_load(
    wish: Wish, content_type: str | None, four: tuple[Load, ...], limit: float | None, spilling: bool, refuses: bool
) -> None:
    candidates = preselect(MIXED, Request("t", wish, content_type))
    seen = four[: len(candidates.tiers)]
    verdict = place(candidates, seen, limit=limit, spilling=spilling, refuses=refuses)
    tier = candidates.tiers[verdict.index]
    if wish == "required":
        assert tier.accelerated
    if wish is False:
        assert not tier.accelerated
    assert verdict.wait == seen[verdict.index].wait
    late = [load.full or (limit is not None and load.wait > limit) for load in seen]
    assert (verdict.reason is Reason.OVERLOADED) == (refuses and all(late))
    if not all(late):
        assert not seen[verdict.index].full, "a tier that is out of routing gets no job that another may have"


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        ("audio", True), ("audio/mpeg", True), ("Audio/MPEG", True), (" image/png", True), ("video/mp4; codecs=avc1", True),
        ("text/plain", False), ("application/audio", False), ("audiobook", False), ("", False), ("/audio", False),
    ],
)  # fmt: skip
def test_only_the_main_type_of_the_content_counts(content_type: str, expected: bool) -> None:
    assert gains(MIXED, content_type) is expected


def test_the_content_types_of_the_policy_are_read_in_any_case() -> None:
    assert gains(Policy((GPU, CPU), accelerated_content_types=("Audio",)), "audio/mpeg")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("image/png", "image"), ("IMAGE/PNG; q=1", "image"), ("image", "image"), ("scan.PNG", "image"), ("a/b.mp3", "audio"),
        ("/tmp/film.mp4", "video"), ("notes.txt", "text"), ("application/vnd.ms-excel", "application"),
        ("embedding", "embedding"), ("", ""), ("no.such-suffix", "no.such-suffix"), ("audio/", "audio"),
    ],
)  # fmt: skip
def test_a_content_type_is_a_mime_type_a_main_type_or_a_file_name(given: str, expected: str) -> None:
    assert main_type(given) == expected


@pytest.mark.parametrize("given", ["image\nrouted pool=ml/media", "x tier=gpu", "\u202eimage", "a" * 65, "x\x1b[2J"])
def test_what_can_be_no_type_does_not_reach_the_log(given: str) -> None:
    assert main_type(given) == UNKNOWN


OUT, ON_TRIAL = Load(0, 0, 4, limit=0), Load(0, 0, 4, limit=1)


@pytest.mark.parametrize(
    ("fast", "verdict"),
    [
        (OUT, Verdict(1, Reason.TIER_BROKEN, 0.0)),
        (replace(OUT, service=1.0), Verdict(1, Reason.TIER_BROKEN, 0.0)),
        (replace(OUT, ready=0, coming=soon(4)), Verdict(1, Reason.TIER_BROKEN, 0.0)),
        (ON_TRIAL, Verdict(0, Reason.FREE_SLOT, 0.0)),
        (replace(ON_TRIAL, ready=0, coming=soon(4)), Verdict(0, Reason.SLOT_STARTING, START_SECONDS)),
        (replace(ON_TRIAL, in_flight=1), Verdict(1, Reason.TIER_BROKEN, 0.0)),
        (replace(ON_TRIAL, waiting=1), Verdict(1, Reason.TIER_BROKEN, 0.0)),
        (replace(ON_TRIAL, leased=1), Verdict(1, Reason.TIER_BROKEN, 0.0)),
    ],
    ids=[
        "out, with idle slots", "out, and much faster", "out, with slots that start", "on trial", "on trial, its slots start",
        "one runs there", "one waits there", "one is on its way there",
    ],
)  # fmt: skip
def test_a_tier_whose_attempts_fail_has_room_for_those_that_try_it_alone(fast: Load, verdict: Verdict) -> None:
    assert place(TWO, (fast, replace(IDLE, service=9.0)), limit=None) == verdict


def test_a_job_goes_to_the_next_accelerated_tier_while_the_first_is_out() -> None:
    assert place(FOUR, (OUT, IDLE, IDLE, IDLE), limit=None) == Verdict(1, Reason.FREE_SLOT, 0.0)
    assert place(FOUR, (OUT, Load(0, 9, 9), IDLE, IDLE), limit=None) == Verdict(2, Reason.TIER_BROKEN, 0.0)


def test_a_job_that_requires_a_tier_that_is_out_is_refused_however_long_it_may_wait() -> None:
    required, nobody = preselect(MIXED, Request("t", "required")), Load(0, 0, 0)
    assert place(required, (OUT, OUT), limit=None) == Verdict(0, Reason.OVERLOADED, inf)
    assert place(required, (OUT, OUT), limit=None, refuses=False) == Verdict(0, Reason.REQUIRED, inf), "delay() never refuses"
    assert place(required, (OUT, nobody), limit=None) == Verdict(1, Reason.REQUIRED, inf), "the other may have workers some day"
    assert place(required, (ON_TRIAL, nobody), limit=None) == Verdict(0, Reason.REQUIRED, 0.0)


def spilled(fast: Load, slow: Load) -> bool:
    return place(TWO, (fast, slow), limit=None).reason in SPILLS


def test_a_job_that_did_not_ask_for_an_accelerator_goes_to_the_plain_tier() -> None:
    assert preselect(MIXED, Request("t", False, "audio")).tiers[0] == CPU


def test_a_type_that_gains_nothing_goes_to_the_plain_tier_even_when_it_asked() -> None:
    assert preselect(MIXED, Request("t", True, "text")).tiers[0] == CPU


def test_a_job_for_the_plain_tier_never_takes_an_accelerated_slot() -> None:
    candidates = preselect(MIXED, Request("t", False))
    assert place(candidates, (Load(50, 9, 1), Load(50, 9, 1)), limit=None).reason is Reason.NOT_REQUESTED
    assert not any(tier.accelerated for tier in candidates.tiers)


def test_without_a_free_accelerated_slot_and_none_on_its_way_a_job_goes_to_the_plain_tier() -> None:
    assert place(TWO, (Load(0, 1, 1), Load(9, 9, 1)), limit=None) == Verdict(1, Reason.NO_CAPACITY, 18.0)


def test_an_accelerated_queue_more_than_five_longer_sends_the_job_to_the_plain_tier() -> None:
    assert MARGIN == 5
    assert place(TWO, (Load(7, 1, 1, soon(8)), Load(2, 0, 0, soon(1))), limit=None).reason is Reason.SLOT_STARTING
    assert place(TWO, (Load(8, 1, 1, soon(8)), Load(2, 0, 0, soon(1))), limit=None).reason is Reason.QUEUE_TOO_LONG


@pytest.mark.parametrize(
    ("accelerated", "plain_waiting", "reason"),
    [
        pytest.param(Load(0, 0, 1), 0, Reason.FREE_SLOT, id="one idle worker"),
        pytest.param(Load(1, 1, 3), 0, Reason.FREE_SLOT, id="a slot is left after those that wait"),
        pytest.param(Load(1, 1, 3, leased=1), 0, Reason.NO_CAPACITY, id="the last slot is leased"),
        pytest.param(Load(1, 0, 1), 0, Reason.NO_CAPACITY, id="the free slot has its job already"),
        pytest.param(Load(0, 0, 0), 0, Reason.NO_CAPACITY, id="no worker and none can start"),
        pytest.param(Load(0, 0, 0, soon(1)), 0, Reason.SLOT_STARTING, id="from zero"),
        pytest.param(Load(0, 1, 1, soon(1)), 0, Reason.SLOT_STARTING, id="busy, another may start"),
        pytest.param(Load(3, 1, 1, soon(8), leased=2), 0, Reason.SLOT_STARTING, id="five jobs longer, two on their way"),
        pytest.param(Load(3, 1, 1, soon(8), leased=3), 0, Reason.QUEUE_TOO_LONG, id="six jobs longer, three on their way"),
        pytest.param(Load(6, 1, 1, soon(8)), 1, Reason.SLOT_STARTING, id="the plain queue is as long"),
        pytest.param(Load(20, 0, 30), 0, Reason.FREE_SLOT, id="a long queue that is taken in a moment"),
        pytest.param(Load(50, 1, 1), 0, Reason.NO_CAPACITY, id="a long queue is not the first thing that is wrong"),
        pytest.param(Load(50, 1, 1, service=2.0), 0, Reason.NO_CAPACITY, id="the service of one tier alone says nothing"),
    ],
)
def test_while_service_times_are_unknown_slots_and_lengths_decide(accelerated: Load, plain_waiting: int, reason: Reason) -> None:
    assert place(TWO, (accelerated, Load(plain_waiting, 9, 9, soon(9))), limit=None).reason is reason


@pytest.mark.parametrize(("fast", "slow", "seconds"), [(1.0, 9.0, 2.0), (1.0, 16.0, 3.0), (4.0, 4.0, 0.0), (9.0, 1.0, 0.0)])
def test_the_threshold_grows_with_the_ratio_of_the_speeds_and_includes_its_boundary(
    fast: float, slow: float, seconds: float
) -> None:
    in_time = round(seconds / fast)
    plain = Load(0, 0, 1, service=slow)
    assert not spilled(Load(in_time, 0, 1, service=fast), plain) or in_time == 0
    assert spilled(Load(in_time + 1, 0, 1, service=fast), plain)


def test_the_wait_on_the_plain_tier_counts_against_it() -> None:
    fast = Load(9, 1, 1, service=1.0)
    assert spilled(fast, Load(0, 0, 1, service=9.0))
    assert not spilled(fast, Load(0, 1, 1, service=9.0))


def test_a_task_that_spills_comes_back_at_half_the_threshold() -> None:
    slow, verdicts = Load(0, 0, 1, service=25.0), {}
    for waiting in range(1, 7):
        fast = Load(waiting - 1, 1, 1, service=1.0)  # waits that many seconds; the threshold is 4
        verdicts[waiting] = tuple(place(TWO, (fast, slow), limit=None, spilling=side).reason for side in (False, True))
    assert [waiting for waiting, (not_yet, _) in verdicts.items() if not_yet is Reason.WORTH_THE_WAIT] == [1, 2, 3, 4]
    assert [waiting for waiting, (_, still) in verdicts.items() if still is Reason.WORTH_THE_WAIT] == [1, 2]


@settings(max_examples=200)
@given(st.floats(0.01, 100), st.floats(1, 100), counts, counts, st.integers(1, 8))
def test_a_job_is_never_kept_waiting_for_longer_than_the_plain_tier_needs_to_finish_it(
    fast: float, ratio: float, waiting: int, in_flight: int, ready: int
) -> None:
    seen = Load(waiting, in_flight, ready, service=fast)
    verdict = place(TWO, (seen, Load(0, 0, 1, service=fast * ratio)), limit=None)
    if verdict.index == 0:
        assert verdict.wait + fast <= sqrt(fast * fast * ratio) * 1.000001 or seen.free > 0


def test_the_first_accelerated_tier_with_room_takes_the_job_in_order_of_preference() -> None:
    busy = Load(0, 1, 1)
    assert place(FOUR, (IDLE, IDLE, IDLE, IDLE), limit=None).index == 0
    assert place(FOUR, (busy, IDLE, IDLE, IDLE), limit=None).index == 1
    assert place(FOUR, (busy, busy, busy, IDLE), limit=None) == Verdict(3, Reason.NO_CAPACITY, 0.0)
    assert place(FOUR, (busy, busy, busy, busy), limit=None).index == 2


def test_of_several_tiers_of_a_kind_the_one_that_starts_the_job_soonest_takes_it() -> None:
    plain = preselect(MIXED, Request("t", False))
    assert place(plain, (Load(4, 1, 1), Load(2, 1, 1)), limit=None).index == 1
    assert place(plain, (Load(4, 1, 1, service=0.1), Load(2, 1, 1)), limit=None).index == 0


def test_a_tier_that_cannot_start_the_job_in_time_gives_way_to_one_that_can() -> None:
    fast, slow = Load(1, 1, 1, service=1.0), Load(0, 0, 1, service=9.0)
    assert place(TWO, (fast, slow), limit=2.0) == Verdict(0, Reason.WORTH_THE_WAIT, 2.0)
    assert place(TWO, (fast, slow), limit=1.9) == Verdict(1, Reason.STARTS_SOONER, 0.0)


def test_a_job_that_no_tier_can_start_in_time_is_refused_or_goes_where_it_starts_soonest() -> None:
    seen = (Load(4, 1, 1, service=1.0), Load(0, 1, 1, service=9.0))
    assert place(TWO, seen, limit=3.0) == Verdict(0, Reason.OVERLOADED, 5.0)
    assert place(TWO, seen, limit=3.0, refuses=False).index == 0


@pytest.mark.parametrize(
    ("load", "seconds"),
    [
        (Load(0, 0, 1), 0.0),
        (Load(0, 1, 1, service=3.0), 3.0),
        (Load(3, 2, 2, service=3.0), 6.0),
        (Load(3, 2, 2), 2 * SERVICE_SECONDS),
        (Load(3, 2, 2, assumed=0.2), 0.4),
        (Load(3, 2, 2, assumed=0.2, service=3.0), 6.0),
        (Load(0, 0, 0), inf),
        (Load(0, 0, 0, soon(2)), START_SECONDS),
        (Load(3, 0, 0, soon(2), service=3.0), START_SECONDS + 3.0),
        (Load(0, 1, 1, soon(9), service=3.0), 3.0),
        (Load(0, 1, 1, soon(9), service=300.0), START_SECONDS),
        (Load(0, 0, 0, ((1, 5.0), (1, 300.0)), service=10.0), 5.0),
        (Load(1, 0, 0, ((1, 5.0), (1, 300.0)), service=10.0), 15.0),
        (Load(40, 0, 0, ((1, 5.0), (1, 300.0)), service=10.0), (10.0 * 39 + 5.0 + 300.0) / 2),
        (Load(9, 1, 1, ((1, 20.0),), service=10.0), (10.0 * 9 + 20.0) / 2),
        (Load(1, 1, 1, ((9, 19.0),), service=10.0), 19.0),
        (Load(1, 1, 1, ((9, 21.0),), service=10.0), 20.0),
    ],
)
def test_the_expected_wait_counts_the_jobs_ahead_over_the_slots_and_when_they_are_ready(load: Load, seconds: float) -> None:
    assert load.wait == seconds


def test_a_job_that_nobody_has_run_is_taken_to_be_shorter_where_there_is_an_accelerator() -> None:
    assert assumed_seconds(accelerated=True) * ACCELERATION == assumed_seconds(accelerated=False) == SERVICE_SECONDS


@settings(max_examples=300)
@given(existing)
def test_a_job_is_expected_to_start_when_as_many_have_started_as_its_place_says(load: Load) -> None:
    service = SERVICE_SECONDS if load.service is None else load.service

    def starts(until: float) -> float:
        """Ends of the jobs on ready slots, and what the slots that are there by then have started and ended."""
        return load.ready * until / service + sum(n * (1 + (until - at) / service) for n, at in load.coming if at <= until)

    place, wait = load.ahead + 1 - load.ready, load.wait
    assert (wait == inf) == (load.slots == 0)
    if place <= 0 or wait == inf:
        assert wait == 0.0 or load.slots == 0
        return
    assert starts(wait + 1e-9) >= place - 1e-6
    earlier = wait - 1e-6 * (1 + wait)
    assert earlier < 0 or starts(earlier) < place


@pytest.mark.parametrize(
    ("load", "seconds"),
    [
        (Load(0, 0, 0, startable=8, start_seconds=20.0, target_seconds=60.0), 20.0),
        # Five jobs of 10 s each on one slot that starts: the last begins after 20 + 4 * 10 s, in time; a sixth needs another.
        (Load(4, 0, 0, service=10.0, startable=8, start_seconds=20.0, target_seconds=60.0), 60.0),
        (Load(5, 0, 0, service=10.0, startable=8, start_seconds=20.0, target_seconds=60.0), (10.0 * 4 + 2 * 20.0) / 2),
        (Load(5, 0, 0, service=10.0, startable=1, start_seconds=20.0, target_seconds=60.0), 70.0),
        (Load(5, 1, 1, service=10.0, startable=8, start_seconds=20.0, target_seconds=60.0), 60.0),
        (Load(6, 1, 1, service=10.0, startable=8, start_seconds=20.0, target_seconds=60.0), (10.0 * 6 + 20.0) / 2),
        (Load(2, 1, 1, service=10.0, startable=8, start_seconds=20.0, target_seconds=0.0), 20.0),
        (Load(9, 0, 0, ((1, 5.0),), service=10.0, startable=8, start_seconds=20.0, target_seconds=60.0), (10.0 * 8 + 25.0) / 2),
    ],
)  # fmt: skip
def test_slots_that_may_be_ordered_count_as_the_operator_will_order_them(load: Load, seconds: float) -> None:
    assert load.wait == seconds


@settings(max_examples=300)
@given(loads)
def test_of_the_slots_that_may_be_ordered_the_least_count_with_which_the_job_starts_in_time(load: Load) -> None:
    def ordered(slots: int) -> float:
        return replace(load, coming=(*load.coming, (slots, load.start_seconds)) if slots else load.coming, startable=0).wait

    within = max(load.start_seconds, load.target_seconds)
    enough = next((slots for slots in range(load.startable) if ordered(slots) <= within), load.startable)
    # On the boundary a rounding may call for one more.
    assert any(
        load.wait == pytest.approx(ordered(slots)) for slots in (enough - 1, enough, enough + 1) if 0 <= slots <= load.startable
    )
    assert load.wait <= max(within, ordered(load.startable)) * (1 + 1e-9)


@settings(max_examples=200)
@given(existing)
def test_neither_more_slots_nor_sooner_ones_make_a_job_wait_longer(load: Load) -> None:
    wait = load.wait * (1 + 1e-9) + 1e-9
    assert replace(load, ready=load.ready + 1).wait <= wait
    assert replace(load, coming=(*load.coming, (1, 300.0))).wait <= wait
    assert replace(load, coming=tuple((n, at / 2) for n, at in load.coming)).wait <= wait


@pytest.mark.parametrize(
    ("accelerated", "plain"),
    [
        (Load(0, 0, 0), Load(0, 0, 4)),
        (Load(0, 1, 1), Load(0, 0, 4)),
        (Load(0, 0, 0, service=10.0), Load(0, 0, 4, service=90.0)),
        (Load(4, 1, 1, service=10.0), Load(0, 0, 4, service=90.0)),
    ],
    ids=["unknown, from zero", "unknown, all busy", "known, from zero", "known, a queue that is too long for one"],
)
def test_a_job_waits_for_an_accelerator_that_is_5_s_away_and_spills_when_it_is_5_min_away(accelerated: Load, plain: Load) -> None:
    reasons = [place(TWO, (replace(accelerated, coming=((8, away),)), plain), limit=None).reason for away in (5.0, 300.0)]
    unknown, known = [Reason.SLOT_STARTING, Reason.SLOT_TOO_FAR], [Reason.WORTH_THE_WAIT, Reason.WAIT_TOO_LONG]
    assert reasons == (unknown if accelerated.service is None else known)


def test_while_service_times_are_unknown_the_first_slot_that_comes_may_be_so_much_later_than_a_plain_one() -> None:
    patience = PATIENCE_SECONDS

    def reason(fast: Load, slow: Load) -> Reason:
        return place(TWO, (fast, slow), limit=None).reason

    assert patience >= START_SECONDS, "what is not known to take long is waited for"
    assert reason(Load(0, 0, 0, ((1, patience),)), IDLE) is Reason.SLOT_STARTING
    assert reason(Load(0, 0, 0, ((1, patience + 1),)), IDLE) is Reason.SLOT_TOO_FAR
    assert reason(Load(0, 1, 1, ((1, patience + 1), (9, patience + 2))), IDLE) is Reason.SLOT_TOO_FAR
    assert reason(Load(0, 0, 0, ((1, patience + 60),)), Load(0, 0, 0, ((1, 60.0),))) is Reason.SLOT_STARTING
    assert reason(Load(0, 0, 0, ((1, 9_999.0),)), Load(0, 0, 0)) is Reason.SLOT_STARTING, "the plain tier has nothing at all"


def test_a_deadline_is_held_against_when_the_slots_are_ready() -> None:
    only = preselect(MIXED, Request("t", "required"))
    seen = (Load(0, 0, 0, ((1, 100.0),)), Load(2, 0, 0, ((2, 40.0), (1, 90.0)), service=60.0))
    assert place(only, seen, limit=90.0) == Verdict(1, Reason.REQUIRED, 70.0)
    assert place(only, seen, limit=69.0) == Verdict(1, Reason.OVERLOADED, 70.0)


def test_a_load_has_the_slots_that_presence_cannot_show_as_they_are_at_the_present_time() -> None:
    on_its_way = (StartingSlots(2, Milliseconds(1_500)), StartingSlots(1, Milliseconds(9_250)))
    capacity, bare = TierCapacity(on_its_way, 4, 10.5, 60.0, 9), Load(1, 2, 3, leased=4, service=5.0)
    assert bare.having(capacity, Milliseconds(2_000)) == Load(1, 2, 3, ((2, 0.0), (1, 7.25)), 4, 5.0, 4, 10.5, 60.0)
    assert bare.having(capacity, Milliseconds(2_001)).coming == ((2, 0.0), (1, 7.249))
    assert bare.having(TierCapacity(), Milliseconds(0)) == bare
    assert (bare.slots, bare.next_slot) == (3, inf)
    assert replace(bare, startable=4, start_seconds=10.5).next_slot == 10.5
    assert replace(bare, coming=((2, 1.0),), startable=4, start_seconds=10.5).next_slot == 1.0
    assert replace(bare, coming=((2, 1.0),), startable=4).slots == 9


def test_the_jobs_ahead_count_as_those_of_the_tier_and_where_that_is_unknown_as_those_of_the_task() -> None:
    held = Load(4, 1, 1)
    assert [replace(held, service=service, mean=mean).wait for service, mean in ((9.0, 2.0), (9.0, None), (None, 2.0))] == [
        10,
        45,
        10,
    ]
    assert replace(held, service=9.0, mean=0.5, startable=1, start_seconds=1.0).wait == (0.5 * 4 + 1.0) / 2


def test_jobs_that_take_no_time_at_all_need_no_more_than_a_slot() -> None:
    assert Load(9, 0, 0, service=0.0, startable=2, start_seconds=5.0).wait == pytest.approx(5.0, abs=0.01)
    assert Load(9, 1, 1, service=0.0, startable=2).wait == pytest.approx(0.0, abs=0.01)


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_is_explained_with_its_tier_and_the_numbers(reason: Reason) -> None:
    bare = explain(reason, "gpu")
    assert re.fullmatch(r"gpu: [a-z].{20,}", bare)
    none = explain(reason, "gpu", Load(waiting=11, in_flight=22, ready=33, leased=5))
    assert none == f"{bare} (33 slots ready, 0 may still start, 22 in flight, 16 waiting)"
    some = explain(reason, "gpu", Load(11, 22, 33, ((4, 7.4), (20, 300.0)), leased=5, startable=20))
    assert some == f"{bare} (33 slots ready, 44 may still start, the first in 7 s, 22 in flight, 16 waiting)"


def test_every_reason_is_spelt_as_its_name() -> None:
    assert [reason.value for reason in Reason] == [reason.name.title().replace("_", "") for reason in Reason]


def test_no_two_reasons_have_the_same_words() -> None:
    assert len({explain(reason, "gpu") for reason in Reason}) == len(Reason)


def test_the_lua_twin_answers_with_the_reasons_of_the_rule() -> None:
    measured = {Reason.FREE_SLOT, Reason.SLOT_STARTING, Reason.WORTH_THE_WAIT, Reason.STARTS_SOONER, Reason.OVERLOADED}
    assert set(re.findall(r"'([A-Z][a-z]+(?:[A-Z][a-z]+)+|Overloaded)'", script("admit"))) == measured | SPILLS


ENTRY = Entry("t1", Message("head", "tail", 6), idempotency_key="upload-7")


def asked(question: Question, until: Milliseconds | None = None) -> tuple[Any, Any, list[str | bytes | int | float]]:
    given = admission.call(KEYS, question, until=until)
    assert given.keys == []
    pool, ask, *message = given.args
    return json.loads(str(pool)), json.loads(str(ask)), message


def test_the_script_is_asked_with_the_keys_of_every_candidate() -> None:
    pool, ask, message = asked(Question(TWO, Request("media.t", True, limit=9.5), ENTRY))
    assert [tier["name"] for tier in pool["tiers"]] == ["gpu", "cpu"]
    assert pool["wanted"] == pool["tiers"][0] == {
        "name": "gpu",
        "queue": "gpu-tasks",
        "lists": KEYS.queue_lists("gpu-tasks"),
        "unacked": KEYS.unacked("gpu"),
        "slots": KEYS.slots("gpu"),
        "waiting": KEYS.waiting("gpu"),
        "scheduled": KEYS.scheduled("gpu"),
        "leases": KEYS.leases("gpu"),
        "service": KEYS.service("gpu"),
        "served": KEYS.served("gpu"),
        "spilled": KEYS.spilled("gpu"),
        "assumed": SERVICE_SECONDS / ACCELERATION,
    }  # fmt: skip
    assert ask == {
        "id": "t1", "job": KEYS.job("t1"), "idempotent": KEYS.idempotent("upload-7"), "step": 3, "task": "media.t", "required": 0,
        "refuses": True, "limit": 9.5, "later": 0,
    }  # fmt: skip
    assert message == ["head", "tail"]
    assert (pool["capacity"], pool["routes"], pool["wake"]) == (KEYS.capacity, KEYS.routes, "prod-workerpool:wake")
    assert (pool["name"], pool["margin"], pool["accelerated"]) == ("ml/media", MARGIN, 1)
    assert "reason" not in pool


def test_a_question_without_a_job_writes_nothing() -> None:
    _, ask, message = asked(Question(TWO, Request("media.t", True)))
    assert ask == {"task": "media.t", "refuses": True}
    assert message == []


def test_the_script_knows_every_field_that_it_is_given() -> None:
    chosen = Candidates((GPU,), reason=Reason.REQUIRED)
    question = Question(chosen, Request("t", "required", limit=1.0), replace(ENTRY, wait=1.0), lease="l", wanted=GPU2)
    pool, ask, _ = asked(question, until=Milliseconds(1))
    assert set(re.findall(r"pool\.(\w+)", script("admit"))) == set(pool)
    assert set(re.findall(r"ask\.(\w+)", script("admit"))) == set(ask)


def test_the_answer_of_the_script_is_read_with_the_load_that_it_saw() -> None:
    reply = [77, "t1", "cpu", "celery", "NoCapacity", "0.5", 1, 2, 3, 5, 4, 30_125]
    seen = Load(1, 2, 3, ((4, 30.125),), 5)
    assert admission.parse(reply) == Admission("t1", "cpu", "celery", Reason.NO_CAPACITY, 0.5, seen, Milliseconds(77))


def test_an_earlier_answer_has_no_load_and_one_that_came_too_late_only_the_time() -> None:
    earlier = admission.parse([77, "t0", "gpu", "gpu-tasks", "FreeSlot", "inf"])
    assert isinstance(earlier, Admission)
    assert (earlier.task_id, earlier.load, earlier.wait) == ("t0", None, inf)
    assert admission.parse([77]) == 77


def test_a_wish_is_yes_no_or_required() -> None:
    assert get_args(Wish) == (True, False, "required")
