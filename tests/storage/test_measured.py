"""What was measured on single suites: found whole or not at all, and gone with its model."""

from __future__ import annotations

import math
import zlib

import pytest
import torch

from storage.manifest import digest
from storage.measured import Measured, model_of
from storage.objects import MemoryObjects
from storage.refs import CheckpointRef
from storage.sweep import Wishes, mark
from storage.transfer import mirror
from storage.verify import verify
from tests.builders import checkpoint_of, memory_store

MODEL = CheckpointRef(f"checkpoint/{'a' * 64}")
KEY = "b" * 64


def test_numbers_come_back_bit_by_bit() -> None:
    kept, value = Measured(MemoryObjects()), {"scores": [0.1 + 0.2, 1e-320, -0.0, 5, True, None, "ä", math.inf]}
    assert kept.read(MODEL, KEY) is None
    kept.write(MODEL, KEY, value)
    found = kept.read(MODEL, KEY)
    assert repr(found) == repr(value)
    assert math.copysign(1, found["scores"][2]) == -1
    assert kept.read(MODEL, "c" * 64) is None
    assert kept.read(CheckpointRef(f"checkpoint/{'d' * 64}"), KEY) is None


def stated(data: bytes) -> bytes:
    """Data under its right digest: what a hostile store could hold."""
    return digest(data).encode() + b"\n" + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        stated(b""),
        stated(b"{}"),
        stated(zlib.compress(b"{")),
        stated(zlib.compress(b"[" * 100_000)),
        stated(zlib.compress(b"\xff")),
        stated(zlib.compress(b"{}")[:-3]),
        stated(zlib.compress(b"{}"))[:-1],
        b"x" + stated(zlib.compress(b"{}"))[1:],
        zlib.compress(b"{}"),
    ],
)
def test_what_is_not_whole_is_not_there(data: bytes) -> None:
    objects = MemoryObjects()
    Measured(objects).write(MODEL, KEY, [1])
    (key,) = objects.list("")
    objects.put(key, data)
    assert Measured(objects).read(MODEL, KEY) is None


def test_any_bit_that_turns_is_noticed() -> None:
    objects = MemoryObjects()
    kept = Measured(objects)
    kept.write(MODEL, KEY, {"scores": [1.5]})
    (key,) = objects.list("")
    whole = objects.get(key)
    for place in range(len(whole)):
        objects.put(key, whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert kept.read(MODEL, KEY) is None


def test_what_claims_endless_room_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.measured._MOST", 1000)
    kept = Measured(MemoryObjects())
    kept.write(MODEL, KEY, "x" * 998)
    assert kept.read(MODEL, KEY) == "x" * 998
    kept.write(MODEL, KEY, "x" * 999)
    assert kept.read(MODEL, KEY) is None


def test_it_goes_with_its_model_and_only_after_a_while() -> None:
    store = memory_store()
    wanted, lost = (checkpoint_of({"a": torch.full((3,), value)}, store) for value in (1.0, 2.0))
    kept = Measured(store.objects)
    for model in (wanted, lost, MODEL):
        kept.write(model, KEY, [1])
    store.objects.put("measured/stray", b"")
    registered = frozenset({wanted})
    young = mark(store, Wishes(registered=registered))
    assert not young.memos and {"measured/stray", f"measured/{'a' * 64}/{KEY}"} <= {one.key for one in young.young}
    gone = {one.key for one in mark(store, Wishes(grace=0, registered=registered), now=9e9).memos}
    assert gone == {f"measured/{one.partition('/')[2]}/{KEY}" for one in (lost, MODEL)} | {"measured/stray"}
    assert not verify(store, store.refs()).findings


def test_a_mirror_takes_it_along_unless_the_model_is_damaged() -> None:
    source, target = memory_store(), memory_store()
    whole, damaged = (checkpoint_of({"a": torch.full((3,), value)}, source) for value in (1.0, 2.0))
    for model in (whole, damaged):
        Measured(source.objects).write(model, KEY, [model])
    Measured(target.objects).write(whole, "other", [2])
    (blob,) = source.open(damaged).manifest.blobs()
    source.objects.put(f"blob/{blob}", b"damaged")
    source.objects.put("measured/stray", b"")
    mirror(source, target)
    assert Measured(target.objects).read(whole, KEY) == [whole]
    assert Measured(target.objects).read(whole, "other") == [2]
    assert len(list(target.objects.list("measured/"))) == 2


def test_whose_it_is() -> None:
    assert model_of(f"measured/{'a' * 64}/{KEY}") == MODEL
    assert model_of("measured/x") is model_of("measured/") is None
