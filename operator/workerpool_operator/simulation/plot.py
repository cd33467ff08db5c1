"""The picture of a simulation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from workerpool_operator.simulation.engine import Outcome
from workerpool_operator.simulation.trace import Trace


def timeline(trace: Trace, outcomes: Mapping[str, Outcome], target_wait: float, file: Path) -> None:
    """Arrivals, replicas and waits over time, one under the other for each policy."""
    figure = Figure(figsize=(11, 2 + 3 * len(outcomes)), layout="constrained")
    axes = figure.subplots(1 + 2 * len(outcomes), 1, sharex=True, squeeze=False)[:, 0]
    minutes = Counter(int(at // 60) for at in trace.arrivals)
    axes[0].bar([minute / 60 for minute in minutes], minutes.values(), width=1 / 60)
    axes[0].set_ylabel("arrivals\na minute")
    hours = [at / 3600 for at in trace.arrivals]
    for index, (name, outcome) in enumerate(outcomes.items()):
        replicas, waits = axes[1 + 2 * index], axes[2 + 2 * index]
        times = [look[0] / 3600 for look in outcome.series]
        replicas.step(times, [look[3] for look in outcome.series], where="post", label="ordered", linewidth=0.8)
        replicas.step(times, [look[2] for look in outcome.series], where="post", label="ready", linewidth=0.8)
        replicas.set_ylabel(f"{name}\nreplicas")
        replicas.legend(loc="upper left", fontsize="small")
        waits.plot(hours, outcome.waits, ".", markersize=1.5)
        waits.axhline(target_wait, color="tab:red", linewidth=0.8)
        waits.set_ylabel(f"{name}\nwait, s")
    axes[-1].set_xlabel("hours")
    figure.savefig(file, dpi=110)
