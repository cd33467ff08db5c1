"""One way to talk to the API server: JSON in, JSON out, an :class:`ApiError` that says what it answered."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from http import HTTPStatus
from importlib.metadata import version
from typing import Any, TypeAlias
from urllib.parse import quote

import aiohttp
from kubernetes.aio import config
from kubernetes.aio.client import ApiClient, Configuration

APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"
STEPS = "application/json-patch+json"

TIMEOUT_SECONDS = 5.0
"""No pass waits longer than this for one answer."""

_Body: TypeAlias = Mapping[str, Any] | Sequence[Mapping[str, Any]] | None

USER_AGENT = f"celery-workerpool/{version('celery-workerpool')}"


class ApiError(Exception):
    """The API server refused or could not be reached.

    Attributes:
        status: the HTTP status, 0 where there was no answer.
        retry_after: seconds that it asked to wait, 0 where it did not ask.
    """

    def __init__(self, status: int, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after

    @property
    def passing(self) -> bool:
        """Whether the same request may well succeed later."""
        return (
            self.status in {0, HTTPStatus.CONFLICT, HTTPStatus.TOO_MANY_REQUESTS}
            or self.status >= HTTPStatus.INTERNAL_SERVER_ERROR
        )


class Api:
    """A connection to the API server of the pod's own cluster, or else of KUBECONFIG. Made inside the event loop.

    Args:
        client: logged in.
        fence: called before every write; does not return where this process may not write any more.
        patience: seconds for one answer.
    """

    def __init__(self, client: ApiClient, fence: Callable[[], None] = lambda: None, patience: float = TIMEOUT_SECONDS) -> None:
        client.user_agent = USER_AGENT
        self._client, self._fence, self._patience = client, fence, patience

    @classmethod
    async def connect(cls, fence: Callable[[], None] = lambda: None, patience: float = TIMEOUT_SECONDS) -> Api:
        """Log in; raises :class:`kubernetes.aio.config.ConfigException` where there is nothing to log in with."""
        configuration = Configuration()
        try:
            config.load_incluster_config(configuration)  # type: ignore[no-untyped-call]
        except config.ConfigException:
            await config.load_kube_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        return cls(ApiClient(configuration), fence, patience)

    @property
    def host(self) -> str:
        """The URL of the API server."""
        return str(self._client.configuration.host)

    async def close(self) -> None:
        """Close its connections."""
        await self._client.rest_client.close()

    async def get(self, path: str, **query: str) -> dict[str, Any]:
        """Read an object or a list."""
        return await self._request("GET", path, query, None, "application/json")

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Create an object."""
        return await self._request("POST", path, {}, body, "application/json")

    async def merge(self, path: str, body: Mapping[str, Any], **query: str) -> dict[str, Any]:
        """Change some fields of an object."""
        return await self._request("PATCH", path, query, body, MERGE)

    async def step(self, path: str, steps: Sequence[Mapping[str, Any]], **query: str) -> dict[str, Any]:
        """Change an object by a JSON patch, all of it or nothing; a ``test`` that fails is answered with 422."""
        return await self._request("PATCH", path, query, steps, STEPS)

    async def apply(self, path: str, body: Mapping[str, Any], manager: str) -> dict[str, Any]:
        """Server-side apply: create it or make the fields in ``body`` as they say, and own them."""
        return await self._request("PATCH", path, {"fieldManager": manager, "force": "true"}, body, APPLY)

    async def delete(self, path: str, uid: str) -> None:
        """Delete this one object, unless it is gone already; what it owns goes with it. Another of its name is a conflict."""
        body = {"propagationPolicy": "Background", "preconditions": {"uid": uid}}
        try:
            await self._request("DELETE", path, {}, body, "application/json")
        except ApiError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise

    async def watch(self, path: str, seconds: int, **query: str) -> AsyncIterator[dict[str, Any]]:
        """Follow a resource for so long at most: events as the API server sends them."""
        query |= {"watch": "true", "timeoutSeconds": str(seconds)}
        try:
            response = await self._send("GET", path, query, None, "application/json", seconds + TIMEOUT_SECONDS)
        except (aiohttp.ClientError, OSError) as error:
            raise ApiError(0, f"the API server does not begin a watch: {error!r}") from error
        try:
            if response.status >= HTTPStatus.BAD_REQUEST:
                raise _refusal(response, await response.response.read())
            async for line in response.response.content:
                yield _parse(line)
        except (aiohttp.ClientError, OSError) as error:
            raise ApiError(0, f"the API server ended a watch: {error}") from error
        finally:
            response.response.close()

    async def _request(self, method: str, path: str, query: Mapping[str, str], body: _Body, content_type: str) -> dict[str, Any]:
        if method != "GET":
            self._fence()
        try:
            response = await self._send(method, path, query, body, content_type, self._patience)
            raw = await response.response.read()
        except TimeoutError as error:
            raise ApiError(0, f"the API server did not answer within {self._patience:.0f} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ApiError(0, f"the API server cannot be reached: {error}") from error
        if response.status >= HTTPStatus.BAD_REQUEST:
            raise _refusal(response, raw)
        return _parse(raw)

    async def _send(
        self, method: str, path: str, query: Mapping[str, str], body: _Body, content_type: str, patience: float
    ) -> Any:
        verb, url, headers, content, _ = await self._client.param_serialize(
            method,
            path,
            query_params=list(query.items()),
            header_params={"Content-Type": content_type, "Accept": "application/json"},
            body=body,
            auth_settings=["BearerToken"],
        )
        return await self._client.call_api(verb, url, headers, content, _request_timeout=patience)


def _refusal(response: Any, raw: bytes | None) -> ApiError:
    message = _parse(raw).get("message") or f"{response.status} {response.reason}"
    return ApiError(response.status, message, _seconds(response.headers.get("Retry-After")))


def _parse(raw: bytes | None) -> dict[str, Any]:
    try:
        answer = json.loads(raw or b"{}")
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _seconds(header: str | None) -> float:
    return float(header) if header and header.isdigit() else 0.0


def path_to(group_version: str, namespace: str | None, plural: str, *rest: str) -> str:
    """The path of a resource, an object in it, or an object's subresource; all namespaces when ``namespace`` is None."""
    root = "/api" if "/" not in group_version else "/apis"
    within = ["namespaces", namespace] if namespace else []
    return "/".join([root, group_version, *(quote(part, safe="") for part in (*within, plural, *rest))])
