"""The connection to an API server that is not there."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from kubernetes.aio.client import ApiClient, Configuration

from workerpool_operator.kube.api import Api, ApiError

pytestmark = pytest.mark.unit


async def follow(api: Api) -> None:
    async for _ in api.watch("/api/v1/pods", 5):
        pytest.fail("nobody is there")


async def read(api: Api) -> None:
    await api.get("/api/v1/pods")


@pytest.mark.parametrize(("ask", "words"), [(follow, "does not begin a watch"), (read, "cannot be reached")])
def test_an_api_server_that_cannot_be_reached_is_a_passing_error(ask: Callable[[Api], Awaitable[Any]], words: str) -> None:
    async def scenario() -> ApiError:
        with socket.create_server(("127.0.0.1", 0)) as free:
            configuration = Configuration(host=f"http://127.0.0.1:{free.getsockname()[1]}")
        api = Api(ApiClient(configuration))
        try:
            with pytest.raises(ApiError) as raised:
                await ask(api)
            return raised.value
        finally:
            await api.close()

    error = asyncio.run(scenario())
    assert words in str(error)
    assert (error.status, error.passing) == (0, True)
