"""The sample service over HTTP, with a real Redis behind it."""

from __future__ import annotations

import importlib
import io
import json
import socket
import sys
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import redis
from fastapi.testclient import TestClient
from PIL import Image

from workerpool_routing.wire import Keyspace, Policy, TierPolicy

pytestmark = pytest.mark.contract

KEYS = Keyspace("default/media")
POLICY = Policy((TierPolicy("gpu", "gpu-tasks", accelerated=True), TierPolicy("cpu", "celery", accelerated=False)))


def serve(url: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    """The service as a fresh process would import it."""
    monkeypatch.setenv("CELERY_BROKER_URL", url)
    monkeypatch.setenv("MEDIA_DIR", str(directory))
    # Celery hands the tasks of every import to every later app, and these are imported again and again.
    monkeypatch.setattr("celery._state._on_app_finalizers", set())
    for module in ("examples.media.tasks", "examples.media.api"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    service = importlib.import_module("examples.media.api")
    with TestClient(service.api) as client:
        yield client
    service.app.close()


@pytest.fixture
def client(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    with redis.Redis.from_url(redis_url) as broker:
        broker.set(KEYS.policy, POLICY.dump())
    yield from serve(redis_url, tmp_path, monkeypatch)


@pytest.fixture
def client_without_redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        yield from serve(f"redis://127.0.0.1:{closed.getsockname()[1]}/0", tmp_path, monkeypatch)


def picture() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 48), 60).save(file, "PNG")
    return file.getvalue()


def recording() -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(3200))
    return file.getvalue()


@pytest.mark.parametrize(("content", "kind"), [(picture(), "image"), (recording(), "audio")])
def test_an_upload_is_accepted_with_its_task_its_type_and_the_reason_for_its_tier(
    client: TestClient, content: bytes, kind: str
) -> None:
    answer = client.post("/process/file", files={"file": content}, data={"gpu": "false", "metadata": '{"album": 7}'})
    assert answer.status_code == 202
    accepted = answer.json()
    assert {key: accepted[key] for key in ("tier", "reason", "content_type")} == {
        "tier": "cpu",
        "reason": "NotRequested",
        "content_type": kind,
    }
    assert accepted["message"].startswith("cpu: ")
    assert 0 < accepted["decision_ms"] < 1000
    task = client.get(f"/tasks/{accepted['task_id']}").json()
    assert (task["state"], task["tier"], task["attempt"], task["starts"], task["result"]) == ("admitted", "cpu", 1, {}, None)


def test_an_upload_that_asks_for_a_gpu_while_there_is_none_spills_and_still_wants_it(client: TestClient) -> None:
    accepted = client.post("/process/file", files={"file": picture()}, data={"gpu": "true"}).json()
    assert (accepted["tier"], accepted["reason"]) == ("cpu", "NoCapacity")
    assert client.get(f"/tasks/{accepted['task_id']}").json()["wanted"] == "gpu"


def test_an_upload_that_requires_a_gpu_waits_for_one(client: TestClient) -> None:
    accepted = client.post("/process/file", files={"file": picture()}, data={"gpu": "required"}).json()
    assert (accepted["tier"], accepted["reason"]) == ("gpu", "Required")


def test_a_file_is_kept_under_its_hash_whatever_the_client_calls_it(client: TestClient, tmp_path: Path) -> None:
    content = picture()
    for name in ("../../etc/passwd", "same.png"):
        assert client.post("/process/file", files={"file": (name, content)}).status_code == 202
    (kept,) = tmp_path.iterdir()
    assert kept.read_bytes() == content
    assert len(kept.name) == 64


@pytest.mark.parametrize(
    ("content", "source_type", "detail"),
    [
        (b"only words", None, "the file is neither; accepted: image, audio"),
        (b"only words", "image", "source_type says 'image', the file is neither; accepted: image, audio"),
        (picture(), "audio", "source_type says 'audio', the file holds image; accepted: image, audio"),
        (picture(), "video", "source_type says 'video', the file holds image; accepted: image, audio"),
    ],
)
def test_a_file_of_another_type_is_refused_and_not_kept(
    client: TestClient, tmp_path: Path, content: bytes, source_type: str | None, detail: str
) -> None:
    data = {"source_type": source_type} if source_type else {}
    answer = client.post("/process/file", files={"file": content}, data=data)
    assert (answer.status_code, answer.json()["detail"]) == (415, detail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("metadata", "{not json"), ("metadata", "[1]"), ("metadata", '"text"'), ("gpu", "perhaps")],
)
def test_a_bad_field_is_refused_by_its_name(client: TestClient, field: str, value: str) -> None:
    answer = client.post("/process/file", files={"file": picture()}, data={field: value})
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"][:2] == ["body", field]


def test_an_upload_without_a_file_is_refused_by_its_name(client: TestClient) -> None:
    answer = client.post("/process/file", data={"gpu": "true"})
    assert (answer.status_code, answer.json()["detail"][0]["loc"]) == (422, ["body", "file"])


def test_a_file_that_is_too_large_is_refused(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("examples.media.api.MAX_BYTES", 1024)
    answer = client.post("/process/file", files={"file": bytes(1025)})
    assert answer.status_code == 413


def test_an_unknown_task_is_not_found(client: TestClient) -> None:
    answer = client.get("/tasks/no-such-task")
    assert answer.status_code == 404
    assert "no-such-task" in answer.json()["detail"]


def tier_state(kind: str, queue: str, *, ready: int, waiting: int, oldest_wait: Any) -> dict[str, Any]:
    counts = {"ready": ready, "starting": 0, "waiting": waiting, "in_flight": 0}
    return {"type": kind, "queue": queue, **counts, "oldest_wait": oldest_wait}


def test_an_upload_that_cannot_start_in_time_is_refused_with_when_to_come_back(client: TestClient, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as broker:
        seconds, _ = broker.time()
        broker.zadd(KEYS.slots("cpu"), {"w1.x/0": seconds * 1000})
        broker.hset(KEYS.service("cpu"), "examples.media.tasks.measure_image", 9.0)
    first, second = (client.post("/process/file", files={"file": picture()}, data={"deadline": "4"}) for _ in range(2))
    assert first.status_code == 202
    assert (second.status_code, second.headers["retry-after"]) == (429, "5")
    assert second.json() == {
        "detail": "cpu: no tier can start the job in time (1 slots ready, 0 may still start, 0 in flight, 1 waiting)",
        "reason": "Overloaded",
    }


def test_an_upload_that_is_repeated_with_its_key_is_the_same_task(client: TestClient) -> None:
    answers = [client.post("/process/file", files={"file": picture()}, headers={"Idempotency-Key": "u7"}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [202, 202]
    first, second = (answer.json() for answer in answers)
    assert first["task_id"] == second["task_id"]
    assert client.get("/api/v1/status/workers").json()["queues"]["celery"]["length"] == 1


def test_the_status_shows_workers_and_queues_in_the_documented_shape(client: TestClient, redis_url: str) -> None:
    client.post("/process/file", files={"file": picture()}, data={"gpu": "required"})
    with redis.Redis.from_url(redis_url) as broker:
        seconds, micros = broker.time()
        report = {"owner": "w1.x", "worker": "w1", "tier": "gpu", "queue": "gpu-tasks", "slots": 1, "busy": 1}
        at = seconds * 1000 + micros // 1000
        broker.hset(KEYS.presence("gpu"), "w1.x", json.dumps({"version": 1, **report, "since": at, "at": at}))
    assert client.get("/api/v1/status/workers").json() == {
        "workers": {
            "total": 1,
            "gpu": 1,
            "cpu": 0,
            "details": {"w1.x": {"type": "gpu", "active_tasks": 1, "max_tasks": 1, "queues": ["gpu-tasks"]}},
        },
        "queues": {"gpu-tasks": {"length": 1, "workers": 1}, "celery": {"length": 0, "workers": 0}},
        "gpu_available": False,
        "tiers": {
            "gpu": tier_state("gpu", "gpu-tasks", ready=1, waiting=1, oldest_wait=ANY),
            "cpu": tier_state("cpu", "celery", ready=0, waiting=0, oldest_wait=None),
        },
    }


@pytest.mark.parametrize("path", ["/tasks/any", "/api/v1/status/workers"])
def test_without_redis_a_question_is_answered_with_when_to_come_back(client_without_redis: TestClient, path: str) -> None:
    answer = client_without_redis.get(path)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


def test_without_redis_an_upload_is_refused_with_when_to_come_back(client_without_redis: TestClient) -> None:
    answer = client_without_redis.post("/process/file", files={"file": picture()}, data={"gpu": "true"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert "Redis" in answer.json()["detail"]
