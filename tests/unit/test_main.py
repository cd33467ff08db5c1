"""What connects the watches to the pass, with the API server's answers put in by hand."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import AsyncMock, Mock

import aiohttp
import pytest

from workerpool_operator import main
from workerpool_operator.kube.api import Api
from workerpool_operator.kube.seen import PAGE, worker_pool
from workerpool_operator.main import Operator
from workerpool_operator.observation import Unavailable
from workerpool_operator.ports import Pool

pytestmark = pytest.mark.unit

PATIENCE_SECONDS = 60.0


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
        await until(lambda: "ml/c" in operator._reconciler.pools)
        assert not listing.done()
        listing.cancel()
        return sorted(operator._reconciler.pools)

    assert asyncio.run(scenario()) == ["ml/a", "ml/c"]
    assert caplog.messages == ["ml/b: could not be processed, the next listing tries again"]


def test_an_answer_that_is_no_listing_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(main, "RETRY_SECONDS", 0.01)

    class Portal(Listing):
        answers = 0

        async def get(self, path: str, **query: str) -> dict[str, Any]:
            self.answers += 1
            return {} if self.answers == 1 else await super().get(path, **query)

    async def scenario() -> None:
        operator = Operator(Portal(), [], Mock())  # type: ignore[arg-type]
        listing = asyncio.create_task(operator._keep_listing())
        await until(lambda: listing.done() or "ml/c" in operator._reconciler.pools)
        assert not listing.done()
        listing.cancel()

    asyncio.run(scenario())
    assert caplog.messages == ["listing failed, the next one tries again"]


def test_a_pool_that_is_made_anew_keeps_what_it_publishes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "LAST_PASS_SECONDS", 0.0)

    async def scenario() -> None:
        operator = Operator(Listing(), [], Mock())  # type: ignore[arg-type]
        forget = AsyncMock()
        monkeypatch.setattr(operator._broker, "forget", forget)
        pool = worker_pool(stored("a"))
        assert isinstance(pool, Pool)
        operator._reconciler.pools[pool.id] = replace(pool, uid="another")
        await operator._forget(pool)
        forget.assert_not_awaited()
        del operator._reconciler.pools[pool.id]
        await operator._forget(pool)
        forget.assert_awaited_once_with("redis://one", pool)

    asyncio.run(scenario())


def test_a_pass_that_does_not_end_makes_the_process_ask_for_its_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "STUCK_SECONDS", 1.0)

    async def scenario() -> None:
        operator = Operator(Listing(), [], Mock())  # type: ignore[arg-type]
        pool = worker_pool(stored("a"))
        assert isinstance(pool, Pool)
        operator._reconciler.pools[pool.id] = pool

        async def hang(_: Pool) -> str | Unavailable:
            await asyncio.Event().wait()
            raise AssertionError

        monkeypatch.setattr(operator._urls, "broker_url", hang)
        await operator.endpoints.open(0)
        port = next(address[1] for address in operator.endpoints._runner.addresses if address[0] == "0.0.0.0")
        passes = asyncio.create_task(operator._reconciler.run())
        try:
            assert await healthz(port) == (200, "ok\n"), "a standby makes no pass"
            operator._began = time.monotonic()
            await until(operator.unhealthy)
            status, text = await healthz(port)
            assert status == 503
            assert text.startswith("no pass has ended for ")
        finally:
            passes.cancel()
            await asyncio.gather(passes, return_exceptions=True)
            await operator.endpoints.close()

    asyncio.run(scenario())


def test_a_watch_that_does_nothing_makes_the_process_ask_for_its_restart() -> None:
    async def scenario() -> None:
        operator = Operator(Listing(), [], Mock())  # type: ignore[arg-type]
        operator._began = operator._reconciler.passes.last_ended_at = time.monotonic()
        for kind in main._WATCHED:
            operator._watched[kind] = operator._began
        assert operator.unhealthy() == ""
        operator._watched["pods"] -= main.SILENT_SECONDS + 1
        assert operator.unhealthy().startswith("the watch of pods has done nothing for ")

    asyncio.run(scenario())


def test_a_stored_pool_that_is_not_valid_is_in_the_metrics_until_it_is_gone() -> None:
    async def scenario() -> None:
        operator = Operator(AsyncMock(Api), [], Mock(leads=True))
        wrong = {**stored("a"), "spec": {"app": "media.tasks"}}

        def not_ready() -> list[str]:
            samples = [sample for family in operator._metrics.collect() for sample in family.samples]
            return [s.labels["pool"] for s in samples if s.labels.get("type") == "Ready" and s.labels["status"] == "False"]

        for raw in (wrong, stored("b")):
            await operator._on_pool({"type": "ADDED", "object": raw})  # type: ignore[typeddict-item]
        assert not_ready() == ["ml/a"]
        await operator._on_pool({"type": "DELETED", "object": wrong})  # type: ignore[typeddict-item]
        assert not_ready() == []

    asyncio.run(scenario())


def test_a_pool_that_is_deleted_and_held_by_a_finalizer_says_that_nothing_is_done_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "LAST_PASS_SECONDS", 0.0)

    async def scenario() -> None:
        api = AsyncMock(Api)
        operator = Operator(api, [], Mock())
        operator._seen.complete = True
        published = AsyncMock()
        monkeypatch.setattr(operator._broker, "forget", published)
        pool, metadata = stored("a"), stored("a")["metadata"]
        await operator._on_pool({"type": "ADDED", "object": pool})  # type: ignore[typeddict-item]
        assert list(operator._reconciler.pools) == ["ml/a"]
        held = {"deletionTimestamp": "2026-01-02T00:00:00Z", "finalizers": ["backup.example/hold"], "resourceVersion": "2"}
        event = {"type": "MODIFIED", "object": {**pool, "metadata": {**metadata, **held}}}
        for _ in range(2):
            await operator._on_pool(event)  # type: ignore[arg-type]
        assert not operator._reconciler.pools
        published.assert_awaited_once()
        api.merge.assert_awaited_once()
        path, body = api.merge.await_args.args
        assert path.endswith("/workerpools/a/status")
        (ready,) = body["status"]["conditions"]
        assert (ready["type"], ready["status"], ready["reason"]) == ("Ready", "False", "Deleting")
        assert "backup.example/hold" in ready["message"]

    asyncio.run(scenario())


async def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def healthz(port: int) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/healthz") as answer:
        return answer.status, await answer.text()


def test_kopf_lists_page_by_page() -> None:
    assert main._settings().watching.chunk_size == PAGE, "thousands of pods in one answer would hold up the renewal of the lease"
