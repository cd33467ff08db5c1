"""A real Kubernetes cluster of two nodes, one with GPUs, made of ordinary processes: no Docker, no virtual machine.

It lives in namespaces of its own (processes, mounts, network): the kernel ends all of it when its first process ends, and a
watchdog removes the directory and the cgroups, however its owner went. ``python -m e2e.cluster.cluster up`` starts one in the
background, and prints how to reach it; ``down`` ends it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

from e2e.cluster import binaries, images
from e2e.cluster.control_plane import ControlPlaneFailed

PACKAGES = {
    "buildah": "buildah",
    "conntrack": "conntrack",
    "debootstrap": "debootstrap",
    "ip": "iproute2",
    "iptables": "iptables",
    "mount": "mount",
    "nsenter": "util-linux",
    "runc": "runc",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
}
"""What comes from Debian: a program or file, and its package."""

DOWN_SECONDS = 60.0


class CannotRun(Exception):
    """This machine cannot run a cluster; the message says why, and what would help."""


def need() -> None:
    """Look whether this machine can run a cluster.

    Raises:
        CannotRun: it cannot.
    """
    if sys.platform != "linux" or os.geteuid() != 0:
        raise CannotRun("a cluster of its own needs root on Linux; or name any cluster: E2E_KUBECONFIG=FILE")
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = sorted({package for program, package in PACKAGES.items() if shutil.which(program, path=path) is None})
    if missing:
        raise CannotRun(f"Debian packages are missing: apt-get install --no-install-recommends {' '.join(missing)}")


class Cluster:
    """A context manager; while it is entered the cluster runs, and nothing of it outlives this process.

    Attributes:
        kubeconfig: an administrator's, for programs that run in the cluster's network: see :meth:`inside`.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._binaries = binaries.ensure(say)
        self._images = images.ensure(say)

    def __enter__(self) -> Self:
        try:
            self._start()
        except ControlPlaneFailed as error:
            # A dozen servers begin at once on a machine that may be busy: a second failure is one of the cluster.
            self._say(f"the cluster did not start, and is started once more: {error}")
            self._start()
        return self

    def _start(self) -> None:
        directory = Path(tempfile.mkdtemp(prefix="celery-workerpool-nodes-"))
        cgroup = directory.name
        watchdog = [sys.executable, "-IS", str(Path(__file__).with_name("watchdog.py")), str(directory), cgroup]
        self._watchdog = subprocess.Popen(watchdog, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0)
        unshare = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
        machine = [sys.executable, "-m", "e2e.cluster.machine", str(self._binaries), cgroup, *map(str, self._images)]
        try:
            self._machine = subprocess.Popen(
                [*unshare, *machine],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=images.ROOT,
                env={**os.environ, "TMPDIR": str(directory)},
                process_group=self._watchdog.pid,
            )
            self.kubeconfig = Path(self._answer("ready"))
            self._pid = _child_of(self._machine.pid)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        # One clean-up for every end: the watchdog's. It holds its standard output open until all is gone.
        self._watchdog.communicate()
        self._machine.communicate()

    def image_sizes(self) -> dict[str, int]:
        """Bytes of each image, unpacked; the first is the sandbox's: the base of the others."""
        names = (images.PAUSE, *(image.name for image in images.IMAGES))
        return {name: archive.stat().st_size for name, archive in zip(names, self._images, strict=True)}

    @property
    def audit_log(self) -> Path:
        """One line of JSON for each request of a pod."""
        return self.kubeconfig.with_name("audit.log")

    def inside(self) -> list[str]:
        """The beginning of a command that is to run in the cluster's network."""
        return ["nsenter", f"--net=/proc/{self._pid}/ns/net"]

    def tell(self, command: str) -> None:
        """Break something, or mend it: ``restart`` ``etcd`` or ``kube-apiserver``; ``lose``, ``freeze`` or ``cut`` a node, and
        ``find``, ``thaw`` or ``mend`` it.
        """
        assert self._machine.stdin is not None
        self._machine.stdin.write(f"{command}\n")
        self._machine.stdin.flush()
        self._answer("ok")

    def _answer(self, expected: str) -> str:
        assert self._machine.stdout is not None
        said = self._machine.stdout.readline()
        if not said.startswith(expected):
            raise ControlPlaneFailed((said + self._machine.stdout.read()).removeprefix("failed ") or "the cluster ended at once")
        return said.removeprefix(expected).strip()


def _child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def _note() -> Path:
    """Where a cluster in the background leaves its process id."""
    return binaries.cache_home() / "cluster.pid"


def _running() -> int | None:
    """The process that keeps the cluster in the background, if there is one."""
    try:
        pid = int(_note().read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    return pid if b"e2e.cluster.cluster" in command else None


def up() -> int:
    """Start a cluster in the background and print how to reach it."""
    need()
    if pid := _running():
        print(f"a cluster runs already (process {pid}); end it: make cluster-down", file=sys.stderr)
        return 1
    keeper = [sys.executable, "-m", "e2e.cluster.cluster", "keep"]
    # Not with "with": the keeper goes on when this process has ended.
    process = subprocess.Popen(keeper, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    ready = False
    for line in process.stdout:
        print(line, end="", flush=True)
        if ready := line.startswith("export KUBECONFIG="):
            break
    return int(not ready)


def keep() -> int:
    """Run a cluster until SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with Cluster(lambda line: print(line, flush=True)) as cluster:
        _note().write_text(str(os.getpid()))
        try:
            print(f"{' '.join(cluster.inside())} kubectl get nodes    # or helm, curl, a shell")
            print(f"export KUBECONFIG={cluster.kubeconfig}", flush=True)
            while True:
                signal.pause()
        finally:
            _note().unlink()


def down() -> int:
    """End the cluster in the background, and wait until nothing is left of it."""
    pid = _running()
    if pid is None:
        print("no cluster runs", file=sys.stderr)
        return 0
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + DOWN_SECONDS
    while _running() or Path(f"/proc/{pid}").exists():
        if time.monotonic() > deadline:
            print(f"process {pid} did not end within {DOWN_SECONDS:.0f} s", file=sys.stderr)
            return 1
        time.sleep(0.1)
    return 0


COMMANDS: Mapping[str, Callable[[], int]] = {"up": up, "keep": keep, "down": down}


def main(arguments: list[str]) -> int:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(prog="python -m e2e.cluster.cluster", description="A real cluster of ordinary processes.")
    parser.add_argument("command", choices=COMMANDS)
    try:
        return COMMANDS[parser.parse_args(arguments).command]()
    except (CannotRun, ControlPlaneFailed, binaries.BinariesMissing, images.ImageFailed) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
