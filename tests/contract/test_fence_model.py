"""The fence, explored: workers, deaths, zombies, reapers and sweeps in any order, on a real Redis, with the library's own steps.

The model knows only what really happened: who runs, who is dead, what was stored. It holds Redis to the promise after every step.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import product
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from redis import Redis
from redis import asyncio as aioredis
from tests.seeds import make_pool

from workerpool_operator import moving, planning, salvage
from workerpool_operator.local.redis_server import private_redis
from workerpool_operator.observation import Attempts
from workerpool_operator.ports import Pool
from workerpool_operator.rebalancing import Transfer
from workerpool_routing import ledger
from workerpool_routing.connection import Connection
from workerpool_routing.ledger import Claim, Job, Result, State
from workerpool_routing.worker.attempt import Attempt, Outcome, WorkerLife

pytestmark = [pytest.mark.contract, pytest.mark.timeout(900)]

TIERS = {"gpu": "gpu-tasks", "cpu": "celery"}
JOB = "t1"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with private_redis() as server:
        yield server.url


@dataclass
class Delivery:
    """A message in the hands of one worker life, and how far that worker has come with it."""

    life: WorkerLife
    message: dict[str, Any]
    step: str = "taken"
    lost: bool = False
    """Its presence has run out although it lives: a zombie."""

    @property
    def tag(self) -> str:
        return str(self.message["properties"]["delivery_tag"])

    @property
    def attempt(self) -> Attempt:
        headers = self.message["headers"]
        return Attempt(self.life, JOB, headers["workerpool"]["attempt"], self.tag, 0)


@dataclass
class World:
    """One job in one Redis, and everybody who has to do with it."""

    url: str
    pool: Pool
    client: Any
    deliveries: list[Delivery] = field(default_factory=list)
    dead: list[Delivery] = field(default_factory=list)
    stored: list[str] = field(default_factory=list)
    interruptions: int = 0
    one_redis: bool = False
    in_a_chord: bool = False
    stored_at_once: bool = False

    def job(self) -> Job:
        job = Job.load(JOB, self.client.hgetall(self.pool.keys.job(JOB)))
        assert job
        return job

    def counted(self, tier: str) -> Attempts:
        """How its attempts on a tier ended, as the breaker will read it."""
        stored = self.client.hgetall(self.pool.keys.attempts(tier))
        return Attempts(**{field.name: float(stored.get(field.name, 0)) for field in fields(Attempts)})

    def waits_for_its_first_start(self) -> bool:
        return not self.job().runs and any(place.startswith("queue") for place in self.places())

    def places(self) -> list[str]:
        """Everywhere that a message of the job is."""
        keys = self.pool.keys
        queued = [f"queue {tier}" for tier, queue in TIERS.items() for _ in range(self.client.llen(keys.queue_list(queue, 0)))]
        held = [f"in flight {tier}" for tier in TIERS for _ in range(self.client.hlen(keys.unacked(tier)))]
        return queued + held + [f"taken by {d.life.owner}" for d in self.deliveries if d.step == "taken"]


def admit(url: str) -> World:
    pool = make_pool(url)
    client = Redis.from_url(url, decode_responses=True)
    client.flushall()
    headers = {"id": JOB, "task": "t", "workerpool": {"attempt": 1}}
    properties = {"delivery_tag": "first", "delivery_info": {"exchange": "", "routing_key": "gpu-tasks"}, "priority": 0}
    message = json.dumps({"body": "", "headers": headers, "properties": properties})
    client.hset(
        pool.keys.job(JOB),
        mapping={
            "version": 1, "state": "admitted", "attempt": 1, "task": "t", "tier": "gpu", "wanted": "gpu", "required": 0,
            "reason": "FreeSlot", "admitted_at": 1, "message": message, "queue": "gpu-tasks",
        },
    )  # fmt: skip
    client.zadd(pool.keys.waiting("gpu"), {JOB: 1})
    client.lpush(pool.keys.queue_list("gpu-tasks", 0), message)
    return World(url, pool, client)


def while_one_is(*steps: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A rule that applies while somebody has come that far."""

    def applies(fence: Fence) -> bool:
        return fence._pick(0, *steps) is not None

    return precondition(applies)


def _never(task_id: str, error: Exception) -> None:
    raise AssertionError(task_id) from error


class Fence(RuleBasedStateMachine):
    """Every step that a worker, a reaper or a sweep can take, in any order."""

    url = ""
    reached: set[str] = set()  # noqa: RUF012 what all examples together have seen

    def __init__(self) -> None:
        super().__init__()
        self.world = admit(self.url)
        self.connection = Connection(Celery(broker=self.url), patient=True)

    def teardown(self) -> None:
        """Whatever has happened: healthy workers, a reaper and a sweep bring the job to its one outcome."""
        for delivery in list(self.world.deliveries):
            self._die(delivery)
        for _ in range(12):
            self._salvage()
            for tier in TIERS:
                if taken := self._take(tier):
                    for step in (self._hold, self._claim, self._finish, self._close):
                        step(taken)
            if self.world.job().state.ended:
                break
        assert self.world.job().state.ended, self.world.places()
        assert len(self.world.stored) == 1
        assert self.world.job().state is (State.DONE if self.world.stored == ["result"] else State.FAILED)
        counted = self.world.counted("gpu")
        assert counted.confirmed + counted.refuted == counted.failed, "a tier that was suspected is so no longer"
        Fence.reached.add(f"ended {self.world.job().state}")
        self.connection.client.close()
        self.world.client.close()

    def _pick(self, number: int, *steps: str) -> Delivery | None:
        found = [d for d in self.world.deliveries if d.step in steps]
        return found[number % len(found)] if found else None

    def _take(self, tier: str) -> Delivery | None:
        raw = self.world.client.rpop(self.world.pool.keys.queue_list(TIERS[tier], 0))
        if raw is None:
            return None
        pool: Any = SimpleNamespace(keys=self.world.pool.keys, given=planning.policy(self.world.pool.spec))
        delivery = Delivery(WorkerLife(pool, tier, f"{tier}.{uuid4().hex[:4]}", self.connection), json.loads(raw))
        self.world.deliveries.append(delivery)
        return delivery

    def _hold(self, delivery: Delivery) -> None:
        value = json.dumps([delivery.message, "", TIERS[delivery.life.tier]])
        call = ledger.hold(self.world.pool.keys, delivery.life.tier, tag=delivery.tag, value=value)
        self.connection.run("hold", call)
        delivery.step = "held"

    def _claim(self, delivery: Delivery) -> None:
        answer = delivery.attempt.claim(
            lambda: "SUCCESS" if "result" in self.world.stored else "FAILURE" * len(self.world.stored)
        )
        Fence.reached.add(f"claim {answer}")
        if answer is Claim.RUN:
            delivery.step = "running"
        elif answer is Claim.POISON:
            self._store(delivery, "failure")
        else:
            self._ack(delivery)

    def _finish(self, delivery: Delivery) -> None:
        if delivery.step == "running":
            if self._returned(delivery.attempt):
                self._store(delivery, "result")
            else:
                Fence.reached.add("dropped")
                self._ack(delivery)

    def _returned(self, attempt: Attempt) -> bool:
        if not self.world.one_redis:
            return attempt.settle(State.CLAIMED, State.FINISHING, how="done")
        # Its part in a chord is counted before its message is acknowledged.
        counts = attempt.finish(
            Result("result", "gpu or cpu", 60), after=State.FINISHING if self.world.in_a_chord else State.DONE
        )
        self.world.stored_at_once = self.world.stored_at_once or bool(counts)
        return counts is not False

    def _raise(self, delivery: Delivery) -> None:
        outcome = delivery.attempt.end(ledger.after_failure, "failed", "boom")
        Fence.reached.add(f"raised {outcome.name}")
        if outcome is Outcome.FINAL:
            self._store(delivery, "failure")
        else:
            self._ack(delivery)

    def _store(self, delivery: Delivery, what: str) -> None:
        self.world.stored.append(what)
        delivery.step = what

    def _close(self, delivery: Delivery) -> None:
        if delivery.step in ("result", "failure"):
            delivery.attempt.acknowledge(State.DONE if delivery.step == "result" else State.FAILED)
            self.world.deliveries.remove(delivery)

    def _ack(self, delivery: Delivery) -> None:
        keys = self.world.pool.keys
        self.world.client.hdel(keys.unacked(delivery.life.tier), delivery.tag)
        self.world.client.zrem(keys.unacked_index(delivery.life.tier), delivery.tag)
        self.world.deliveries.remove(delivery)
        delivery.step = "acknowledged"

    def _die(self, delivery: Delivery) -> None:
        self.world.deliveries.remove(delivery)
        self.world.dead.append(delivery)

    def _salvage(self) -> None:
        """A reaper and a sweep, much later."""
        world, keys = self.world, self.world.pool.keys
        for delivery in world.dead + [d for d in world.deliveries if d.lost]:
            world.client.zadd(keys.unacked_index(delivery.life.tier), {delivery.tag: 0}, xx=True)
        for tier in TIERS:
            if world.client.zscore(keys.waiting(tier), JOB) is not None:
                world.client.zadd(keys.waiting(tier), {JOB: 1})
        owners = [(d.life.tier, d.life.owner) for d in world.dead + [d for d in world.deliveries if d.lost]]

        async def once() -> None:
            client = aioredis.Redis.from_url(world.url, decode_responses=True)
            for tier, owner in owners:
                await salvage.take_over(client, world.pool, tier, owner, _never)
            for _ in range(2):  # what is missing must be missing twice
                await salvage.sweep(client, world.pool)
            await client.aclose()

        asyncio.run(once())

    @initialize(one_redis=st.booleans(), in_a_chord=st.booleans())
    def results_are_kept_beside_the_ledger_or_elsewhere(self, one_redis: bool, in_a_chord: bool) -> None:
        self.world.one_redis, self.world.in_a_chord = one_redis, in_a_chord

    @precondition(lambda self: any(place.startswith("queue") for place in self.world.places()))
    @rule(steps=st.integers(0, 2))
    def a_worker_takes_a_message(self, steps: int) -> None:
        delivery = self._take("gpu") or self._take("cpu")
        if delivery is None:
            return
        for step in (self._hold, self._claim)[:steps]:
            step(delivery)

    @while_one_is("taken", "held", "result", "failure")
    @rule(n=st.integers(0, 3))
    def a_worker_goes_on(self, n: int) -> None:
        delivery = self._pick(n, "taken", "held", "result", "failure")
        if delivery:
            {"taken": self._hold, "held": self._claim, "result": self._close, "failure": self._close}[delivery.step](delivery)

    @while_one_is("running")
    @rule(n=st.integers(0, 3))
    def an_attempt_returns(self, n: int) -> None:
        if delivery := self._pick(n, "running"):
            self._finish(delivery)

    @while_one_is("running")
    @rule(n=st.integers(0, 3))
    def an_attempt_returns_and_its_worker_dies_before_the_result_is_stored(self, n: int) -> None:
        delivery = self._pick(n, "running")
        if delivery and not delivery.lost and delivery.attempt.settle(State.CLAIMED, State.FINISHING, how="done"):
            self.world.interruptions += 1
            self._die(delivery)

    @while_one_is("running")
    @rule(times=st.integers(1, 3), finishing=st.booleans())
    def an_attempt_is_cut_off_and_delivered_again(self, times: int, finishing: bool) -> None:
        """Deaths, take-overs, and the next worker, in one go: what would be reached too seldom by chance."""
        for _ in range(times):
            delivery = self._pick(0, "running")
            if delivery is None:
                return
            if finishing and not delivery.lost and delivery.attempt.settle(State.CLAIMED, State.FINISHING, how="done"):
                self.world.interruptions += 1
                Fence.reached.add("interrupted")
            self._die(delivery)
            self._salvage()
            self.a_worker_takes_a_message(2)

    @while_one_is("running")
    @rule(n=st.integers(0, 3))
    def an_attempt_returns_while_the_ledger_does_not_know_its_job(self, n: int) -> None:
        """It stores nothing itself: who knows what has been accepted meanwhile."""
        delivery, entry = self._pick(n, "running"), self.world.pool.keys.job(JOB)
        assert delivery
        self.world.client.rename(entry, "entry")
        stored_before = self.world.stored_at_once
        assert self._returned(delivery.attempt)
        assert self.world.stored_at_once == stored_before
        assert bool(self.world.client.exists("result")) == stored_before
        self.world.client.rename("entry", entry)
        Fence.reached.add("unknown")

    @while_one_is("running")
    @rule(raises=st.booleans())
    def a_zombie_is_taken_over_and_then_ends(self, raises: bool) -> None:
        """Likewise."""
        zombie = self._pick(0, "running")
        assert zombie
        zombie.lost = True
        self._salvage()
        self._raise(zombie) if raises else self._finish(zombie)

    @while_one_is("running")
    @rule(n=st.integers(0, 3))
    def an_attempt_raises(self, n: int) -> None:
        if delivery := self._pick(n, "running"):
            self._raise(delivery)

    @while_one_is("running")
    @rule(n=st.integers(0, 3))
    def a_soft_time_limit_strikes_before_an_attempt_hears_that_it_has_ended(self, n: int) -> None:
        """So it is taken for one that has failed in time."""
        delivery = self._pick(n, "running")
        assert delivery
        if self._returned(delivery.attempt):
            self.world.interruptions += 1
            if self.world.one_redis:
                self.world.stored.append("result")
        self._raise(delivery)

    @while_one_is("running")
    @rule(stored=st.booleans())
    def a_child_is_killed_and_its_worker_sees_it(self, stored: bool) -> None:
        """Before or after it stored its result."""
        delivery = self._pick(0, "running")
        assert delivery
        if stored:
            self._finish(delivery)
        if delivery.step in ("running", "result"):
            outcome = delivery.attempt.end(ledger.after_loss, "lost")
            Fence.reached.add(f"killed when {delivery.step}: {outcome.name}")
            self._ack(delivery)

    @while_one_is("running")
    @rule(n=st.integers(0, 3))
    def a_worker_that_has_to_leave_gives_its_job_back(self, n: int) -> None:
        delivery = self._pick(n, "running")
        if delivery and delivery.attempt.release():
            self.world.interruptions += 1
            self._ack(delivery)

    @while_one_is("taken", "held", "running", "result", "failure")
    @rule(n=st.integers(0, 3))
    def a_worker_dies(self, n: int) -> None:
        if delivery := self._pick(n, "taken", "held", "running", "result", "failure"):
            self._die(delivery)

    @while_one_is("taken", "held", "running", "result", "failure")
    @rule(n=st.integers(0, 3))
    def a_worker_falls_silent_and_lives(self, n: int) -> None:
        if delivery := self._pick(n, "taken", "held", "running", "result", "failure"):
            delivery.lost = True

    @precondition(lambda self: self.world.dead or any(d.lost or d.step == "taken" for d in self.world.deliveries))
    @rule()
    def an_operator_takes_over_and_sweeps(self) -> None:
        self._salvage()

    @rule()
    def a_message_is_delivered_twice(self) -> None:
        """As when a sweep was wrong, or an old copy turns up."""
        raw = self.world.client.lindex(self.world.pool.keys.queue_list("gpu-tasks", 0), -1)
        if raw:
            message = json.loads(raw)
            message["properties"]["delivery_tag"] = uuid4().hex
            self.world.client.rpush(self.world.pool.keys.queue_list("gpu-tasks", 0), json.dumps(message))

    @invariant()
    def nothing_is_stored_twice(self) -> None:
        assert len(self.world.stored) <= 1

    @invariant()
    def a_result_is_stored_by_the_step_that_ends_its_attempt_and_by_no_other(self) -> None:
        assert bool(self.world.client.exists("result")) == self.world.stored_at_once

    @invariant()
    def each_tier_starts_a_job_once_and_the_last_once_more(self) -> None:
        starts = self.world.job().starts
        assert starts.get("gpu", 0) <= 1 + self.world.interruptions
        assert starts.get("cpu", 0) <= 2 + self.world.interruptions

    @invariant()
    def an_attempt_is_counted_once(self) -> None:
        counted, starts = self.world.counted("gpu"), self.world.job().starts.get("gpu", 0)
        assert counted.succeeded + counted.failed <= starts
        assert counted.confirmed + counted.refuted <= counted.failed <= 1
        assert self.world.counted("cpu").failed == 0

    @invariant()
    def a_job_that_has_not_ended_can_be_found(self) -> None:
        job = self.world.job()
        assert job.state.ended or self.world.places() or job.message, "nobody has it"


class Rebalanced(Fence):
    """The same, while an operator moves what waits from one tier to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.moves: list[str] = []

    @precondition(lambda self: self.world.waits_for_its_first_start())
    @rule(away=st.booleans(), steps=st.integers(0, 2))
    def an_operator_moves_it_to_another_tier_whose_worker_may_take_it(self, away: bool, steps: int) -> None:
        """Copies of it may be with workers; what one has claimed stays."""
        before = self.world.job()
        source, target = ("gpu", "cpu") if away else ("cpu", "gpu")
        policy = planning.policy(self.world.pool.spec)

        async def once() -> int:
            client = aioredis.Redis.from_url(self.world.url, decode_responses=True)
            try:
                return await moving.move(client, self.world.pool.keys, policy, Transfer(source, target, 1, "here"))
            finally:
                await client.aclose()

        if asyncio.run(once()):
            assert (before.state, before.tier, self.world.job().tier) == (State.ADMITTED, source, target)
            assert not before.runs
            self.moves.append(target)
            Fence.reached.add(f"moved to {' and '.join(self.moves)}")
            if taken := self._take(target) if steps else None:
                for step in (self._hold, self._claim)[:steps]:
                    step(taken)


def explore(
    fence: type[Fence], url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, *, examples: int
) -> None:
    caplog.set_level(logging.ERROR, "workerpool_routing.worker")
    monkeypatch.setattr(ledger, "MISSING_MS", 0)
    monkeypatch.setattr(ledger, "REPUBLISHED_AT_MOST", 100)  # chance loses a message again and again
    fence.url, Fence.reached = url, set()
    run_state_machine_as_test(
        fence,
        settings=settings(
            derandomize=True,
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.long
def test_in_any_order_a_job_has_one_outcome_and_is_never_lost(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    explore(Fence, url, monkeypatch, caplog, examples=200)
    # A model that never gets anywhere would hold too. Which orders come up hangs on every line of source: the rare ones follow.
    assert {"claim run", "claim ended", "claim stale", "ended done"} <= Fence.reached


@pytest.mark.parametrize(("one_redis", "in_a_chord"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(
    ("step", "times", "elsewhere", "beside_the_ledger"),
    [
        (lambda fence: fence.an_attempt_raises(0), 2, "raised FINAL", "raised FINAL"),
        (lambda fence: fence.a_zombie_is_taken_over_and_then_ends(raises=True), 1, "raised NOT_OURS", "raised NOT_OURS"),
        (lambda fence: fence.a_zombie_is_taken_over_and_then_ends(raises=False), 1, "dropped", "dropped"),
        (
            lambda fence: fence.a_child_is_killed_and_its_worker_sees_it(stored=False), 1,
            "killed when running: MOVED", "killed when running: MOVED",
        ),
        (
            lambda fence: fence.a_child_is_killed_and_its_worker_sees_it(stored=True), 1,
            "killed when result: MOVED", "killed when result: NOT_OURS",
        ),
        (
            lambda fence: fence.an_attempt_is_cut_off_and_delivered_again(times=3, finishing=False), 1,
            "claim poison", "claim poison",
        ),
        (
            lambda fence: fence.an_attempt_is_cut_off_and_delivered_again(times=1, finishing=True), 1,
            "interrupted", "ended done",
        ),
        (
            lambda fence: fence.a_soft_time_limit_strikes_before_an_attempt_hears_that_it_has_ended(0), 1,
            "raised MOVED", "raised NOT_OURS",
        ),
        (lambda fence: fence.an_attempt_returns_while_the_ledger_does_not_know_its_job(0), 1, "unknown", "unknown"),
    ],
    ids=[
        "raises twice", "zombie raises", "zombie returns", "child dies", "child dies after", "dies each time", "interrupted",
        "unheard", "unknown",
    ],
)  # fmt: skip
def test_what_chance_reaches_too_seldom_holds_too(
    url: str, monkeypatch: pytest.MonkeyPatch, step: Callable[[Fence], None], times: int, elsewhere: str,
    beside_the_ledger: str, one_redis: bool, in_a_chord: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(ledger, "MISSING_MS", 0)
    Fence.url, Fence.reached = url, set()
    fence = Fence()
    fence.results_are_kept_beside_the_ledger_or_elsewhere(one_redis, in_a_chord)
    for _ in range(times):
        fence.a_worker_takes_a_message(2)
        step(fence)
        fence.nothing_is_stored_twice()
        fence.each_tier_starts_a_job_once_and_the_last_once_more()
        fence.an_attempt_is_counted_once()
        fence.a_job_that_has_not_ended_can_be_found()
    fence.teardown()
    assert (beside_the_ledger if one_redis and not in_a_chord else elsewhere) in Fence.reached


@contextmanager
def claimed(url: str) -> Iterator[tuple[Fence, Delivery]]:
    """A job that its first worker has claimed."""
    Fence.url = url
    fence = Fence()
    fence.a_worker_takes_a_message(2)
    (delivery,) = fence.world.deliveries
    assert (delivery.tag, delivery.step) == ("first", "running")
    try:
        yield fence, delivery
    finally:
        fence.connection.client.close()
        fence.world.client.close()


def test_an_attempt_leaves_the_state_that_is_named_and_no_other(url: str) -> None:
    ends = (State.DONE, State.FAILED, State.EXPIRED)
    with claimed(url) as (fence, delivery):
        entry = fence.world.pool.keys.job(JOB)
        for found, before, after in product(State, (State.CLAIMED, State.FINISHING), (State.FINISHING, *ends)):
            fence.world.client.hset(entry, "state", found)
            moved = delivery.attempt.settle(before, after)
            assert moved is (found in (before, after)), (found, before, after)
            assert fence.world.job().state is (after if moved else found)
        for found in (State.ADMITTED, State.FINISHING, *ends):
            fence.world.client.hset(entry, "state", found)
            assert not delivery.attempt.retry("", "", 0)
            assert fence.world.job().state is found


@pytest.mark.parametrize("after", [State.FINISHING, State.DONE, State.FAILED, State.EXPIRED])
def test_a_delivery_ends_with_its_job_though_its_worker_can_no_longer_acknowledge_it(url: str, after: State) -> None:
    with claimed(url) as (fence, delivery):
        assert delivery.attempt.settle(State.CLAIMED, after)
        assert fence.world.places() == ([] if after.ended else ["in flight gpu"])
        assert fence.world.client.zcard(fence.world.pool.keys.unacked_index("gpu")) == (0 if after.ended else 1)


@pytest.mark.parametrize("after", [State.FINISHING, State.DONE, State.FAILED, State.EXPIRED])
def test_how_long_a_task_takes_is_told_by_jobs_that_have_ended_and_not_by_revoked_ones(url: str, after: State) -> None:
    with claimed(url) as (fence, delivery):
        assert delivery.attempt.settle(State.CLAIMED, after)
        assert fence.world.client.hexists(fence.world.pool.keys.service("gpu"), "t") is (after in (State.DONE, State.FAILED))


def test_a_claim_whose_answer_was_lost_is_answered_again_and_is_one_start(url: str) -> None:
    Fence.url = url
    fence = Fence()
    fence.a_worker_takes_a_message(1)
    (delivery,) = fence.world.deliveries
    call = ledger.claim(
        fence.world.pool.keys, JOB, attempt=1, tag=delivery.tag, owner=delivery.life.owner, tier="gpu", retries=0, moves_on=True,
        no_result=False, name="this request",
    )  # fmt: skip
    assert [fence.connection.run("claim", call) for _ in range(2)] == [Claim.RUN, Claim.RUN]
    assert fence.world.job().starts == {"gpu": 1}
    fence.connection.client.close()
    fence.world.client.close()


def test_a_copy_from_before_a_retry_does_not_run_and_does_not_replace_the_retry_on_the_ledger(url: str) -> None:
    with claimed(url) as (fence, delivery):
        keys = fence.world.pool.keys
        raw = fence.world.client.hget(keys.unacked("gpu"), delivery.tag)
        assert delivery.attempt.retry("the retry", "gpu-tasks", 0)
        assert delivery.attempt.claim(str) is Claim.STALE
        back = ledger.requeue(keys, "gpu", tag=delivery.tag, raw=raw, delivery_tag="fresh")
        assert fence.connection.run("requeue", back) == 1
        assert fence.world.job().message == "the retry"


def test_a_retry_of_a_job_that_the_ledger_does_not_know_goes_on_and_makes_no_entry(url: str) -> None:
    with claimed(url) as (fence, delivery):
        keys = fence.world.pool.keys
        fence.world.client.delete(keys.job(JOB))
        assert delivery.attempt.retry("", "gpu-tasks", 0)
        assert not fence.world.client.exists(keys.job(JOB), keys.held(delivery.life.owner))


@pytest.mark.parametrize("other", [{"attempt": 2}, {"tag": "second"}, {"owner": "gpu.other"}], ids=str)
def test_an_attempt_is_ended_under_the_number_the_tag_and_the_owner_of_its_claim_and_no_other(
    url: str, other: dict[str, Any]
) -> None:
    with claimed(url) as (fence, delivery):
        keys, policy = fence.world.pool.keys, planning.policy(fence.world.pool.spec)
        named: dict[str, Any] = {"attempt": 1, "tag": delivery.tag, "owner": delivery.life.owner, "tier": "gpu"} | other
        before = fence.world.client.hgetall(keys.job(JOB))
        calls = [
            ("settle", ledger.settle(keys, policy, JOB, **named, before=State.CLAIMED, after=after))
            for after in (State.FINISHING, State.DONE, State.FAILED, State.EXPIRED)
        ]
        for name, call in (*calls, ("readmit", ledger.readmit(keys, JOB, **named, how="retry", retries=1))):
            assert fence.connection.run(name, call) == 0
        if "owner" not in other:
            job = replace(fence.world.job(), **other)
            raw = fence.world.client.hget(keys.unacked("gpu"), delivery.tag)
            to = ledger.after_failure(policy, job)
            assert to
            call = ledger.move(keys, job, to, held_as=delivery.tag, raw=raw, delivery_tag="fresh", how="failed")
            assert fence.connection.run("move", call) == 0
        assert fence.world.client.hgetall(keys.job(JOB)) == before
        assert fence.world.places() == ["in flight gpu"]


@pytest.mark.parametrize(("asked_by", "answer"), [("first", Claim.RUN), ("of a zombie", Claim.STALE), ("", Claim.RUN)])
def test_a_retry_overtakes_the_attempt_that_asked_for_it_and_no_other(url: str, asked_by: str, answer: Claim) -> None:
    """One that an earlier release has published does not say who asked."""
    with claimed(url) as (fence, delivery):
        fence.connection.run("hold", ledger.hold(fence.world.pool.keys, "gpu", tag="retry", value="[]"))
        retry = Attempt(delivery.life, JOB, 1, "retry", 1, asked_by=asked_by)
        assert retry.claim(str) is answer
        assert fence.world.job().tag == ("retry" if answer is Claim.RUN else "first")


def test_it_is_so_too_while_an_operator_moves_waiting_jobs_between_the_tiers(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    explore(Rebalanced, url, monkeypatch, caplog, examples=100)
    assert {"claim run", "claim ended", "ended done"} <= Fence.reached


def test_a_job_that_was_moved_away_and_home_falls_back_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "MISSING_MS", 0)
    Fence.url, Fence.reached = url, set()
    fence = Rebalanced()
    fence.results_are_kept_beside_the_ledger_or_elsewhere(one_redis=True, in_a_chord=False)
    fence.a_message_is_delivered_twice()
    fence.an_operator_moves_it_to_another_tier_whose_worker_may_take_it(away=True, steps=0)
    fence.an_operator_moves_it_to_another_tier_whose_worker_may_take_it(away=False, steps=2)
    fence.an_attempt_raises(0)
    fence.an_attempt_is_counted_once()
    fence.teardown()
    assert {"moved to cpu", "moved to cpu and gpu", "claim run", "raised MOVED", "ended done"} <= Fence.reached


def test_a_retry_may_go_to_a_tier_that_its_job_has_left(url: str) -> None:
    Fence.url = url
    fence = Rebalanced()
    fence.an_operator_moves_it_to_another_tier_whose_worker_may_take_it(away=True, steps=2)
    (delivery,) = fence.world.deliveries
    assert (delivery.life.tier, delivery.step) == ("cpu", "running")
    assert delivery.attempt.retry("", "gpu-tasks", 0)
    assert not fence.world.client.exists(fence.world.pool.keys.held(delivery.life.owner))
    fence.connection.run("hold", ledger.hold(fence.world.pool.keys, "gpu", tag="retry", value="[]"))
    accelerated = WorkerLife(delivery.life.pool, "gpu", "gpu.other", fence.connection)
    assert Attempt(accelerated, JOB, 1, "retry", 1).claim(str) is Claim.RUN
    fence.connection.client.close()
    fence.world.client.close()
