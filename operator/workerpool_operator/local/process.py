"""One worker as a local process: started, restarted with back-off when it dies, ended when it is told to."""

from __future__ import annotations

import asyncio
import re
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from workerpool_operator.local.guardian import Guardian, kill_group
from workerpool_operator.local.launch import Launch
from workerpool_operator.observation import Phase, Replica

FIRST_BACKOFF_SECONDS = 1.0
MAX_BACKOFF_SECONDS = 30.0
STABLE_SECONDS = 30.0
"""Ready for this long, a worker has earned the first back-off again."""

_POLL_SECONDS = 0.1
_LAST_BYTES = 16_384
_READY = re.compile(rb"@\S+ ready\.\s*$", re.MULTILINE)
_EXCEPTION = re.compile(r"(\w+\.)*[A-Za-z]\w*(Error|Exception)\b")


class Log:
    """A worker's log file, and what the current run of the worker has written to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begin = self._read = 0

    def begin(self) -> IO[bytes]:
        """The file for the output of a new run."""
        file = self.path.open("ab")
        self._begin = self._read = file.tell()
        return file

    def says_ready(self) -> bool:
        """Whether Celery has said so in the lines that came since the last call."""
        with self.path.open("rb") as file:
            file.seek(self._read)
            lines = file.read().rpartition(b"\n")[0]
        self._read += len(lines)
        return bool(_READY.search(lines))

    def last_words(self) -> str:
        """The last line that says something, an exception's before any other; empty without one."""
        with self.path.open("rb") as file:
            end = file.seek(0, 2)
            file.seek(max(self._begin, end - _LAST_BYTES))
            return last_words(file.read().decode(errors="replace"))


def last_words(output: str) -> str:
    """The line that tells best what a process died of."""
    lines = [line.strip() for line in output.splitlines() if re.search(r"\w", line)]
    exceptions = [line for line in lines if _EXCEPTION.match(line)]
    return (exceptions or lines or [""])[-1]


class LocalWorker:
    """One replica. It keeps its name over restarts, as a pod does.

    Args:
        name: under which it reports its presence.
        launch: how it is started.
        log: where its output goes.
        guardian: who ends it when this process cannot.
        wake: set when its phase has changed.
    """

    def __init__(self, name: str, launch: Launch, log: Path, guardian: Guardian, wake: asyncio.Event) -> None:
        self.name = name
        self.phase = Phase.STARTING
        self.ordered_at = time.time()
        self._ready_at: float | None = None
        self._detail = ""
        self._launch = launch
        self._log = Log(log)
        self._guardian = guardian
        self._wake = wake
        self._process: asyncio.subprocess.Process | None = None
        self.life = asyncio.create_task(self._live(), name=name)
        """Done when nothing of the worker is left; cancelled, it kills the worker at once."""

    @property
    def replica(self) -> Replica:
        """What the pass sees of it."""
        return Replica(self.name, self.phase, self.ordered_at, self._ready_at, self._detail)

    @property
    def process_group(self) -> int | None:
        """Of its process and all children; None when it does not run."""
        return self._process.pid if self._process else None

    def stop(self) -> None:
        """SIGTERM, on which Celery finishes the tasks it runs; SIGKILL for the whole group after the grace period."""
        if self._stopping:
            return
        before, self.phase, self._detail = self.phase, Phase.STOPPING, ""
        if self._process:
            self._terminate(self._process)
        elif before is Phase.FAILING:
            self.life.cancel()

    async def _live(self) -> None:
        backoff = FIRST_BACKOFF_SECONDS
        try:
            while True:
                died_of, ready_seconds = await self._run()
                if self._stopping:
                    return
                if ready_seconds >= STABLE_SECONDS:
                    backoff = FIRST_BACKOFF_SECONDS
                self._turn(Phase.FAILING, died_of)
                await asyncio.sleep(backoff)
                if ready_seconds:
                    self._turn(Phase.STARTING, died_of)
                backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)
        finally:
            self._wake.set()

    async def _run(self) -> tuple[str, float]:
        """Run the process once to its end; what it died of, and how many seconds it was ready."""
        try:
            self._process = process = await self._spawn()
        except OSError as error:
            return str(error), 0.0
        ready_since = None
        try:
            if self._stopping:
                self._terminate(process)
            if await self._becomes_ready(process):
                ready_since = time.monotonic()
            await process.wait()
        finally:
            # The main process may have been killed alone: its children hold tasks that are no longer theirs.
            kill_group(process.pid)
            await process.wait()
            self._guardian.release(process.pid)
            self._process = None
        return self._cause(process), time.monotonic() - ready_since if ready_since else 0.0

    async def _spawn(self) -> asyncio.subprocess.Process:
        with self._log.begin() as output:
            return await asyncio.create_subprocess_exec(
                *self._guardian.wrap(self._launch.command),
                stdin=self._guardian.pipe,
                stdout=output,
                stderr=asyncio.subprocess.STDOUT,
                env=self._launch.environment,
                cwd=self._launch.directory,
                start_new_session=True,
            )

    async def _becomes_ready(self, process: asyncio.subprocess.Process) -> bool:
        while process.returncode is None and not self._stopping:
            if self._log.says_ready():
                # The first time counts: a restart says nothing of how long a new worker takes.
                self._ready_at = self._ready_at or time.time()
                self._turn(Phase.READY)
                return True
            await asyncio.sleep(_POLL_SECONDS)
        return False

    def _cause(self, process: asyncio.subprocess.Process) -> str:
        code = process.returncode
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"{self._log.last_words() or f'exited with status {code}'} (see {self._log.path})"

    def _terminate(self, process: asyncio.subprocess.Process) -> None:
        with suppress(ProcessLookupError):
            process.terminate()
        asyncio.get_running_loop().call_later(self._launch.grace_seconds, self.life.cancel)

    @property
    def _stopping(self) -> bool:
        return self.phase is Phase.STOPPING

    def _turn(self, phase: Phase, detail: str = "") -> None:
        self.phase, self._detail = phase, detail
        self._wake.set()
