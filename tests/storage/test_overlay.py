"""An overlay reads through and writes aside."""

from __future__ import annotations

import pytest

from storage.errors import Missing
from storage.objects import MemoryObjects
from storage.overlay import Overlay


def test_reads_go_through_and_writes_stay_above() -> None:
    below, above = MemoryObjects(), MemoryObjects()
    below.put("kept", b"below")
    below.put("both", b"below")
    overlay = Overlay(below, above)
    overlay.put("both", b"above")
    overlay.put("new", b"above")
    assert [overlay.get(key) for key in ("kept", "both", "new")] == [b"below", b"above", b"above"]
    assert [bytes(overlay.view(key)) for key in ("kept", "both")] == [b"below", b"above"]
    assert list(overlay.list("")) == ["both", "kept", "new"]
    assert (overlay.size("kept"), overlay.size("nothing")) == (5, None)
    assert list(below.list("")) == ["both", "kept"]
    assert below.get("both") == b"below"
    with pytest.raises(Missing, match="nothing"):
        overlay.get("nothing")


def test_a_name_that_is_taken_below_is_taken() -> None:
    below, above = MemoryObjects(), MemoryObjects()
    below.put("entry", b"first")
    overlay = Overlay(below, above)
    assert not overlay.create("entry", b"second")
    assert overlay.create("other", b"first")
    assert not overlay.create("other", b"second")
    assert list(above.list("")) == ["other"]


def test_only_what_is_above_is_deleted() -> None:
    below, above = MemoryObjects(), MemoryObjects()
    below.put("both", b"below")
    above.put("both", b"over it")
    above.put("new", b"above")
    overlay = Overlay(below, above)
    assert [(one.key, one.bytes) for one in overlay.listed("")] == [("both", 7), ("new", 5)]
    for key in ("both", "new"):
        overlay.delete(key)
    assert [(one.key, one.bytes) for one in overlay.listed("")] == [("both", 5)]
    assert below.get("both") == b"below"
