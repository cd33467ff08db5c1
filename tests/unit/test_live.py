"""The live view: what a person reads on a terminal, and in a log."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterable

import pytest
from rich.console import Console

from workerpool_operator.live import LiveView, TimedEvent, line, render
from workerpool_operator.model import WorkerPoolSpec
from workerpool_operator.observation import BrokerReading, Unavailable
from workerpool_operator.ports import Pool, Report
from workerpool_operator.status import Condition, ConditionType, Event, Status, TierStatus
from workerpool_routing.wire import Milliseconds

pytestmark = pytest.mark.unit

TEMPLATE = {"spec": {"containers": [{"name": "worker"}]}}
SPEC = WorkerPoolSpec.model_validate(
    {
        "app": "media.tasks",
        "broker": {"url": "redis://localhost"},
        "tiers": [
            {"name": "gpu", "queue": "gpu-tasks", "accelerator": {"resource": "nvidia.com/gpu"}, "template": TEMPLATE},
            {"name": "cpu", "queue": "celery", "template": TEMPLATE},
        ],
    }
)
POOL = Pool("default", "media", "uid", 1, 0.0, SPEC)
ROUTES = {"gpu:RoomOnAccelerator": 7, "cpu:AcceleratorFull": 12}
READING = BrokerReading(tiers={}, run_id="r1", time=Milliseconds(0), routes=ROUTES)
OUTAGE = Unavailable("connection refused by 127.0.0.1:6379")


def tier(name: str = "gpu", waiting: int | None = 12, in_flight: int | None = 2, desired: int = 2, ready: int = 1) -> TierStatus:
    return TierStatus(
        name=name,
        desired=desired,
        ready=ready,
        starting=desired - ready,
        unschedulable=0,
        draining=0,
        waiting=waiting,
        in_flight=in_flight,
        spilled=None if waiting is None else 3,
        reason="BacklogExceedsCapacity",
        message="12 waiting + 2 in flight need 14, ordered 2",
    )


def report(
    *tiers: TierStatus,
    reading: BrokerReading | Unavailable = READING,
    conditions: Iterable[Condition] = (),
    events: Iterable[Event] = (),
) -> Report:
    status = Status(1, tuple(conditions), tiers or (tier(), tier("cpu", waiting=0, in_flight=4)), None, None, "")
    return Report(POOL, status, reading, tuple(events))


def condition(kind: ConditionType, status: str, message: str) -> Condition:
    return Condition(kind, status, "Because", message, 1)


def text_of(given: Report, events: Iterable[TimedEvent] = ()) -> str:
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(render(given, events))
    return console.export_text()


def row(text: str, name: str) -> str:
    return next(found for found in text.splitlines() if found.strip("│ ").startswith(name))


def lines_of(*given: tuple[float, Report]) -> list[str]:
    """What the view prints without a terminal for reports at these times."""
    out = io.StringIO()
    times = iter([at for at, _ in given])
    with LiveView(Console(file=out, width=60), clock=lambda: next(times)) as view:
        for _, passed in given:
            asyncio.run(view.report(passed))
    return out.getvalue().splitlines()


def test_a_tier_shows_its_queue_its_work_and_what_is_starting() -> None:
    text = row(text_of(report(tier(waiting=5))), "gpu")
    assert "1/2 ●○" in text
    assert "5 ▇▇▇▇▇ " in text
    assert "BacklogExceedsCapacity" in text


def test_a_long_queue_and_many_replicas_stay_within_their_columns() -> None:
    text = row(text_of(report(tier(waiting=900, desired=40, ready=38))), "gpu")
    assert "900 " + "▇" * 16 + " " in text
    assert "38/40" in text
    assert "●" not in text


def test_routes_are_listed_with_the_most_used_first() -> None:
    text = text_of(report())
    assert text.index("AcceleratorFull") < text.index("RoomOnAccelerator")
    assert "12" in row(text, "→ cpu")


def test_the_title_names_the_pool_and_its_mode() -> None:
    assert "default/media  Active" in text_of(report()).splitlines()[0]


def test_only_conditions_that_want_attention_are_shown() -> None:
    text = text_of(
        report(
            conditions=[
                condition(ConditionType.READY, "True", "all is well"),
                condition(ConditionType.SPILLING, "True", "12 jobs wait elsewhere"),
                condition(ConditionType.QUEUE_SHARED, "False", "nobody else"),
                condition(ConditionType.CAPACITY_AVAILABLE, "False", "no node has a GPU"),
            ]
        )
    )
    assert "Spilling 12 jobs wait elsewhere" in text
    assert "not CapacityAvailable no node has a GPU" in text
    assert "all is well" not in text
    assert "nobody else" not in text


def test_events_are_listed_with_their_time_and_brackets_survive() -> None:
    text = text_of(report(), [TimedEvent(0.0, Event(True, "Lost", "worker [gpu-1] fell silent"))])
    assert ":00:00  Lost: worker [gpu-1] fell silent" in text or ":30:00  Lost: worker [gpu-1] fell silent" in text


def test_an_outage_is_named_and_never_reads_as_an_empty_queue() -> None:
    blind = report(tier(waiting=None, in_flight=None), reading=OUTAGE)
    text = text_of(blind)
    assert "broker unreachable: connection refused by 127.0.0.1:6379" in text
    assert "?" in row(text, "gpu")
    assert "0" not in row(text, "gpu").partition("Backlog")[0]
    assert "  ? waiting,  ? in flight" in line(blind)
    assert line(blind).endswith("broker unreachable: connection refused by 127.0.0.1:6379")


def test_a_line_says_the_same_in_words() -> None:
    assert line(report()) == (
        "media  gpu 1/2 ready,  12 waiting,  2 in flight  BacklogExceedsCapacity"
        "   cpu 1/2 ready,   0 waiting,  4 in flight  BacklogExceedsCapacity"
    )


def test_without_a_terminal_a_line_comes_only_when_something_changed() -> None:
    printed = lines_of((10.0, report(tier())), (12.0, report(tier())), (14.0, report(tier(waiting=3))))
    assert [" 12 waiting" in printed[0], "  3 waiting" in printed[1]] == [True, True]
    assert len(printed) == 2


def test_without_a_terminal_lines_come_at_most_once_a_second() -> None:
    passes = [(10.0 + n / 10, report(tier(waiting=n))) for n in range(25)]
    printed = lines_of(*passes)
    assert [text.partition(" waiting")[0].split()[-1] for text in printed] == ["0", "10", "20"]


def test_without_a_terminal_events_are_never_held_back() -> None:
    lost = report(tier(), events=[Event(True, "Lost", "worker gpu-1 fell silent")])
    printed = lines_of((10.0, report(tier())), (10.1, lost))
    assert printed[1].endswith("media  Lost: worker gpu-1 fell silent")


def test_on_a_terminal_the_panel_is_drawn_and_the_cursor_given_back() -> None:
    out = io.StringIO()
    with LiveView(Console(file=out, width=100, force_terminal=True)) as view:
        asyncio.run(view.report(report()))
    drawn = out.getvalue()
    assert "default/media" in drawn
    assert drawn.rstrip().endswith("\x1b[?25h")


def test_a_picture_taken_earlier_does_not_change_with_later_reports() -> None:
    view = LiveView(Console(file=io.StringIO(), width=100))
    asyncio.run(view.report(report(tier(waiting=7))))
    earlier = view.view()
    asyncio.run(view.report(report(tier(waiting=1))))
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(earlier)
    assert "7 ▇▇▇▇▇▇▇ " in console.export_text()
