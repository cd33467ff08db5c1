"""One way to talk to the API server: JSON in, JSON out, an :class:`ApiError` that says what it answered."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import aiohttp
from kubernetes.aio import config
from kubernetes.aio.client import ApiClient, Configuration

APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"

TIMEOUT_SECONDS = 5.0
"""No pass waits longer than this for one answer."""


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
    """A connection to the API server of the pod's own cluster, or else of KUBECONFIG. Made inside the event loop."""

    def __init__(self, client: ApiClient) -> None:
        self._client = client

    @classmethod
    async def connect(cls) -> Api:
        """Log in; raises :class:`kubernetes.aio.config.ConfigException` where there is nothing to log in with."""
        configuration = Configuration()
        try:
            config.load_incluster_config(configuration)  # type: ignore[no-untyped-call]
        except config.ConfigException:
            await config.load_kube_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        return cls(ApiClient(configuration))

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

    async def apply(self, path: str, body: Mapping[str, Any], manager: str) -> dict[str, Any]:
        """Server-side apply: create it or make the fields in ``body`` as they say, and own them."""
        return await self._request("PATCH", path, {"fieldManager": manager, "force": "true"}, body, APPLY)

    async def delete(self, path: str) -> None:
        """Delete an object, unless it is gone already; what it owns goes with it."""
        try:
            await self._request("DELETE", path, {}, {"propagationPolicy": "Background"}, "application/json")
        except ApiError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise

    async def _request(
        self, method: str, path: str, query: Mapping[str, str], body: Mapping[str, Any] | None, content_type: str
    ) -> dict[str, Any]:
        try:
            verb, url, headers, content, _ = await self._client.param_serialize(
                method,
                path,
                query_params=list(query.items()),
                header_params={"Content-Type": content_type, "Accept": "application/json"},
                body=body,
                auth_settings=["BearerToken"],
            )
            response = await self._client.call_api(verb, url, headers, content, _request_timeout=TIMEOUT_SECONDS)
            raw = await response.response.read()
        except TimeoutError as error:
            raise ApiError(0, f"the API server did not answer within {TIMEOUT_SECONDS:.0f} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ApiError(0, f"the API server cannot be reached: {error}") from error
        answer = _parse(raw)
        if response.status >= HTTPStatus.BAD_REQUEST:
            message = answer.get("message") or f"{response.status} {response.reason}"
            raise ApiError(response.status, message, _seconds(response.headers.get("Retry-After")))
        return answer


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
