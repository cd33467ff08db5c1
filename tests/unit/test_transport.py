"""When a worker that has no operator may put back what another one holds."""

from __future__ import annotations

import pytest

from workerpool_routing.wire import PRESENCE_LIFE_MS
from workerpool_routing.worker.transport import Overdue, held_by_nobody, seen_overdue

pytestmark = pytest.mark.unit

LIFE = PRESENCE_LIFE_MS / 1000


def looks(*found: tuple[float, dict[str, float]]) -> list[str]:
    """What the last of some looks gives back, each at a time and with the renewals that it found overdue."""
    overdue: Overdue = {}
    now = 0.0
    for now, renewals in found:
        overdue = seen_overdue(overdue, renewals.items(), now)
    return held_by_nobody(overdue, now)


def test_what_nobody_renews_for_a_presence_life_is_given_back_and_not_at_first_sight() -> None:
    assert looks((0, {"a": 5.0})) == []
    assert looks((0, {"a": 5.0}), (LIFE - 1, {"a": 5.0})) == []
    assert looks((0, {"a": 5.0}), (LIFE + 1, {"a": 5.0, "b": 6.0})) == ["a"]


def test_a_step_of_the_clock_gives_back_nothing_that_its_worker_renews() -> None:
    """All look overdue at once; a second later those of live workers carry the new time."""
    assert looks((0, {"held": 5.0, "lost": 5.0}), (LIFE / 2, {"lost": 5.0}), (LIFE + 1, {"held": 75.0, "lost": 5.0})) == ["lost"]
    assert looks((0, {"held": 5.0}), (LIFE + 1, {"held": 6.0})) == []


def test_what_was_seen_again_after_an_end_is_watched_anew() -> None:
    assert looks((0, {"a": 5.0}), (LIFE + 1, {}), (LIFE + 2, {"a": 5.0})) == []
