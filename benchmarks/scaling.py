"""The scaling rule next to others on recorded and made-up days: ``make bench-scaling``.

Prints one table a scenario in Markdown, and draws the frontiers. Traces are read from ``--traces`` or WORKERPOOL_TRACES; where
there are none, made-up ones of the same kind are used, and the table says so.
"""

from __future__ import annotations

import argparse
import heapq
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.rules import BacklogPerInstance, DelayedOff, Judoscale, Knative, Static
from workerpool_operator import scaling
from workerpool_operator.model import Replicas, WorkerPoolSpec
from workerpool_operator.ports import Pool
from workerpool_operator.simulation import engine, trace
from workerpool_operator.simulation.compare import Score, Setting, lower_bound, play, pool_of, quantile, score, tier_of
from workerpool_operator.simulation.engine import Controller, Outage, TierSetup, World
from workerpool_operator.simulation.policies import Keda, Operator
from workerpool_operator.simulation.trace import Trace

MAXIMUM = 80
IMAGES = ("gentd26_sd_d01-12_fold24h.csv", "images")
BURSTS = ("azure_llm2023_code_1h.csv", "bursts")


@dataclass(frozen=True, slots=True)
class Scenario:
    """A trace (a file's name, and the made-up one in its place), start time, target, and the counts for the static rule."""

    name: str
    source: tuple[str, str]
    start_seconds: float
    target_wait: int
    static: Sequence[int]
    parameter: str
    values: Sequence[float]


SCENARIOS = (
    Scenario("S1", IMAGES, 45, 60, (30, 50), "CONFIDENCE", (0.0, 1.0, 1.64, 2.0, 2.33, 2.6, 3.0, 4.0)),
    Scenario("S2", IMAGES, 240, 300, (30, 50), "CONFIDENCE", (0.0, 1.0, 1.64, 2.0, 2.33, 2.6, 3.0, 4.0)),
    Scenario("S3", IMAGES, 240, 60, (30, 50), "BURST_DEVIATIONS", (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)),
    Scenario("S6", BURSTS, 45, 30, (16, 26), "BURST_DEVIATIONS", (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)),
)


def load(source: tuple[str, str], directory: Path | None) -> Trace:
    """The recorded trace where it is there, else the made-up one."""
    file, synthetic = source
    if directory and (directory / file).exists():
        with (directory / file).open(newline="") as lines:
            return trace.read(file, lines)
    return trace.SYNTHETIC[synthetic](1)


def rivals(setting: Setting, jobs: Trace) -> Iterator[tuple[str, Controller]]:
    """The other rules, each with the configuration that its documentation would give it here."""
    pool = bounded(setting)
    yield "KEDA + HPA, defaults", Keda(pool)
    yield "KEDA + HPA, target 1, poll 5 s", Keda(pool, target=1.0, poll_seconds=5.0)
    yield "KEDA fed with in flight, target 1, poll 5 s", Keda(pool, target=1.0, poll_seconds=5.0, in_flight=True)
    yield "Knative KPA", Knative(maximum=MAXIMUM)
    mean = statistics.fmean(jobs.services)
    yield "AWS backlog per instance", BacklogPerInstance(acceptable_wait=setting.target_wait, mean_service=mean, maximum=MAXIMUM)
    wait, start = setting.target_wait, setting.start_seconds
    yield "Judoscale", Judoscale(upper=wait / 2, lower=wait / 10, start_seconds=start, maximum=MAXIMUM)
    yield "DelayedOff, T = D", DelayedOff(start, maximum=MAXIMUM)


def bounded(setting: Setting) -> Pool:
    """A pool of one tier, 0 to :data:`MAXIMUM` replicas."""
    return pool_of(tier_of(Replicas(max=MAXIMUM)), setting)


@contextmanager
def inner(parameter: str, value: float) -> Iterator[None]:
    """The rule with another value of one of its constants."""
    before = getattr(scaling, parameter)
    setattr(scaling, parameter, value)
    try:
        yield
    finally:
        setattr(scaling, parameter, before)


def row(name: str, result: Score, seconds: float) -> str:
    """One line of a table."""
    ratio = 0.0 if result.cost_ratio is None else result.cost_ratio
    return (
        f"| {name} | {result.slo_percent:.2f} | {ratio:.2f} | {result.killed} | {result.wait_p50:.0f} | {result.wait_p95:.0f} | "
        f"{result.wait_p99:.0f} | {result.replica_hours:.1f} | {result.changes} | {seconds:.1f} |"
    )


def run_scenario(scenario: Scenario, directory: Path | None, plots: Path | None) -> None:
    """Print the table of one scenario, and draw its frontier."""
    jobs = load(scenario.source, directory)
    setting = Setting(scenario.start_seconds, scenario.target_wait)
    least = lower_bound(jobs, setting)
    print(f"\n### {scenario.name}: `{jobs.name}`, start {setting.start_seconds:g} s, target {setting.target_wait} s\n")
    print(f"{len(jobs)} jobs; work {sum(jobs.services) / 3600:.1f} h; lower bound {least / 3600:.1f} replica-hours\n")
    print("| rule | in time % | cost ÷ bound | killed | p50 s | p95 s | p99 s | replica-hours | changes | ran s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    points: dict[str, tuple[float, float]] = {}

    def judge(name: str, controller: Controller, initial: int = 0) -> Score:
        began = time.perf_counter()
        result = score(play(jobs, setting, controller, initial=initial), setting, least)
        print(row(name, result, time.perf_counter() - began), flush=True)
        points[name] = (result.slo_percent, result.cost_ratio or 0.0)
        return result

    judge("workerpool", Operator(bounded(setting)))
    for name, controller in rivals(setting, jobs):
        judge(name, controller)
    for count in scenario.static:
        judge(f"static {count}", Static(count), count)
    if plots:
        draw(scenario, setting, jobs, least, points, plots)


def draw(
    scenario: Scenario, setting: Setting, jobs: Trace, least: float, points: Mapping[str, tuple[float, float]], plots: Path
) -> None:
    """The frontier over one inner parameter, with those of DelayedOff and KEDA, and every rule's own point."""

    def at(controller: Controller) -> tuple[float, float]:
        result = score(play(jobs, setting, controller), setting, least)
        return result.slo_percent, result.cost_ratio or 0.0

    ours = []
    for value in scenario.values:
        with inner(scenario.parameter, value):
            ours.append(at(Operator(bounded(setting))))
    shown = ", ".join(f"{value:g}: {p:.2f} · {c:.2f}" for value, (p, c) in zip(scenario.values, ours, strict=True))
    print(f"\nover {scenario.parameter}: {shown}")
    targets = (0.7, 0.85, 1.0, 1.5, 2.0)
    curves = {
        f"workerpool over {scenario.parameter}": ours,
        "DelayedOff over T": [at(DelayedOff(setting.start_seconds * f, maximum=MAXIMUM)) for f in (0.1, 0.25, 0.5, 1, 2, 4)],
        "KEDA with in flight over its target": [
            at(Keda(bounded(setting), target=target, poll_seconds=5.0, in_flight=True)) for target in targets
        ],
    }
    others = {name: point for name, point in points.items() if "static" not in name and point[1] < 4 * ours[-1][1]}
    frontier(f"{scenario.name}: {jobs.name}", curves, others, plots / f"scaling-{scenario.name.lower()}.png")


def frontier(
    title: str, curves: Mapping[str, Sequence[tuple[float, float]]], points: Mapping[str, tuple[float, float]], file: Path
) -> None:
    """Late jobs (percent, logarithmic) against cost over the bound: curves over an inner parameter, and single points."""
    from matplotlib.figure import Figure  # an extra, which the tables do not need

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot([cost for _, cost in curve], [late(percent) for percent, _ in curve], "o-", markersize=3, label=name)
    for name, (percent, cost) in points.items():
        axes.plot([cost], [late(percent)], "x")
        axes.annotate(name, (cost, late(percent)), textcoords="offset points", xytext=(4, 3), fontsize="small")
    axes.set(title=title, xlabel="replica-hours / lower bound", ylabel="jobs late, %", yscale="log")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=110)


def late(percent: float) -> float:
    """Percent of jobs that were late; a hundredth of a percent stands for none on the logarithmic axis."""
    return max(100 - percent, 0.01)


OUTAGE = Outage("gpu", 1200, 1800)
FAST, SLOW, SLOWDOWN = 8, 16, 6.0


def outage_jobs(seed: int, hours: int) -> Trace:
    """Hours at half the load that 8 fast and 16 slow workers can take, in bursts."""
    return bursty(seed, 3600.0 * hours, 1.07, 5.0)


def bursty(seed: int, seconds: float, rate: float, length: float) -> Trace:
    """Jobs of that mean length that come at that rate, in bursts."""
    rng = random.Random(seed)
    shape, at = 0.25, 0.0
    arrivals: list[float] = []
    while at < seconds:
        at += rng.gammavariate(shape, 1 / (rate * shape))
        arrivals.append(at)
    return Trace(f"bursty, seed {seed}", arrivals, [rng.expovariate(1 / length) for _ in arrivals])


def two_tiers(fast: Replicas, slow: Replicas, *, rebalance: bool) -> Pool:
    """Accelerated workers, and some without."""
    template = {"spec": {"containers": [{"name": "worker"}]}}
    gpu = {
        "name": "gpu",
        "queue": "g",
        "accelerator": {"resource": "nvidia.com/gpu"},
        "replicas": fast,
        "template": template,
    }
    cpu = {"name": "cpu", "queue": "c", "replicas": slow, "template": template}
    spec = {
        "app": "simulated", "broker": {"url": "redis://simulated"}, "tiers": [gpu, cpu], "routing": {"rebalance": rebalance},
    }  # fmt: skip
    return Pool("simulation", "outage", "simulation/outage", 1, 0.0, WorkerPoolSpec.model_validate(spec))


def one_queue(jobs: Trace, outage: Outage = OUTAGE, fast: int = FAST, slow: int = SLOW) -> list[float]:
    """The waits of ideal late binding.

    Fast and slow workers that are always there take the head of one queue, the fast first. The fast are gone for the outage,
    give back what they had, and return at its very end.
    """
    most = fast
    waits: dict[int, float] = {}
    events: list[tuple[float, int, int]] = [(at, _COMES, job) for job, at in enumerate(jobs.arrivals)]
    events += [(outage.start, _FAST_GONE, 0), (outage.end, _FAST_BACK, 0)]
    heapq.heapify(events)
    queue, running = list[int](), dict[int, float]()
    while events:
        now, what, job = heapq.heappop(events)
        if what == _COMES:
            heapq.heappush(queue, job)
        elif what == _FAST_GONE:
            for cut in running:
                heapq.heappush(queue, cut)
            fast, running = 0, {}
        elif what == _FAST_BACK:
            fast = most
        elif what == _SLOW_ENDS:
            slow += 1
        elif running.get(job) == now:
            del running[job]
            fast += 1
        while queue and (fast or slow):
            job = heapq.heappop(queue)
            waits.setdefault(job, now - jobs.arrivals[job])
            if fast:
                fast, running[job] = fast - 1, now + jobs.services[job]
                heapq.heappush(events, (running[job], _FAST_ENDS, job))
            else:
                slow -= 1
                heapq.heappush(events, (now + SLOWDOWN * jobs.services[job], _SLOW_ENDS, job))
    return [waits[job] for job in range(len(jobs))]


_COMES, _FAST_GONE, _FAST_BACK, _FAST_ENDS, _SLOW_ENDS = range(5)


def run_outage() -> None:
    """All accelerators are gone for ten minutes; jobs run six times as long without one."""
    print("\n### Outage: all accelerated workers gone for 10 minutes, jobs 6 times slower without, starts of 45 s\n")
    print("| hours | accelerated | plain | waiting jobs move | p50 s | p95 s | p99 s | max s | GPU-h | CPU-h |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    always = Replicas(min=FAST, max=FAST), Replicas(min=SLOW, max=SLOW)
    from_zero = [(Replicas(max=FAST), Replicas(max=plain)) for plain in (SLOW, 24, 40)]
    for hours in (1, 4):
        for fast, slow in (always, *from_zero):
            for rebalance in (False, True):
                outage_row(hours, fast, slow, rebalance=rebalance)
        waits = [sorted(one_queue(outage_jobs(seed, hours))) for seed in range(1, 6)]
        means = [statistics.fmean(quantile(one, part) for one in waits) for part in (0.5, 0.95, 0.99, 1.0)]
        print(f"| {hours} | {FAST} | {SLOW} | one queue for all | {' | '.join(f'{value:.0f}' for value in means)} | | |")


def outage_row(hours: int, fast: Replicas, slow: Replicas, *, rebalance: bool) -> None:
    """Means of five seeds."""
    start: Callable[[random.Random], float] = lambda _: 45.0  # noqa: E731
    results = []
    for seed in range(1, 6):
        tiers = (TierSetup("gpu", start, initial=fast.min), TierSetup("cpu", start, slowdown=SLOWDOWN, initial=slow.min))
        world = World(tiers, outages=(OUTAGE,))
        found = engine.run(outage_jobs(seed, hours), world, Operator(two_tiers(fast, slow, rebalance=rebalance)))
        waits = sorted(found.waits)
        spent = [seconds / 3600 for seconds in found.replica_seconds.values()]
        results.append((*(quantile(waits, part) for part in (0.5, 0.95, 0.99, 1.0)), *spent))
    means = [statistics.fmean(column) for column in zip(*results, strict=True)]
    shown = " | ".join(f"{value:.0f}" for value in means[:4]) + " | " + " | ".join(f"{value:.1f}" for value in means[4:])
    bounds = " | ".join(f"{tier.min} to {tier.max}" if tier.min < tier.max else f"{tier.max}" for tier in (fast, slow))
    print(f"| {hours} | {bounds} | {'yes' if rebalance else 'no'} | {shown} |", flush=True)


def run_speed() -> None:
    """What one decision, and a day of a hundred thousand jobs, take of one core."""
    policy = scaling.Policy(0, 80, 1, 60.0)
    print("\n### Speed\n")
    for waiting in (10, 1_000, 100_000):
        memory, now = scaling.Memory(start_seconds=45.0), 0.0
        seen = scaling.Demand(0, 0, 0, 0)
        for step in range(90):
            now += 1.0
            seen = scaling.Demand(
                waiting * (step + 1) // 90, 40, 0, 60, 45.0, 40, tuple(now - n for n in range(20)), arrived=waiting * step
            )
            memory = scaling.decide(policy, seen, memory, now).memory
        began = time.process_time()
        for _ in range(2_000):
            scaling.decide(policy, seen, memory, now)
        print(f"* one decision at {waiting} waiting jobs, 60 replicas: {(time.process_time() - began) / 2_000 * 1e6:.0f} µs")
    jobs = trace.steady(1)
    began = time.process_time()
    play(jobs, Setting(45, 60), Operator(bounded(Setting(45, 60))))
    print(f"* a day of {len(jobs)} jobs: {time.process_time() - began:.1f} s")


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path, default=os.environ.get("WORKERPOOL_TRACES"), help="directory of recorded traces")
    parser.add_argument("--plots", type=Path, help="directory for the pictures")
    options = parser.parse_args()
    began = time.perf_counter()
    for scenario in SCENARIOS:
        run_scenario(scenario, options.traces and Path(options.traces), options.plots)
    run_outage()
    run_speed()
    print(f"\nall in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
