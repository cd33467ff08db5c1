"""The operator as a process, and a namespace with the eyes and hands of its user: what tests of level ``api`` share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError

import yaml
from celery import Celery
from e2e.cluster.ports import reserve_port
from tests.api.kubectl import Kubectl

from workerpool_operator.local.guardian import Guardian

SAMPLE = Path(__file__).parents[2] / "manifests" / "samples" / "workerpool.yaml"
COMMAND = [str(Path(sys.executable).with_name("workerpool")), "run"]
PATIENCE_SECONDS = 60.0
"""For what is bound to happen: long, because the machine may be busy with other things."""

COLLECTOR_SECONDS = 120.0
"""A young control plane's garbage collector looks for new kinds, such as WorkerPools, only every 30 s."""

CONTROLLER_SECONDS = 90.0
"""The ReplicaSet controller tries a refused pod again with growing pauses."""

Object = dict[str, Any]
T = TypeVar("T")


class Operator:
    """The operator's process. It reaches the API server as its own service account."""

    def __init__(self, kubeconfig: Path, guardian: Guardian, *options: str) -> None:
        self.kubeconfig, self._guardian, self._options = kubeconfig, guardian, options
        self._log = kubeconfig.with_suffix(".log")
        self.port = reserve_port()
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._log_began = log.tell()
            self._process = subprocess.Popen(
                self._guardian.wrap([*COMMAND, f"--port={self.port}", *self._options]),
                stdin=self._guardian.pipe,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "KUBECONFIG": str(self.kubeconfig)},
                start_new_session=True,
            )

    def end(self, how: signal.Signals) -> int:
        self._process.send_signal(how)
        return self.wait()

    def wait(self) -> int:
        return self._process.wait(PATIENCE_SECONDS)

    @property
    def pid(self) -> int:
        return self._process.pid

    def running(self) -> bool:
        return self._process.poll() is None

    def carry_on(self) -> None:
        """Start it again where it left because its lease was over, as a kubelet would: on a busy machine that may happen."""
        if not self.running():
            said = self._log.read_bytes()[self._log_began :].decode()
            assert "leaving: the lease is over" in said, said[-3000:]
            self.start()

    def healthy(self) -> None:
        """Wait until it is ready and says that it is well."""
        eventually(lambda: self.get("/readyz")[0] == self.get("/healthz")[0] == 200, self)

    def get(self, path: str) -> tuple[int, str]:
        """What its HTTP server answers: status, 0 where it does not listen, and text."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def leads(self) -> bool:
        return "\nworkerpool_leader 1.0" in self.get("/metrics")[1]

    def stands_by(self) -> bool:
        return self.get("/readyz")[0] == 200 and not self.leads()

    def log(self) -> str:
        return self._log.read_text()


def eventually(look: Callable[[], T], operator: Operator, seconds: float = PATIENCE_SECONDS) -> T:
    """Look until there is something to see; fail with the end of the operator's log."""
    began = time.monotonic()
    while not (seen := look()):
        operator.carry_on()
        waited = time.monotonic() - began
        assert waited < seconds, f"last seen: {seen}\n{operator.log()[-3000:]}"
        # A look is a kubectl or two: what takes its time is looked for less often, since others need the processors.
        time.sleep(min(max(0.2, waited / 20), 1.0))
    return seen


class Namespace:
    """One namespace with the eyes and hands of its user."""

    def __init__(self, name: str, kubectl: Kubectl, operator: Operator, redis_url: str) -> None:
        self.name, self._kubectl, self.operator, self.redis_url = name, kubectl, operator, redis_url

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        answer = self._kubectl("--namespace", self.name, *arguments, stdin=stdin)
        assert answer.returncode == 0, answer.stderr
        return answer.stdout

    def get(self, kind: str, name: str) -> Object:
        text = self.kubectl("get", kind, name, "--ignore-not-found", "-o", "json")
        return dict(json.loads(text)) if text else {}

    def objects(self, *what: str) -> list[Object]:
        return list(json.loads(self.kubectl("get", *what, "-o", "json"))["items"])

    def create_pool(self, name: str = "media", queues_of: str = "", **changes: Any) -> None:
        pool: Object = yaml.safe_load(SAMPLE.read_text())
        pool["metadata"] = {"name": name}
        pool["spec"] |= {"broker": {"url": self.redis_url}, **changes}
        for tier in pool["spec"]["tiers"]:
            tier["queue"] = self.queue(tier["name"], queues_of or name)
        self.kubectl("create", "-f", "-", stdin=json.dumps(pool))

    def queue(self, tier: str, pool: str = "media") -> str:
        """Tests share one Redis, so a queue carries the namespace."""
        return f"{tier}-{pool}-{self.name}"

    def publish(self, tier: str, count: int) -> None:
        app = Celery(broker=self.redis_url, set_as_current=False)
        for _ in range(count):
            app.send_task("media.tasks.transcribe", queue=self.queue(tier))
        app.close()

    def set_status(self, pod: Object, status: Object) -> None:
        """Write what a scheduler or a kubelet would report of a pod."""
        body = json.dumps({"status": status})
        self.kubectl("patch", "pod", pod["metadata"]["name"], "--subresource=status", "--type=strategic", "--patch", body)

    def condition(self, kind: str, pool: str = "media") -> Object:
        conditions = self.get("workerpool", pool).get("status", {}).get("conditions", [])
        return next((condition for condition in conditions if condition["type"] == kind), {"status": "", "message": ""})

    def replicas(self) -> dict[str, int]:
        return {d["metadata"]["name"]: d["spec"]["replicas"] for d in self.objects("deployments")}

    def versions(self) -> dict[str, str]:
        """What changes with every write to a pool or its Deployments."""
        return {
            f"{o['kind']}/{o['metadata']['name']}": o["metadata"]["resourceVersion"] for o in self.objects("deploy,workerpools")
        }

    def eventually(self, look: Callable[[], T], seconds: float = PATIENCE_SECONDS) -> T:
        return eventually(look, self.operator, seconds)

    def settled(self, replicas: dict[str, int] | None = None) -> dict[str, int]:
        """Wait until the Deployments have these replica counts and the pool's status says so."""
        wanted = replicas if replicas is not None else {"media-gpu": 0, "media-cpu": 1}

        def look() -> bool:
            tiers = self.get("workerpool", "media").get("status", {}).get("tiers", [])
            return self.replicas() == wanted == {f"media-{tier['name']}": tier["desired"] for tier in tiers}

        self.eventually(look)
        return wanted


def obj(kind: str, version: str = "v1", **spec: object) -> str:
    """An object named ``limits``, as kubectl reads it."""
    return json.dumps({"apiVersion": version, "kind": kind, "metadata": {"name": "limits"}, "spec": spec})


def log_in(admin: Path, path: Path, kubectl: Kubectl, namespace: str, account: str) -> None:
    """Write the kubeconfig of a service account."""
    token = kubectl("create", "token", account, "--namespace", namespace)
    assert token.returncode == 0, token.stderr
    login = json.loads(admin.read_text())
    login["users"][0]["user"] = {"token": token.stdout.strip()}
    path.write_text(json.dumps(login))


@contextmanager
def paused(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
