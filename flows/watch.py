"""Watching an inbox: look, queue, tell Prefect, wait. The flow is in service.py, the command in watch_command.py."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from flows.notices import announce_waiting
from flows.workplace import here
from storage.address import open_objects
from storage.errors import Unavailable
from storage.lines import Line
from tasks.watch import Looked, Watch

Say = Callable[[str], None]
_SOON = 1.0  # seconds to the second look at what came: whoever still writes is seen by then


def keep_watching(source: str, line: str, every: float, say: Say, *, lasting: float | None, once: bool) -> int:
    """Look every so many seconds. Returns how many were queued.

    once: end when nothing is left that a second look could find. Otherwise a store, inbox or Prefect that does not
    answer is waited for.
    """
    place = here()
    pause = every
    Line(place.store.objects, line).head()  # a line that does not exist is said at once
    found = Watch(open_objects(source), line, place.store)
    said: dict[str, str] = {}
    queued, end = 0, None if lasting is None else time.monotonic() + lasting
    while True:
        start = time.monotonic()
        try:
            looked = found.look()
            queued += len(looked.queued)
            _report(looked, said, say)
            if os.environ.get("PREFECT_API_URL"):
                announce_waiting(found.queue)
            if once and looked.is_settled:
                return queued
            pause = every if looked.is_settled else min(every, _SOON)
        except Unavailable as error:
            if once:
                raise
            _once(said, "", f"waiting: {error}", say)
        else:
            said.pop("", None)
        if end is not None and not once and time.monotonic() + every > end:
            return queued
        time.sleep(max(0.0, pause - (time.monotonic() - start)))


def _report(looked: Looked, said: dict[str, str], say: Say) -> None:
    """Say what is new, and of what is left alone why, once."""
    for one in looked.queued:
        say(f"queued {one.task} from {one.reference}, content {one.content[:12]}")
    for folder, one in looked.known.items():
        say(f"nothing to do for {folder}: its content is {one.task}, {one.state}")
    for folder, lacks in looked.waiting.items():
        _once(said, folder, f"{folder} waits for {lacks}", say)
    for folder, why in looked.refused.items():
        _once(said, folder, f"{folder} is left alone: {why}", say)


def _once(said: dict[str, str], about: str, text: str, say: Say) -> None:
    if said.get(about) != text:
        say(text)
        said[about] = text
