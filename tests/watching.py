"""What a test sees from outside: that something holds after a while, and which processes live."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest


def until(true: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """What the condition answers once it holds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := true():
            return found
        time.sleep(0.05)
    pytest.fail(f"not within {seconds} s: {what}")


async def until_then(true: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """The same where an event loop has to go on meanwhile."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := true():
            return found
        await asyncio.sleep(0.02)
    pytest.fail(f"not within {seconds} s: {what}")


def processes(*marks: str) -> Mapping[int, str]:
    """Every live process whose environment or command line holds one of the marks."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            environment, command = (directory / "environ").read_bytes(), (directory / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if command and any(mark.encode() in environment + command for mark in marks):
            found[int(directory.name)] = command.decode().replace("\0", " ")
    return found
