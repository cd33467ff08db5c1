"""Which waiting jobs move, from where to where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from workerpool_operator.rebalancing import AT_ONCE, TOLD_SECONDS, Moved, Transfer, tell, told, transfers
from workerpool_routing.decide import START_SECONDS, Load
from workerpool_routing.wire import Policy, TierPolicy

pytestmark = pytest.mark.unit

POLICY = Policy((TierPolicy("gpu", "g", accelerated=True), TierPolicy("cpu", "c", accelerated=False)))


def load(waiting: int = 0, busy: int = 0, ready: int = 0, coming: int = 0, service: float | None = None) -> Load:
    return Load(waiting, busy, ready, service=service, startable=coming, start_seconds=START_SECONDS)


def moves(gpu: Load, cpu: Load, spilled: int = 1_000) -> tuple[str, int] | None:
    """Where to, and how many."""
    found = transfers(POLICY, {"gpu": gpu, "cpu": cpu}, {"gpu": spilled})
    assert len(found) <= 1
    return (found[0].target, found[0].jobs) if found else None


@pytest.mark.parametrize(
    ("gpu", "cpu", "moved"),
    [
        (load(12), load(busy=1, ready=1), ("cpu", 12)),
        (load(12, service=5), load(40, 4, 4, service=30), ("cpu", 12)),
        (load(12), load(coming=4), ("cpu", 12)),
        (load(AT_ONCE + 1), load(ready=1), ("cpu", AT_ONCE)),
        (load(12), load(), None),
        (load(5, coming=8), load(ready=4), None),
        (load(9, coming=8), load(ready=4), ("cpu", 2)),
        (load(9, coming=8), load(busy=4, ready=4), None),
        (load(9, 1, 1, service=5), load(ready=4, service=30), ("cpu", 4)),
        (load(9, 1, 1, service=5), load(busy=4, ready=4, service=30), None),
        (load(1, 8, 8, service=5), load(ready=4, service=30), None),
        (load(), load(ready=4), None),
    ],
    ids=[
        "an outage: all", "an outage: all, however long the other queue", "an outage: all, workers for them will come",
        "an outage: so many at once", "nothing anywhere: none", "slots are coming: few wait for them",
        "slots are coming: those that are too many, one free slot each", "no free slot on the other side: none",
        "a long queue: as many as start at once", "a long queue, and a busy other side: none", "a short queue: none",
        "no job: none",
    ],
)  # fmt: skip
def test_jobs_leave_an_accelerated_tier_that_admission_would_not_send_them_to(
    gpu: Load, cpu: Load, moved: tuple[str, int] | None
) -> None:
    assert moves(gpu, cpu) == moved


@pytest.mark.parametrize(
    ("gpu", "cpu", "spilled", "moved"),
    [
        (load(ready=8), load(3, 4, 4), 7, ("gpu", 3)),
        (load(ready=8), load(30, 4, 4), 3, ("gpu", 3)),
        (load(ready=8, service=5), load(300, 16, 16, service=30), 400, ("gpu", AT_ONCE)),
        (load(busy=8, ready=8, service=5), load(10, 4, 4, service=30), 400, ("gpu", 10)),
        (load(20, 8, 8, service=5), load(1, 4, 4, service=30), 400, None),
        (load(coming=8), load(30, 4, 4), 7, None),
        (load(ready=8), load(30, 4, 4), 0, None),
        (load(ready=8), load(0, 4, 4), 4, None),
    ],
    ids=[
        "free slots: what waits", "free slots: those that belong there", "so many at once", "no free slot, but a shorter wait",
        "a longer wait: none", "slots that may not come: none", "none belong there", "none wait",
    ],
)  # fmt: skip
def test_jobs_come_home_to_slots_that_start_them_sooner(
    gpu: Load, cpu: Load, spilled: int, moved: tuple[str, int] | None
) -> None:
    assert moves(gpu, cpu, spilled) == moved


def test_one_transfer_goes_to_one_tier_though_the_next_job_would_go_to_another() -> None:
    policy = Policy((*POLICY.tiers, TierPolicy("big", "b", accelerated=False)))
    (away,) = transfers(policy, {"gpu": load(9), "cpu": load(ready=1), "big": load(ready=1)}, {})
    assert (away.target, away.jobs) == ("cpu", 1)


def test_jobs_come_home_from_the_tier_where_they_wait_though_a_busy_one_would_take_longer() -> None:
    policy = Policy((*POLICY.tiers, TierPolicy("big", "b", accelerated=False)))
    loads = {"gpu": load(ready=8, service=5), "cpu": load(3, 4, 4, service=30), "big": load(0, 1, 1, service=900)}
    (home,) = transfers(policy, loads, {"gpu": 9})
    assert (home.source, home.target, home.jobs) == ("cpu", "gpu", 3)


def test_the_transfer_says_why() -> None:
    (away,) = transfers(POLICY, {"gpu": load(2), "cpu": load(ready=1)}, {})
    assert away == Transfer(
        "gpu", "cpu", 2,
        "from gpu to cpu: gpu: no accelerated slot is free and none can be started"
        " (0 slots ready, 0 may still start, 0 in flight, 2 waiting)",
    )  # fmt: skip
    (home,) = transfers(POLICY, {"gpu": load(ready=1, service=5), "cpu": load(2, 1, 1, service=30)}, {"gpu": 2})
    assert home.message == "from cpu to gpu: the last of its queue would wait 90 s, there it waits at most 10 s"


@pytest.mark.parametrize(
    ("gpu", "cpu", "moved"),
    [
        (replace(load(12, 0, 4), limit=0), load(ready=1), ("cpu", 12)),
        (replace(load(12, 0, 4), limit=0), load(9, 4, 4), ("cpu", 12)),
        (replace(load(12, 0, 4), limit=0), load(), None),
        (replace(load(12, 0, 4), limit=1), load(ready=1), ("cpu", 11)),
        (replace(load(12, 1, 4), limit=1), load(ready=1), ("cpu", 12)),
        (replace(load(ready=4), limit=0), load(9, 4, 4), None),
        (replace(load(ready=4), limit=1), load(9, 4, 4), ("gpu", 1)),
        (replace(load(0, 1, 4), limit=1), load(9, 4, 4), None),
    ],
    ids=[
        "out: all leave", "out: all leave, however long the other queue", "out, and nobody elsewhere: none",
        "on trial: all but one leave", "one tries it: all leave", "out: none come home", "on trial: one comes home",
        "one tries it: none come home",
    ],
)  # fmt: skip
def test_what_waits_for_a_tier_whose_attempts_fail_leaves_but_for_the_one_that_tries_it(
    gpu: Load, cpu: Load, moved: tuple[str, int] | None
) -> None:
    assert moves(gpu, cpu) == moved


def test_a_job_that_comes_home_to_try_a_broken_tier_is_told_how_long_it_waits() -> None:
    on_trial = replace(load(ready=1, service=5), limit=1)
    (home,) = transfers(POLICY, {"gpu": on_trial, "cpu": load(9, 1, 1, service=30)}, {"gpu": 9})
    assert home.message.endswith("there it waits at most 5 s")


def test_moves_of_one_way_are_told_as_one_until_a_longer_pause() -> None:
    away, home = Transfer("gpu", "cpu", 9, "away"), Transfer("cpu", "gpu", 9, "home")
    first = tell([], away, 3, 0.0)
    assert first == [Moved(away, 3, 0.0)]
    again = replace(away, message="away again")
    second = tell(first, again, 4, 50.0)
    assert second == [Moved(again, 7, 50.0)], "the newest reason, and all that went that way"
    both = tell(second, home, 2, 60.0)
    assert both == [Moved(again, 7, 50.0), Moved(home, 2, 60.0)]
    assert told(both, 50.0 + TOLD_SECONDS) == [Moved(home, 2, 60.0)]
    assert tell(both, away, 1, 60.0 + TOLD_SECONDS) == [Moved(away, 1, 60.0 + TOLD_SECONDS)]


def test_with_several_tiers_jobs_leave_for_the_one_that_starts_them_soonest_and_return_from_the_slowest() -> None:
    slow = TierPolicy("slow", "s", accelerated=False)
    policy = replace(POLICY, tiers=(*POLICY.tiers, slow))
    loads = {"gpu": load(3), "cpu": load(9, 1, 1), "slow": load(ready=4)}
    assert [(t.target, t.jobs) for t in transfers(policy, loads, {})] == [("slow", 3)]
    loads = {"gpu": load(ready=4), "cpu": load(2, 4, 4), "slow": load(9, 1, 1)}
    assert [(t.source, t.target) for t in transfers(policy, loads, {"gpu": 9})] == [("slow", "gpu")]


def test_a_pool_without_both_kinds_of_tier_has_nothing_to_move() -> None:
    for tier in POLICY.tiers:
        assert transfers(Policy((tier,)), {tier.name: load(9)}, {}) == []


counts = st.integers(0, 30)
services = st.one_of(st.none(), st.floats(0.01, 600))
groups = st.lists(st.tuples(st.integers(1, 30), st.floats(0, 300)), max_size=4).map(
    lambda found: tuple(sorted(found, key=lambda group: group[1]))
)
held = st.builds(
    Load, counts, counts, counts, groups, service=services, startable=counts, start_seconds=st.floats(300, 400),
    target_seconds=st.floats(0, 600),
)  # fmt: skip
limited = st.builds(replace, held, limit=st.integers(0, 2))


@given(gpu=held | limited, cpu=held, spilled=counts)
@example(gpu=replace(load(1, 1, 1), limit=2), cpu=load(coming=1), spilled=0)
def test_a_job_is_never_moved_there_and_back(gpu: Load, cpu: Load, spilled: int) -> None:
    loads: Mapping[str, Load] = {"gpu": gpu, "cpu": cpu}
    for transfer in transfers(POLICY, loads, {"gpu": spilled}):
        assert 0 < transfer.jobs <= loads[transfer.source].waiting
        after = {
            name: replace(
                one, waiting=one.waiting + transfer.jobs * ((name == transfer.target) - (name == transfer.source))
            )
            for name, one in loads.items()
        }  # fmt: skip
        left = spilled + transfer.jobs * (1 if transfer.source == "gpu" else -1)
        assert transfer.source not in [next_one.target for next_one in transfers(POLICY, after, {"gpu": left})]
