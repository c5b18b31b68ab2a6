"""Measured: what a model reached on one suite. Short cuts like memos, of which an evaluation is put together.

    measured/<sha256 of the model's manifest>/<content key>    sha256 of the rest, a line feed, then JSON by zlib

What a base's own classes look like to it, the heads that its abilities are asked with, is kept here too.

They are written as soon as a suite has been asked, so that an evaluation that is killed goes on at the next suite, and
one with another list of suites asks only what is new. Nothing names them: they may be removed at any time, and a prune
removes those whose model is gone. One that is damaged is as one that is not there.
"""

from __future__ import annotations

import json
import zlib
from contextlib import suppress
from typing import Any

from storage.errors import InvalidInput, Missing
from storage.manifest import digest
from storage.objects import ObjectStore
from storage.refs import CheckpointRef, Ref, parse_ref

PREFIX = "measured/"
_MOST = 2**30  # bytes of JSON; whoever claims more has not measured it


class Measured:
    """What models reached on single suites, in one store."""

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects

    def write(self, model: CheckpointRef, key: str, value: Any) -> None:
        """Keep what was measured, plain JSON. `key`: the content key of everything but the model that decides it."""
        data = zlib.compress(json.dumps(value).encode())
        self._objects.put(_key(model, key), digest(data).encode() + b"\n" + data)

    def read(self, model: CheckpointRef, key: str) -> Any:
        """What was kept; None if there is nothing, or nothing whole."""
        try:
            name, _, data = self._objects.get(_key(model, key)).partition(b"\n")
        except Missing:
            return None
        if name != digest(data).encode():
            return None
        with suppress(ValueError, RecursionError, zlib.error):
            reader = zlib.decompressobj()
            text = reader.decompress(data, _MOST)
            return json.loads(text) if reader.eof else None
        return None


def model_of(key: str) -> Ref | None:
    """The model that the object `key` tells of; None for a stray object."""
    try:
        return parse_ref(f"checkpoint/{key.removeprefix(PREFIX).partition('/')[0]}")
    except InvalidInput:
        return None


def _key(model: CheckpointRef, key: str) -> str:
    return f"{PREFIX}{model.partition('/')[2]}/{key}"
