"""Trust: what a manifest may say. Stores are copied and carried about, so what one holds may be anything.

A digest proves that bytes are those that were named, not that they mean well. Whatever could lead out of a folder,
take over a terminal, or stand for more memory than there is, is refused before anything is done with it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from storage.errors import InvalidInput
from storage.refs import Kind, parse_ref

_DIGEST = re.compile(r"[0-9a-f]{64}")
# controls, and the marks that turn the direction of text round: both make a terminal show what is not there
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_LONGEST = 1024  # characters of a name
_MOST = 2**63 - 1  # of anything that is counted
_DIMENSIONS = 64  # as many as torch allows


def check_digest(value: Any, what: str) -> None:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise InvalidInput(f"{what}: expected 64 hexadecimal digits, found {_shown(value)}")


def check_count(value: Any, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST:
        raise InvalidInput(f"{what}: expected a whole number from 0 to 2^63 - 1, found {_shown(value)}")


def check_name(value: Any, what: str) -> None:
    """A name that is shown and compared, but is never a path."""
    if not isinstance(value, str) or len(value) > _LONGEST or _UNPRINTABLE.search(value):
        raise InvalidInput(f"{what}: expected up to {_LONGEST} printable characters, found {_shown(value)}")


def printable(text: str) -> str:
    """`text` without what could take over a terminal: for notes that are shown, whatever they hold."""
    return _UNPRINTABLE.sub("?", text)[:_LONGEST]


def check_file_name(value: Any, what: str) -> None:
    """A name that an export makes a file of, in a folder that it must not leave."""
    check_name(value, what)
    if value in ("", ".", "..") or "/" in value or "\\" in value or len(value.encode()) > 255:
        raise InvalidInput(f"{what}: expected the name of a file, without folders, found {_shown(value)}")


def check_number(value: Any, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidInput(f"{what}: expected a finite number, found {_shown(value)}")


def check_mapping(value: Any, what: str) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise InvalidInput(f"{what}: expected names and values, found {_shown(value)}")


def check_shape(value: Any, what: str) -> None:
    if not isinstance(value, tuple) or len(value) > _DIMENSIONS:
        raise InvalidInput(f"{what}: expected up to {_DIMENSIONS} sizes, found {_shown(value)}")
    for size in value:
        check_count(size, what)
    if math.prod(value) > _MOST:
        raise InvalidInput(f"{what}: no tensor has {_shown(value)} numbers")


def check_inputs(value: Any, what: str) -> None:
    """The inputs of a lineage: role -> ref. Roles are shown, and so are refs."""
    check_mapping(value, what)
    for role, ref in value.items():
        check_name(role, what)
        check_name(ref, f"{what}, {role!r}")


def check_ref(value: Any, kind: Kind, what: str) -> None:
    if not isinstance(value, str):
        raise InvalidInput(f"{what}: expected a ref, found {_shown(value)}")
    parse_ref(value, kind)


def check_merge(found: Any, what: str) -> None:
    """What an entry of a journal, or a fold that it lists, says of a merge."""
    check_name(found.task, f"{what}, task")
    check_number(found.weight, f"{what}, weight")
    check_number(found.factor, f"{what}, factor")
    for kind, ref in (("update", found.update), ("state", found.state)):
        if ref is not None:
            check_ref(ref, kind, f"{what}, {kind}")  # type: ignore[arg-type]


def check_entry(entry: Any, number: int, what: str) -> None:
    """An entry of a journal that was read under `number`."""
    if entry.number != number or isinstance(entry.number, bool):
        raise InvalidInput(f"{what}: says that it is entry {_shown(entry.number)}")
    check_count(entry.step, f"{what}, step")
    check_ref(entry.base, "checkpoint", f"{what}, base")
    check_mapping(entry.merger, f"{what}, merger")
    check_name(entry.at, f"{what}, at")
    if not isinstance(entry.why, str) or _UNPRINTABLE.search(re.sub(r"[\t\r\n]", " ", entry.why)):
        raise InvalidInput(f"{what}, why: expected a printable text, found {_shown(entry.why)}")
    check_merge(entry, what)
    for one in entry.folds:
        check_merge(one, what)
        if one.update is None or one.state is None:
            raise InvalidInput(f"{what}: a fold of it lacks its update or its state")
    if entry.action == "fold" and (entry.update is None or entry.state is None):
        raise InvalidInput(f"{what}: a fold lacks its update or its state")


def check_version(version: Any, number: int, what: str) -> None:
    """A version of a series that was read under `number`."""
    if version.number != number or isinstance(version.number, bool):
        raise InvalidInput(f"{what}: says that it is version {_shown(version.number)}")
    check_ref(version.checkpoint, "checkpoint", f"{what}, checkpoint")
    check_count(version.since_anchor, f"{what}, since_anchor")
    check_name(version.at, f"{what}, at")


def _shown(value: Any) -> str:
    """Enough of a value to recognise it, and nothing that a terminal could take for a command."""
    text = ascii(value if not isinstance(value, str) else value[:60])
    return text if len(text) <= 80 else f"{text[:80]}…"
