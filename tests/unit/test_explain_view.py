"""What `workerpool explain` prints of what is known: all sentences whole, and what is not known by name."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import replace

import pytest
from rich.console import Console

from workerpool_operator.dry_run import Answer, DryRun
from workerpool_operator.explain_view import Explanation, render
from workerpool_operator.model import Mode, WorkerPoolSpec
from workerpool_operator.observation import BrokerReading, QueueReading, Unavailable
from workerpool_operator.ports import Pool
from workerpool_operator.status import Condition, ConditionType, Status, TierStatus
from workerpool_routing.decide import Reason, explain
from workerpool_routing.wire import Milliseconds, Presence

pytestmark = pytest.mark.unit

TEMPLATE = {"spec": {"containers": [{"name": "worker"}]}}
POOL = Pool(
    "ml", "media", "uid", 1, 0.0,
    WorkerPoolSpec.model_validate(
        {
            "app": "media.tasks",
            "broker": {"url": "redis://localhost"},
            "tiers": [
                {"name": "gpu", "queue": "gpu-tasks", "accelerator": {"resource": "nvidia.com/gpu"}, "template": TEMPLATE},
                {"name": "cpu", "queue": "celery", "template": TEMPLATE},
            ],
        }
    ),
)  # fmt: skip
NEED = (
    "12 waiting + 2 in flight + 3 spilled need 9 workers to start within 60 s (a job takes 30 s, a worker's start 240 s); "
    "wanted: 9"
)
GPU = TierStatus(
    "gpu", 9, 2, 5, 1, 1, 12, 2, 3, "BacklogExceedsCapacity", f"{NEED}; workers still to leave: 1 (once their jobs are finished)"
)
CPU = TierStatus("cpu", 1, 1, 0, 0, 0, 0, 0, 0, "AtMinimum", "0 waiting need 0 workers; wanted: 1; replicas.min holds it")
DOWN = Unavailable("Redis at one:6379 cannot be reached")


def condition(kind: ConditionType, status: str, message: str) -> Condition:
    return Condition(kind, status, "Because", message, 1)


CONDITIONS = (
    condition(ConditionType.READY, "True", "all is well"),
    condition(ConditionType.CAPACITY_AVAILABLE, "False", "gpu: 1 of 9 unschedulable: 0/3 nodes are available: insufficient GPUs"),
    condition(ConditionType.REBALANCING, "True", "4 of the waiting jobs moved from gpu to cpu: the wait costs more"),
    condition(ConditionType.QUEUE_SHARED, "False", "nobody else has these queues"),
    condition(ConditionType.SPILLING, "Unknown", "Redis does not answer"),
    condition(ConditionType.TIER_BROKEN, "False", "every accelerated tier takes part in routing"),
)
STATUS = Status(1, CONDITIONS, (GPU, CPU), 12, 2, "gpu 2/9, cpu 1/1")
ROUTES = {"cpu:NoCapacity": 40, "gpu:FreeSlot": 7, "gpu:SlotStarting": 9, "elsewhere:FutureReason": 1}


def presence(worker: str, busy: int, *, draining: bool) -> Presence:
    return Presence(f"{worker}.1", worker, "gpu", "gpu-tasks", 1, busy, Milliseconds(0), Milliseconds(0), draining=draining)


WORKERS = (presence("gpu-a", 1, draining=False), presence("gpu-b", 1, draining=False), presence("gpu-c", 0, draining=True))
READING = BrokerReading(
    {"gpu": QueueReading(12, 2, 3, WORKERS), "cpu": QueueReading(0, 0, 0)}, "r1", Milliseconds(0), ROUTES, 0, frozenset({"gpu-b"})
)


def answer(task: str, wish: bool, tier: str, reason: Reason, wait: float | None) -> Answer:
    return Answer(task, wish, tier, reason, explain(reason, tier or "cpu"), wait)


DRY_RUN = DryRun(
    True,
    (
        *(answer(f"task-{n}", True, "cpu", Reason.WAIT_TOO_LONG, float(n)) for n in range(5)),
        answer("task-5", True, "gpu", Reason.WORTH_THE_WAIT, 0.26),
        answer("task-0", False, "cpu", Reason.NOT_REQUESTED, 0.0),
    ),
)
KNOWN = Explanation(POOL, STATUS, READING, DRY_RUN)


def text_of(known: Explanation, width: int = 400) -> str:
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(render(known))
    return console.export_text()


def line(text: str, *words: str) -> str:
    """The one line that holds them all; runs of blanks count as one."""
    lines = [" ".join(found.split()) for found in text.splitlines()]
    (found,) = [one for one in lines if all(word in one for word in words)]
    return found


def in_mode(mode: Mode) -> Pool:
    return replace(POOL, spec=POOL.spec.model_copy(update={"mode": mode}))


def without_blanks(text: str) -> str:
    return "".join(text.split())


def test_a_tier_has_its_counts_and_the_whole_sentence_of_the_status() -> None:
    text = text_of(KNOWN)
    assert line(text, "ready of 9") == "gpu 2 ready of 9 wanted, 5 starting, 1 unschedulable, 1 leaving 12 2 3"
    assert (
        line(text, "12 waiting +")
        == f"gpu BacklogExceedsCapacity {NEED}; workers still to leave: 1 (once their jobs are finished)"
    )
    assert line(text, "ready of 1 ") == "cpu 1 ready of 1 wanted 0 0 0"
    assert line(text, "AtMinimum") == f"cpu AtMinimum {CPU.message}"


@pytest.mark.parametrize("width", [80, 100, 200])
def test_no_sentence_is_cut_however_narrow_the_screen(width: int) -> None:
    columns = text_of(KNOWN, width).splitlines()
    assert max(map(len, columns)) <= width
    assert "…" not in "".join(columns)
    for last_words in ("insufficient GPUs", "the wait costs more", "their jobs are finished)"):
        assert without_blanks(last_words)[-8:] in without_blanks("".join(columns)), last_words


def test_conditions_that_want_attention_come_first_with_their_sentence_and_the_others_by_name() -> None:
    text = text_of(KNOWN)
    assert line(text, "not CapacityAvailable").endswith("0/3 nodes are available: insufficient GPUs")
    assert line(text, "Rebalancing").endswith("4 of the waiting jobs moved from gpu to cpu: the wait costs more")
    assert line(text, "in order") == "in order Ready"
    assert line(text, "not the case") == "not the case QueueShared, TierBroken"
    assert line(text, "not known") == "not known Spilling"
    assert text.index("insufficient GPUs") < text.index("why each tier")


def test_who_leaves_is_named_with_what_keeps_it() -> None:
    text = text_of(KNOWN)
    assert line(text, "gpu-b") == "gpu-b gpu: takes nothing new, jobs left: 1"
    assert line(text, "gpu-c") == "gpu-c gpu: takes nothing new, jobs left: 0"
    assert "gpu-a" not in text


def test_where_nobody_leaves_nothing_is_said_of_it() -> None:
    calm = replace(READING, marked=frozenset(), tiers={"gpu": QueueReading(0, 0, 0, WORKERS[:1])})
    assert "who leaves" not in text_of(replace(KNOWN, reading=calm))


def test_routes_are_told_tier_by_tier_with_the_words_of_their_reasons() -> None:
    text = text_of(KNOWN)
    assert line(text, "40 NoCapacity") == f"40 NoCapacity {explain(Reason.NO_CAPACITY, 'cpu')}"
    assert text.index("SlotStarting") < text.index("FreeSlot") < text.index("NoCapacity") < text.index("FutureReason")
    assert line(text, "FutureReason") == "1 FutureReason elsewhere", "a release that knows another reason has written it"
    assert "no job has been admitted yet" in text_of(replace(KNOWN, reading=replace(READING, routes={})))


def test_jobs_that_get_the_same_answer_share_a_line() -> None:
    text = text_of(KNOWN)
    assert line(text, "2 more") == "cpu, starts within 4.0 s asks for an accelerator: task-0, task-1, task-2 and 2 more"
    assert line(text, "task-5") == "gpu, starts within 0.3 s asks for an accelerator: task-5"
    assert line(text, "asks for none") == "cpu, starts at once asks for none: task-0"
    for reason in (Reason.WAIT_TOO_LONG, Reason.WORTH_THE_WAIT, Reason.NOT_REQUESTED):
        assert explain(reason, "gpu" if reason is Reason.WORTH_THE_WAIT else "cpu") in line(text, reason)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (answer("", True, "", Reason.OVERLOADED, 700.0), "refused asks for an accelerator"),
        (answer("", False, "cpu", Reason.NOT_REQUESTED, None), "cpu, starts when a worker is there asks for none"),
    ],
    ids=["refused", "nobody there"],
)
def test_a_job_that_cannot_start_is_told_so(given: Answer, said: str) -> None:
    assert line(text_of(replace(KNOWN, dry_run=DryRun(True, (given,)))), "asks for") == said


def test_without_redis_the_status_is_still_told_and_the_outage_once() -> None:
    text = text_of(Explanation(POOL, STATUS, DOWN, DOWN))
    assert line(text, "Redis at one:6379") == "Redis Redis at one:6379 cannot be reached"
    assert NEED in text
    assert "what a new job" not in text


def test_without_a_policy_the_outlook_says_what_holds_then() -> None:
    unknown = Unavailable(explain(Reason.POLICY_UNKNOWN, POOL.id))
    text = text_of(replace(KNOWN, dry_run=unknown))
    assert line(text, "unknown: ") == "unknown: ml/media: nothing is known of the pool, the app's own routing holds"


def test_without_a_status_what_redis_knows_is_told() -> None:
    text = text_of(replace(KNOWN, status=Unavailable("nobody has told")))
    assert line(text, "no status") == "no status nobody has told"
    assert "40  NoCapacity" in text


def test_numbers_that_nobody_knows_are_no_zeros() -> None:
    blind = replace(GPU, waiting=None, in_flight=None, spilled=None, message="unread")
    text = text_of(replace(KNOWN, status=replace(STATUS, tiers=(blind,))))
    assert line(text, "ready of 9").endswith("1 leaving ? ? ?")


def held(conditions: Iterable[Condition]) -> tuple[Condition, ...]:
    return tuple(replace(c, status="True") if c.type is ConditionType.QUEUE_SHARED else c for c in conditions)


@pytest.mark.parametrize(
    ("pool", "conditions", "has_capacity", "alarmed"),
    [
        (POOL, CONDITIONS, True, False),
        (POOL, CONDITIONS, False, True),
        (POOL, held(CONDITIONS), False, False),
        (in_mode(Mode.ADVISORY), CONDITIONS, False, False),
        (in_mode(Mode.PAUSED), CONDITIONS, False, False),
    ],
    ids=["it tells", "it is silent", "the pool is held", "Advisory", "Paused"],
)
def test_an_operator_that_should_speak_and_does_not_is_an_alarm(
    pool: Pool, conditions: tuple[Condition, ...], has_capacity: bool, alarmed: bool
) -> None:
    dry_run = replace(DRY_RUN, has_capacity=has_capacity)
    text = text_of(replace(KNOWN, pool=pool, status=replace(STATUS, conditions=conditions), dry_run=dry_run))
    assert ("no operator" in text) == alarmed
    assert text.splitlines()[0].split() == ["ml/media", pool.spec.mode.value]
