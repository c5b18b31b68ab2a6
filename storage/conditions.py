"""Does a store keep the promise of `create`? Asked of the store itself, because servers claim what they do not do.

Of five S3 servers that were tried, three accepted `If-None-Match: *` and ignored it, or kept it only while nobody else
wrote. What is left on such a server are writes of which the last one wins, and no number of those can decide between
two writers that may stop at any moment (Herlihy 1991: registers have consensus number 1). So there is no fallback that
is safe: journals are refused there. Whatever is named by its content needs no decision, and works.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from storage.errors import Missing

WRITERS = 8
ROUNDS = 3


@dataclass(frozen=True)
class Conditional:
    """What was seen. `sequential`: a second create of one key was refused. `most_winners`: of racing creates."""

    sequential: bool
    most_winners: int = 0
    rounds: int = 0

    @property
    def holds(self) -> bool:
        return self.sequential and self.most_winners <= 1

    @property
    def said(self) -> str:
        if not self.sequential:
            return "a second create of the same key replaced the first"
        if self.most_winners > 1:
            return f"of {WRITERS} writers at the same moment up to {self.most_winners} were told that they were first"
        return f"one winner among {WRITERS} writers, {self.rounds} times"


def examine(
    create: Callable[[str, bytes], bool], get: Callable[[str], bytes], prefix: str, rounds: int = ROUNDS
) -> Conditional:
    """Try `create` on fresh keys that begin with `prefix`: one after the other, then many at once."""
    first, second = b"first", b"second"
    key = f"{prefix}sequential"
    if not create(key, first) and get(key) != first:  # a lost answer to one's own write looks like somebody else's
        return Conditional(False)
    if create(key, second) or get(key) != first:
        return Conditional(False)
    most = max(_winners(create, get, f"{prefix}race-{number}") for number in range(rounds))
    return Conditional(True, most, rounds)


def _winners(create: Callable[[str, bytes], bool], get: Callable[[str], bytes], key: str) -> int:
    """How many of the writers that start at the same moment are told that they were first, and one at least."""
    gate = threading.Barrier(WRITERS)
    texts = [f"writer {number}".encode() for number in range(WRITERS)]

    def write(text: bytes) -> bool:
        gate.wait()
        return create(key, text)

    with ThreadPoolExecutor(WRITERS) as pool:
        won = list(pool.map(write, texts))
    try:
        found = get(key)
    except Missing:  # everybody lost: nobody's harm, the next attempt decides
        return sum(won)
    wrong = any(one and text != found for one, text in zip(won, texts, strict=True))
    return max(sum(won), 2 if wrong else 1)
