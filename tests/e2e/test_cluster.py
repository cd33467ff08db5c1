"""The cluster that the scenarios stand on leaves nothing behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from e2e.cluster import images
from tests.e2e.kube import Kube, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

OWNER = """
import signal
from e2e.cluster.cluster import Cluster
with Cluster(print) as cluster:
    print(f"up {cluster.kubeconfig}", flush=True)
    signal.pause()
"""


def left_of(directory: Path) -> list[str]:
    """Processes, mounts, cgroups and files that bear the name of the cluster's directory."""
    processes = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            processes.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    mounts = Path("/proc/mounts").read_text().splitlines()
    cgroups = [str(path) for pattern in ("*", "*/*") for path in Path("/sys/fs/cgroup").glob(pattern)]
    return [found for found in (*processes, *mounts, *cgroups, *map(str, directory.parent.iterdir())) if directory.name in found]


def test_nothing_is_left_of_a_cluster_whose_owner_is_killed(kube: Kube) -> None:
    if kube.cluster is None:
        pytest.skip("E2E_KUBECONFIG: the cluster is not ours")
    command = [sys.executable, "-c", OWNER]
    with subprocess.Popen(command, cwd=images.ROOT, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        said = [""]
        while not said[-1].startswith("up ") and (line := owner.stdout.readline()):
            said.append(line)
        assert said[-1].startswith("up "), f"the cluster did not come up: {''.join(said)}"
        directory = Path(said[-1].split()[1]).parents[1]
        assert len(left_of(directory)) > 10
        owner.send_signal(signal.SIGKILL)
    eventually(lambda: left_of(directory), lambda found: not found, seconds=240)


def test_the_scheduler_counts_the_gpus(kube: Kube) -> None:
    eventually(lambda: allocatable_gpus(kube), lambda gpus: gpus == 2)


def allocatable_gpus(kube: Kube) -> int:
    return sum(int(node["status"]["allocatable"].get("nvidia.com/gpu", 0)) for node in kube.items("default", "nodes"))
