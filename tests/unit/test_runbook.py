"""Whoever is on call finds every name that the system shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from workerpool_operator import conditions, metrics, scaling
from workerpool_operator.model import Mode
from workerpool_operator.status import ConditionType
from workerpool_routing.decide import Reason

pytestmark = pytest.mark.unit

RUNBOOK = (Path(__file__).parents[2] / "docs" / "runbook.md").read_text()


def test_the_runbook_has_every_condition_and_every_reason_by_its_name() -> None:
    literals = set(re.findall(r'"([A-Z][a-z]+(?:[A-Z][a-z]+)*)"', Path(conditions.__file__).read_text()))
    verdicts = literals - {"True", "False", "Unknown"}
    assert {"BrokerUnreadable", "WorkersEjected", "InTime"} <= verdicts
    shown = {"InvalidSpec", "Deleting", *verdicts, *ConditionType, *scaling.Reason, *Reason, *Mode}
    assert sorted(name for name in shown if f"`{name}`" not in RUNBOOK) == []


def test_an_alert_of_the_runbook_asks_for_metrics_conditions_and_labels_that_there_are() -> None:
    alerts = re.search(r"## Alerts\n+```\n(.*?)```", RUNBOOK, re.DOTALL)
    assert alerts is not None
    asked = re.findall(r"\b(workerpool_\w+)(?:\{(.*?)\})?", alerts.group(1))
    known = {metric.name: metric.labels for metric in metrics.ALL}
    assert asked
    for name, matchers in asked:
        given = dict(re.findall(r'(\w+)!?="(\w+)"', matchers))
        assert given.keys() <= set(known[name])
        assert given.get("type", "Ready") in set(ConditionType)
        assert given.get("reason", Reason.ATTEMPT_LOST) in set(Reason)
