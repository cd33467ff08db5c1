"""The routing rule: what is decided without measuring, what by measuring, and in which words."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workerpool_routing import admission
from workerpool_routing.admission import Admission, Entry
from workerpool_routing.decide import MARGIN, SPILLS, Choice, Load, Reason, Request, explain, gains, place, preselect
from workerpool_routing.ledger import script
from workerpool_routing.wire import Keyspace, Policy, TierPolicy, Wish

pytestmark = pytest.mark.unit

GPU, GPU2 = TierPolicy("gpu", "gpu-tasks", True), TierPolicy("gpu2", "gpu2-tasks", True)
CPU, CPU2 = TierPolicy("cpu", "celery", False), TierPolicy("cpu2", "cpu2-tasks", False)
MIXED = Policy((GPU, GPU2, CPU, CPU2))
KEYS = Keyspace("ml/media", "prod-")


@pytest.mark.parametrize(
    ("wish", "content_type", "tier", "reason"),
    [
        (False, None, CPU, Reason.NOT_REQUESTED),
        (False, "audio", CPU, Reason.NOT_REQUESTED),
        (True, "text", CPU, Reason.CONTENT_TYPE_GAINS_NOTHING),
        (True, "", CPU, Reason.CONTENT_TYPE_GAINS_NOTHING),
        ("required", None, GPU, Reason.REQUIRED),
        ("required", "audio", GPU, Reason.REQUIRED),
        ("required", "text", GPU, Reason.REQUIRED),
    ],
)
def test_what_needs_no_measurement_is_chosen_at_once(
    wish: Wish, content_type: str | None, tier: TierPolicy, reason: Reason
) -> None:
    assert preselect(MIXED, Request("t", wish, content_type)) == Choice(tier, reason, tier)


@pytest.mark.parametrize("content_type", [None, "audio", "video", "image"])
def test_a_job_that_gains_from_an_accelerator_is_left_to_the_measurement(content_type: str | None) -> None:
    assert preselect(MIXED, Request("t", True, content_type)) == (GPU, CPU)


@pytest.mark.parametrize("only", [(CPU,), (CPU2, CPU), (GPU,), (GPU2, GPU)])
@pytest.mark.parametrize("wish", [True, False, "required"])
def test_where_all_tiers_are_of_one_kind_the_first_takes_every_job(only: tuple[TierPolicy, ...], wish: Wish) -> None:
    assert preselect(Policy(only), Request("t", wish, "text")) == Choice(only[0], Reason.ONLY_TIER, only[0])


tiers = st.lists(st.sampled_from([GPU, GPU2, CPU, CPU2]), min_size=1, unique=True).map(tuple)
content_types = st.none() | st.sampled_from(["audio", "audio/mpeg", "text", "text/plain", ""]) | st.text(max_size=10)
requests = st.builds(Request, st.just("t"), st.sampled_from([True, False, "required"]), content_types)


@settings(max_examples=100)
@given(tiers, requests)
def test_a_required_job_never_goes_to_a_plain_tier_of_a_pool_that_has_another(
    tiers: tuple[TierPolicy, ...], request: Request
) -> None:
    chosen = preselect(Policy(tiers), request)
    if request.accelerated == "required" and any(tier.accelerated for tier in tiers):
        assert isinstance(chosen, Choice)
        assert chosen.tier.accelerated


@settings(max_examples=100)
@given(tiers, requests)
def test_a_choice_is_a_tier_of_the_pool_and_an_open_one_is_between_the_two_kinds(
    tiers: tuple[TierPolicy, ...], request: Request
) -> None:
    chosen = preselect(Policy(tiers), request)
    if isinstance(chosen, Choice):
        assert chosen.tier in tiers
        assert chosen.wanted == chosen.tier, "what was not measured was not spilled"
    else:
        assert request.accelerated is True
        assert [tier.accelerated for tier in chosen] == [True, False]


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
    ("accelerated", "plain_waiting", "reason"),
    [
        pytest.param(Load(0, 0, 1, 0), 0, Reason.FREE_SLOT, id="one idle worker"),
        pytest.param(Load(1, 1, 3, 0), 0, Reason.FREE_SLOT, id="a slot is left after those that wait"),
        pytest.param(Load(0, 1, 1, 0), 0, Reason.NO_CAPACITY, id="busy and nothing can start"),
        pytest.param(Load(1, 0, 1, 0), 0, Reason.NO_CAPACITY, id="the free slot has its job already"),
        pytest.param(Load(0, 0, 0, 0), 0, Reason.NO_CAPACITY, id="no worker and none can start"),
        pytest.param(Load(0, 0, 0, 1), 0, Reason.SLOT_STARTING, id="from zero"),
        pytest.param(Load(0, 1, 1, 1), 0, Reason.SLOT_STARTING, id="busy, another may start"),
        pytest.param(Load(5, 1, 1, 8), 0, Reason.SLOT_STARTING, id="five jobs longer"),
        pytest.param(Load(6, 1, 1, 8), 0, Reason.QUEUE_TOO_LONG, id="six jobs longer"),
        pytest.param(Load(6, 1, 1, 8), 1, Reason.SLOT_STARTING, id="the plain queue is as long"),
        pytest.param(Load(20, 0, 30, 0), 0, Reason.FREE_SLOT, id="a long queue that is taken in a moment"),
        pytest.param(Load(50, 1, 1, 0), 0, Reason.NO_CAPACITY, id="a long queue is not the first thing that is wrong"),
    ],
)
def test_the_measured_tiers_decide(accelerated: Load, plain_waiting: int, reason: Reason) -> None:
    assert place(accelerated, Load(plain_waiting, 9, 9, 9)) is reason


counts = st.integers(0, 30)
loads = st.builds(Load, counts, counts, counts, counts)


@settings(max_examples=200)
@given(loads, loads)
def test_an_accelerated_tier_takes_a_job_only_when_it_has_a_slot_or_may_get_one(accelerated: Load, plain: Load) -> None:
    reason = place(accelerated, plain)
    assert reason in SPILLS | {Reason.FREE_SLOT, Reason.SLOT_STARTING}
    free = accelerated.ready > accelerated.in_flight + accelerated.waiting
    assert (reason is Reason.FREE_SLOT) == free
    if reason is Reason.SLOT_STARTING:
        assert accelerated.coming > 0
        assert accelerated.waiting - plain.waiting <= MARGIN
    if reason in SPILLS:
        assert accelerated.coming == 0 or accelerated.waiting - plain.waiting > MARGIN


@settings(max_examples=100)
@given(loads, loads)
def test_more_slots_never_turn_a_job_away(accelerated: Load, plain: Load) -> None:
    if place(accelerated, plain) not in SPILLS:
        more = Load(accelerated.waiting, accelerated.in_flight, accelerated.ready + 1, accelerated.coming + 1)
        assert place(more, plain) not in SPILLS


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_is_explained_with_its_tier_and_the_numbers(reason: Reason) -> None:
    bare = explain(reason, "gpu")
    assert re.fullmatch(r"gpu: [a-z].{20,}", bare)
    measured = explain(reason, "gpu", Load(waiting=11, in_flight=22, ready=33, coming=44), Load(55, 66, 77, 88))
    assert measured == f"{bare} (33 slots ready, 44 may still start, 22 in flight, 11 waiting; 55 waiting on the plain tier)"


def test_every_reason_is_spelt_as_its_name() -> None:
    assert [reason.value for reason in Reason] == [reason.name.title().replace("_", "") for reason in Reason]


def test_no_two_reasons_have_the_same_words() -> None:
    assert len({explain(reason, "gpu") for reason in Reason}) == len(Reason)


def test_the_lua_twin_answers_with_the_reasons_of_the_rule() -> None:
    answers = set(re.findall(r"return [12], '(\w+)'", script("admit")))
    assert answers == {Reason.FREE_SLOT, Reason.SLOT_STARTING, *SPILLS}


def test_an_open_choice_is_asked_with_the_keys_of_both_tiers() -> None:
    asked = json.loads(admission.argument(KEYS, (GPU, CPU), Entry("t1", "media.t", required=False)))
    assert [tier["name"] for tier in asked["tiers"]] == ["gpu", "cpu"]
    assert asked["wanted"] == asked["tiers"][0] == {
        "name": "gpu",
        "lists": KEYS.queue_lists("gpu-tasks"),
        "unacked": KEYS.unacked("gpu"),
        "slots": KEYS.slots("gpu"),
        "spilled": KEYS.spilled("gpu"),
        "waiting": KEYS.waiting("gpu"),
        "scheduled": KEYS.scheduled("gpu"),
    }  # fmt: skip
    assert asked["job"] == {"key": KEYS.job("t1"), "id": "t1", "task": "media.t", "required": 0}
    assert (asked["capacity"], asked["routes"], asked["wake"]) == (KEYS.capacity, KEYS.routes, "prod-workerpool:wake")
    assert (asked["pool"], asked["margin"]) == ("ml/media", MARGIN)
    assert "choice" not in asked


def test_a_choice_that_was_made_is_only_written_down() -> None:
    asked = json.loads(admission.argument(KEYS, Choice(GPU, Reason.REQUIRED, GPU), Entry("t1", "media.t", required=True)))
    assert [tier["name"] for tier in asked["tiers"]] == ["gpu"]
    assert (asked["wanted"]["name"], asked["choice"], asked["job"]["required"]) == ("gpu", "Required", 1)


def test_a_question_without_a_job_writes_nothing() -> None:
    assert "job" not in json.loads(admission.argument(KEYS, (GPU, CPU), None))


def test_the_script_knows_every_field_that_it_is_given() -> None:
    asked = json.loads(admission.argument(KEYS, Choice(GPU, Reason.REQUIRED, GPU), Entry("t1", "media.t", required=True)))
    used = set(re.findall(r"request\.(\w+)", script("admit")))
    assert used == set(asked)
    assert set(re.findall(r"job\.(\w+)", script("admit"))) == set(asked["job"])


@pytest.mark.parametrize(
    ("index", "reason", "tier"),
    [(1, Reason.FREE_SLOT, GPU), (1, Reason.SLOT_STARTING, GPU), (2, Reason.NO_CAPACITY, CPU), (2, Reason.QUEUE_TOO_LONG, CPU)],
)
@pytest.mark.parametrize("encode", [str, str.encode])
def test_the_answer_of_the_script_is_read_with_the_loads_that_it_saw(
    index: int, reason: Reason, tier: TierPolicy, encode: type[str]
) -> None:
    reply = [index, encode(reason.value), 1, 2, 3, 4, 5, 6, 7, 8]
    expected = Admission(Choice(tier, reason, GPU), Load(1, 2, 3, 4), Load(5, 6, 7, 8))
    assert admission.parse((GPU, CPU), reply) == expected


def test_the_answer_for_a_choice_that_was_made_has_no_loads() -> None:
    chosen = Choice(CPU, Reason.NOT_REQUESTED, CPU)
    assert admission.parse(chosen, [1, "NotRequested"]) == Admission(chosen)
