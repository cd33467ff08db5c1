"""What a user of the operator has in one namespace: Redis in a pod, a volume that pods share, the media service, a WorkerPool."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from e2e.cluster import images
from e2e.cluster.machine import GPUS
from tests.e2e.kube import Kube, Object, eventually

SAMPLE = images.ROOT / "examples" / "media" / "workerpool.yaml"
JOBS = Path(__file__).with_name("jobs.py")
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
SHARED = "/mnt"
"""What both nodes see: e2e/cluster mounts it so."""

PATIENT_PROBE = {"periodSeconds": 1, "timeoutSeconds": 30, "failureThreshold": 10}
"""Ready as soon as it answers, and not taken out of its Service because the machine is busy."""

CPU_NODE = {"nodeSelector": {"workerpool.dev/node": "cpu-node"}}
POD_SECURITY = {"runAsNonRoot": True, "runAsUser": 65532, "runAsGroup": 65532, "seccompProfile": {"type": "RuntimeDefault"}}
CONTAINER_SECURITY = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
VOLUMES: list[Object] = [
    {"name": "tmp", "emptyDir": {}},
    {"name": "jobs", "configMap": {"name": "jobs"}},
    {"name": "media", "persistentVolumeClaim": {"claimName": "media"}},
]
MOUNTS: list[Object] = [
    {"name": "tmp", "mountPath": "/tmp"},
    {"name": "jobs", "mountPath": "/jobs"},
    {"name": "media", "mountPath": "/shared/media"},
]


class Site:
    """A namespace that enforces the restricted Pod Security level, with all that a pool needs."""

    def __init__(self, kube: Kube) -> None:
        self.kube = kube
        self.namespace = f"site-{secrets.token_hex(3)}"

    def set_up(self) -> None:
        """Make it, and wait until Redis and the API answer."""
        self.kube.apply("default", namespace(self.namespace), self._volume())
        self.kube.apply(self.namespace, self._claim(), service("redis", 6379), service("media-api", 8000))
        host = self.kube.get(self.namespace, "service", "redis")["spec"]["clusterIP"]
        url = f"redis://{host}:6379/0"
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "redis"}, "stringData": {"url": url}}
        jobs = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "jobs"}, "data": {"jobs.py": JOBS.read_text()}}
        self.kube.apply(self.namespace, secret, jobs, self._redis(), self._api())
        for name in ("redis", "media-api"):
            self.kube.kubectl("rollout", "status", f"deployment/{name}", f"--namespace={self.namespace}", "--timeout=230s")

    def take_down(self) -> None:
        """Take it away, workers first: they may have to be told by kubectl, not by an operator that a test took away."""
        delete = ("delete", "--ignore-not-found")
        here = f"--namespace={self.namespace}"
        self.kube.kubectl(*delete, "--timeout=90s", "workerpools,deployments", "--all", here, check=False)
        self.kube.kubectl(*delete, "--force", "--grace-period=0", "pods", "--all", here, check=False)
        self.kube.kubectl(*delete, "--wait=false", "namespace", self.namespace, check=False)
        self.kube.kubectl(*delete, "--wait=false", "persistentvolume", self.namespace, check=False)

    def pool(self, name: str = "media", *, files: bool = False) -> Object:
        """The sample WorkerPool, for this namespace: the same tiers and queues, our image, a broker URL from the Secret.

        ``files``: its workers know the tasks of the media service too.
        """
        pool: Object = yaml.safe_load(SAMPLE.read_text())
        pool["metadata"] = {"name": name, "namespace": self.namespace}
        pool["spec"] |= {"app": "jobs", "broker": {"urlFrom": {"secretKeyRef": {"name": "redis", "key": "url"}}}}
        # Longer than a start takes on a busy machine: after one that outlasts it workers stand ready for a quarter of an hour.
        pool["spec"]["scaling"] = {"targetWaitSeconds": 240}
        for tier in pool["spec"]["tiers"]:
            pod = tier["template"]["spec"]
            (container,) = pod["containers"]
            container |= {"image": images.MEDIA.name, "imagePullPolicy": "IfNotPresent", "securityContext": CONTAINER_SECURITY}
            beside = [{"name": "BESIDE_MEDIA", "value": "1"}] if files else []
            container |= {
                "env": [*self._environment(name), *beside],
                "volumeMounts": MOUNTS,
                "resources": {"requests": {"cpu": "100m"}},
            }
            pod |= {"securityContext": POD_SECURITY, "volumes": VOLUMES, "terminationGracePeriodSeconds": 60}
            if "accelerator" not in tier:
                pod |= CPU_NODE
        return pool

    def apply(self, *objects: Mapping[str, Any]) -> None:
        self.kube.apply(self.namespace, *objects)

    def status(self, pool: str = "media") -> Object:
        status: Object = self.kube.get(self.namespace, "workerpool", pool).get("status", {})
        return status

    def tier(self, name: str, pool: str = "media") -> Object:
        return next((tier for tier in self.status(pool).get("tiers", []) if tier["name"] == name), {})

    def condition(self, kind: str, pool: str = "media") -> Object:
        return next((one for one in self.status(pool).get("conditions", []) if one["type"] == kind), {})

    def wait_ready(self, pool: str = "media") -> None:
        eventually(lambda: self.condition("Ready", pool), lambda condition: condition.get("status") == "True")

    def replicas(self, deployment: str) -> int:
        return int(self.kube.get(self.namespace, "deployment", deployment)["spec"].get("replicas", 0))

    def workers(self, tier: str, pool: str = "media") -> list[Object]:
        return self.kube.items(self.namespace, "pods", f"--selector=workerpool.dev/pool={pool},workerpool.dev/tier={tier}")

    def scheduled(self, tier: str) -> list[bool]:
        """Of each of its workers, whether it has a node; those that wait for one first."""
        return sorted("nodeName" in pod["spec"] for pod in self.workers(tier))

    def events(self, kind: str) -> list[Object]:
        """The Events about objects of that kind."""
        events = self.kube.items(self.namespace, "events.events.k8s.io")
        return [event for event in events if event["regarding"]["kind"] == kind]

    def submit(self, count: int) -> list[str]:
        """Short jobs that ask for a GPU; their task ids."""
        tasks: list[str] = json.loads(self._python("submit", str(count)))
        return tasks

    def hold(self) -> str:
        """Let a GPU run a job that ends only when it is released, and wait until it does; on a CPU it ends at once."""
        task: str = json.loads(self._python("hold"))

        def held() -> bool:
            nonlocal task
            (job,) = self.jobs([task])
            if job and job["state"] == "done":  # it had gone to a CPU, while no GPU seemed to come
                task = json.loads(self._python("hold"))
            return bool(job) and job["state"] == "claimed" and job["tier"] == "gpu"

        eventually(held, seconds=240)
        return task

    def stay(self, tier: str, *gates: str) -> list[str]:
        """Jobs that ask for a GPU and run until their gates are opened, once a new one goes to that tier; their task ids."""
        tasks: list[str] = json.loads(self._python("stay", tier, *gates))
        return tasks

    def require(self, *gates: str) -> list[str]:
        """Jobs that run on GPUs alone, until their gates are opened; their task ids."""
        tasks: list[str] = json.loads(self._python("require", *gates))
        return tasks

    def since(self) -> dict[str, int]:
        """When the lives of workers that are there first reported, in milliseconds of Redis."""
        since: dict[str, int] = json.loads(self._python("since"))
        return since

    def worker_of(self, task: str) -> str:
        """The name of the pod that runs a job."""
        (job,) = self.jobs([task])
        return pod_of(job)

    def release(self) -> None:
        """Let the job that is held end."""
        self.open("released")

    def take_gpus(self) -> None:
        """Let somebody else have all of them."""
        container = {"name": "others", "image": images.REDIS.name, "resources": {"limits": {"nvidia.com/gpu": GPUS}}}
        others = deployment("others", container, [])
        del others["spec"]["template"]["spec"]["nodeSelector"]
        self.apply(others)
        self.kube.kubectl("rollout", "status", "deployment/others", f"--namespace={self.namespace}", "--timeout=230s")

    def give_gpus_back(self) -> None:
        self.kube.kubectl("delete", "deployment/others", f"--namespace={self.namespace}")

    def gate(self, tier: Object) -> None:
        """Let the workers of a tier of a pool's manifest start only when its gate is opened."""
        wait = "import pathlib, sys, time\nwhile not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.1)"
        command = ["python", "-c", wait, f"{self._media}/marks/{tier['name']}"]
        image = {"image": images.MEDIA.name, "imagePullPolicy": "IfNotPresent", "securityContext": CONTAINER_SECURITY}
        tier["template"]["spec"]["initContainers"] = [{"name": "gate", "command": command, "volumeMounts": MOUNTS, **image}]

    def open(self, gate: str) -> None:
        """Open a gate; tried again while a control plane that was restarted is not back yet."""
        eventually(lambda: self._python("open", gate) is not None)

    def marks(self) -> list[str]:
        """The gates that are open, and ``ended-TIER`` where a held job came to its end there."""
        marks: list[str] = json.loads(self._python("marks"))
        return marks

    def upload(self, count: int) -> list[Object]:
        answers: list[Object] = json.loads(self._python("upload", str(count)))
        return answers

    def jobs(self, tasks: Sequence[str]) -> list[Object]:
        """What the ledger and the result backend say of them."""
        jobs: list[Object] = json.loads(self._python("states", stdin=json.dumps(list(tasks))))
        return jobs

    def all_done(self, tasks: Sequence[str], seconds: float = 240) -> list[Object]:
        """Wait until all are done, and return them."""
        done = lambda jobs: all(job and job["state"] == "done" for job in jobs)  # noqa: E731
        return eventually(lambda: self.jobs(tasks), done, seconds)

    def comes_to_zero(self, tier: str) -> None:
        """Wait until none of a tier's workers is left."""
        eventually(lambda: self.workers(tier), lambda pods: not pods, seconds=240)

    def _python(self, *arguments: str, stdin: str = "") -> str:
        exec_ = ("exec", "--stdin", "deployment/media-api", f"--namespace={self.namespace}", "--")
        return self.kube.kubectl(*exec_, "python", "/jobs/jobs.py", *arguments, stdin=stdin)

    def _environment(self, pool: str) -> list[Object]:
        return [
            {"name": "MEDIA_POOL", "value": f"{self.namespace}/{pool}"},
            {"name": "PYTHONPATH", "value": "/jobs:/srv"},
            {"name": "MEDIA_DIR", "value": self._media},
        ]

    @property
    def _media(self) -> str:
        return f"/shared/media/{self.namespace}"

    def _api(self) -> Object:
        broker = {"name": "CELERY_BROKER_URL", "valueFrom": {"secretKeyRef": {"name": "redis", "key": "url"}}}
        container = {"name": "api", "image": images.MEDIA.name, "env": [*self._environment("media"), broker]}
        requests = {"requests": {"cpu": "100m"}}
        ready = {"httpGet": {"path": "/openapi.json", "port": 8000}, **PATIENT_PROBE}
        return deployment(
            "media-api", {**container, "readinessProbe": ready, "volumeMounts": MOUNTS, "resources": requests}, VOLUMES
        )

    def _redis(self) -> Object:
        save = ["--appendonly", "yes", "--appendfsync", "always", "--dir", "/data", "--appenddirname", f"{self.namespace}-redis"]
        container = {
            "name": "redis",
            "image": images.REDIS.name,
            "args": save,
            "readinessProbe": {"exec": {"command": ["redis-cli", "ping"]}, **PATIENT_PROBE},
            # A busy worker must not starve it: without a request it would have a fiftieth of a worker's share.
            "resources": {"requests": {"cpu": "300m"}},
            "volumeMounts": [{"name": "media", "mountPath": "/data"}],
        }
        return deployment("redis", container, [VOLUMES[2]])

    def _volume(self) -> Object:
        claim = {"namespace": self.namespace, "name": "media"}
        spec = {"capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteMany"], "hostPath": {"path": SHARED}, "claimRef": claim}
        return {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": self.namespace}, "spec": spec}

    def _claim(self) -> Object:
        spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}, "storageClassName": ""}
        return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "media"}, "spec": spec}


def pod_of(run: Object) -> str:
    """The name of the pod that had a run, or has a job."""
    return str(run["owner"]).rpartition(".")[0]


def namespace(name: str) -> Object:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": RESTRICTED}}


def service(name: str, port: int) -> Object:
    spec = {"selector": {"app": name}, "ports": [{"port": port}]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}


def deployment(name: str, container: Object, volumes: Sequence[Object]) -> Object:
    """One pod on the node without GPUs, as the restricted level wants it."""
    pod = {
        "securityContext": POD_SECURITY,
        "containers": [{"imagePullPolicy": "IfNotPresent", "securityContext": CONTAINER_SECURITY, **container}],
        "volumes": list(volumes),
        "terminationGracePeriodSeconds": 5,
        **CPU_NODE,
    }
    spec = {
        "selector": {"matchLabels": {"app": name}},
        "strategy": {"type": "Recreate"},
        "template": {"metadata": {"labels": {"app": name}}, "spec": pod},
    }
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name}, "spec": spec}
