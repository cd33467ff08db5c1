"""What kind of content a job works on, from whatever a client says."""

from __future__ import annotations

import pytest

from workerpool_routing.content import UNKNOWN, main_type

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ("image/png", "image"),
        ("audio/ogg; codecs=opus", "audio"),
        ("scan.PNG", "image"),
        ("my scan.png", "image"),
        (" Video ", "video"),
        ("x-own", "x-own"),
    ],
)
def test_the_kind_is_the_main_type(given: str, kind: str) -> None:
    assert main_type(given) == kind


@pytest.mark.parametrize("given", ["image\nrouted pool=ml/media", "x tier=gpu", "\u202eimage", "a" * 65, "", "x\x1b[2J"])
def test_what_cannot_be_a_type_does_not_reach_the_log(given: str) -> None:
    assert main_type(given) == UNKNOWN
