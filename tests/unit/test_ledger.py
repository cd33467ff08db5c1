"""The ledger's rules: what follows a failure and a loss, and what each script is given."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib.resources import files
from itertools import product
from typing import Any

import pytest

from workerpool_routing import ledger
from workerpool_routing.decide import Reason
from workerpool_routing.ledger import Claim, CorruptEntry, Job, Move, Run, State, after_failure, after_loss
from workerpool_routing.wire import (
    ENDED_JOB_LIFE_SECONDS,
    HEADER,
    JOB_LIFE_SECONDS,
    Keyspace,
    Milliseconds,
    Policy,
    TierPolicy,
    VersionMismatch,
    wake_channel,
)

pytestmark = pytest.mark.unit

GPU, CPU = TierPolicy("gpu", "gpu-tasks", True), TierPolicy("cpu", "celery", False)
POLICY = Policy((GPU, CPU))
KEYS = Keyspace("ml/media", "prod-")
JOB = Job("t1", "media.t", State.CLAIMED, 1, "gpu", "gpu", False, Reason.FREE_SLOT, owner="w.1", tag="tag")

EVERY_CASE = list(product(["gpu", "cpu"], [False, True], [False, True], [False, True], [1, 2]))
cases = pytest.mark.parametrize(("tier", "required", "on_failure", "on_loss", "attempt"), EVERY_CASE)


def case(tier: str, required: bool, on_failure: bool, on_loss: bool, attempt: int) -> tuple[Policy, Job]:
    policy = replace(POLICY, fallback_on_failure=on_failure, fallback_on_loss=on_loss)
    return policy, replace(JOB, tier=tier, required=required, attempt=attempt)


@cases
def test_a_failure_is_final_unless_an_accelerated_job_may_fall_back(
    tier: str, required: bool, on_failure: bool, on_loss: bool, attempt: int
) -> None:
    falls_back = tier == "gpu" and not required and on_failure
    expected = Move(CPU, attempt + 1, Reason.ATTEMPT_FAILED) if falls_back else None
    assert after_failure(*case(tier, required, on_failure, on_loss, attempt)) == expected


@cases
def test_a_loss_falls_back_or_runs_the_same_attempt_again_on_its_own_tier(
    tier: str, required: bool, on_failure: bool, on_loss: bool, attempt: int
) -> None:
    falls_back = tier == "gpu" and not required and on_loss
    own = GPU if tier == "gpu" else CPU
    expected = Move(CPU, attempt + 1, Reason.ATTEMPT_LOST) if falls_back else Move(own, attempt, Reason.ATTEMPT_LOST)
    assert after_loss(*case(tier, required, on_failure, on_loss, attempt)) == expected


def test_a_job_falls_back_once() -> None:
    moved = after_failure(POLICY, JOB)
    assert moved
    assert after_failure(POLICY, replace(JOB, tier=moved.tier.name, attempt=moved.attempt)) is None


def test_without_a_plain_tier_a_failure_is_final_and_a_loss_stays() -> None:
    only_gpu = Policy((GPU,))
    assert after_failure(only_gpu, JOB) is None
    assert after_loss(only_gpu, JOB) == Move(GPU, 1, Reason.ATTEMPT_LOST)


def test_a_job_of_a_tier_that_is_gone_has_nowhere_to_go() -> None:
    assert after_failure(POLICY, replace(JOB, tier="old")) is None
    assert after_loss(POLICY, replace(JOB, tier="old")) is None
    assert after_loss(Policy(()), JOB) is None


def test_exactly_the_last_three_states_are_the_end() -> None:
    assert {state for state in State if state.ended} == {State.DONE, State.FAILED, State.EXPIRED}


STORED = {
    "version": "1",
    "state": "claimed",
    "attempt": "2",
    "task": "media.t",
    "tier": "cpu",
    "wanted": "gpu",
    "required": "1",
    "reason": "AttemptLost",
    "owner": "w.1",
    "tag": "abc",
    "losses": "1",
    "starts:gpu": "1",
    "starts:cpu": "2",
    "admitted_at": "1000",
    "claimed_at": "2000",
}


def test_an_entry_is_read_in_full() -> None:
    assert Job.load("t1", STORED) == Job(
        task_id="t1",
        task="media.t",
        state=State.CLAIMED,
        attempt=2,
        tier="cpu",
        wanted="gpu",
        required=True,
        reason=Reason.ATTEMPT_LOST,
        owner="w.1",
        tag="abc",
        losses=1,
        starts={"gpu": 1, "cpu": 2},
        times={State.ADMITTED: Milliseconds(1000), State.CLAIMED: Milliseconds(2000)},
    )


def test_an_entry_that_nobody_claimed_has_no_owner_and_no_starts() -> None:
    fresh = {name: STORED[name] for name in ("version", "state", "attempt", "task", "tier", "wanted", "reason")} | {
        "required": "0"
    }
    job = Job.load("t1", fresh)
    assert job
    assert (job.owner, job.tag, job.losses, job.starts, job.times, job.required) == ("", "", 0, {}, {}, False)


@pytest.mark.parametrize("stored", [{}, {"version": "1"}, {"state": ""}, {"starts:gpu": "1"}])
def test_what_is_no_entry_is_no_job(stored: dict[str, str]) -> None:
    assert Job.load("t1", stored) is None


@pytest.mark.parametrize("version", ["2", "0", None])
def test_an_entry_of_another_version_is_refused_by_name(version: str | None) -> None:
    stored = {name: value for name, value in STORED.items() if name != "version"} | ({"version": version} if version else {})
    with pytest.raises(VersionMismatch, match=f"job t1 has schema version {version}, this side knows 1"):
        Job.load("t1", stored)


def claimed(**changes: Any) -> ledger.Call:
    defaults: dict[str, Any] = {
        "attempt": 2, "tag": "tag", "owner": "w.1", "tier": "gpu", "retries": 3, "moves_on": True, "no_result": False,
        "name": "c1",
    }  # fmt: skip
    return ledger.claim(KEYS, "t1", **defaults | changes)


def test_a_claim_gives_the_script_its_arguments_in_order() -> None:
    call = claimed()
    assert call.keys == [KEYS.job("t1"), KEYS.held("w.1"), KEYS.waiting("gpu"), KEYS.unacked("gpu"), KEYS.waits("gpu")]
    within = [ledger.AS_EXPECTED_SECONDS, ledger.AS_EXPECTED_PART]
    assert call.args == ["t1", 2, "tag", "w.1", "gpu", 3, ledger.LOSSES_ALLOWED, JOB_LIFE_SECONDS, 1, 0, "c1", 0, "", *within]
    assert claimed(moves_on=False, no_result=True, scheduled=True, asked_by="old").args[-7:] == [0, 1, "c1", 1, "old", *within]


def test_a_job_that_cannot_move_on_survives_one_loss_and_not_two() -> None:
    assert ledger.LOSSES_ALLOWED == 1


@pytest.mark.parametrize("after", State)
def test_an_entry_lives_longer_while_its_job_can_still_change(after: State) -> None:
    call = ledger.settle(KEYS, POLICY, "t1", attempt=2, tag="tag", owner="w.1", tier="gpu", before=State.CLAIMED, after=after)
    ended = after in (State.DONE, State.FAILED, State.EXPIRED)
    life = ENDED_JOB_LIFE_SECONDS if ended else JOB_LIFE_SECONDS
    assert call.args == ["t1", 2, "tag", "w.1", "claimed", after, life, JOB_LIFE_SECONDS, "", "", ""]
    assert ENDED_JOB_LIFE_SECONDS < JOB_LIFE_SECONDS


def test_a_result_names_its_database_where_that_is_not_the_ledgers() -> None:
    def args(result: ledger.Result) -> list[Any]:
        call = ledger.settle(
            KEYS, POLICY, "t1", attempt=1, tag="t", owner="w.1", tier="gpu", before=State.CLAIMED, after=State.DONE, result=result
        )
        return list(call.args[-4:])

    assert args(ledger.Result("key", "value", 60)) == ["key", "value", 60, ""]
    assert args(ledger.Result("key", "value", 60, 0)) == ["key", "value", 60, 0]


def test_a_settled_job_is_struck_from_the_spills_of_every_tier() -> None:
    call = ledger.settle(
        KEYS, POLICY, "t1", attempt=1, tag="tag", owner="w.1", tier="gpu", before=State.CLAIMED, after=State.DONE
    )
    assert call.keys == [
        KEYS.job("t1"), KEYS.held("w.1"), KEYS.waiting("gpu"), KEYS.unacked("gpu"), KEYS.unacked_index("gpu"),
        KEYS.service("gpu"), KEYS.served("gpu"), KEYS.attempts("gpu"), KEYS.checkpoint("gpu"), KEYS.outlier("w.1"),
        KEYS.spilled("gpu"), KEYS.spilled("cpu"),
    ]  # fmt: skip


RAW = json.dumps(
    [
        {
            "body": "b64",
            "headers": {"id": "t1", HEADER: {"attempt": 1}},
            "properties": {
                "delivery_tag": "held",
                "priority": 6,
                "delivery_info": {"exchange": "", "routing_key": "gpu-tasks"},
            },
        },
        "",
        "gpu-tasks",
    ]
)


def moved(to: Move) -> ledger.Call:
    return ledger.move(KEYS, JOB, to, held_as="held", raw=RAW, delivery_tag="fresh", how="lost", error="why")


def test_a_move_takes_the_message_from_the_tier_that_held_it_to_the_queue_of_the_next() -> None:
    call = moved(Move(CPU, 2, Reason.ATTEMPT_LOST))
    assert call.keys == [
        KEYS.job("t1"),
        KEYS.held("w.1"),
        KEYS.unacked("gpu"),
        KEYS.unacked_index("gpu"),
        KEYS.queue_list("celery", 6),
        KEYS.routes,
        KEYS.waiting("cpu"),
        KEYS.attempts("gpu"),
        KEYS.checkpoint("gpu"),
        KEYS.served("gpu"),
        KEYS.outlier("w.1"),
    ]
    *before, message, channel, pool, life, queue, how, error = call.args
    assert (queue, how, error) == ("celery", "lost", "why")
    assert before == ["t1", 1, "tag", "held", 2, "cpu", "AttemptLost", 0]
    assert (channel, pool, life) == (wake_channel("prod-"), "ml/media", JOB_LIFE_SECONDS)
    renewed = json.loads(str(message))
    assert renewed["properties"]["delivery_tag"] == "fresh"
    assert renewed["properties"]["delivery_info"]["routing_key"] == "celery"
    assert renewed["headers"] == {"id": "t1", HEADER: {"attempt": 2}}
    assert renewed["body"] == "b64"


def test_a_move_on_the_same_tier_says_so_because_it_counts_as_a_loss() -> None:
    call = moved(Move(GPU, 1, Reason.ATTEMPT_LOST))
    assert call.keys[4] == KEYS.queue_list("gpu-tasks", 6)
    assert call.args[4:8] == [1, "gpu", "AttemptLost", 1]


def test_a_worker_that_leaves_is_struck_from_presence_slots_and_claims() -> None:
    call = ledger.leave(KEYS, "gpu", "w.1")
    of_tier = [KEYS.presence("gpu"), KEYS.slots("gpu"), KEYS.held("w.1"), KEYS.scheduled("gpu")]
    assert (call.keys, call.args) == ([*of_tier, KEYS.outlier("w.1")], ["w.1"])


def test_a_deadline_is_for_the_first_start() -> None:
    message, *rest = json.loads(RAW)
    due = json.dumps([{**message, "headers": {**message["headers"], "expires": "2026-01-01T00:00:00+00:00"}}, *rest])
    again = ledger.move(KEYS, JOB, Move(CPU, 2, Reason.ATTEMPT_LOST), held_as="held", raw=due, delivery_tag="fresh", how="lost")
    assert "expires" not in json.loads(str(again.args[8]))["headers"]
    unclaimed = ledger.requeue(KEYS, "gpu", tag="held", raw=due, delivery_tag="fresh")
    assert json.loads(str(unclaimed.args[1]))["headers"]["expires"] == "2026-01-01T00:00:00+00:00"


def test_a_message_whose_headers_hold_words_is_put_back_all_the_same() -> None:
    message, *rest = json.loads(RAW)
    worded = {**message, "headers": {**message["headers"], "workerpool": "required", "retries": "x"}}
    call = ledger.requeue(KEYS, "gpu", tag="a", raw=json.dumps([worded, *rest]), delivery_tag="fresh")
    assert json.loads(str(call.args[1]))["headers"]["workerpool"] == "required"
    assert call.args[4:] == ["", "gpu", 0, 0]


def test_what_the_code_has_asked_for_is_told_from_what_it_has_rejected() -> None:
    asked: dict[str, Any] = {"attempt": 2, "tag": "tag", "owner": "w.1", "tier": "gpu"}
    retry = ledger.readmit(KEYS, "t1", **asked, how="retry", retries=1, message="m", queue="gpu-tasks", later=9)
    rejected = ledger.readmit(KEYS, "t1", **asked, how="rejected")
    assert retry.keys == rejected.keys == [KEYS.job("t1"), KEYS.held("w.1"), KEYS.waiting("gpu")]
    assert retry.args == ["t1", 2, "tag", "w.1", JOB_LIFE_SECONDS, "retry", 1, "m", "gpu-tasks", 9]
    assert rejected.args == ["t1", 2, "tag", "w.1", JOB_LIFE_SECONDS, "rejected", "", "", "", 0]


def test_the_claim_script_answers_in_the_words_of_the_library() -> None:
    assert set(re.findall(r"return '(\w+)'", ledger.script("claim"))) == set(Claim)


def test_the_scripts_know_the_states_by_their_names() -> None:
    compared = {
        name for script in ("claim", "move", "readmit") for name in re.findall(r"state [~=]= '(\w+)'", ledger.script(script))
    }
    assert compared == set(State)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("claim", claimed()),
        ("move", moved(Move(CPU, 2, Reason.ATTEMPT_LOST))),
        ("leave", ledger.leave(KEYS, "gpu", "w.1")),
        ("hold", ledger.hold(KEYS, "gpu", tag="a", value="b")),
        ("requeue", ledger.requeue(KEYS, "gpu", tag="a", raw=RAW, delivery_tag="fresh")),
        ("republish", ledger.republish(KEYS, replace(JOB, message=json.dumps(json.loads(RAW)[0])), GPU, delivery_tag="fresh")),
        ("rebalance", ledger.rebalance(KEYS, JOB, GPU, CPU, raw=json.dumps(json.loads(RAW)[0]), delivery_tag="fresh")),
        ("aside", ledger.aside(KEYS, "gpu", "t1", tag="a", reason="b", message="c")),
        ("presence", ledger.report(KEYS, {"owner": "w.1", "tier": "gpu"}, ())),
        (
            "readmit",
            ledger.readmit(KEYS, "t1", attempt=1, tag="", owner="w", tier="gpu", how="retry", retries=1, message="m", queue="q"),
        ),
        (
            "settle",
            ledger.settle(
                KEYS,
                Policy(()),
                "t1",
                attempt=1,
                tag="",
                owner="w",
                tier="gpu",
                before=State.CLAIMED,
                after=State.DONE,
                result=ledger.Result("r", "{}", 60, 1),
            ),
        ),
    ],
)
def test_a_script_names_and_uses_exactly_the_keys_and_arguments_that_it_is_given(name: str, call: ledger.Call) -> None:
    text = ledger.script(name)
    for array, given in (("KEYS", call.keys), ("ARGV", call.args)):
        (names,) = re.findall(rf"local ([\w,\s]+) = unpack\({array}\)", text)
        named = re.split(r",\s+", names)
        assert len(named) == len(given)
        assert [name for name in named if len(re.findall(rf"\b{name}\b", re.sub("--.*", "", text))) < 2] == []


def test_no_script_does_what_takes_longer_the_more_messages_wait() -> None:
    scripts = list(files("workerpool_routing").joinpath("lua").iterdir())
    commands = {name for one in scripts for name in re.findall(r"redis\.call\(\s*'(\w+)'", one.read_text())}
    assert {"LLEN", "RPUSH"} <= commands
    assert commands.isdisjoint({"LINSERT", "LINDEX", "LPOS", "LSET", "LTRIM", "KEYS", "SCAN"})


@pytest.mark.parametrize(
    ("changes", "source", "target", "moves"),
    [
        ({}, GPU, CPU, True),
        ({"tier": "cpu"}, CPU, GPU, True),
        ({"required": True}, GPU, CPU, False),
        ({"tier": "cpu", "wanted": "cpu"}, CPU, GPU, False),
        ({"tier": "cpu"}, GPU, CPU, False),
        ({"state": State.CLAIMED}, GPU, CPU, False),
        ({"state": State.FINISHING}, GPU, CPU, False),
        ({"runs": (Run(1, "gpu", "w.1", Milliseconds(1)),)}, GPU, CPU, False),
        ({"tier": "cpu", "attempt": 2, "runs": (Run(1, "gpu", "w.1", Milliseconds(1)),)}, CPU, GPU, False),
    ],
    ids=[
        "away", "home", "required", "plain", "elsewhere", "claimed", "finishing", "started before", "fell back",
    ],
)  # fmt: skip
def test_a_waiting_job_may_leave_the_tier_that_it_asked_for_and_come_home(
    changes: dict[str, Any], source: TierPolicy, target: TierPolicy, moves: bool
) -> None:
    waiting = replace(JOB, state=State.ADMITTED, owner="", tag="")
    assert ledger.may_move(replace(waiting, **changes), source, target) is moves


def test_every_start_is_read_with_its_end_and_its_error() -> None:
    runs = {"runs": "2", "run:1": '{"attempt":1,"tier":"gpu","owner":"w.1","began":1,"ended":2,"how":"failed","error":"E()"}',
            "run:2": '{"attempt":2,"tier":"cpu","owner":"w.2","began":3}'}  # fmt: skip
    job = Job.load("t1", STORED | runs)
    assert job
    assert [(run.tier, run.how, run.error, run.ended) for run in job.runs] == [("gpu", "failed", "E()", 2), ("cpu", "", "", None)]


@pytest.mark.parametrize("garbage", [{"state": "nonsense"}, {"attempt": "x"}, {"reason": "Because"}, {"runs": "1", "run:1": "{"}])
def test_an_entry_that_no_release_wrote_is_corrupt(garbage: dict[str, str]) -> None:
    with pytest.raises(CorruptEntry, match="job t1 cannot be read"):
        Job.load("t1", STORED | garbage)


def test_a_job_that_its_task_keeps_where_it_is_does_not_move_on_after_a_loss() -> None:
    assert after_loss(POLICY, replace(JOB, stays=True)) == Move(GPU, 1, Reason.ATTEMPT_LOST)


def test_what_is_given_back_is_the_same_attempt_on_the_same_tier_and_no_loss() -> None:
    to = ledger.again(POLICY, JOB)
    assert to == Move(GPU, 1, Reason.FREE_SLOT)
    call = ledger.move(KEYS, JOB, to, held_as="held", raw=RAW, delivery_tag="fresh", how="given back", counts=False)
    assert call.args[4:8] == [1, "gpu", "FreeSlot", 0]
    assert ledger.again(Policy((CPU,)), JOB) is None
