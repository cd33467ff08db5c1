"""What ``/metrics`` shows of the last pass, and that the documentation lists all of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from workerpool_operator import metrics
from workerpool_operator.metrics import Metrics
from workerpool_operator.model import WorkerPoolSpec
from workerpool_operator.observation import (
    Breaker,
    BreakerState,
    BrokerReading,
    Checkpoint,
    QueueReading,
    Served,
    Unavailable,
    Waits,
)
from workerpool_operator.ports import Pool, Report
from workerpool_operator.reconcile import Passes
from workerpool_operator.status import Condition, ConditionType, Status, TierStatus
from workerpool_routing.wire import Milliseconds

pytestmark = pytest.mark.unit

TABLE = Path(__file__).parents[2] / "docs" / "metrics.md"
WORKER = {"spec": {"containers": [{"name": "worker"}]}}
SPEC = WorkerPoolSpec.model_validate(
    {"app": "media", "broker": {"url": "redis://one"}, "tiers": [{"name": "cpu", "queue": "celery", "template": WORKER}]}
)
POOL = Pool("ml", "media", "uid", 1, 0.0, SPEC)
QUEUE = QueueReading(waiting=12, in_flight=2, spilled=0, served=Served(7, 93.5, 1300.0), waits=Waits(9, 45.5, 40.25, 6))
READING = BrokerReading({"cpu": QUEUE}, "r1", Milliseconds(0), {"cpu:NoAcceleratedWorkers": 5})
OUTAGE = Unavailable("connection refused")


def shown(reading: BrokerReading | Unavailable, *, gone: bool = False, refused: bool = False, pool: Pool = POOL) -> list[str]:
    known = None if isinstance(reading, Unavailable) else 12
    tier = TierStatus("cpu", 3, 1, 1, 1, 0, known, known and 2, known and 0, "BacklogExceedsCapacity", "12 waiting; wanted: 3")
    ready = Condition(ConditionType.READY, "True", "Working", "", 1)
    passes = Passes(ended=4, seconds=0.5, errors=1)
    exposed = Metrics(lambda: True, lambda: passes, lambda: {} if gone else {POOL.id: POOL}, lambda: [POOL.id] if refused else [])
    exposed.saw(Report(pool, Status(1, (ready,), (tier,), known, known and 2, ""), reading))
    registry = CollectorRegistry()
    registry.register(exposed)
    return [line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")]


def test_a_pass_is_shown_in_full() -> None:
    tier = 'pool="ml/media",tier="cpu"'
    assert sorted(shown(READING)) == sorted(
        [
            "workerpool_leader 1.0",
            "workerpool_pass_seconds_count 4.0",
            "workerpool_pass_seconds_sum 0.5",
            "workerpool_pass_errors_total 1.0",
            'workerpool_broker_reachable{pool="ml/media"} 1.0',
            'workerpool_condition{pool="ml/media",status="True",type="Ready"} 1.0',
            f"workerpool_tier_replicas_desired{{{tier}}} 3.0",
            *(
                f'workerpool_tier_replicas{{pool="ml/media",state="{state}",tier="cpu"}} {count}'
                for state, count in {"ready": 1.0, "starting": 1.0, "unschedulable": 1.0, "draining": 0.0}.items()
            ),
            'workerpool_tier_reason{pool="ml/media",reason="BacklogExceedsCapacity",tier="cpu"} 1.0',
            f"workerpool_tier_jobs_waiting{{{tier}}} 12.0",
            f"workerpool_tier_jobs_in_flight{{{tier}}} 2.0",
            f"workerpool_tier_jobs_spilled{{{tier}}} 0.0",
            f"workerpool_tier_job_seconds_count{{{tier}}} 7.0",
            f"workerpool_tier_job_seconds_sum{{{tier}}} 93.5",
            f"workerpool_tier_job_wait_seconds_count{{{tier}}} 9.0",
            f"workerpool_tier_job_wait_seconds_sum{{{tier}}} 45.5",
            f"workerpool_tier_job_wait_expected_seconds_total{{{tier}}} 40.25",
            f"workerpool_tier_job_waits_as_expected_total{{{tier}}} 6.0",
            'workerpool_jobs_routed_total{pool="ml/media",reason="NoAcceleratedWorkers",tier="cpu"} 5.0',
        ]
    )


@pytest.mark.parametrize("state", BreakerState)
def test_an_accelerated_tier_shows_the_state_of_its_breaker(state: BreakerState) -> None:
    accelerator = {"resource": "nvidia.com/gpu"}
    tiers = [{"name": "cpu", "queue": "celery", "accelerator": accelerator, "template": WORKER}]
    nowhere = {"fallback": {"onFailure": False, "onLoss": False}}
    raw = {"app": "media", "broker": {"url": "redis://one"}, "tiers": tiers, "routing": nowhere}
    pool = replace(POOL, spec=WorkerPoolSpec.model_validate(raw))
    reading = replace(READING, tiers={"cpu": replace(QUEUE, kept=Checkpoint(Breaker(state)))})
    lines = [line for line in shown(reading, pool=pool) if line.startswith("workerpool_tier_breaker")]
    assert lines == [f'workerpool_tier_breaker{{pool="ml/media",state="{state}",tier="cpu"}} 1.0']


def test_what_is_not_known_is_left_out() -> None:
    lines = shown(OUTAGE)
    assert 'workerpool_broker_reachable{pool="ml/media"} 0.0' in lines
    assert not [line for line in lines if "_jobs_" in line or "_job_" in line]


def test_a_pool_that_is_gone_leaves_nothing_behind() -> None:
    assert not [line for line in shown(READING, gone=True) if "ml/media" in line]


@pytest.mark.parametrize("gone", [False, True], ids=["just refused", "refused for long"])
def test_a_pool_that_is_not_valid_is_shown_as_not_ready(gone: bool) -> None:
    lines = [line for line in shown(READING, gone=gone, refused=True) if "ml/media" in line]
    assert lines == ['workerpool_condition{pool="ml/media",status="False",type="Ready"} 1.0']


def test_the_documentation_lists_every_metric_as_it_is() -> None:
    rows = [line for line in TABLE.read_text().splitlines() if line.startswith("| `")]
    assert rows == [
        f"| `{metric.name}` | {metric.family().type} | {', '.join(metric.labels)} | {metric.meaning} |" for metric in metrics.ALL
    ]
