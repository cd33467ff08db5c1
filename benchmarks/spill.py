"""Simulates when to leave the fast tier, by several rules on the same jobs: ``python -m benchmarks.spill`` prints the table.

Four fast slots of one second, sixteen slots that are slower by the ratio; Poisson arrivals, lognormal service of 50 % deviation.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from statistics import mean, quantiles

from workerpool_routing.decide import MARGIN, Candidates, Load, Reason, place
from workerpool_routing.wire import TierPolicy

SLOTS, JOBS, SEEDS, DEVIATION = (4, 16), 20_000, (1, 2, 3), 0.5
BOTH = Candidates((TierPolicy("fast", "fast", accelerated=True), TierPolicy("slow", "slow", accelerated=False)), accelerated=1)

Rule = Callable[[Load, Load], int]
"""Which tier takes the next job."""


def ours() -> Rule:
    """The rule itself, with its memory of the last side."""
    spilling = False

    def rule(fast: Load, slow: Load) -> int:
        nonlocal spilling
        verdict = place(BOTH, (fast, slow), limit=None, spilling=spilling)
        spilling = verdict.reason is Reason.WAIT_TOO_LONG
        return verdict.index

    return rule


def shortest_completion() -> Rule:
    """Each job for itself."""
    return lambda fast, slow: int(fast.wait + (fast.service or 0) > slow.wait + (slow.service or 0))


def margin() -> Rule:
    """The rule for unknown service times."""
    return lambda fast, slow: int(fast.waiting > slow.waiting + MARGIN)


def longer_than(length: int) -> Callable[[], Rule]:
    """A fixed length of the fast queue."""
    return lambda: lambda fast, _: int(fast.waiting > length)


def simulate(rule: Rule, services: Sequence[float], load: float, seed: int) -> list[float]:
    """Seconds from submit to end of every job."""
    chance = random.Random(seed)
    sigma = math.sqrt(math.log(1 + DEVIATION**2))
    rate = load * sum(slots / service for slots, service in zip(SLOTS, services, strict=True))
    queues, busy, ends, sojourns = (deque[float](), deque[float]()), [0, 0], list[tuple[float, int, float]](), list[float]()

    def start(tier: int, now: float) -> None:
        while queues[tier] and busy[tier] < SLOTS[tier]:
            busy[tier] += 1
            seconds = services[tier] * math.exp(chance.gauss(-sigma * sigma / 2, sigma))
            heapq.heappush(ends, (now + seconds, tier, queues[tier].popleft()))

    arrived, arrival = 0, chance.expovariate(rate)
    while arrived < JOBS or ends:
        if arrived < JOBS and (not ends or arrival < ends[0][0]):
            fast, slow = (Load(len(queues[t]), busy[t], SLOTS[t], service=services[t]) for t in (0, 1))
            tier = rule(fast, slow)
            queues[tier].append(arrival)
            start(tier, arrival)
            arrived, arrival = arrived + 1, arrival + chance.expovariate(rate)
        else:
            now, tier, submitted = heapq.heappop(ends)
            busy[tier] -= 1
            sojourns.append(now - submitted)
            start(tier, now)
    return sojourns


RULES: dict[str, Callable[[], Rule]] = {
    "this rule": ours,
    "shortest completion": shortest_completion,
    f"margin of {MARGIN} jobs": margin,
    "over 2 waiting": longer_than(2),
    "over 6 waiting": longer_than(6),
}


def main() -> None:
    """Mean and 99th percentile, in seconds, over all seeds."""
    print(f"| ratio, load | {' | '.join(RULES)} |\n|{'---|' * (len(RULES) + 1)}")
    for ratio, load in ((4.0, 0.85), (8.0, 0.5), (8.0, 0.85), (8.0, 0.95), (16.0, 0.85)):
        cells = []
        for make in RULES.values():
            runs = [simulate(make(), (1.0, ratio), load, seed) for seed in SEEDS]
            tail = mean(quantiles(run, n=100)[-1] for run in runs)
            cells.append(f"{mean(map(mean, runs)):.2f} / {tail:.1f}")
        print(f"| {ratio:.0f}, {load:.0%} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
