"""Chords, chains and groups over both tiers: every part counts once, whatever becomes of the attempts at it."""

from __future__ import annotations

from types import ModuleType

import pytest
from celery import chord, group
from tests.contract.api_and_operator import admit, outcome

from workerpool_routing.ledger import State

pytestmark = pytest.mark.contract


@pytest.mark.parametrize("task", ["add", "add_once"])
def test_a_chord_of_100_with_10_failing_parts_completes_once_with_the_right_result(two_tiers: ModuleType, task: str) -> None:
    part, body = getattr(two_tiers, task), f"bodies-of-{task}"
    header = [admit(two_tiers, part.s(n, fails=n % 10 == 0)) for n in range(100)]
    result = chord(header)(two_tiers.total.s(body).set(queue="cpu-jobs"))
    assert result.get(timeout=60) == sum(range(100)) + 100
    starts = [outcome(two_tiers, signature.options["task_id"])[1] for signature in header]
    assert starts == [{"gpu": 1, "cpu": 1} if n % 10 == 0 else {"gpu": 1} for n in range(100)]
    assert int(two_tiers.pool.connection.client.get(body)) == 1


@pytest.mark.parametrize(("dies", "which"), [("before", 1), ("after", 1), ("after", 2)])
def test_a_part_of_a_chord_whose_child_dies_before_it_is_acknowledged_counts_once(
    two_tiers: ModuleType, dies: str, which: int
) -> None:
    body = f"bodies-with-a-death-{dies}-{which}"
    header = [admit(two_tiers, two_tiers.part.s(n, dies if n == which else "")) for n in range(3)]
    result = chord(header)(two_tiers.total.s(body).set(queue="cpu-jobs"))
    assert result.get(timeout=60) == 3
    for signature in header:
        assert outcome(two_tiers, signature.options["task_id"]) == (State.DONE, {"gpu": 1})
    behind = two_tiers.pool.submit(two_tiers.work, ({},))
    assert outcome(two_tiers, behind.task_id) == (State.DONE, {"cpu": 1})
    assert int(two_tiers.pool.connection.client.get(body)) == 1


def test_a_chain_goes_on_after_a_step_that_fell_back(two_tiers: ModuleType) -> None:
    steps = admit(two_tiers, two_tiers.add.s(1, fails=True)) | two_tiers.add.s().set(queue="cpu-jobs")
    assert steps.apply_async().get(timeout=60) == 3


def test_a_group_has_every_result(two_tiers: ModuleType) -> None:
    parts = group(admit(two_tiers, two_tiers.add.s(n, fails=n == 1)) for n in range(4))
    assert parts.apply_async().get(timeout=60) == [1, 2, 3, 4]
