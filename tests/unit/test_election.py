"""Who holds the Lease, since when and until when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workerpool_operator.election import LEASE_SECONDS, RENEW_DEADLINE_SECONDS, RENEW_SECONDS, Lease, look, parse

pytestmark = pytest.mark.unit

HELD = Lease("a", LEASE_SECONDS, 0, "1")


def test_a_lease_that_was_not_renewed_is_free_after_its_duration_by_the_clock_of_who_sees_it() -> None:
    seen = look(None, HELD, 100.0)
    assert seen.free_at == 110.0
    assert look(seen, HELD, 105.0).free_at == 110.0, "seeing it again is no renewal"
    assert look(seen, Lease("a", LEASE_SECONDS, 0, "2"), 105.0).free_at == 115.0


def test_a_lease_that_was_given_back_or_never_there_is_free_at_once() -> None:
    assert look(look(None, HELD, 100.0), Lease("", 1.0, 3, "9"), 101.0).free_at == 101.0
    assert look(None, None, 101.0).free_at == 101.0


def test_a_lease_that_somebody_deleted_is_still_its_holders_for_its_time() -> None:
    gone = look(look(None, HELD, 100.0), None, 101.0)
    assert gone.free_at == 110.0
    assert look(gone, None, 105.0).free_at == 110.0


@given(asked=st.floats(0, 1e6), answered=st.floats(0, 60), seen=st.floats(0, 60))
def test_a_holders_time_is_over_before_anybody_else_may_take_the_lease(asked: float, answered: float, seen: float) -> None:
    """A renewal is asked for, then written, then seen; only then does the other clock begin."""
    assert asked + RENEW_DEADLINE_SECONDS < look(None, HELD, asked + answered + seen).free_at


def test_two_renewals_may_fail_before_a_holder_has_to_go() -> None:
    assert 3 * RENEW_SECONDS < RENEW_DEADLINE_SECONDS < LEASE_SECONDS


def test_a_lease_is_read_whatever_another_client_left_out() -> None:
    spec = {"holderIdentity": "b_1", "leaseDurationSeconds": 15, "leaseTransitions": 4, "renewTime": "2026-01-01T00:00:00Z"}
    assert parse({"metadata": {"resourceVersion": "7"}, "spec": spec}) == Lease("b_1", 15.0, 4, "7")
    assert parse({"metadata": {"resourceVersion": "7"}}).holder == ""
