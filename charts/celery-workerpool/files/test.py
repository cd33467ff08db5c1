"""What ``helm test`` runs, in the operator's image: may the operator do its work, and does one of its replicas lead?

Arguments: the directory of the service account, the path of the Lease, and the paths that the operator has to be able to list.
"""

from __future__ import annotations

import json
import os
import ssl
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

PATIENCE_SECONDS = 60.0


class ApiServer:
    """The API server of the pod's cluster, asked as the pod's service account; never through a proxy."""

    def __init__(self, account: Path) -> None:
        host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
        self._url = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
        self._token = (account / "token").read_text()
        trust = ssl.create_default_context(cafile=account / "ca.crt")
        handlers = urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trust)
        self._open = urllib.request.build_opener(*handlers).open

    def get(self, path: str) -> dict[str, Any]:
        """Read an object or a list."""
        request = urllib.request.Request(self._url + path, headers={"Authorization": f"Bearer {self._token}"})  # noqa: S310
        with self._open(request, timeout=10) as answer:
            return dict(json.load(answer))


def leader(server: ApiServer, lease: str) -> str:
    """Who renews the Lease; empty where nobody did for a minute. Its own clock is not compared with anybody's."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    before = None
    while time.monotonic() < deadline:
        try:
            spec = server.get(lease)["spec"]
        except HTTPError as error:
            if error.code != 404:
                raise
            spec = {}
        if before and spec.get("holderIdentity") and spec.get("renewTime") != before:
            return str(spec["holderIdentity"])
        before = spec.get("renewTime")
        time.sleep(1)
    return ""


def main(account: str, lease: str, *lists: str) -> None:
    """Exit with one plain message where something is wrong."""
    server = ApiServer(Path(account))
    try:
        for path in lists:
            server.get(path)
        holder = leader(server, lease)
    except HTTPError as error:
        sys.exit(f"{error.url}: {json.load(error).get('message', error)}")
    if not holder:
        sys.exit(f"nobody renewed {lease} within {PATIENCE_SECONDS:.0f} s: look at the operator's log")
    print(f"{holder} leads")  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
