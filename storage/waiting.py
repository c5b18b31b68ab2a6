"""Waiting: a queue in numbers, for people and for monitoring."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from storage.events import STATES, Submission


@dataclass(frozen=True)
class Waiting:
    """length: submissions that are still to be merged. oldest: seconds since the first of them came, 0 for none.
    failures: what is quarantined, by kind."""

    line: str
    counts: dict[str, int]
    length: int
    oldest: float
    failures: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        return {
            "line": self.line,
            **self.counts,
            "queue_length": self.length,
            "oldest_pending_seconds": self.oldest,
            "failures": self.failures,
        }


def waiting(line: str, submissions: Sequence[Submission], now: datetime | None = None) -> Waiting:
    found: Counter[str] = Counter(one.state for one in submissions)
    open_ = [one for one in submissions if one.state in ("pending", "running")]
    moment = now or datetime.now(UTC)
    ages = [(moment - datetime.fromisoformat(one.arrived)).total_seconds() for one in open_]
    failures = Counter(one.kind for one in submissions if one.state == "quarantined")
    return Waiting(
        line,
        {state: found.get(state, 0) for state in STATES},
        len(open_),
        max(0.0, round(max(ages, default=0.0), 1)),
        dict(sorted(failures.items())),
    )
