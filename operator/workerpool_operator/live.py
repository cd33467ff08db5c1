"""The live view of ``workerpool dev`` and of the demo: a panel on a terminal, plain lines elsewhere.

:func:`render` and :func:`line` are pure; :class:`LiveView` keeps the last report of each pool and decides when to show it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from workerpool_operator.observation import Unavailable
from workerpool_operator.ports import Report
from workerpool_operator.status import WARNS_WHEN, Condition, ConditionType, Event, TierStatus

LINES_EVERY_SECONDS = 1.0
"""A pool's plain line is printed at most this often."""

_EVENTS_SHOWN = 4
_BAR_CELLS = 16
_MOST_DOTS = 8
_UNKNOWN = "?"
_GOOD_WHEN_TRUE = {ConditionType.READY, ConditionType.BROKER_REACHABLE, ConditionType.CAPACITY_AVAILABLE}


@dataclass(frozen=True, slots=True)
class TimedEvent:
    """An Event, and when a pass reported it, in wall-clock seconds."""

    at: float
    event: Event


def render(report: Report, events: Iterable[TimedEvent] = ()) -> RenderableType:
    """One pool as a panel: conditions that need a look, its tiers, where its jobs went, its last Events.

    Args:
        report: of the last pass.
        events: oldest first.
    """
    pool = report.pool
    title = Text.assemble((pool.id, "bold"), "  ", (pool.spec.mode.value, "cyan"))
    parts: list[RenderableType] = [_condition(c) for c in report.status.conditions if worth_seeing(c)]
    if isinstance(report.reading, Unavailable):
        parts.append(Text(f"broker unreachable: {report.reading.why}", "bold red"))
    parts.append(_tier_table(report.status.tiers))
    if not isinstance(report.reading, Unavailable) and report.reading.routes:
        parts.append(_route_table(report.reading.routes))
    parts += [_event(timed) for timed in events]
    return Panel(Group(*parts), title=title, title_align="left", box=box.ROUNDED, border_style="dim")


def line(report: Report) -> str:
    """One pool in one plain line, without the time."""
    tiers = "   ".join(_tier_words(tier) for tier in report.status.tiers).rstrip()
    outage = f"   broker unreachable: {report.reading.why}" if isinstance(report.reading, Unavailable) else ""
    return f"{report.pool.name}  {tiers}{outage}"


@dataclass(slots=True)
class _Shown:
    """What the view remembers of one pool."""

    report: Report
    events: deque[TimedEvent] = field(default_factory=lambda: deque(maxlen=_EVENTS_SHOWN))
    line: str = ""
    printed_at: float = float("-inf")


class LiveView:
    """A ``Reporter`` for people. It is a context manager, whose exit restores the terminal.

    Args:
        console: where to print: a panel on a terminal, else lines.
        clock: wall-clock seconds.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.time) -> None:
        self._console = console
        self._clock = clock
        self._pools: dict[str, _Shown] = {}
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    async def report(self, report: Report) -> None:
        """Show one pass."""
        shown = self._pools.setdefault(report.pool.id, _Shown(report))
        shown.report = report
        now = self._clock()
        shown.events.extend(TimedEvent(now, event) for event in report.events)
        if self._live:
            self._live.update(self.view(), refresh=True)
        else:
            self._print(shown, now)

    def view(self) -> RenderableType:
        """All pools as panels: a snapshot, which later reports do not change."""
        return Group(*(render(shown.report, tuple(shown.events)) for shown in self._pools.values()))

    def _print(self, shown: _Shown, now: float) -> None:
        for event in shown.report.events:
            self._write(f"{_clock(now)}  {shown.report.pool.name}  {event.reason}: {event.message}")
        new = line(shown.report)
        if new != shown.line and now - shown.printed_at >= LINES_EVERY_SECONDS:
            shown.line, shown.printed_at = new, now
            self._write(f"{_clock(now)}  {new}")

    def _write(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def worth_seeing(condition: Condition) -> bool:
    """Whether a condition is not as it is in a healthy pool at rest."""
    return (condition.status == "True") != (condition.type in _GOOD_WHEN_TRUE)


def condition_name(condition: Condition) -> Text:
    """The condition's type, with "not" if its status is not True, coloured by severity."""
    style = "bold red" if WARNS_WHEN.get(condition.type) == condition.status else "yellow"
    return Text(condition.type.value if condition.status == "True" else f"not {condition.type.value}", style)


def _condition(condition: Condition) -> Text:
    return Text.assemble(condition_name(condition), " ", condition.message, no_wrap=True, overflow="ellipsis")


def _tier_table(tiers: Iterable[TierStatus]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False)
    table.add_column("tier", style="bold", no_wrap=True)
    table.add_column("replicas", no_wrap=True)
    table.add_column("waiting", no_wrap=True, min_width=_BAR_CELLS + 4)
    table.add_column("in flight", justify="right")
    table.add_column("spilled", justify="right")
    table.add_column("why", ratio=1, no_wrap=True, overflow="ellipsis")
    for tier in tiers:
        why = Text.assemble((tier.reason, "cyan"), (f" {tier.message}", "dim"))
        table.add_row(tier.name, _replicas(tier), _bar(tier.waiting), _number(tier.in_flight), _number(tier.spilled), why)
    return table


def _route_table(routes: Mapping[str, int]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for route, count in sorted(routes.items(), key=lambda item: -item[1]):
        tier, _, reason = route.partition(":")
        table.add_row(Text(f"→ {tier}", "bold"), Text(str(count), justify="right"), Text(reason, "dim"))
    return table


def _event(timed: TimedEvent) -> Text:
    style = "yellow" if timed.event.warning else "dim"
    sentence = f"{_clock(timed.at)}  {timed.event.reason}: {timed.event.message}"
    return Text(sentence, style, no_wrap=True, overflow="ellipsis")


def _replicas(tier: TierStatus) -> Text:
    text = Text(f"{tier.ready}/{tier.desired}")
    if tier.desired <= _MOST_DOTS:
        text.append(" ").append("●" * tier.ready, "green").append("○" * tier.starting, "yellow")
        text.append("✗" * tier.unschedulable, "red")
    return text


def _bar(waiting: int | None) -> Text:
    cells = min(waiting or 0, _BAR_CELLS)
    return Text.assemble(f"{_number(waiting):>3} ", ("▇" * cells, "yellow"))


def _number(number: int | None) -> str:
    return _UNKNOWN if number is None else str(number)


def _tier_words(tier: TierStatus) -> str:
    work = f"{_number(tier.waiting):>3} waiting, {_number(tier.in_flight):>2} in flight"
    return f"{tier.name} {tier.ready}/{tier.desired} ready, {work}  {tier.reason:<22}"


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))
