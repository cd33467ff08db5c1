"""A kind cluster for the e2e tests, for machines that have Docker: the same images, the same two nodes, pretended GPUs.

``python -m e2e.cluster.kind`` makes it and prints the variable by which the tests find it; ``kind delete cluster --name
celery-workerpool`` ends it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from e2e.cluster.binaries import cache_home
from e2e.cluster.images import IMAGES, ROOT
from e2e.cluster.kubectl import kubectl_path
from e2e.cluster.machine import NODES, SHARED

NAME = "celery-workerpool"


def main() -> int:
    """Build, create, load."""
    if missing := [program for program in ("docker", "kind") if shutil.which(program) is None]:
        print(f"not on PATH: {', '.join(missing)}", file=sys.stderr)
        return 1
    shared = cache_home() / "kind" / "shared"
    shared.mkdir(parents=True, exist_ok=True)
    shared.chmod(0o1777)
    kubeconfig = cache_home() / "kind" / "kubeconfig"
    try:
        for image in IMAGES:
            _run("docker", "build", "--file", str(ROOT / image.dockerfile), "--tag", image.name, str(ROOT))
        configuration = json.dumps(_configuration(shared))
        _run("kind", "create", "cluster", f"--name={NAME}", f"--kubeconfig={kubeconfig}", "--config=-", stdin=configuration)
        _run("kind", "load", "docker-image", f"--name={NAME}", *(image.name for image in IMAGES))
        for node in NODES:
            if node.gpus:
                _advertise(kubeconfig, node.name, node.gpus)
    except subprocess.CalledProcessError as error:
        return int(error.returncode)
    print(f"export E2E_KUBECONFIG={kubeconfig}")
    return 0


def _configuration(shared: Path) -> dict[str, object]:
    mounts = [{"hostPath": str(shared), "containerPath": str(SHARED)}]
    workers = [{"role": "worker", "labels": {"workerpool.dev/node": node.name}, "extraMounts": mounts} for node in NODES]
    nodes = [{"role": "control-plane"}, *workers]
    return {"kind": "Cluster", "apiVersion": "kind.x-k8s.io/v1alpha4", "nodes": nodes}


def _advertise(kubeconfig: Path, node: str, gpus: int) -> None:
    kubectl = [kubectl_path(), f"--kubeconfig={kubeconfig}"]
    names = subprocess.run(
        [*kubectl, "get", "nodes", f"--selector=workerpool.dev/node={node}", "--output=name"],
        check=True,
        capture_output=True,
        text=True,
    )
    capacity = json.dumps({"status": {"capacity": {"nvidia.com/gpu": str(gpus)}}})
    _run(*kubectl, "patch", names.stdout.strip(), "--subresource=status", "--type=merge", f"--patch={capacity}")


def _run(*command: str, stdin: str | None = None) -> None:
    subprocess.run(command, check=True, text=True, input=stdin)


if __name__ == "__main__":
    sys.exit(main())
