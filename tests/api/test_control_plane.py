"""The control plane that the other tests stand on: it starts, it fails in plain words, and it leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from e2e.cluster.control_plane import ControlPlane, ControlPlaneFailed
from tests.api.kubectl import Kubectl
from tests.api.operators import PATIENCE_SECONDS

pytestmark = pytest.mark.api

ROOT = Path(__file__).parents[2]


@pytest.fixture
def owner(control_plane: ControlPlane, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another control plane, owned by a process of its own, with its files under ``tmp_path``."""
    process = subprocess.Popen(
        [sys.executable, "-m", "e2e.cluster.control_plane"],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
        # As at a terminal: in the background of a script a shell lets its children ignore Ctrl-C, and they inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with process:
        yield process
        process.kill()


def processes_of(directory: Path) -> list[str]:
    """The command lines that name the directory, the owner's watchdog and servers among them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(directory) in command:
            found.append(command)
    return found


def until(holds: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def printed_kubeconfig(owner: subprocess.Popen[str]) -> Path:
    assert owner.stdout is not None
    return Path(owner.stdout.readline().strip().removeprefix("KUBECONFIG="))


def test_nothing_is_left_when_the_owner_is_killed(owner: subprocess.Popen[str], tmp_path: Path) -> None:
    assert printed_kubeconfig(owner).is_relative_to(tmp_path)
    assert {"etcd", "kube-apiserver", "kube-controller-manager"} <= {
        Path(command.split()[0]).name for command in processes_of(tmp_path)
    }
    owner.kill()
    assert until(lambda: not processes_of(tmp_path) and not any(tmp_path.iterdir()), PATIENCE_SECONDS), processes_of(tmp_path)


def test_nothing_is_left_when_the_owner_is_killed_while_it_starts(owner: subprocess.Popen[str], tmp_path: Path) -> None:
    assert until(lambda: any("kube-apiserver" in command for command in processes_of(tmp_path)), PATIENCE_SECONDS)
    owner.kill()
    assert until(lambda: not processes_of(tmp_path) and not any(tmp_path.iterdir()), PATIENCE_SECONDS), processes_of(tmp_path)


def test_ctrl_c_ends_it_without_a_traceback(owner: subprocess.Popen[str], tmp_path: Path) -> None:
    printed_kubeconfig(owner)
    owner.send_signal(signal.SIGINT)
    assert owner.wait(PATIENCE_SECONDS) == 0
    assert not processes_of(tmp_path)
    assert not any(tmp_path.iterdir())


def test_an_api_server_that_was_stopped_comes_back_with_what_it_stored(
    control_plane: ControlPlane, kubectl: Kubectl, namespace: str
) -> None:
    control_plane.stop_api_server()
    assert "refused" in kubectl("get", "namespace", namespace).stderr
    control_plane.restart_api_server()
    assert kubectl("get", "namespace", namespace).returncode == 0


def test_a_process_that_dies_at_start_is_named_with_the_end_of_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "etcd").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "kube-apiserver").write_text("#!/bin/sh\necho no such flag\nexit 3\n")
    for name in ("etcd", "kube-apiserver"):
        (tmp_path / name).chmod(0o755)
    files = tmp_path / "files"
    files.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(files))
    expected = "kube-apiserver ended with code 3; the end of its log:\nno such flag"
    with pytest.raises(ControlPlaneFailed, match=expected), ControlPlane(tmp_path):
        pass
    assert not processes_of(tmp_path)
    assert not any(files.iterdir())
