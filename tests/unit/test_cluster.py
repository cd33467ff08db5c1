"""What the cluster of the e2e tests needs of a machine, and how it says so."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest
from e2e.cluster import binaries, cluster, images
from e2e.cluster.control_plane import ControlPlaneFailed
from e2e.cluster.ports import reserve_port

pytestmark = pytest.mark.unit

BRIDGE = "/usr/lib/cni/bridge"


def test_without_root_it_says_what_would_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(cluster.CannotRun, match=r"needs root on Linux.*E2E_KUBECONFIG"):
        cluster.need()


def test_missing_packages_are_named_with_the_command_that_brings_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(shutil, "which", lambda program, **_: None if program in ("runc", BRIDGE) else program)
    with pytest.raises(cluster.CannotRun, match=r"apt-get install --no-install-recommends containernetworking-plugins runc$"):
        cluster.need()


def test_the_checks_of_a_change_install_every_package_that_is_needed() -> None:
    script = (images.ROOT / ".ci" / "run").read_text()
    assert all(f" {package}" in script for package in cluster.PACKAGES.values())


def test_an_image_is_built_again_when_what_goes_into_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "ROOT", tmp_path)
    (tmp_path / "Dockerfile").write_text("FROM scratch\n")
    source = tmp_path / "package" / "module.py"
    source.parent.mkdir()
    source.touch()
    image = images.Image("docker.io/library/some:e2e", "Dockerfile", ("package",))
    first = images.digest("base", image)
    (tmp_path / "else.py").touch()
    assert images.digest("base", image) == first
    source.write_text("x = 1\n")
    second = images.digest("base", image)
    (tmp_path / "Dockerfile").write_text("FROM other\n")
    assert len({first, second, images.digest("base", image), images.digest("other", image)}) == 4


def test_a_reserved_port_is_there_for_one_server_after_the_other_and_for_nobody_else() -> None:
    port = reserve_port()
    for _ in range(2):
        with socket.create_server(("127.0.0.1", port)), pytest.raises(OSError, match="in use"):
            socket.create_server(("127.0.0.1", port))
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_a_cluster_that_does_not_start_is_started_once_more_and_the_first_reason_is_told(
    failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons, said = [f"reason {n}" for n in range(failures)], list[str]()

    def start(_: object) -> None:
        if reasons:
            raise ControlPlaneFailed(reasons.pop(0))

    for builder in (binaries, images):
        monkeypatch.setattr(builder, "ensure", lambda _: ())
    monkeypatch.setattr(cluster.Cluster, "_start", start)
    nodes = cluster.Cluster(said.append)
    if failures < 2:
        assert nodes.__enter__() is nodes
    else:
        with pytest.raises(ControlPlaneFailed, match="reason 1"):
            nodes.__enter__()
    assert ["reason 0" in sentence for sentence in said] == [True] * min(failures, 1)
