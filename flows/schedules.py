"""Schedules: what is started when, in the words of a command. Knows nothing of Prefect, so that a typo is answered at
once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from zoneinfo import available_timezones

from flows.words import interval
from storage.errors import InvalidInput

NEVER = "never"
_FIELD = re.compile(r"[0-9A-Za-z*/,#?\-]+")


@dataclass(frozen=True)
class When:
    """merge_every: seconds from one merge of what waits to the next. tidy_at: cron, in `zone`. None: only when somebody
    asks, or an event."""

    merge_every: float | None = 600.0
    tidy_at: str | None = "0 3 * * 0"
    zone: str = "UTC"


def schedules(merge_every: str, tidy_at: str, zone: str) -> When:
    """Raises InvalidInput for what is no time, no cron expression or no time zone."""
    if zone not in available_timezones():
        raise InvalidInput(f"{zone!r} is no time zone", remedy="Write it like Europe/Berlin")
    fields = tidy_at.split()
    if tidy_at != NEVER and not (len(fields) == 5 and all(_FIELD.fullmatch(one) for one in fields)):
        raise InvalidInput(
            f"{tidy_at!r} is no cron expression",
            remedy="Write minute, hour, day, month and weekday, like '0 3 * * 0', or never",
        )
    return When(
        None if merge_every == NEVER else interval(merge_every), None if tidy_at == NEVER else " ".join(fields), zone
    )
