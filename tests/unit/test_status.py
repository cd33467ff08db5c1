"""The status: when conditions changed, which changes are events, and when it is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from workerpool_operator.status import (
    COMES_AND_GOES,
    HELD_SECONDS,
    LONGEST_MESSAGE,
    NUMBERS_EVERY_SECONDS,
    WARNS_WHEN,
    Condition,
    ConditionType,
    Event,
    Status,
    TierStatus,
    flips,
    rfc3339,
    stamp,
    summary,
    total,
    worth_writing,
)

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]

NOON, LATER = 1_767_268_800.0, 1_767_268_861.5


def condition(kind: ConditionType = ConditionType.READY, status: str = "True", reason: str = "Working", **more: Any) -> Condition:
    return Condition(kind, status, reason, more.pop("message", "all is well"), more.pop("generation", 3), **more)


def tier(**changes: Any) -> TierStatus:
    return replace(TierStatus("gpu", 3, 2, 1, 0, 0, 12, 2, 5, "BacklogExceedsCapacity", "12 waiting"), **changes)


def status(*conditions: Condition, tiers: tuple[TierStatus, ...] = (), **changes: Any) -> Status:
    return replace(Status(3, conditions, tiers or (tier(),), 12, 2, "gpu 2/3"), **changes)


def stored(*conditions: Condition, **more: Any) -> dict[str, Any]:
    """A status as it comes back from the API server."""
    dumped: dict[str, Any] = json.loads(json.dumps(status(*conditions, **more).dump()))
    return dumped


def test_what_was_stored_is_the_status_again() -> None:
    blind = tier(waiting=None, in_flight=None, spilled=None)
    written = status(*stamp([condition(), condition(ConditionType.PAUSED)], {}, NOON), tiers=(tier(), blind), waiting=None)
    assert Status.load(json.loads(json.dumps(written.dump()))) == written


def test_what_another_release_has_told_besides_is_left_out() -> None:
    newer = stored(condition())
    newer["conditions"].append({**newer["conditions"][0], "type": "Novel"})
    newer["tiers"][0]["novel"] = newer["novel"] = 1
    assert Status.load(newer) == Status.load(stored(condition()))


def test_where_nobody_has_told_there_is_no_status() -> None:
    assert Status.load({}) is None


def test_times_are_written_as_the_api_server_writes_them() -> None:
    assert (rfc3339(NOON), rfc3339(LATER)) == ("2026-01-01T12:00:00Z", "2026-01-01T12:01:01Z")


def test_a_new_condition_gets_the_time_of_now() -> None:
    assert stamp([condition()], {}, NOON) == (condition(last_transition_time="2026-01-01T12:00:00Z"),)


def test_a_transition_time_is_kept_until_the_status_changes() -> None:
    before = stored(*stamp([condition()], {}, NOON))
    same = stamp([condition(reason="Other", message="other", generation=4)], before, LATER)
    assert [c.last_transition_time for c in same] == [rfc3339(NOON)]
    changed = stamp([condition(status="False")], before, LATER)
    assert [c.last_transition_time for c in changed] == [rfc3339(LATER)]


def test_each_condition_keeps_its_own_time() -> None:
    before = stored(*stamp([condition()], {}, NOON))
    both = stamp([condition(ConditionType.SPILLING), condition()], before, LATER)
    assert {c.type: c.last_transition_time for c in both} == {"Spilling": rfc3339(LATER), "Ready": rfc3339(NOON)}


def test_a_stored_condition_without_a_time_gets_one() -> None:
    assert stamp([condition()], {"conditions": [{"type": "Ready", "status": "True"}]}, NOON)[0].last_transition_time == rfc3339(
        NOON
    )


def test_a_condition_flips_once_and_is_silent_while_it_stays() -> None:
    down = condition(status="False", reason="BrokerUnreadable", message="Redis is down")
    flipped = flips(status(down), stored(condition()))
    assert flipped == [Event(True, "BrokerUnreadable", "Redis is down")]
    assert flips(status(replace(down, message="still down", reason="Other")), stored(down)) == []
    assert flips(status(condition()), stored(down)) == [Event(False, "Working", "all is well")]


@pytest.mark.parametrize("kind", ConditionType)
@pytest.mark.parametrize("value", ["True", "False", "Unknown"])
def test_only_what_wants_attention_is_an_event_of_a_new_pool(kind: ConditionType, value: str) -> None:
    events = flips(status(condition(kind, value)), {})
    assert events == ([Event(True, "Working", "all is well")] if WARNS_WHEN.get(kind) == value else [])


@pytest.mark.parametrize(
    ("kind", "value"),
    [("Ready", "False"), ("BrokerReachable", "False"), ("CapacityAvailable", "False"), ("QueueShared", "True")],
)
def test_what_is_wrong_with_a_pool_is_a_warning(kind: str, value: str) -> None:
    healthy = {"True": "False", "False": "True"}[value]
    here = ConditionType(kind)
    assert [event.warning for event in flips(status(condition(here, value)), stored(condition(here, healthy)))] == [True]
    assert [event.warning for event in flips(status(condition(here, healthy)), stored(condition(here, value)))] == [False]


def test_what_a_pool_does_as_told_is_no_warning() -> None:
    here = ConditionType.PAUSED
    for value, other in (("True", "False"), ("False", "True")):
        assert [event.warning for event in flips(status(condition(here, value)), stored(condition(here, other)))] == [False]


@pytest.mark.parametrize("kind", sorted(COMES_AND_GOES))
def test_what_comes_and_goes_holds_for_a_minute_and_is_no_event(kind: ConditionType) -> None:
    began = condition(kind, "True", reason="Began", message="3 jobs")
    before = stored(*stamp([began], stored(condition(kind, "False")), NOON))
    assert flips(status(began), stored(condition(kind, "False"))) == []
    (held,) = stamp([condition(kind, "False")], before, NOON + HELD_SECONDS - 1)
    assert held == replace(began, last_transition_time=rfc3339(NOON))
    (over,) = stamp([condition(kind, "False")], before, NOON + HELD_SECONDS)
    assert (over.status, over.last_transition_time) == ("False", rfc3339(NOON + HELD_SECONDS))
    (unread,) = stamp([condition(kind, "Unknown")], before, NOON + 1)
    assert unread.status == "Unknown"


def test_a_status_that_is_stored_already_is_not_written() -> None:
    assert not worth_writing(status(condition()), stored(condition()), since_last=3600.0)


def test_a_first_status_is_written_at_once() -> None:
    assert worth_writing(status(), {}, since_last=0.0)


NUMBERS_ONLY = {
    "the queue": status(condition(), tiers=(tier(waiting=13, message="13 waiting"),), waiting=13),
    "what runs": status(condition(), tiers=(tier(in_flight=3),), in_flight=3),
    "what spilled": status(condition(), tiers=(tier(spilled=6),)),
    "the words of a condition": status(condition(message="one more job")),
}
MORE_THAN_NUMBERS = {
    "a condition": status(condition(status="False")),
    "the reason of a condition": status(condition(reason="Other")),
    "the time of a condition": status(condition(last_transition_time="2026-01-01T12:00:00Z")),
    "a new condition": status(condition(), condition(ConditionType.SPILLING)),
    "the wanted replicas": status(condition(), tiers=(tier(desired=4),)),
    "the ready replicas": status(condition(), tiers=(tier(ready=3),)),
    "the starting replicas": status(condition(), tiers=(tier(starting=2),)),
    "the unschedulable replicas": status(condition(), tiers=(tier(unschedulable=1),)),
    "the draining replicas": status(condition(), tiers=(tier(draining=1),)),
    "the reason of a tier": status(condition(), tiers=(tier(reason="AtMaximum"),)),
    "a new tier": status(condition(), tiers=(tier(), tier(name="cpu"))),
    "the generation": status(condition(), observed_generation=4),
    "the summary of replicas": status(condition(), replicas="gpu 3/3"),
}


@pytest.mark.parametrize("changed", NUMBERS_ONLY)
def test_a_change_of_numbers_alone_waits_for_ten_seconds(changed: str) -> None:
    assert NUMBERS_EVERY_SECONDS == 10
    assert not worth_writing(NUMBERS_ONLY[changed], stored(condition()), since_last=9.9)
    assert worth_writing(NUMBERS_ONLY[changed], stored(condition()), since_last=10.0)


@pytest.mark.parametrize("changed", MORE_THAN_NUMBERS)
def test_any_other_change_is_written_at_once(changed: str) -> None:
    assert worth_writing(MORE_THAN_NUMBERS[changed], stored(condition()), since_last=0.0)


def test_a_status_is_stored_in_the_spelling_of_kubernetes_and_without_what_is_unknown() -> None:
    blind = status(condition(last_transition_time="t"), tiers=(tier(waiting=None, in_flight=None, spilled=None),), waiting=None)
    assert blind.dump() == {
        "observedGeneration": 3,
        "conditions": [
            {
                "type": "Ready",
                "status": "True",
                "reason": "Working",
                "message": "all is well",
                "observedGeneration": 3,
                "lastTransitionTime": "t",
            }
        ],
        "tiers": [
            {
                "name": "gpu",
                "desired": 3,
                "ready": 2,
                "starting": 1,
                "unschedulable": 0,
                "draining": 0,
                "reason": "BacklogExceedsCapacity",
                "message": "12 waiting",
            }
        ],
        "inFlight": 2,
        "replicas": "gpu 2/3",
    }


def test_a_zero_is_stored_because_it_is_known() -> None:
    assert status(waiting=0).dump()["waiting"] == 0


def test_a_sum_with_an_unknown_part_is_unknown() -> None:
    assert [total([]), total([0, 3]), total([3, None]), total([None])] == [0, 3, None, None]


def test_replicas_are_summed_up_as_ready_of_desired_in_order_of_preference() -> None:
    assert summary([tier(), tier(name="cpu", ready=3)]) == "gpu 2/3, cpu 3/3"
    assert summary([]) == ""


def test_a_message_that_the_api_server_would_refuse_is_cut() -> None:
    (long,) = stamp([condition(message="x" * (LONGEST_MESSAGE + 1))], {}, NOON)
    assert len(long.message) == LONGEST_MESSAGE
    schema = yaml.safe_load((ROOT / "crds" / "workerpool.yaml").read_text())["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    message = schema["properties"]["status"]["properties"]["conditions"]["items"]["properties"]["message"]
    assert message["maxLength"] == LONGEST_MESSAGE
