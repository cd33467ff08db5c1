"""The least that any rule could pay: a linear programme that knows the future.

It is the fluid relaxation of the problem: replicas may be fractions, a job may be cut up and served in any order, and a start
costs its start-up time. Every schedule that starts each job within the target is one of its solutions, so none costs less.
"""

from __future__ import annotations

import math

from workerpool_operator.simulation.trace import Trace


def replica_seconds(
    trace: Trace, *, start_seconds: float, target_wait: float, slots: int = 1, bin_seconds: float = 20.0
) -> float:
    """A lower bound on replica-seconds, start-up included.

    Over bins of time: ``min Σ n·dt + D·u`` with ``u ≥ Δn`` (starts), work done in a bin ``≤ slots·n·dt``, and the work done by
    any time no more than what has arrived, no less than what every job that must have ended by then asks for.
    """
    import numpy as np
    from scipy.optimize import linprog
    from scipy.sparse import bmat, diags, identity

    if not len(trace):
        return 0.0
    arrivals, services = np.asarray(trace.arrivals), np.asarray(trace.services)
    ends = arrivals + target_wait + services
    count = math.ceil((ends.max() - arrivals[0]) / bin_seconds) + 1
    edges = arrivals[0] + bin_seconds * np.arange(1, count + 1)
    arrived = np.concatenate(([0.0], np.cumsum(services)))[np.searchsorted(arrivals, edges, side="right")]
    order = np.argsort(ends)
    due = np.concatenate(([0.0], np.cumsum(services[order])))[np.searchsorted(ends[order], edges, side="right")]

    # Variables: n (replicas), u (starts), x (work done by the end of the bin).
    difference = diags([np.ones(count), -np.ones(count - 1)], [0, -1])
    rows = bmat(
        [
            [difference, -identity(count), None],
            [-slots * bin_seconds * identity(count), None, difference],
        ]
    )
    cost = np.concatenate((np.full(count, bin_seconds), np.full(count, start_seconds), np.zeros(count)))
    bounds = [(0.0, None)] * (2 * count) + list(zip(due, arrived, strict=True))
    found = linprog(cost, A_ub=rows, b_ub=np.zeros(2 * count), bounds=bounds, method="highs")
    if not found.success:
        raise ArithmeticError(f"the bound was not found: {found.message}")
    return float(found.fun)
