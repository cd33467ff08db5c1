"""kubectl as the tests of level ``api`` call it, and the definition that most of them apply."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Protocol

import pytest
from e2e.cluster.control_plane import ControlPlane
from e2e.cluster.kubectl import kubectl_path

CRD = Path(__file__).parents[2] / "crds" / "workerpool.yaml"


class Kubectl(Protocol):
    """Runs kubectl as an administrator; ``stdin`` is what ``-f -`` reads. A refusal is a return code, not an exception."""

    def __call__(self, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]: ...


def kubectl_for(plane: ControlPlane, cache: Path) -> Kubectl:
    try:
        path = kubectl_path()
    except FileNotFoundError as missing:
        pytest.fail(str(missing), pytrace=False)
    environment = {**os.environ, "KUBECONFIG": str(plane.kubeconfig), "KUBECACHEDIR": str(cache)}

    def run(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        command = [path, *arguments]
        return subprocess.run(command, input=stdin, env=environment, capture_output=True, text=True, timeout=120, check=False)

    return run
