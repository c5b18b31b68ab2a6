"""Registering: what is said when MLflow does not answer, and how long it is waited for outside of steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from flows import policy
from storage.errors import Unavailable

T = TypeVar("T")


@contextmanager
def kept(line: str, what: str) -> Iterator[None]:
    """An outage while `what` is registered, as an error that says that nothing is lost and what to do."""
    try:
        yield
    except Unavailable as error:
        raise Unavailable(
            f"line {line!r}: {what} could not be registered, and what comes after waits: {error}",
            remedy="Nothing is lost: what was made and measured is in the store. When all services answer, the same "
            "command registers what has no version yet, in order, and evaluates nothing again",
        ) from error


def patiently(ask: Callable[[], T]) -> T:
    """The answer, asked for again after the waits of a step as long as a service does not answer."""
    for delay in policy.RETRY_DELAYS:
        try:
            return ask()
        except Unavailable:
            time.sleep(delay)
    return ask()
