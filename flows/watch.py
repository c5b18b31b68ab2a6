"""Watching an inbox: look, queue, tell Prefect, wait. The flow is in service.py, the command in commands/watch.py.

An inbox is a folder, a bucket, or a registered model, `models:/NAME`. Waiting ends early when a bell says that there is
something to see: a queue that a bucket writes to, or the webhook. Without a bell, it is seen at the next look.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Protocol

from flows.notices import announce_waiting
from flows.workplace import here
from storage.address import open_objects
from storage.errors import InvalidInput, Unavailable
from storage.lines import Line
from storage.queue import Queue
from tasks.watch import Looked, Watch

MODELS = "models:/"  # before the name of a registered model
Say = Callable[[str], None]
_SOON = 1.0  # seconds to the second look at what came: whoever still writes is seen by then


class Source(Protocol):
    """What is looked at."""

    queue: Queue

    def look(self) -> Looked: ...


class Bell(Protocol):
    """What says that there is something to see."""

    def wait(self, seconds: float) -> None:
        """Until it rings, or so many seconds."""

    def answered(self) -> None:
        """The look that followed has ended well."""


class NoBell:
    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    def answered(self) -> None:
        pass


def source_of(address: str, line: str) -> Source:
    """What is at an address: `s3://bucket/inbox`, a folder, or `models:/NAME`."""
    place = here()
    if not address.startswith(MODELS):
        return Watch(open_objects(address), line, place.store)
    from storage.registry_versions import Versions  # mlflow takes seconds to import
    from tasks.watch_versions import WatchVersions

    name = address.removeprefix(MODELS)
    if not name or "/" in name or "@" in name:
        raise InvalidInput(
            f"{address!r} is no registered model", remedy="Write models:/NAME; all versions are looked at"
        )
    return WatchVersions(Versions(place.registry, name), line, place.store)


def keep_watching(
    source: str, line: str, every: float, say: Say, *, lasting: float | None, once: bool, bell: Bell | None = None
) -> int:
    """Look every so many seconds, and when the bell rings. Returns how many were queued.

    once: end when nothing is left that a second look could find. Otherwise a store, inbox or Prefect that does not
    answer is waited for.
    """
    bell = bell or NoBell()
    Line(here().store.objects, line).head()  # a line that does not exist is said at once
    found = source_of(source, line)
    said: dict[str, str] = {}
    queued, end = 0, None if lasting is None else time.monotonic() + lasting
    settled = True
    while True:
        start = time.monotonic()
        try:
            looked = found.look()
            queued += len(looked.queued)
            _report(looked, said, say)
            if os.environ.get("PREFECT_API_URL"):
                announce_waiting(found.queue)
            settled = looked.is_settled
            if once and settled:
                return queued
            bell.answered()
        except Unavailable as error:
            if once:
                raise
            _once(said, "", f"waiting: {error}", say)
        else:
            said.pop("", None)
        if end is not None and not once and time.monotonic() + every > end:
            return queued
        if settled:
            _wait(bell, max(0.0, every - (time.monotonic() - start)), said, say)
        else:  # a second look is due, whether or not the bell rings
            time.sleep(max(0.0, min(every, _SOON) - (time.monotonic() - start)))


def _wait(bell: Bell, seconds: float, said: dict[str, str], say: Say) -> None:
    start = time.monotonic()
    try:
        bell.wait(seconds)
    except Unavailable as error:
        _once(said, "bell", f"looking every {seconds:.0f} s, because {error}", say)
        time.sleep(max(0.0, seconds - (time.monotonic() - start)))
    else:
        said.pop("bell", None)


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
