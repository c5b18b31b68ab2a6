"""Refs: the names of stored artifacts.

A ref is the string `<kind>/<sha256 of the manifest>`. It is at once a name, the object key of the manifest, and the
proof of the content, because the manifest in turn names every blob by its sha256.
"""

from __future__ import annotations

import re
from typing import Literal, NewType, get_args

from storage.errors import InvalidInput, Mismatch

Kind = Literal["checkpoint", "update", "state", "scores"]
KINDS: tuple[str, ...] = get_args(Kind)

Ref = NewType("Ref", str)
CheckpointRef = NewType("CheckpointRef", Ref)
UpdateRef = NewType("UpdateRef", Ref)
StateRef = NewType("StateRef", Ref)
ScoresRef = NewType("ScoresRef", Ref)

_PATTERN = re.compile(rf"({'|'.join(KINDS)})/([0-9a-f]{{64}})")


def parse_ref(text: str, kind: Kind | None = None) -> Ref:
    """Check that `text` is a ref (of `kind`, if given) and return it typed."""
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise InvalidInput(
            f"{text!r} is not a ref",
            remedy=f"A ref is one of {', '.join(KINDS)}, a slash and 64 hexadecimal digits",
        )
    if kind is not None and match[1] != kind:
        raise Mismatch(f"ref {short(Ref(text))}", expected=f"a {kind}", found=f"a {match[1]}")
    return Ref(text)


def short(ref: str, digits: int = 12) -> str:
    """The ref with its first digits only, for people: `update/1b2c3d4e5f60`."""
    kind, _, digest = ref.partition("/")
    return f"{kind}/{digest[:digits]}"
