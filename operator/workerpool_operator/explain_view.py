"""The screen that ``workerpool explain`` prints, from the facts that ``explain.py`` has gathered.

The sentences are those of the status and of admission: nothing is decided here a second time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from workerpool_operator.dry_run import Answer, DryRun
from workerpool_operator.live import condition_name, worth_seeing
from workerpool_operator.model import Mode
from workerpool_operator.observation import BrokerReading, Unavailable
from workerpool_operator.ports import Pool
from workerpool_operator.status import Condition, ConditionType, Status, TierStatus
from workerpool_routing.decide import Reason, explain
from workerpool_routing.wire import CAPACITY_LIFE_MS

_NAMES_SHOWN = 3
_NUMBERS = {"jobs", "waiting", "in flight", "elsewhere"}
_UNALARMING = {"True": "in order", "False": "not the case", "Unknown": "not known"}
"""How the remaining conditions are introduced, by their status."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """What is known of a pool at one moment; a part that could not be had is ``Unavailable`` and says why.

    Attributes:
        status: as an operator last wrote it.
        reading: its queues and workers, from Redis.
        dry_run: what a new job would get.
    """

    pool: Pool
    status: Status | Unavailable
    reading: BrokerReading | Unavailable
    dry_run: DryRun | Unavailable


def render(known: Explanation) -> RenderableType:
    """The whole screen, problems first; sentences are wrapped, never cut."""
    pool, status, reading, dry_run = known.pool, known.status, known.reading, known.dry_run
    parts: list[RenderableType] = [Text.assemble((pool.id, "bold"), "  ", (pool.spec.mode.value, "cyan")), _alarms(known)]
    if isinstance(status, Status) and status.tiers:
        parts += [_heading("why each tier has its workers"), _tiers(status.tiers)]
        parts += [_grid((Text(tier.name, "bold"), _sentence(tier.reason, tier.message)) for tier in status.tiers)]
    if isinstance(reading, BrokerReading):
        if leaving := list(_leaving(reading)):
            parts += [_heading("who leaves"), _grid(leaving)]
        parts += [_heading("why its jobs went where they are, all so far"), _routes(pool, reading.routes)]
    if dry_run != reading:
        parts += [_heading("what a new job would get now"), _answers(dry_run)]
    return Group(*parts)


def _alarms(known: Explanation) -> Table:
    rows: list[tuple[Text, Text | str]] = []
    conditions = known.status.conditions if isinstance(known.status, Status) else ()
    for what, reading in (("no status", known.status), ("Redis", known.reading)):
        if isinstance(reading, Unavailable):
            rows.append((Text(what, "bold red"), reading.why))
    if _silent(known, conditions):
        message = (
            f"nobody has published the pool's capacity for {CAPACITY_LIFE_MS / 1000:.0f} s: no operator is running, it cannot "
            "see the workers, or Redis takes no writes; what follows is the last status that was written"
        )
        rows.append((Text("no operator", "bold red"), message))
    rows += [(condition_name(condition), condition.message) for condition in conditions if worth_seeing(condition)]
    well = [condition for condition in conditions if not worth_seeing(condition)]
    for status, words in _UNALARMING.items():
        if names := [condition.type.value for condition in well if condition.status == status]:
            rows.append((Text(words, "dim"), ", ".join(names)))
    return _grid(rows)


def _silent(known: Explanation, conditions: Iterable[Condition]) -> bool:
    """Whether an operator should have published the capacity and has not."""
    held = any(c.type is ConditionType.QUEUE_SHARED and c.status == "True" for c in conditions)
    acts = known.pool.spec.mode is Mode.ACTIVE and not held
    return acts and isinstance(known.dry_run, DryRun) and not known.dry_run.has_capacity


def _tiers(tiers: Iterable[TierStatus]) -> Table:
    table = _table("tier", "workers", "waiting", "in flight", "elsewhere")
    for tier in tiers:
        counts = [_number(count) for count in (tier.waiting, tier.in_flight, tier.spilled)]
        table.add_row(Text(tier.name, "bold"), _workers(tier), *counts)
    return table


def _workers(tier: TierStatus) -> str:
    others = {"starting": tier.starting, "unschedulable": tier.unschedulable, "leaving": tier.draining}
    known = f"{_number(tier.ready)} ready of {_number(tier.desired)} wanted"
    return ", ".join([known, *(f"{count} {what}" for what, count in others.items() if count)])


def _leaving(reading: BrokerReading) -> Iterator[tuple[Text, str]]:
    for name, queue in reading.tiers.items():
        for worker in queue.workers:
            if worker.draining or worker.worker in reading.marked:
                yield Text(worker.worker), f"{name}: takes nothing new, jobs left: {worker.busy}"


def _routes(pool: Pool, routes: Mapping[str, int]) -> RenderableType:
    if not routes:
        return Text("  no job has been admitted yet")
    table = _table("jobs", "why")
    order = [tier.name for tier in pool.spec.tiers]

    def place(route: tuple[str, int]) -> tuple[bool, int, int]:
        tier = route[0].partition(":")[0]
        return tier not in order, order.index(tier) if tier in order else 0, -route[1]

    words = {reason.value: reason for reason in Reason}
    for route, count in sorted(routes.items(), key=place):
        tier, _, reason = route.partition(":")
        table.add_row(str(count), _sentence(reason, explain(words[reason], tier) if reason in words else tier))
    return table


def _answers(dry_run: DryRun | Unavailable) -> RenderableType:
    if isinstance(dry_run, Unavailable):
        return Text(f"  unknown: {dry_run.why}")
    rows: list[tuple[Text, Text]] = []
    for _, alike in groupby(dry_run.answers, lambda answer: (answer.accelerated, answer.tier, answer.reason)):
        answers = list(alike)
        first = answers[0]
        gets = Text.assemble((first.tier, "bold"), f", starts {_starts(answers)}") if first.tier else Text("refused", "bold red")
        rows.append((gets, Text(_job(answers))))
        rows.append((Text(), _sentence(first.reason, first.message)))
    return _grid(rows)


def _job(answers: list[Answer]) -> str:
    wish = "asks for an accelerator" if answers[0].accelerated else "asks for none"
    names = [answer.task for answer in answers if answer.task]
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return f"{wish}: {', '.join(names[:_NAMES_SHOWN])}{more}" if names else wish


def _starts(answers: list[Answer]) -> str:
    waits = [answer.wait for answer in answers if answer.wait is not None]
    if len(waits) < len(answers):
        return "when a worker is there"
    return f"within {max(waits):.1f} s" if max(waits) else "at once"


def _sentence(reason: str, message: str) -> Text:
    return Text.assemble((reason, "cyan"), "  ", message)


def _number(number: int | None) -> str:
    return "?" if number is None else str(number)


def _heading(words: str) -> Text:
    return Text(f"\n{words}", "bold")


def _grid(rows: Iterable[tuple[Text, Text | str]]) -> Table:
    grid = Table.grid(padding=(0, 0, 0, 2), pad_edge=True)
    grid.add_column(overflow="fold")
    grid.add_column(overflow="fold")
    for name, message in rows:
        grid.add_row(name, message if isinstance(message, Text) else Text(message))
    return grid


def _table(*headings: str) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 0, 0, 2), pad_edge=True)
    for heading in headings:
        table.add_column(heading, justify="right" if heading in _NUMBERS else "left", overflow="fold")
    return table
