"""What a demo run amounts to: counted, judged, and drawn small."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

_ENDED_BADLY = ("failed", "expired")
_SPARKS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One upload from its answer to its end.

    Attributes:
        asked: whether it asked for a GPU.
        first_tier: where it was sent.
        state: the last state that the ledger showed.
        tier: where it was then.
        starts: how often each tier started it.
        attempt: which attempt it was then; the second is the fallback.
        correct: whether its result is the expected one.
    """

    asked: bool
    first_tier: str
    decision_ms: float
    state: str
    tier: str
    starts: Mapping[str, int]
    attempt: int
    correct: bool

    @property
    def succeeded(self) -> bool:
        """Ended well, with the right result."""
        return self.state == "done" and self.correct

    @property
    def failed(self) -> bool:
        """Ended otherwise."""
        return self.state in _ENDED_BADLY or (self.state == "done" and not self.correct)

    @property
    def spilled(self) -> bool:
        """Wanted a GPU and was sent elsewhere."""
        return self.asked and self.first_tier != "gpu"

    @property
    def fell_back(self) -> bool:
        """Failed or was lost on a GPU, and ran once more elsewhere."""
        return self.attempt > 1


@dataclass(slots=True)
class Course:
    """What happened to the pool.

    Attributes:
        drained: by tier, the workers that took nothing new before they left.
        outage_seconds: how long there was no GPU, None before its end.
        spilled: uploads that went to a CPU meanwhile because there was none.
        moved: waiting jobs that were moved to a CPU meanwhile.
        back_seconds: from the end of the outage until a job began on a GPU, None before.
    """

    drained: dict[str, set[str]] = field(default_factory=dict)
    outage_seconds: float | None = None
    spilled: int = 0
    moved: int = 0
    back_seconds: float | None = None


def summarise(
    outcomes: Sequence[Outcome], peak: Mapping[str, int], final: Mapping[str, int], course: Course, seconds: float
) -> dict[str, Any]:
    """Count; ``peak`` and ``final`` are ready replicas by tier."""
    succeeded, failed = sum(o.succeeded for o in outcomes), sum(o.failed for o in outcomes)
    where = Counter(outcome.tier for outcome in outcomes)
    return {
        "jobs": {
            "submitted": len(outcomes),
            "succeeded": succeeded,
            "failed": failed,
            "lost": len(outcomes) - succeeded - failed,
            "ran_twice_on_one_tier": sum(any(n > 1 for n in o.starts.values()) for o in outcomes),
        },
        "tiers": {tier: {"jobs": where[tier], "peak_replicas": peak[tier], "final_replicas": final[tier]} for tier in peak},
        "drained": {tier: len(course.drained.get(tier, ())) for tier in peak},
        "outage": {
            "seconds": _rounded(course.outage_seconds),
            "spilled": course.spilled,
            "moved": course.moved,
            "back_after": _rounded(course.back_seconds),
        },
        "spilled": sum(o.spilled for o in outcomes),
        "fell_back": sum(o.fell_back for o in outcomes),
        "decision_ms_p50": round(median(o.decision_ms for o in outcomes), 2) if outcomes else None,
        "seconds": round(seconds, 1),
    }


def problems(summary: Mapping[str, Any]) -> list[str]:
    """Everything that should have gone otherwise; nothing when every job took effect exactly once."""
    jobs, gpu, outage = summary["jobs"], summary["tiers"]["gpu"], summary["outage"]
    checks = [
        (jobs["submitted"] > 0, "no job was submitted"),
        (jobs["failed"] == 0, f"{jobs['failed']} jobs failed or have a wrong result"),
        (jobs["lost"] == 0, f"{jobs['lost']} jobs have not ended"),
        (jobs["ran_twice_on_one_tier"] == 0, f"{jobs['ran_twice_on_one_tier']} jobs started twice on one tier"),
        (summary["spilled"] > 0, "no job spilled to the CPU tier"),
        (summary["fell_back"] > 0, "no job fell back to the CPU tier after its GPU worker was killed"),
        (sum(summary["drained"].values()) > 0, "no worker was drained"),
        (outage["seconds"] is not None and outage["spilled"] > 0, "no outage of the GPU tier sent a job to the CPU tier"),
        (outage["back_after"] is not None, "no job ran on a GPU after the outage"),
        (gpu["peak_replicas"] > 0, "the GPU tier never left zero"),
        (gpu["final_replicas"] == 0, f"the GPU tier did not return to zero: {gpu['final_replicas']} left"),
    ]
    return [problem for good, problem in checks if not good]


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)


def same(result: Any, expected: Mapping[str, Any]) -> bool:
    """Whether a job's result is the expected one, its fractions to nine digits."""
    return isinstance(result, dict) and result.keys() == expected.keys() and all(map(_equal, result.values(), expected.values()))


def sparkline(values: Iterable[tuple[float, int]], width: int) -> str:
    """The highest value of each of ``width`` equal spans of time, from ``(time, value)`` in order of time.

    A value holds until the next one.
    """
    points = list(values)
    if not points:
        return ""
    begin, end, most = points[0][0], points[-1][0], max(1, max(value for _, value in points))
    spans: list[list[int]] = [[] for _ in range(width)]
    for at, value in points:
        spans[min(width - 1, int((at - begin) / max(end - begin, 1e-9) * width))].append(value)
    marks, last = "", points[0][1]
    for span in spans:
        marks += _SPARKS[math.ceil(max(span, default=last) / most * (len(_SPARKS) - 1))]
        last = span[-1] if span else last
    return marks


def _equal(one: Any, other: Any) -> bool:
    return math.isclose(one, other, rel_tol=1e-9) if isinstance(other, float) and isinstance(one, float) else bool(one == other)
