"""What people do to a pool and its Deployments, and what is left when they have done it."""

from __future__ import annotations

import pytest
from tests.e2e.conftest import RELEASE, SYSTEM, after_passes, install
from tests.e2e.kube import Kube, eventually
from tests.e2e.site import Site

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


def test_what_is_changed_by_hand_is_repaired(site: Site) -> None:
    site.apply(site.pool())
    site.wait_ready()
    kubectl, here = site.kube.kubectl, f"--namespace={site.namespace}"
    kubectl("scale", "deployment/media-cpu", "--replicas=0", here)
    eventually(lambda: site.replicas("media-cpu"), lambda replicas: replicas == 1)
    kubectl("set", "image", "deployment/media-cpu", "worker=docker.io/library/other:1", here)
    image = lambda: site.kube.get(site.namespace, "deployment", "media-cpu")["spec"]["template"]["spec"]["containers"][0]["image"]  # noqa: E731
    eventually(image, lambda name: name.endswith("media:e2e"))
    uid = site.kube.get(site.namespace, "deployment", "media-cpu")["metadata"]["uid"]
    kubectl("delete", "deployment/media-cpu", "--wait=false", here)
    again = lambda: site.kube.get(site.namespace, "deployment", "media-cpu")["metadata"]["uid"]  # noqa: E731
    eventually(again, lambda new: new != uid)
    site.wait_ready()


def test_a_deleted_pool_takes_its_deployments_and_leaves_its_messages(site: Site) -> None:
    pool = site.pool()
    for tier in pool["spec"]["tiers"]:
        tier["template"]["spec"]["nodeSelector"] = {"kubernetes.io/hostname": "nowhere"}
    site.apply(pool)
    eventually(lambda: site.replicas("media-cpu"), lambda replicas: replicas >= 1)
    tasks = site.submit(3)
    site.kube.kubectl("delete", "workerpool/media", f"--namespace={site.namespace}")
    gone = lambda: site.kube.items(site.namespace, "deployments", "--selector=workerpool.dev/pool=media")  # noqa: E731
    eventually(gone, lambda deployments: not deployments, seconds=240)
    redis = ("exec", "deployment/redis", f"--namespace={site.namespace}", "--", "redis-cli", "llen")
    waiting = sum(int(site.kube.kubectl(*redis, queue)) for queue in ("gpu-tasks", "celery"))
    assert waiting == len(tasks)


def test_a_pool_that_cannot_work_leaves_another_alone(site: Site) -> None:
    broken = site.pool("broken")
    for tier in broken["spec"]["tiers"]:
        tier["queue"] = f"broken-{tier['name']}"
        tier["template"]["spec"]["containers"][0] |= {"image": "registry.invalid/nothing:1", "imagePullPolicy": "Never"}
    site.apply(broken, site.pool())
    site.wait_ready()
    unable = eventually(lambda: site.condition("Ready", "broken"), lambda condition: condition.get("status") == "False")
    assert unable["message"]
    site.all_done(site.submit(2))
    site.wait_ready()


def test_another_autoscaler_on_a_deployment_is_named_and_not_fought(site: Site) -> None:
    site.apply(site.pool())
    site.wait_ready()
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "media-cpu"}
    # There is nobody who measures pods here, but to bring a Deployment to its least count no measure is needed.
    rival = {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": {"name": "rival"}}
    site.apply({**rival, "spec": {"scaleTargetRef": target, "minReplicas": 2, "maxReplicas": 3}})
    eventually(lambda: site.condition("AutoscalerConflict"), lambda condition: condition.get("status") == "True")
    assert "cpu: HorizontalPodAutoscaler rival scales it too" in site.condition("AutoscalerConflict")["message"]
    eventually(lambda: site.replicas("media-cpu"), lambda replicas: replicas == 2)
    before = site.kube.get(site.namespace, "deployment", "media-cpu")["metadata"]["generation"]
    after_passes(site.kube, 5)
    assert site.kube.get(site.namespace, "deployment", "media-cpu")["metadata"]["generation"] == before
    site.kube.kubectl("delete", "hpa/rival", f"--namespace={site.namespace}")
    eventually(lambda: site.condition("AutoscalerConflict"), lambda condition: condition.get("status") == "False")
    eventually(lambda: site.replicas("media-cpu"), lambda replicas: replicas == 1)


def test_two_namespaces_with_pools_of_one_name_keep_to_themselves(site: Site, operator: Kube) -> None:
    other = Site(operator)
    try:
        other.set_up()
        for each in (site, other):
            each.apply(each.pool())
            each.wait_ready()
        tasks = other.submit(2)
        other.all_done(tasks)
        assert site.jobs(tasks) == [None, None]
    finally:
        other.take_down()


def test_an_upgrade_kills_no_job_and_a_release_that_is_installed_again_adopts_its_pools(site: Site) -> None:
    site.apply(site.pool())
    site.wait_ready()
    tasks = [site.hold(), *site.submit(6)]
    install(site.kube, "--set=resources.requests.cpu=210m")
    site.release()
    jobs = site.all_done(tasks)
    assert all(sum(job["starts"].values()) == 1 for job in jobs), jobs
    assert jobs[0]["result"] == "gpu"
    before = site.kube.get(site.namespace, "deployment", "media-cpu")["metadata"]["uid"]
    site.kube.helm("uninstall", RELEASE, f"--namespace={SYSTEM}", "--wait")
    assert site.kube.get(site.namespace, "workerpool", "media")["metadata"]["name"] == "media"
    waiting = site.submit(2)
    install(site.kube)
    site.all_done(waiting)
    assert site.kube.get(site.namespace, "deployment", "media-cpu")["metadata"]["uid"] == before
