"""The inside of the cluster: the first process of namespaces of its own (processes, mounts, network), which end with it.

Run by :mod:`e2e.cluster.cluster`, as ``python -m e2e.cluster.machine BINARIES CGROUP IMAGE...`` with a directory of its own as
``TMPDIR``. It says ``ready`` and the path of a kubeconfig when both nodes are, then obeys one command a line of standard input,
answering each with ``ok``, and ends when that is closed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from e2e.cluster.control_plane import ControlPlane, ControlPlaneFailed
from e2e.cluster.images import PAUSE
from e2e.cluster.kubectl import kubectl_path

BRIDGE = "10.88.0.1"
PODS = "10.88.0.0/24"
GPUS = 2
SHARED = Path("/mnt")
"""A directory that both nodes see, writable for everybody: what a ReadWriteMany volume of the tests lies on."""

CONTROLLERS = Path("/sys/fs/cgroup")
READY_SECONDS = 120.0
MANY_SHARES = 32 * 1024


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the two; ``index`` keeps their addresses and ports apart."""

    name: str
    index: int
    gpus: int = 0

    @property
    def address(self) -> str:
        return f"10.88.0.{2 + self.index}"

    @property
    def pods(self) -> tuple[str, str]:
        """The first and the last address of its pods."""
        first = 20 + 110 * self.index
        return f"10.88.0.{first}", f"10.88.0.{first + 100}"


NODES = (Node("gpu-node", 0, gpus=GPUS), Node("cpu-node", 1))


class Machine:
    """Both nodes on top of a control plane."""

    def __init__(self, plane: ControlPlane, binaries: Path, cgroup: str, images: Sequence[Path]) -> None:
        self._plane, self._binaries, self._cgroup, self._images = plane, binaries, cgroup, images
        # Not within the control plane's: the paths of the kubelet's sockets have to be short.
        self._directory = Path(os.environ["TMPDIR"])
        self._kubectl = [kubectl_path(), f"--kubeconfig={plane.kubeconfig}"]

    def start(self) -> None:
        """Bring both nodes up, with the images loaded and the GPUs advertised."""
        kubeconfig = f"--kubeconfig={self._plane.kubeconfig}"
        self._plane.start("kube-scheduler", kubeconfig, "--leader-elect=false", "--bind-address=127.0.0.1")
        with ThreadPoolExecutor() as pool:
            list(pool.map(self.start_node, NODES))
        self._plane.start(
            "kube-proxy",
            kubeconfig,
            "--proxy-mode=iptables",
            f"--cluster-cidr={PODS}",
            # Pods share a bridge: an answer has to come back the way that the question went, or its address is not translated.
            "--masquerade-all",
            f"--hostname-override={NODES[0].name}",
            "--conntrack-max-per-core=0",
            "--healthz-bind-address=127.0.0.1:10256",
            "--metrics-bind-address=127.0.0.1:10249",
        )
        for node in NODES:
            self.wait_for(node)

    def start_node(self, node: Node) -> None:
        """A containerd and a kubelet, each with files, ports and a cgroup of its own: else each would end the other's pods."""
        directory = self._directory / node.name
        directory.mkdir(exist_ok=True)
        self._make_cgroup(f"{self._cgroup}/{node.name}")
        _write(directory / "cni" / "10-pods.conflist", json.dumps(_network(node, directory)))
        _write(directory / "containerd.toml", _containerd(directory))
        _write(directory / "kubelet.json", json.dumps(_kubelet(node, directory, f"{self._cgroup}/{node.name}")))
        self._plane.start(f"{node.name}.containerd", f"--config={directory}/containerd.toml", program="containerd")
        self._wait_until(lambda: self._ctr(node, "version").returncode == 0, f"containerd of {node.name}")
        for image in self._images:
            loaded = self._ctr(node, "images", "import", str(image))
            if loaded.returncode:
                raise ControlPlaneFailed(f"{image} cannot be loaded: {loaded.stderr.decode()}")
        self.start_kubelet(node)

    def start_kubelet(self, node: Node) -> None:
        directory = self._directory / node.name
        self._plane.start(
            f"{node.name}.kubelet",
            f"--kubeconfig={self._plane.kubeconfig}",
            f"--config={directory}/kubelet.json",
            f"--root-dir={directory}/kubelet",
            f"--cert-dir={directory}/pki",
            f"--hostname-override={node.name}",
            f"--node-ip={node.address}",
            f"--node-labels=workerpool.dev/node={node.name}",
            program="kubelet",
        )

    def wait_for(self, node: Node) -> None:
        """Wait until the node is ready, and say which GPUs it has, as a device plugin would."""
        self._wait_until(lambda: self._ready(node), f"node {node.name}")
        if node.gpus:
            gpus = {"nvidia.com/gpu": str(node.gpus)}
            self._patch(node, {"capacity": gpus, "allocatable": gpus})

    def lose(self, node: Node) -> None:
        """What a power cut does to a node: its kubelet, its containerd and all that they run are gone at once."""
        for part in ("kubelet", "containerd"):
            self._plane.stop(f"{node.name}.{part}")
        _until_none(lambda: self._run_by(node), signal.SIGKILL)

    def find(self, node: Node) -> None:
        """Bring a lost node back."""
        # A kubelet that starts takes back what was said of the GPUs: the wait has to be for its own word.
        self._patch(node, {"conditions": [{"type": "Ready", "status": "Unknown"}]})
        self.start_node(node)
        self.wait_for(node)

    def freeze(self, node: Node) -> None:
        """What a hypervisor does that pauses a node: nothing of it runs, and nothing is gone."""
        self.cut(node)
        self._plane.signal(f"{node.name}.containerd", signal.SIGSTOP)
        _until_none(lambda: [pid for pid in self._run_by(node) if _state(pid) != "T"], signal.SIGSTOP)

    def thaw(self, node: Node) -> None:
        """Let a frozen node go on."""
        for pid in self._run_by(node):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._plane.signal(f"{node.name}.containerd", signal.SIGCONT)
        self.mend(node)

    def cut(self, node: Node) -> None:
        """Stop the kubelet alone: what it has started runs on, and nobody can tell it anything."""
        self._plane.signal(f"{node.name}.kubelet", signal.SIGSTOP)

    def mend(self, node: Node) -> None:
        """Let it go on."""
        self._plane.signal(f"{node.name}.kubelet", signal.SIGCONT)
        self.wait_for(node)

    def _run_by(self, node: Node) -> list[int]:
        """The processes of its pods, and those that containerd has started for them."""
        own = f"/{self._cgroup}/{node.name}/"
        shims = f"{self._directory / node.name}/containerd.sock"
        return [pid for pid in _pids() if own in _read(pid, "cgroup") or shims in _read(pid, "cmdline")]

    def _patch(self, node: Node, status: Mapping[str, object]) -> None:
        patch = ["--subresource=status", "--type=strategic", f"--patch={json.dumps({'status': status})}"]
        subprocess.run([*self._kubectl, "patch", "node", node.name, *patch], check=True, stdout=subprocess.DEVNULL)

    def _ready(self, node: Node) -> bool:
        path = '{.status.conditions[?(@.type=="Ready")].status}'
        answer = subprocess.run(
            [*self._kubectl, "get", "node", node.name, f"-ojsonpath={path}"], capture_output=True, check=False
        )
        return answer.stdout == b"True"

    def _ctr(self, node: Node, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        socket = self._directory / node.name / "containerd.sock"
        command = [str(self._binaries / "ctr"), f"--address={socket}", "--namespace=k8s.io", *arguments]
        return subprocess.run(command, capture_output=True, check=False)

    def _wait_until(self, holds: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while not holds():
            self._plane.check()
            if time.monotonic() > deadline:
                raise ControlPlaneFailed(
                    f"{what} was not ready after {READY_SECONDS:.0f} s; see the logs in {self._plane.directory}"
                )
            time.sleep(0.2)

    def _make_cgroup(self, name: str) -> None:
        if (CONTROLLERS / "cgroup.controllers").exists():
            (CONTROLLERS / name).mkdir(parents=True, exist_ok=True)
            return
        self._make_cgroup_1(name)

    def _make_cgroup_1(self, name: str) -> None:
        for controller in CONTROLLERS.iterdir():
            if (controller / "cgroup.procs").exists():
                (controller / name).mkdir(parents=True, exist_ok=True)
        # An empty cpuset takes no process, and version 1 inherits nothing.
        for parent in (Path(name).parent, Path(name)):
            for file in ("cpuset.cpus", "cpuset.mems"):
                own = CONTROLLERS / "cpuset" / parent / file
                if own.exists():
                    own.write_text((CONTROLLERS / "cpuset" / file).read_text())
        # All pods together would else get no more of the machine than any one process outside.
        shares = CONTROLLERS / "cpu" / self._cgroup / "cpu.shares"
        if shares.exists():
            shares.write_text(str(MANY_SHARES))


def isolate() -> None:
    """Hide what the programs would write outside their directory, and make a network with nobody else in it."""
    _run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
    _run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/var/log")
    _run("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", str(SHARED))
    layers = {name: Path(os.environ["TMPDIR"]) / "var-lib" / name for name in ("upper", "work")}
    for layer in layers.values():
        layer.mkdir(parents=True)
    _run(
        "mount",
        "-t",
        "overlay",
        "-o",
        f"lowerdir=/var/lib,upperdir={layers['upper']},workdir={layers['work']}",
        "var-lib",
        "/var/lib",
    )
    _run("ip", "link", "set", "lo", "up")
    _run("ip", "link", "add", "pods", "type", "bridge")
    for address in (BRIDGE, *(node.address for node in NODES)):
        _run("ip", "address", "add", f"{address}/24", "dev", "pods")
    _run("ip", "link", "set", "pods", "up")
    # kube-proxy and the kubelet look up their default route's address.
    _run("ip", "route", "add", "default", "dev", "pods")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


def _network(node: Node, directory: Path) -> dict[str, object]:
    first, last = node.pods
    pods = {"subnet": PODS, "rangeStart": first, "rangeEnd": last, "gateway": BRIDGE}
    addresses = {
        "type": "host-local",
        "dataDir": str(directory / "addresses"),
        "ranges": [[pods]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    bridge = {"type": "bridge", "bridge": "pods", "isGateway": True, "hairpinMode": True, "ipMasq": False, "ipam": addresses}
    return {"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge, {"type": "loopback"}]}


def _containerd(directory: Path) -> str:
    # restrict_oom_score_adj: without the capability SYS_RESOURCE, as in most containers, runc cannot lower a score.
    # nri: both nodes would listen on one socket, and one of them ends where they begin at the same moment.
    return f"""
version = 3
root = "{directory}/containerd"
state = "/run/{directory.name}"
[grpc]
  address = "{directory}/containerd.sock"
[ttrpc]
  address = "{directory}/containerd.sock.ttrpc"
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "{PAUSE}"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
[plugins."io.containerd.cri.v1.runtime".cni]
  bin_dirs = ["/usr/lib/cni", "/opt/cni/bin"]
  conf_dir = "{directory}/cni"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.nri.v1.nri"]
  disable = true
"""


def _kubelet(node: Node, directory: Path, cgroup: str) -> dict[str, object]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
        "authorization": {"mode": "AlwaysAllow"},
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{cgroup}",
        "containerRuntimeEndpoint": f"unix://{directory}/containerd.sock",
        "enforceNodeAllocatable": [],
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "failCgroupV1": False,
        "failSwapOn": False,
        "healthzPort": 10248 + 100 * (node.index + 1),
        "imageGCHighThresholdPercent": 100,
        "maxPods": 80,
        "podLogsDir": str(directory / "pod-logs"),
        "port": 10250 + 100 * (node.index + 1),
        "resolvConf": "",
    }


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def _until_none(find: Callable[[], Sequence[int]], what: signal.Signals) -> None:
    """Signal what is found until nothing is: what is signalled may have been starting something."""
    while pids := find():
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, what)
        time.sleep(0.05)


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and int(path.name) != os.getpid()]


def _state(pid: int) -> str:
    """A process's state as one letter; Z, as of one that waits to be collected, when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def _read(pid: int, file: str) -> str:
    """A file of a process that is not just waiting to be collected; nothing when it is gone."""
    try:
        return (
            "" if _state(pid) == "Z" else Path(f"/proc/{pid}/{file}").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        )
    except OSError:
        return ""


def main(binaries: Path, cgroup: str, images: Sequence[Path]) -> int:
    """Run the cluster until standard input is closed."""
    isolate()
    os.environ["PATH"] = f"{binaries}:/usr/sbin:/sbin:{os.environ['PATH']}"  # containerd looks for its shim and for runc
    try:
        with ControlPlane(binaries, BRIDGE) as plane:
            machine = Machine(plane, binaries, cgroup, images)
            machine.start()
            print(f"ready {plane.kubeconfig}", flush=True)
            commands = {"restart etcd": plane.restart_etcd, "restart kube-apiserver": plane.restart_api_server}
            for node in NODES:
                for do in (machine.lose, machine.find, machine.freeze, machine.thaw, machine.cut, machine.mend):
                    commands[f"{do.__name__} {node.name}"] = partial(do, node)
            for line in sys.stdin:
                commands[line.strip()]()
                print("ok", flush=True)
    except ControlPlaneFailed as error:
        print(f"failed {error}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], [Path(image) for image in sys.argv[3:]]))
