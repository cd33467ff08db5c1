"""What an install comes to: a pool that is ready soon, a chart that tests itself, operators that cost little."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from e2e.cluster import images
from e2e.cluster.cluster import Cluster
from tests.e2e.conftest import RELEASE, SYSTEM, install
from tests.e2e.kube import Kube, Object, eventually
from tests.e2e.site import Site

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

MEBIBYTE = 1024 * 1024
OPERATORS = 2
"""The chart's default."""

Show = Callable[[str], None]


def test_a_pool_is_ready_soon_after_the_install_and_the_chart_tests_itself(site: Site, show: Show) -> None:
    site.kube.helm("uninstall", RELEASE, f"--namespace={SYSTEM}", "--wait")
    began = time.monotonic()
    install(site.kube)
    site.apply(site.pool())
    site.wait_ready()
    took = time.monotonic() - began
    show(f"seconds from helm install to a ready pool, images present: {took:.0f}")
    assert "leads" in site.kube.helm("test", RELEASE, f"--namespace={SYSTEM}", "--logs", "--timeout=230s")
    follow_the_runbook(site, *site.submit(1))


def follow_the_runbook(site: Site, task: str) -> None:
    """Its first commands tell of the pool, a job, the operators and the workers."""
    block = re.search(r"## Look\n+```console\n(.*?)```", (images.ROOT / "docs" / "runbook.md").read_text(), re.DOTALL)
    assert block is not None
    here = {
        "-n celery-workerpool": f"-n {SYSTEM}", "ml/media": f"{site.namespace}/media", "-n ml": f"-n {site.namespace}",
        "TASK_ID": task, "redis.ml": site.kube.get(site.namespace, "service", "redis")["spec"]["clusterIP"],
    }  # fmt: skip
    script = block.group(1)
    for example, real in here.items():
        assert example in script
        script = script.replace(example, real)
    pools, explain, job, operators, workers = script.removeprefix("$ ").split("\n$ ")
    assert site.namespace in site.kube.shell(pools)
    assert f"{site.namespace}/media  Active" in site.kube.shell(explain)
    assert f"{task}  jobs." in site.kube.shell(job)
    assert "[pod/celery-workerpool-" in site.kube.shell(operators)
    # A pod that is being created has no log yet.
    eventually(lambda: site.kube.shell(workers), lambda said: "[pod/media-" in said)


def test_operators_at_rest_write_nothing_but_the_lease_and_take_little(site: Site, nodes: Cluster, show: Show) -> None:
    site.apply(site.pool())
    site.wait_ready()
    requests = eventually(lambda: minute_of_rest(nodes), seconds=300)
    show(f"requests in a minute of rest, all operators: {len(requests)}")
    assert len(requests) <= 45
    # The kubelet looks at each container only every few seconds, and knows nothing of a young one.
    taken = eventually(lambda: taken_by_operators(site.kube), lambda pods: len(pods) == OPERATORS and all(map(all, pods)))
    show(f"MiB of memory and thousandths of a core that each takes: {[(held // MEBIBYTE, cpu // 10**6) for held, cpu in taken]}")
    assert max(held for held, _ in taken) <= 128 * MEBIBYTE


def minute_of_rest(nodes: Cluster) -> list[Object]:
    """The operators' requests of the last minute, by the API server's own record; none where they wrote more than the Lease."""
    entries = [json.loads(line) for line in nodes.audit_log.read_text().rpartition("\n")[0].splitlines()]
    since = (datetime.now(UTC) - timedelta(seconds=60)).isoformat()
    # A watch has two entries: one when it begins, one when it ends.
    begun = {entry["auditID"]: entry for entry in reversed(entries) if entry["requestReceivedTimestamp"] > since}
    requests = [entry for entry in begun.values() if entry.get("userAgent", "").startswith("celery-workerpool/")]
    writes = [entry for entry in requests if entry["verb"] not in {"get", "list", "watch"}]
    return [] if any(entry["objectRef"]["resource"] != "leases" for entry in writes) else requests


def taken_by_operators(kube: Kube) -> list[tuple[int, int]]:
    """The working set of each in bytes, and billionths of a core; 0 where the kubelet does not know it yet."""
    found = []
    for pod in kube.items(SYSTEM, "pods", f"--selector=app.kubernetes.io/instance={RELEASE}"):
        node, name = pod["spec"]["nodeName"], pod["metadata"]["name"]
        summary = json.loads(kube.kubectl("get", "--raw", f"/api/v1/nodes/{node}/proxy/stats/summary"))
        of: Object = next((one for one in summary["pods"] if one["podRef"]["name"] == name), {})
        found.append((of.get("memory", {}).get("workingSetBytes", 0), of.get("cpu", {}).get("usageNanoCores", 0)))
    return found


def test_the_operators_image_adds_little_to_its_base(nodes: Cluster, show: Show) -> None:
    sizes = nodes.image_sizes()
    base, whole = sizes[images.PAUSE], sizes[images.OPERATOR.name]
    show(f"MB of the operator's image, unpacked: {whole / 1e6:.0f}, of which its base {base / 1e6:.0f}")
    # With a base of the usual size, some 125 MB, it stays within 200.
    assert whole - base < 75e6
