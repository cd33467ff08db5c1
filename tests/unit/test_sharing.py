"""A queue of one broker belongs to the oldest pool that names it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workerpool_operator import sharing
from workerpool_operator.model import parse_spec
from workerpool_operator.ports import Pool
from workerpool_operator.sharing import Conflict

pytestmark = pytest.mark.unit

ONE, OTHER = "redis://one:6379/0", "redis://other:6379/0"


def pool(name: str, created_at: float, *queues: str, prefix: str = "", namespace: str = "ml") -> Pool:
    template = {"spec": {"containers": [{"name": "worker"}]}}
    spec = parse_spec(
        {
            "app": "media.tasks",
            "broker": {"url": ONE, "globalKeyPrefix": prefix},
            "tiers": [{"name": f"t{n}", "queue": queue, "template": template} for n, queue in enumerate(queues)],
        }
    )
    assert not isinstance(spec, list), spec
    return Pool(namespace, name, name, 1, created_at, spec)


def conflicts(pools: Iterable[Pool], places: Mapping[str, Hashable]) -> dict[str, Conflict]:
    """Who is held when every place was read just now, and nothing was known before."""
    return sharing.conflicts(pools, places, places.keys(), {})


def on(url: str, *pools: Pool) -> dict[str, str]:
    return {pool.id: url for pool in pools}


def test_pools_with_queues_of_their_own_do_not_meet() -> None:
    pools = [pool("a", 1, "q1"), pool("b", 2, "q2", "q3")]
    assert conflicts(pools, on(ONE, *pools)) == {}


def test_the_older_keeps_the_queue_even_when_the_younger_was_seen_first() -> None:
    old, young = pool("zebra", 1, "q1", "q2"), pool("ant", 2, "q0", "q2", "q1")
    for pools in ([old, young], [young, old]):
        assert conflicts(pools, on(ONE, *pools)) == {"ml/ant": Conflict("q2", "ml/zebra")}


def test_pools_of_one_age_go_by_name_so_that_every_operator_decides_alike() -> None:
    pools = [pool("a", 5, "q"), pool("b", 5, "q"), pool("a", 5, "q", namespace="late")]
    for order in permutations(pools):
        assert set(conflicts(order, on(ONE, *pools))) == {"ml/a", "ml/b"}


def test_the_same_queue_on_another_broker_is_another_queue() -> None:
    old, young = pool("a", 1, "q"), pool("b", 2, "q")
    assert conflicts([old, young], {**on(ONE, old), **on(OTHER, young)}) == {}


def test_a_key_prefix_makes_another_queue_unless_the_keys_come_out_the_same() -> None:
    plain, prefixed, same = pool("a", 1, "staging-q"), pool("b", 2, "q", prefix="prod-"), pool("c", 3, "q", prefix="staging-")
    pools = [plain, prefixed, same]
    assert conflicts(pools, on(ONE, *pools)) == {"ml/c": Conflict("q", "ml/a")}


def test_a_pool_that_is_held_keeps_no_queue_from_others() -> None:
    pools = [pool("a", 1, "q1"), pool("b", 2, "q1", "q2"), pool("c", 3, "q2")]
    assert set(conflicts(pools, on(ONE, *pools))) == {"ml/b"}


def test_a_held_pool_stays_held_until_it_and_its_owner_were_read_again() -> None:
    old, young = pool("a", 1, "q"), pool("b", 2, "q")
    before = {young.id: Conflict("q", old.id)}
    moved = {**on("the restarted one", old), **on(ONE, young)}
    for sure in ([], [old.id], [young.id]):
        assert sharing.conflicts([old, young], moved, sure, before) == before
    assert sharing.conflicts([old, young], {}, [], before) == before
    assert sharing.conflicts([old, young], moved, [old.id, young.id], before) == {}
    assert sharing.conflicts([young], moved, [], before) == {}, "its owner is gone"


def test_a_conflict_that_is_seen_now_is_told_before_one_that_is_only_remembered() -> None:
    old, other, young = pool("a", 1, "q1"), pool("b", 2, "q2"), pool("c", 3, "q2")
    before = {young.id: Conflict("q1", old.id)}
    seen = sharing.conflicts([old, other, young], on(ONE, other, young), [other.id, young.id], before)
    assert seen == {young.id: Conflict("q2", other.id)}


def test_a_pool_whose_broker_is_unknown_owns_nothing_and_is_not_held() -> None:
    old, young = pool("a", 1, "q"), pool("b", 2, "q")
    assert conflicts([old, young], on(ONE, young)) == {}
    assert conflicts([old, young], on(ONE, old)) == {}


def test_the_queue_of_a_removed_tier_is_anothers_who_names_it_whoever_is_older() -> None:
    gone = pool("x", 0, "q1", "q2").spec.tiers
    for age in (1, 9):
        left = replace(pool("a", 5, "q3"), removed=gone)
        heir, elsewhere = pool("b", age, "q1"), pool("c", age, "q2", prefix="staging-")
        pools = [left, heir, elsewhere]
        assert sharing.ceded(pools, on(ONE, *pools))[left.id] == {"q1"}
        assert sharing.ceded(pools, {**on(ONE, left, elsewhere), **on(OTHER, heir)})[left.id] == frozenset()
        assert sharing.ceded(pools, on(ONE, heir)).get(left.id) is None, "nobody knows where its broker is"
        assert conflicts(pools, on(ONE, *pools)) == {}


def test_a_queue_that_the_pool_itself_has_under_another_name_is_not_anothers() -> None:
    renamed = replace(pool("a", 5, "q"), removed=pool("x", 0, "q").spec.tiers)
    assert sharing.ceded([renamed], on(ONE, renamed)) == {renamed.id: frozenset()}


pools_of_few_queues = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.sampled_from("abc"), min_size=1, max_size=3, unique=True)), max_size=5
).map(lambda found: [pool(f"p{n}", age, *queues) for n, (age, queues) in enumerate(found)])


@settings(max_examples=50)
@given(pools_of_few_queues)
def test_every_queue_has_at_most_one_pool_and_none_is_held_without_an_older_owner(pools: list[Pool]) -> None:
    held = conflicts(pools, on(ONE, *pools))
    by_id = {pool.id: pool for pool in pools}
    served = [tier.queue for pool in pools if pool.id not in held for tier in pool.spec.tiers]
    assert len(served) == len(set(served))
    for name, conflict in held.items():
        assert conflict.owner not in held
        assert conflict.queue in {tier.queue for tier in by_id[conflict.owner].spec.tiers}
        assert (by_id[conflict.owner].created_at, conflict.owner) < (by_id[name].created_at, name)
