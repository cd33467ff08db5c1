"""What connects the watches to the pass, with the API server's answers put in by hand."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import Mock

import pytest

from workerpool_operator.main import Operator

pytestmark = pytest.mark.unit


def stored(name: str) -> dict[str, Any]:
    metadata = {"namespace": "ml", "name": name, "uid": name, "generation": 1, "resourceVersion": "1"}
    worker = {"spec": {"containers": [{"name": "worker"}]}}
    tiers = [{"name": "cpu", "queue": name, "template": worker}]
    return {
        "metadata": {**metadata, "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"app": "media.tasks", "broker": {"url": "redis://one"}, "tiers": tiers},
    }


class Listing:
    """An API server that lists WorkerPools."""

    async def get(self, path: str, **_: str) -> dict[str, Any]:
        pools = [stored("a"), stored("b"), stored("c")] if path.endswith("workerpools") else []
        return {"metadata": {"resourceVersion": "1"}, "items": pools}


def test_a_pool_that_cannot_be_taken_in_keeps_no_other_from_it(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> list[str]:
        operator = Operator(Listing(), [], Mock())  # type: ignore[arg-type]
        take_in = operator._reflect

        async def reflect(namespace: str, name: str) -> None:
            if name == "b":
                raise RuntimeError("out of order")
            await take_in(namespace, name)

        operator._reflect = reflect  # type: ignore[method-assign]
        listing = asyncio.create_task(operator._keep_listing())
        await asyncio.wait([listing], timeout=0.2)
        assert not listing.done()
        listing.cancel()
        return sorted(operator._reconciler.pools)

    assert asyncio.run(scenario()) == ["ml/a", "ml/c"]
    assert caplog.messages == ["ml/b: not taken in, the next listing tries again"]
