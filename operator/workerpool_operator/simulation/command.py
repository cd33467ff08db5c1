"""``workerpool simulate``: what a pool would have done with a day of jobs, next to other rules and to the least possible."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from workerpool_operator.model import Replicas, Tier
from workerpool_operator.simulation import trace as traces
from workerpool_operator.simulation.compare import Score, Setting, lower_bound, play, pool_of, score, tier_of
from workerpool_operator.simulation.engine import Outcome
from workerpool_operator.simulation.policies import POLICIES
from workerpool_operator.simulation.trace import Trace
from workerpool_routing.ledger import Job

BOUND = "bound"
NAMES = (*POLICIES, BOUND)
MAXIMUM_UNTIL_SAID = 1000


class CannotSimulate(Exception):
    """What was asked for cannot be done; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Request:
    """The options of the command."""

    trace: Trace
    setting: Setting
    tier: Tier
    policies: Sequence[str]
    notes: Sequence[str] = field(default_factory=tuple)


def mapping(columns: Sequence[str]) -> dict[str, str]:
    """The ``NAME=COLUMN`` pairs of ``--column``."""
    known = (traces.ARRIVAL, traces.SERVICE[0])
    pairs = {}
    for pair in columns:
        name, equals, column = pair.partition("=")
        if name not in known or not equals or not column:
            raise CannotSimulate(f"--column {pair}: must be NAME=COLUMN with NAME one of {', '.join(known)}")
        pairs[name] = column
    return pairs


def load(file: Path, columns: Mapping[str, str]) -> Trace:
    """Read a trace; raises :class:`BadTrace` with the line, the column and the value, and OSError."""
    with file.open(newline="", errors="replace") as lines:
        return traces.read(file.name, lines, columns)


def replayed(pool: str, tier: str, jobs: Sequence[Job]) -> tuple[Trace, str]:
    """The ended jobs of a running pool as a trace, and what to know of it; raises :class:`BadTrace` if none of them is of use."""
    trace, assumed = traces.of_jobs(pool, tier, jobs)
    since = f"{pool}: {len(trace)} jobs of the last {trace.arrivals[-1] / 60:.0f} min that wanted tier {tier}"
    return trace, f"{since}; {assumed} of them were not done there and are given the mean length" if assumed else since


def chosen(tier: Tier | None) -> tuple[Tier, list[str]]:
    """The tier to simulate, and what had to be assumed of it."""
    if tier is None:
        return tier_of(Replicas(max=MAXIMUM_UNTIL_SAID)), [f"no --pool: 0 to {MAXIMUM_UNTIL_SAID} replicas are assumed"]
    notes = []
    if "max" not in tier.replicas.model_fields_set:
        notes.append(f"tier {tier.name} sets no replicas.max: {tier.replicas.max} is assumed")
    return tier, notes


def simulate(request: Request, console: Console, json_file: Path | None, plot_file: Path | None) -> None:
    """Run the policies and print one table; also write what was asked for."""
    for note in request.notes:
        console.print(note, highlight=False)
    if not len(request.trace):
        raise CannotSimulate(f"{request.trace.name} holds no job: there is nothing to simulate")
    busy, most = _busy(request), request.tier.replicas.max
    if busy > most:
        console.print(f"these jobs keep {busy:.0f} workers busy, replicas.max is {most}: they wait ever longer", highlight=False)
    least = _least(request, console)
    outcomes: dict[str, Outcome] = {}
    with Progress(console=console, transient=True) as progress:
        for name in request.policies:
            if name != BOUND:
                task = progress.add_task(name, total=len(request.trace))
                done: Callable[[int], None] = lambda count, task=task: progress.update(task, completed=count)  # type: ignore[misc]  # noqa: E731
                outcomes[name] = play(
                    request.trace, request.setting, POLICIES[name](pool_of(request.tier, request.setting)), done
                )
    scores = {name: score(outcome, request.setting, least) for name, outcome in outcomes.items()}
    console.print(table(request, scores, least))
    console.print("in time: started within the target; wait: in seconds; hours: of replicas")
    if json_file:
        json_file.write_text(json.dumps(dump(scores, least), indent=2) + "\n")
    if plot_file:
        _plot(request, outcomes, plot_file)


def _busy(request: Request) -> float:
    """How many workers the jobs keep busy, on average from the first arrival to the last."""
    arrivals = request.trace.arrivals
    seconds = arrivals[-1] - arrivals[0]
    return sum(request.trace.services) / request.setting.slots / seconds if seconds else 0.0


def _least(request: Request, console: Console) -> float | None:
    try:
        return lower_bound(request.trace, request.setting)
    except ImportError:
        console.print("SciPy is missing, so there is no bound: pip install scipy", highlight=False)
        return None


def dump(scores: Mapping[str, Score], least: float | None) -> dict[str, Any]:
    """The JSON of a comparison."""
    return {
        "policies": {name: asdict(score) for name, score in scores.items()},
        "bound": {"replica_hours": None if least is None else least / 3600},
    }


def table(request: Request, scores: Mapping[str, Score], least: float | None) -> Table:
    """One row for each policy."""
    setting = request.setting
    title = (
        f"{request.trace.name}: {len(request.trace)} jobs, start {setting.start_seconds:g} s, target {setting.target_wait} s, "
        f"{setting.slots} slot{'s' if setting.slots > 1 else ''}, "
        f"{request.tier.replicas.min} to {request.tier.replicas.max} replicas"
    )
    shown = Table(title=title, box=None, title_justify="left", pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("policy", "jobs", "in time", "wait p50", "p95", "p99", "hours", "÷ bound", "killed", "changes"):
        shown.add_column(column, justify="left" if column == "policy" else "right", no_wrap=True)
    for name, row in scores.items():
        ratio = "-" if row.cost_ratio is None else f"{row.cost_ratio:.2f}"
        waits = [f"{wait:.1f}" for wait in (row.wait_p50, row.wait_p95, row.wait_p99)]
        numbers = (f"{row.replica_hours:.1f}", ratio, str(row.killed), str(row.changes))
        shown.add_row(name, str(row.jobs), f"{row.slo_percent:.2f}%", *waits, *numbers)
    if least is not None and BOUND in request.policies:
        shown.add_row(BOUND, str(len(request.trace)), "100.00%", "-", "-", "-", f"{least / 3600:.1f}", "1.00", "-", "-")
    return shown


def _plot(request: Request, outcomes: Mapping[str, Outcome], file: Path) -> None:
    try:
        from workerpool_operator.simulation.plot import timeline
    except ImportError as error:
        raise CannotSimulate("--plot needs Matplotlib: pip install matplotlib") from error
    timeline(request.trace, outcomes, request.setting.target_wait, file)
