"""The rule that ejects one worker among good ones, once more in Python: a simulation plays hours, and Redis has its own clock.

``contract/test_ejection.py`` holds it to the scripts that decide.
"""

from __future__ import annotations

from dataclasses import dataclass

from workerpool_routing.ledger import EJECTED_AFTER, EJECTION_MS, LONGEST_EJECTION_MS


@dataclass(slots=True)
class Outlier:
    """What ``outlier:<owner>`` holds of a worker; times are in milliseconds, and ``succeeded`` is its tier's count."""

    row: int = 0
    beside: int | None = None
    times: int = 0
    till: float | None = None
    again: bool = False

    def fails(self, succeeded: int, now: float) -> None:
        """One of its attempts has failed."""
        if self.beside is None:
            self.beside = succeeded
        self.again = self.again or (self.till is not None and now >= self.till)

    def is_at_fault(self) -> None:
        """A job that failed here has succeeded elsewhere."""
        self.row += self.beside is not None

    def ejected(self, succeeded: int, now: float) -> bool:
        """What its next report is answered."""
        stands_out = self.beside is not None and self.row >= EJECTED_AFTER and succeeded - self.beside >= EJECTED_AFTER
        if self.again or (self.till is None and stands_out):
            self.times, self.again = self.times + 1, False
            self.till = now + min(LONGEST_EJECTION_MS, EJECTION_MS * 2 ** (self.times - 1))
        return self.till is not None and now < self.till
