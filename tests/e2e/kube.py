"""The cluster under test: one of our own, or whichever ``E2E_KUBECONFIG`` names; and the programs that talk to it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from e2e.cluster import binaries
from e2e.cluster.cluster import Cluster
from e2e.cluster.kubectl import kubectl_path

PATIENCE_SECONDS = 120.0
"""How long anything may take that is bound to happen: long, because the machine may be busy with other things."""

Object = dict[str, Any]
T = TypeVar("T")


class Kube:
    """kubectl and helm as an administrator of the cluster; ``cluster`` is None where it is not ours to break."""

    def __init__(self, kubeconfig: Path, cluster: Cluster | None) -> None:
        self.cluster = cluster
        self._prefix = cluster.inside() if cluster else []
        self._helm = str(binaries.find(("helm",)) / "helm") if cluster or os.environ.get("KUBEBUILDER_ASSETS") else "helm"
        self._environment = {**os.environ, "KUBECONFIG": str(kubeconfig)}

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True) -> str:
        """Run kubectl; what it printed, and a failure of the test where it fails."""
        return self._run([kubectl_path(), *arguments], stdin, check)

    def helm(self, *arguments: str) -> str:
        return self._run([self._helm, *arguments], None, check=True)

    def shell(self, command: str) -> str:
        """Run what people type into a shell, with this kubectl; what it printed."""
        return self._run(["sh", "-c", f'kubectl() {{ {kubectl_path()} "$@"; }}\n{command}'], None, check=True)

    def apply(self, namespace: str, *objects: Mapping[str, Any]) -> None:
        items = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
        self.kubectl("apply", "--server-side", "--force-conflicts", f"--namespace={namespace}", "-f", "-", stdin=items)

    def get(self, namespace: str, what: str, *selection: str) -> Object:
        answer: Object = json.loads(self.kubectl("get", what, *selection, f"--namespace={namespace}", "--output=json"))
        return answer

    def items(self, namespace: str, what: str, *selection: str) -> list[Object]:
        items: list[Object] = self.get(namespace, what, *selection)["items"]
        return items

    def _run(self, command: list[str], stdin: str | None, check: bool) -> str:
        whole = [*self._prefix, *command]
        answer = subprocess.run(
            whole, input=stdin, env=self._environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS * 2, check=False
        )
        if check and answer.returncode:
            raise AssertionError(f"{' '.join(command[:8])}: {answer.stderr or answer.stdout}")
        return answer.stdout


def eventually(look: Callable[[], T], holds: Callable[[T], object] = bool, seconds: float = PATIENCE_SECONDS) -> T:
    """Look until it holds, and return what was seen; the API server may be away while we look.

    Raises:
        AssertionError: it did not within that time; the message shows what was seen last.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            seen: object = look()
            if holds(seen):  # type: ignore[arg-type]
                return seen  # type: ignore[return-value]
        except AssertionError as error:
            seen = error
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:.0f} s; last seen: {seen}")
        time.sleep(0.5)
