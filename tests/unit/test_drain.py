"""Who leaves a tier that has too many workers, and when: never one that has not said that it is idle."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workerpool_operator import drain
from workerpool_operator.drain import EMPTY_WINDOW_SECONDS, OVERDUE_SECONDS, Drain, Mark, Memory
from workerpool_operator.observation import Phase, QueueReading, Replica, TierReplicas
from workerpool_routing.wire import PRESENCE_LIFE_MS, Milliseconds, Presence

pytestmark = pytest.mark.unit

READY = Phase.READY
LONG_AGO = 0.0
NOW = 10_000.0
TIME = Milliseconds(5_000_000)


def up(name: str, phase: Phase = READY, ordered_at: float = LONG_AGO) -> Replica:
    return Replica(name, phase, ordered_at, ready_at=ordered_at + 1)


def says(name: str, busy: int = 0, *, draining: bool = False, at: int = TIME, life: str = "1") -> Presence:
    slots = 0 if draining else 1
    return Presence(f"{name}.{life}", name, "gpu", "gpu-tasks", slots, busy, Milliseconds(0), Milliseconds(at), draining=draining)


def decide(
    wanted: int,
    replicas: Sequence[Replica],
    reports: Sequence[Presence] = (),
    marked: Sequence[str] = (),
    *,
    desired: int | None = None,
    rolling: bool = False,
    waiting: int = 0,
    memory: Memory | None = None,
    now: float = NOW,
) -> Drain:
    live = TierReplicas(len(replicas) if desired is None else desired, tuple(replicas), rolling)
    queue = QueueReading(waiting, sum(report.busy for report in reports), 0, tuple(reports))
    known = memory or Memory({name: Mark(Milliseconds(TIME - 2_000), now - 2) for name in marked})
    return drain.decide(wanted, live, queue, frozenset(marked), TIME, known, now)


def found(outcome: Drain) -> tuple[int, set[str], set[str]]:
    return outcome.replicas, set(outcome.leaving), set(outcome.marks)


def test_an_idle_worker_is_marked_first_and_goes_when_it_has_said_that_it_drains() -> None:
    workers = [up("a"), up("b")]
    first = decide(1, workers, [says("a", 1), says("b")])
    assert found(first) == (2, set(), {"b"})
    assert first.message == "workers still to leave: 1 (they take nothing new)"
    then = decide(1, workers, [says("a", 1), says("b", draining=True)], ["b"])
    assert found(then) == (1, {"b"}, {"b"})
    assert then.message == ""


def test_a_worker_that_reports_is_asked_whatever_its_phase() -> None:
    workers = [up("a"), up("b", Phase.FAILING)]
    assert found(decide(1, workers, [says("a", 1), says("b")])) == (2, set(), {"b"}), "it may take a job at any moment"


def test_a_busy_worker_is_waited_for_however_long_it_takes_and_reported() -> None:
    workers = [up("a"), up("b")]
    reports = [says("a", 1, draining=True), says("b", 1)]
    waits = decide(1, workers, reports, ["a"])
    assert (*found(waits), waits.overdue) == (2, set(), {"a"}, ())
    assert waits.message == "workers still to leave: 1 (once their jobs are finished)"
    late = decide(1, workers, reports, ["a"], now=NOW + OVERDUE_SECONDS + 1, memory=waits.memory)
    assert (*found(late)[:2], late.overdue) == (2, set(), ("a",))
    idle = [says("a", draining=True), says("b", 1)]
    held = decide(1, workers, idle, ["a"], rolling=True, now=NOW + OVERDUE_SECONDS + 1, memory=waits.memory)
    assert (*found(held)[:2], held.overdue) == (2, set(), ()), "it is the rollout that takes long"


def test_a_report_from_before_the_mark_says_nothing() -> None:
    stale = says("b", draining=True, at=TIME - 3_000)
    assert decide(1, [up("a"), up("b")], [says("a", 1), stale], ["b"]).leaving == frozenset()


def test_a_worker_that_is_idle_and_has_not_seen_its_mark_yet_may_still_take_a_job() -> None:
    unaware = says("b", at=TIME + 1_000)
    assert decide(1, [up("a"), up("b")], [says("a", 1), unaware], ["b"]).leaving == frozenset()


def test_a_new_leader_believes_only_what_is_said_after_it_saw_the_mark() -> None:
    workers, reports = [up("a"), up("b")], [says("a", 1), says("b", draining=True)]
    first = decide(1, workers, reports, ["b"], memory=Memory())
    assert (first.replicas, set(first.marks)) == (2, {"b"})
    again = [says("a", 1), says("b", draining=True, at=TIME + 1_000)]
    assert decide(1, workers, again, ["b"], memory=first.memory).leaving == {"b"}


def test_every_life_of_a_worker_has_to_be_idle() -> None:
    reports = [says("a", 1), says("b", draining=True, life="2"), says("b", 1, life="1")]
    assert decide(1, [up("a"), up("b")], reports, ["b"]).leaving == frozenset()


def test_new_demand_takes_the_marks_back() -> None:
    workers = [up("a"), up("b"), up("c")]
    reports = [says("a", 1), says("b", draining=True), says("c", 1, draining=True)]
    assert decide(2, workers, reports, ["b", "c"]).marks == {"b"}
    for wanted in (3, 4):
        outcome = decide(wanted, workers, reports, ["b", "c"])
        assert found(outcome) == (wanted, set(), set())


def test_those_that_never_came_up_go_first_then_the_idle_then_those_with_the_fewest_jobs_of_equals_the_youngest() -> None:
    workers = [
        up("two-jobs"), up("one-job"), up("idle-old"), up("idle-young", ordered_at=9.0), up("silent", ordered_at=NOW - 1),
        Replica("starting", Phase.STARTING, 0.0), Replica("unplaced", Phase.UNSCHEDULABLE, 0.0),
        up("idle-unready", Phase.STARTING),
    ]  # fmt: skip
    reports = [says("two-jobs", 2), says("one-job", 1), says("idle-old"), says("idle-young"), says("idle-unready")]
    order: list[frozenset[str]] = [decide(wanted, workers, reports).marks for wanted in range(7, -1, -1)]
    assert [set(more - less) for less, more in zip([frozenset(), *order], order, strict=False)] == [
        {"starting"}, {"unplaced"}, {"idle-unready"}, {"idle-young"}, {"idle-old"}, {"one-job"}, {"two-jobs"}, {"silent"},
    ]  # fmt: skip


def test_what_never_came_up_goes_at_once_and_so_does_what_nobody_has_seen_yet() -> None:
    waiting = [up("a"), Replica("pending", Phase.UNSCHEDULABLE, 0.0)]
    outcome = decide(1, waiting, [says("a", 1)])
    assert found(outcome)[:2] == (1, {"pending"})
    both = decide(0, waiting, [says("a", 1)])
    assert both.message == "workers still to leave: 1 (once their jobs are finished)", "what never came up has no report to make"
    assert decide(1, [up("a")], [says("a", 1)], desired=4).replicas == 1


def test_nothing_leaves_and_nothing_is_marked_during_a_rollout() -> None:
    workers, reports = [up("a"), up("b"), up("c")], [says("a", 1), says("b", draining=True), says("c")]
    outcome = decide(1, workers, reports, ["b"], rolling=True)
    assert found(outcome) == (3, set(), {"b"})
    assert outcome.message == "workers still to leave: 2 (once the rollout is over)"


def test_a_rollout_that_nothing_ever_came_up_of_holds_nobody() -> None:
    pending = [Replica("a", Phase.STARTING, 0.0), Replica("b", Phase.FAILING, 0.0)]
    assert found(decide(1, pending, rolling=True))[0] == 1


def test_nothing_leaves_while_a_busy_worker_is_not_ready_because_the_cluster_would_take_that_one() -> None:
    workers = [up("a", Phase.STARTING), up("b"), up("c")]
    reports = [says("a", 1), says("b", draining=True), says("c", 1)]
    outcome = decide(2, workers, reports, ["b"])
    assert found(outcome)[:2] == (3, set())
    assert "a is ready again" in outcome.message


def test_what_was_let_go_and_is_still_there_is_not_counted_twice() -> None:
    workers = [up("a"), up("b"), up("c")]
    reports = [says("a", 1), says("b", draining=True), says("c", 1)]
    outcome = decide(1, workers, reports, ["b", "c"], desired=2)
    assert found(outcome)[:2] == (2, set())
    assert decide(2, workers, reports, ["b"], desired=2).marks == {"b"}, "the mark stays until it is gone"


def test_a_worker_that_stops_keeps_its_mark_and_one_that_is_gone_does_not() -> None:
    assert decide(1, [up("a"), up("b", Phase.STOPPING)], [says("a", 1)], ["b", "gone"], desired=1).marks == {"b"}


def test_workers_that_never_report_leave_after_the_queue_has_been_empty_for_the_window() -> None:
    workers = [up("a"), up("b")]
    busy = decide(0, workers, waiting=1)
    assert (busy.replicas, busy.memory.empty_since) == (2, None)
    empty = decide(0, workers, memory=busy.memory)
    assert found(empty)[:2] == (2, set())
    why = "2 of them do not report: once nothing has been waiting or in flight for 60 s"
    assert empty.message == f"workers still to leave: 2 ({why})"
    soon = decide(0, workers, memory=empty.memory, now=NOW + EMPTY_WINDOW_SECONDS - 1)
    assert soon.replicas == 2
    then = decide(0, workers, memory=soon.memory, now=NOW + EMPTY_WINDOW_SECONDS)
    assert found(then)[:2] == (0, {"a", "b"})


def test_workers_that_never_report_stay_while_any_of_their_kind_holds_a_message() -> None:
    live, long_empty = TierReplicas(1, (up("a"),)), Memory(empty_since=NOW - EMPTY_WINDOW_SECONDS)
    readings = [QueueReading(0, 0, 0), QueueReading(0, 0, 0, plain_in_flight=1), QueueReading(0, 1, 0)]
    outcomes = [drain.decide(0, live, reading, frozenset(), TIME, long_empty, NOW) for reading in readings]
    assert [(one.replicas, one.memory.empty_since is None) for one in outcomes] == [(0, False), (1, True), (1, True)]


def test_a_worker_that_has_just_become_ready_may_yet_report() -> None:
    young = up("a", ordered_at=NOW - PRESENCE_LIFE_MS / 1000)
    empty = Memory(empty_since=NOW - EMPTY_WINDOW_SECONDS)
    slow = Replica("a", READY, LONG_AGO, ready_at=NOW - PRESENCE_LIFE_MS / 1000)
    for worker in (young, slow):
        assert decide(0, [worker], memory=empty).leaving == frozenset()


def test_while_the_broker_cannot_be_read_nothing_leaves() -> None:
    outcome = drain.held(TierReplicas(3, (up("a"), up("b"), up("c"))), 1, Memory(empty_since=0.0))
    assert (outcome.replicas, outcome.leaving, outcome.memory.empty_since) == (3, frozenset(), None)


@given(
    wanted=st.integers(0, 6),
    desired=st.integers(0, 6),
    rolling=st.booleans(),
    workers=st.lists(
        st.tuples(st.sampled_from(Phase), st.booleans(), st.integers(0, 2), st.booleans(), st.booleans(), st.booleans()),
        max_size=6,
    ),
)
def test_never_a_busy_worker_never_too_many_never_a_mark_without_need(
    wanted: int, desired: int, rolling: bool, workers: list[tuple[Phase, bool, int, bool, bool, bool]]
) -> None:
    replicas, reports, marked = [], [], []
    for n, (phase, reported, busy, draining, is_marked, was_ready) in enumerate(workers):
        replicas.append(Replica(f"w{n}", phase, 0.0, 1.0 if was_ready else None))
        reports += [says(f"w{n}", busy, draining=draining)] if reported else []
        marked += [f"w{n}"] if is_marked else []
    outcome = decide(wanted, replicas, reports, marked, desired=desired, rolling=rolling)
    assert min(desired, wanted) <= outcome.replicas <= max(desired, wanted)
    assert not outcome.leaving & {report.worker for report in reports if report.busy}
    assert outcome.leaving <= {replica.worker for replica in replicas if replica.phase is not Phase.STOPPING}
    assert outcome.leaving <= outcome.marks
    if wanted >= desired:
        assert outcome.replicas == wanted
        assert outcome.marks <= set(marked)


def test_what_the_cluster_would_remove_first_has_to_become_idle_first() -> None:
    workers = [up("a", Phase.STARTING), up("b"), up("c")]
    asked = decide(1, workers, [says("a", 1), says("b"), says("c")])
    assert found(asked) == (3, set(), {"a", "b"})
    idle = decide(1, workers, [says("a", draining=True), says("b", draining=True), says("c", 1)], ["a", "b"])
    assert found(idle) == (1, {"a", "b"}, {"a", "b"})


def test_a_rollout_that_is_stuck_does_not_keep_a_tier_that_nobody_needs() -> None:
    workers = [up("a"), up("b"), Replica("new", Phase.FAILING, 0.0)]
    asked = decide(0, workers, [says("a"), says("b", 1)], rolling=True)
    assert found(asked) == (3, set(), {"a", "b", "new"})
    still = decide(0, workers, [says("a", draining=True), says("b", 1, draining=True)], ["a", "b"], rolling=True)
    assert found(still)[:2] == (3, set())
    idle = decide(0, workers, [says("a", draining=True), says("b", draining=True)], ["a", "b"], rolling=True)
    assert found(idle)[:2] == (0, {"a", "b", "new"})


def test_a_worker_that_reports_is_there_although_the_cluster_has_not_told_of_it_yet() -> None:
    ours = [up("a"), up("b")]
    reports = [says("a"), says("b"), *(says(f"unseen-{n}", busy=1) for n in range(4))]
    assert decide(2, ours, reports, desired=6).replicas == 6, "four that are busy would have gone, unmarked"
    assert decide(2, ours, reports[:4], desired=6).replicas == 4, "two are still to come"
    idle = [says(name, draining=True) for name in ("a", "b")]
    elsewhere = [says(f"by-hand-{n}") for n in range(4)]
    assert decide(0, ours, [*idle, *elsewhere], ["a", "b"]).replicas == 0, "workers of no Deployment hold back none of it"
