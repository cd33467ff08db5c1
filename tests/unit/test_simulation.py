"""Traces, the simulated world, the bound and the command, in the small."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from workerpool_operator.cli import main
from workerpool_operator.simulation import bound, engine, trace
from workerpool_operator.simulation.engine import Orders, Outage, Outcome, Tier, TierSetup, World
from workerpool_operator.simulation.trace import BadTrace, Trace
from workerpool_routing.decide import Reason
from workerpool_routing.ledger import Job, Run, State
from workerpool_routing.wire import Milliseconds

pytestmark = pytest.mark.unit


class Script:
    """Orders what it is told, when it is told."""

    reacts = False

    def __init__(self, *counts: tuple[float, int], spares_busy: bool = False) -> None:
        self._counts = list(counts)
        self.spares_busy = spares_busy

    def look(self, tiers: Mapping[str, Tier], now: float) -> Orders:
        """The last count whose time has come."""
        count = [count for at, count in self._counts if at <= now][-1]
        later = [at for at, _ in self._counts if at > now]
        return Orders({next(iter(tiers)): count}, later[0] if later else float("inf"))


def play(jobs: Trace, *counts: tuple[float, int], slots: int = 1, spares_busy: bool = False) -> Outcome:
    world = World([TierSetup("workers", lambda _: 10.0, slots)])
    return engine.run(jobs, world, Script(*counts, spares_busy=spares_busy))


def test_a_job_starts_when_a_worker_is_ready_and_the_next_when_it_has_ended() -> None:
    outcome = play(Trace("three", [0.0, 1.0, 30.0], [5.0, 5.0, 5.0]), (0.0, 1), (40.0, 0))
    assert outcome.waits == [10.0, 14.0, 0.0]
    assert outcome.replica_seconds == {"workers": 40.0}


def test_slots_of_one_worker_run_side_by_side() -> None:
    assert play(Trace("three", [0.0] * 3, [5.0] * 3), (0.0, 1), (40.0, 0), slots=2).waits == [10.0, 10.0, 15.0]


def test_a_replica_set_kills_what_does_not_end_within_the_grace_period() -> None:
    outcome = play(Trace("long", [0.0], [100.0]), (0.0, 1), (20.0, 0), (30.0, 1), (200.0, 0))
    assert (outcome.killed, outcome.waits, outcome.starts) == (1, [10.0], [10.0])
    assert outcome.replica_seconds["workers"] == 20.0 + engine.GRACE_SECONDS + 170.0


def test_a_busy_worker_that_is_spared_ends_its_job_first() -> None:
    outcome = play(Trace("long", [0.0], [100.0]), (0.0, 1), (20.0, 0), spares_busy=True)
    assert (outcome.killed, outcome.replica_seconds) == (0, {"workers": 110.0})


def test_workers_that_start_are_removed_before_those_that_are_ready() -> None:
    outcome = play(Trace("one", [0.0], [50.0]), (0.0, 1), (20.0, 2), (25.0, 1), (70.0, 0), spares_busy=True)
    assert (outcome.killed, outcome.replica_seconds) == (0, {"workers": 75.0})


def test_jobs_of_a_lost_tier_run_on_the_other_one_when_the_loss_is_seen() -> None:
    tiers = [TierSetup("gpu", lambda _: 10.0, initial=1), TierSetup("cpu", lambda _: 10.0, slowdown=2.0, initial=1)]

    class Keep:
        reacts = spares_busy = True

        def look(self, _tiers: Mapping[str, Tier], _now: float) -> Orders:
            return Orders({"gpu": 1, "cpu": 1}, float("inf"))

    outcome = engine.run(Trace("one", [0.0], [100.0]), World(tiers, outages=(Outage("gpu", 50.0, 60.0),)), Keep())
    assert outcome.waits == [0.0]
    assert outcome.replica_seconds["cpu"] >= 50 + engine.LOSS_SEEN_SECONDS + 200


def test_the_bound_of_one_job_is_its_work_and_the_part_of_a_start_that_it_cannot_share() -> None:
    least = bound.replica_seconds(Trace("one", [0.0], [100.0]), start_seconds=0.0, target_wait=60, bin_seconds=5.0)
    assert least == pytest.approx(100.0, rel=0.01)
    dear = bound.replica_seconds(Trace("one", [0.0], [100.0]), start_seconds=80.0, target_wait=60, bin_seconds=5.0)
    assert dear == pytest.approx(100.0 + 80.0 * 100 / 160, rel=0.05)


def test_the_bound_falls_with_the_target_and_rises_with_the_start_time() -> None:
    jobs = trace.images(1, jobs=500)
    tight, loose = (bound.replica_seconds(jobs, start_seconds=45, target_wait=wait) for wait in (30, 600))
    assert sum(jobs.services) * 0.999 <= loose <= tight <= bound.replica_seconds(jobs, start_seconds=240, target_wait=30)


def test_nothing_is_needed_for_no_jobs() -> None:
    assert bound.replica_seconds(Trace("none", [], []), start_seconds=45.0, target_wait=60) == 0.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("arrival_s,service_s\n1,2\n0.5,3\n", "line 3: arrival_s is 0.5, earlier than 1 before it"),
        ("arrival_s,service_s\n1,-2\n", "line 2: service_s is '-2': it must be a number of seconds, 0 or more"),
        ("arrival_s,service_s\n1,\n", "line 2: service_s is missing"),
        ("arrival_s,service_s\n1\n", "line 2: service_s is missing"),
        ("arrival_s,exec_s\nsoon,1\n", "line 2: arrival_s is 'soon'"),
        ("arrival_s,exec_s\nnan,1\n", "line 2: arrival_s is 'nan'"),
        ("arrival_s,length\n1,1\n", "line 1: no column service_s or exec_s; the columns are: arrival_s, length"),
        ("at,exec_s\n1,1\n", "line 1: no column arrival_s"),
        ("", "line 1: no column arrival_s; the columns are: none"),
    ],
)
def test_a_trace_that_cannot_be_used_is_refused_with_its_place(text: str, said: str) -> None:
    with pytest.raises(BadTrace, match=said):
        trace.read("jobs.csv", text.splitlines(keepends=True))


def test_a_trace_may_have_other_columns_and_names_of_its_own() -> None:
    lines = ["day,start,took\n", "1,0,5\n", "1,2.5,7\n"]
    jobs = trace.read("jobs.csv", lines, {"arrival_s": "start", "service_s": "took"})
    assert (list(jobs.arrivals), list(jobs.services)) == ([0.0, 2.5], [5.0, 7.0])


@pytest.mark.parametrize("name", trace.SYNTHETIC)
def test_made_up_jobs_are_in_order_and_the_same_for_the_same_seed(name: str) -> None:
    jobs = trace.SYNTHETIC[name](3)
    assert list(jobs.arrivals) == sorted(jobs.arrivals)
    assert len(jobs) > 1_000
    assert min(jobs.services) > 0
    assert jobs == trace.SYNTHETIC[name](3)
    assert jobs != trace.SYNTHETIC[name](4)


def job(admitted: int, *runs: Run, wanted: str = "gpu") -> Job:
    return Job(
        "t", "media.t", State.DONE, 1, "gpu", wanted, required=False, reason=Reason.FREE_SLOT,
        times={State.ADMITTED: Milliseconds(admitted)}, runs=runs,
    )  # fmt: skip


def ran(tier: str, began: int, ended: int, how: str = "done") -> Run:
    return Run(1, tier, "w.1", Milliseconds(began), Milliseconds(ended), how)


def test_the_jobs_of_a_ledger_come_as_they_came_and_what_ran_elsewhere_takes_the_mean() -> None:
    jobs = [
        job(9_000, ran("gpu", 9_500, 13_500)),
        job(5_000, ran("gpu", 5_000, 5_900, "returned"), ran("gpu", 6_000, 8_000)),
        job(7_000, ran("gpu", 7_000, 7_500, "failed"), ran("cpu", 8_000, 38_000)),
        job(1_000, ran("cpu", 1_000, 2_000), wanted="cpu"),
    ]
    assert trace.of_jobs("ml/media", "gpu", jobs) == (Trace("ml/media", [0.0, 2.0, 4.0], [2.0, 3.0, 4.0]), 1)


def test_a_ledger_that_says_nothing_about_a_tier_is_no_trace() -> None:
    with pytest.raises(BadTrace, match="the ledger of ml/media has no job"):
        trace.of_jobs("ml/media", "gpu", [job(1, ran("cpu", 1, 2)), job(1, wanted="cpu")])


def simulate(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["simulate", *map(str, arguments)])


JOBS = "\n".join(["arrival_s,exec_s", *(f"{n * 20},30" for n in range(200))])


def jobs_in(directory: Path, text: str = JOBS) -> Path:
    file = directory / "jobs.csv"
    file.write_text(text)
    return file


def test_the_command_compares_policies_in_a_table_and_in_json(tmp_path: Path) -> None:
    result = simulate("--trace", jobs_in(tmp_path), "--json", tmp_path / "out.json", "--plot", tmp_path / "out.png")
    assert result.exit_code == 0, result.output
    assert [name in result.output for name in ("workerpool", "keda", "keda-inflight", "bound")] == [True] * 4
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["policies"].keys() == {"workerpool", "keda", "keda-inflight"}
    assert found["policies"]["workerpool"].keys() == {
        "jobs", "slo_percent", "wait_p50", "wait_p95", "wait_p99", "replica_hours", "cost_ratio", "killed", "changes",
    }  # fmt: skip
    assert found["bound"]["replica_hours"] > 1
    assert (tmp_path / "out.png").stat().st_size > 10_000


def test_the_command_takes_bounds_target_and_slots_from_the_pool_and_says_what_it_assumed(tmp_path: Path) -> None:
    pool = tmp_path / "pool.yaml"
    pool.write_text(
        "apiVersion: workerpool.dev/v1alpha1\nkind: WorkerPool\nmetadata: {name: media}\nspec:\n  app: media.tasks\n"
        "  broker: {url: redis://one}\n  scaling: {targetWaitSeconds: 90}\n  tiers:\n"
        "    - {name: cpu, queue: celery, concurrency: 3, template: {spec: {containers: [{name: worker}]}}}\n"
    )
    result = simulate("--trace", jobs_in(tmp_path), "--pool", pool, "--policy", "workerpool")
    assert result.exit_code == 0, result.output
    assert "tier cpu sets no replicas.max: 10 is assumed" in result.output
    assert "target 90 s, 3 slots, 0 to 10 replicas" in " ".join(result.output.split())
    assert "keda" not in result.output
    assert "ever longer" not in result.output


def test_the_command_says_when_the_jobs_are_more_than_the_pool_can_ever_do(tmp_path: Path) -> None:
    rows = [f"{second},30" for second in range(61)]
    pool = tmp_path / "pool.yaml"
    pool.write_text(
        "apiVersion: workerpool.dev/v1alpha1\nkind: WorkerPool\nmetadata: {name: media}\nspec:\n  app: media.tasks\n"
        "  broker: {url: redis://one}\n  tiers:\n"
        "    - {name: cpu, queue: celery, replicas: {max: 2}, template: {spec: {containers: [{name: worker}]}}}\n"
    )
    trace = jobs_in(tmp_path, "\n".join(["arrival_s,exec_s", *rows]))
    result = simulate("--trace", trace, "--pool", pool, "--policy", "workerpool")
    assert "these jobs keep 30 workers busy, replicas.max is 2: they wait ever longer" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give one of --trace FILE, --synthetic NAME and --from-redis"),
        (["--trace", "JOBS", "--from-redis"], "give one of --trace FILE, --synthetic NAME and --from-redis"),
        (["--from-redis"], "--from-redis needs --pool FILE"),
        (["--synthetic", "images", "--target-wait", "-1"], "--target-wait"),
        (["--synthetic", "images", "--start-seconds", "-1"], "--start-seconds"),
        (["--synthetic", "images", "--slots", "0"], "--slots"),
        (["--synthetic", "nothing"], "--synthetic"),
        (["--synthetic", "images", "--policy", "magic"], "--policy"),
        (["--trace", "JOBS", "--column", "length=took"], "--column length=took: must be NAME=COLUMN with NAME one of"),
    ],
)
def test_impossible_parameters_are_named(arguments: list[str], said: str, tmp_path: Path) -> None:
    file = str(jobs_in(tmp_path))
    result = simulate(*(file if argument == "JOBS" else argument for argument in arguments))
    assert (result.exit_code, said in result.output) == (2, True), result.output


def test_a_trace_without_a_job_gets_a_clear_answer(tmp_path: Path) -> None:
    result = simulate("--trace", jobs_in(tmp_path, "arrival_s,exec_s\n"))
    assert (result.exit_code, "holds no job: there is nothing to simulate" in result.output) == (2, True), result.output


def test_a_bad_line_is_named_and_ends_with_2(tmp_path: Path) -> None:
    result = simulate("--trace", jobs_in(tmp_path, "arrival_s,exec_s\n0,1\n1,x\n"))
    assert (result.exit_code, result.output) == (
        2,
        "jobs.csv: line 3: exec_s is 'x': it must be a number of seconds, 0 or more\n",
    )
