"""The broker URL out of a Secret, while the API server answers, refuses, fails and hangs."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from workerpool_operator.kube import urls
from workerpool_operator.kube.api import ApiError
from workerpool_operator.kube.urls import CACHE_SECONDS, KubeUrls
from workerpool_operator.model import parse_spec
from workerpool_operator.observation import Unavailable
from workerpool_operator.ports import Pool

pytestmark = pytest.mark.unit

SPEC = parse_spec(
    {
        "app": "media.tasks",
        "broker": {"urlFrom": {"secretKeyRef": {"name": "redis", "key": "url"}}},
        "tiers": [{"name": "cpu", "queue": "celery", "template": {"spec": {"containers": [{"name": "worker"}]}}}],
    }
)
assert not isinstance(SPEC, list)
POOL = Pool("ml", "media", "uid", 1, 0.0, SPEC)
URL = "redis://:secret@one/0"


class Secrets:
    """An API server that knows one Secret, fails as told, or does not answer at all."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.error: ApiError | None = None
        self.answers = asyncio.Event()
        self.answers.set()
        self.url = URL
        self.urls = KubeUrls(self, lambda: self.now)  # type: ignore[arg-type]

    async def get(self, path: str) -> Mapping[str, Any]:
        assert path == "/api/v1/namespaces/ml/secrets/redis"
        await self.answers.wait()
        if self.error:
            raise self.error
        return {"data": {"url": base64.b64encode(self.url.encode()).decode()}}

    async def later(self) -> str | Unavailable:
        """What is known when the cache is over, and the answer of this time has come in."""
        self.now += CACHE_SECONDS
        await self.urls.broker_url(POOL)
        await asyncio.sleep(0.01)
        return await self.urls.broker_url(POOL)


@pytest.mark.parametrize(
    "error", [ApiError(0, "no answer"), ApiError(503, "overloaded"), ApiError(401, "token expired")], ids=str
)
def test_a_secret_that_cannot_be_read_for_a_moment_changes_nothing(error: ApiError) -> None:
    async def scenario() -> None:
        secrets = Secrets()
        assert await secrets.urls.broker_url(POOL) == URL
        secrets.error = error
        assert await secrets.later() == URL
        secrets.error, secrets.url = None, "redis://two/0"
        assert await secrets.later() == "redis://two/0"

    asyncio.run(scenario())


def test_a_url_of_sentinels_comes_with_the_name_of_their_master_or_not_at_all() -> None:
    async def scenario() -> None:
        secrets = Secrets()
        secrets.url = "sentinel://:pw@one:26379/0;sentinel://:pw@two:26379/0"
        answer = await secrets.urls.broker_url(POOL)
        assert isinstance(answer, Unavailable)
        assert "spec.broker.masterName" in answer.why
        assert "pw" not in answer.why
        named = replace(
            POOL, spec=POOL.spec.model_copy(update={"broker": POOL.spec.broker.model_copy(update={"master_name": "main"})})
        )
        assert await secrets.urls.broker_url(named) == f"{secrets.url}#main"
        secrets.url = URL
        secrets.now += CACHE_SECONDS
        await secrets.urls.broker_url(named)
        await asyncio.sleep(0.01)
        assert isinstance(await secrets.urls.broker_url(named), Unavailable)

    asyncio.run(scenario())


@pytest.mark.parametrize(("status", "words"), [(404, "does not exist"), (403, "may not read")])
def test_a_secret_that_is_gone_or_forbidden_is_told(status: int, words: str) -> None:
    async def scenario() -> None:
        secrets = Secrets()
        assert await secrets.urls.broker_url(POOL) == URL
        secrets.error = ApiError(status, "no")
        answer = await secrets.later()
        assert isinstance(answer, Unavailable)
        assert words in answer.why

    asyncio.run(scenario())


def test_an_api_server_that_hangs_is_waited_for_a_moment_and_not_at_all_where_the_url_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        secrets = Secrets()
        secrets.answers.clear()
        async with asyncio.timeout(60 * urls.PATIENCE_SECONDS):
            assert isinstance(await secrets.urls.broker_url(POOL), Unavailable)
        secrets.answers.set()
        assert await secrets.urls.broker_url(POOL) == URL
        secrets.answers.clear()
        monkeypatch.setattr(urls, "PATIENCE_SECONDS", 3_600.0)
        async with asyncio.timeout(60):
            assert await secrets.later() == URL
        secrets.answers.set()

    asyncio.run(scenario())


def test_a_changed_url_changes_its_mark_which_says_nothing_of_it() -> None:
    async def scenario() -> None:
        secrets = Secrets()
        assert secrets.urls.mark(POOL) == "", "nothing is known yet"
        await secrets.urls.broker_url(POOL)
        mark = secrets.urls.mark(POOL)
        assert mark
        assert "secret" not in mark
        await secrets.later()
        assert secrets.urls.mark(POOL) == mark
        another = replace(POOL, uid="another")
        await secrets.urls.broker_url(another)
        assert secrets.urls.mark(another) not in {mark, ""}, "equal passwords of two pools look different"
        secrets.url = "redis://:other@one/0"
        await secrets.later()
        assert secrets.urls.mark(POOL) not in {mark, ""}
        secrets.error = ApiError(404, "gone")
        await secrets.later()
        assert secrets.urls.mark(POOL) == ""

    asyncio.run(scenario())


def test_marks_are_made_beside_the_event_loop_which_has_a_lease_to_renew(monkeypatch: pytest.MonkeyPatch) -> None:
    loop_goes_on = threading.Event()

    def slow(url: str, salt: str) -> str:
        assert loop_goes_on.wait(20), "the event loop stands still"
        return f"{salt} of {len(url)}"

    monkeypatch.setattr(urls, "_mark", slow)

    async def scenario() -> None:
        secrets = Secrets()
        asyncio.get_running_loop().call_later(0.05, loop_goes_on.set)
        pools = [replace(POOL, uid=f"uid-{n}") for n in range(3)]
        assert await asyncio.gather(*(secrets.urls.broker_url(pool) for pool in pools)) == [URL] * 3
        assert [secrets.urls.mark(pool) for pool in pools] == [f"uid-{n} of {len(URL)}" for n in range(3)]

    asyncio.run(scenario())
