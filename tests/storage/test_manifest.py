"""Manifests: canonical bytes, whole round trips, and a store written long ago that must open for ever."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.artifacts import ArtifactStore
from storage.directory import DirectoryObjects
from storage.errors import Damaged, InvalidInput
from storage.manifest import (
    Asset,
    Lineage,
    Manifest,
    TensorRecord,
    canonical,
    decode_manifest,
    digest,
    encode_manifest,
)
from storage.refs import Ref, UpdateRef
from tasks.tensors import prefixed, read_tensor

GOLDEN = Path(__file__).parents[1] / "golden" / "format"
GOLDEN_REF = UpdateRef(Ref("update/79ed0564003fb6a32fe108d21123e02455a9c7bd2cd9680f3947c0077acc5024"))

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
# names are shown on terminals and, of assets, become files: see storage/trust.py
names = st.text(st.characters(exclude_categories=["Cc", "Cf", "Cs", "Zl", "Zp"]), max_size=12)
files = st.text(st.characters(categories=["L", "N"]) | st.sampled_from("-_. "), min_size=3, max_size=12).map(
    "x{}".format
)
digests = st.binary(max_size=4).map(digest)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))
mappings = st.dictionaries(texts, values, max_size=4)
records = st.builds(
    TensorRecord,
    name=names,
    role=names,
    dtype=st.sampled_from(["F32", "BF16", "I64"]),
    shape=st.lists(st.integers(0, 1 << 15), max_size=4).map(tuple),
    blob=digests,
    bytes=st.integers(0, 1 << 50),
    codec=names,
    rank=st.none() | st.integers(0, 100),
    onto=st.none() | digests,
)
manifests = st.builds(
    Manifest,
    kind=st.sampled_from(["checkpoint", "update", "state", "scores"]),
    lineage=st.builds(Lineage, step=names, inputs=st.dictionaries(names, names, max_size=3), spec=mappings),
    tensors=st.lists(records, max_size=4, unique_by=lambda record: record.name).map(
        lambda found: tuple(sorted(found, key=lambda record: record.name))
    ),
    facts=mappings,
    assets=st.dictionaries(files, st.builds(Asset, blob=digests, bytes=st.integers(0, 1 << 50)), max_size=3),
)


def backwards(value: Any) -> Any:
    """`value` with the insertion order of every mapping turned round."""
    if isinstance(value, dict):
        return {key: backwards(item) for key, item in reversed(value.items())}
    return [backwards(item) for item in value] if isinstance(value, list) else value


@settings(max_examples=150, deadline=None)
@given(manifests)
def test_decoding_undoes_encoding(manifest: Manifest) -> None:
    data = encode_manifest(manifest)
    found = decode_manifest(data, source="test")
    assert found == manifest
    assert encode_manifest(found) == data


@settings(max_examples=150, deadline=None)
@given(mappings)
def test_bytes_are_independent_of_insertion_order(mapping: dict[str, Any]) -> None:
    assert canonical(backwards(mapping)) == canonical(mapping)
    assert json.loads(canonical(mapping)) == mapping


def test_canonical_bytes_are_what_the_format_says() -> None:
    assert canonical({"b": [1, 0.1, None, True], "a": "ä\n"}) == '{"a":"ä\\n","b":[1,0.1,null,true]}'.encode()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), {1, 2}, b"x", "\ud800", torch.ones(1)])
def test_what_has_no_canonical_form_is_refused(value: object) -> None:
    with pytest.raises(InvalidInput, match="canonical JSON"):
        encode_manifest(Manifest("update", Lineage("test"), facts={"norm": value}))


def record(name: str) -> TensorRecord:
    return TensorRecord(name, "linear.weight", "F32", (2, 3), digest(b""), 0)


@pytest.mark.parametrize("names", [["b", "a"], ["a", "a"]])
def test_tensors_are_sorted_and_unique(names: list[str]) -> None:
    with pytest.raises(InvalidInput, match="sorted by name, each once"):
        Manifest("update", Lineage("test"), tuple(record(name) for name in names))


def test_sizes_count_shared_blobs_once() -> None:
    one, two = record("a"), record("b")
    manifest = Manifest("update", Lineage("test"), (replace(one, bytes=10), replace(two, bytes=10, onto=digest(b"o"))))
    assert (manifest.tensor_bytes, manifest.parameters) == (10, 12)
    assert manifest.blobs() == {digest(b""), digest(b"o")}


GOOD = json.loads(encode_manifest(Manifest("update", Lineage("test"), (record("a"), record("b")))))


@pytest.mark.parametrize(
    "harm",
    [
        lambda found: found.update(format="deltaworks/2"),
        lambda found: found.pop("kind"),
        lambda found: found.pop("lineage"),
        lambda found: found["tensors"][0].pop("blob"),
        lambda found: found["tensors"][0].update(colour="red"),
        lambda found: found["tensors"][0].update(shape=3),
        lambda found: found["tensors"].reverse(),
        lambda found: found.update(tensors=None),
        lambda found: found.update(assets=["x"]),
        lambda found: found.update(assets={"x": {}}),
    ],
)
def test_what_is_no_manifest_is_damaged(harm: Callable[[dict[str, Any]], object]) -> None:
    found = json.loads(json.dumps(GOOD))
    harm(found)
    with pytest.raises(Damaged, match="update/12345"):
        decode_manifest(canonical(found), source="update/12345")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"7", b"\xff\xfe", b'"deltaworks/1"'])
def test_what_is_no_json_object_is_damaged(data: bytes) -> None:
    with pytest.raises(Damaged, match="update/12345"):
        decode_manifest(data, source="update/12345")


def test_a_format_from_the_future_is_named() -> None:
    with pytest.raises(
        Damaged, match=r"update/12345 has format 'deltaworks/2', .* reads 'deltaworks/1'\. Read it with"
    ):
        decode_manifest(canonical({**GOOD, "format": "deltaworks/2"}), source="update/12345")


class TestGolden:
    """A format is a promise: this store was written by version 1 and has not been touched since."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> ArtifactStore:
        """A copy, because reading must work and writing must not reach the golden files."""
        shutil.copytree(GOLDEN, tmp_path / "store")
        return ArtifactStore(DirectoryObjects(tmp_path / "store"))

    def test_it_opens(self, store: ArtifactStore) -> None:
        artifact = store.open(GOLDEN_REF, "update")
        assert list(store.refs()) == [GOLDEN_REF]
        assert artifact.names == ["layer.bias", "layer.weight", "low.weight"]
        assert artifact.manifest.lineage == Lineage("extract", {"base": f"checkpoint/{'0' * 64}"}, {"heads": "refuse"})
        assert artifact.manifest.facts == {"norm": 0.1, "task": "Öl"}
        assert artifact.asset("config.json") == b'{"hidden_size": 4}'
        for name, expected in golden_tensors().items():
            assert torch.equal(read_tensor(artifact, name), expected), name

    def test_it_would_be_written_the_same_today(self, store: ArtifactStore, tmp_path: Path) -> None:
        """Not a promise to readers, but a new ref for old work would make everybody compute everything again.

        Only the bytes of compressed streams may change, with the version of zstandard.
        """
        old = store.open(GOLDEN_REF).manifest
        new = ArtifactStore(DirectoryObjects(tmp_path / "new")).open(write_format(tmp_path / "new")).manifest
        bias, weight, low = old.tensors
        streams = replace(weight, blob=new.tensors[1].blob, bytes=new.tensors[1].bytes)
        assert encode_manifest(new) == encode_manifest(replace(old, tensors=(bias, streams, low)))

    @pytest.mark.parametrize(
        ("old", "new"), [(b'"norm":0.1', b'"norm":0.2'), (b"[4,8]", b"[8,4]"), (b'"F32"', b'"F16"')]
    )
    def test_a_changed_manifest_is_damaged(self, store: ArtifactStore, old: bytes, new: bytes) -> None:
        data = store.objects.get(GOLDEN_REF)
        assert old in data
        store.objects.put(GOLDEN_REF, data.replace(old, new))
        with pytest.raises(Damaged, match=GOLDEN_REF[:19]):
            store.open(GOLDEN_REF)


def golden_tensors() -> dict[str, torch.Tensor]:
    return {
        "layer.bias": torch.tensor([0.5, -0.25, 0.0, 1.0]),
        "layer.weight": torch.tensor([0.0, 2.0, -2.0, 0.0]).repeat(8).reshape(4, 8),
        "low.weight": torch.tensor([[2.0, 0.0], [4.0, 0.0], [6.0, 0.0]]),
    }


def write_format(folder: Path) -> UpdateRef:
    """How the golden store was written: one dense tensor, one ternary, one of low rank, and an asset.

    python -c "from tests.storage.test_manifest import *; print(write_format(GOLDEN))"
    """
    tensors = golden_tensors()
    lineage = Lineage("extract", {"base": f"checkpoint/{'0' * 64}"}, {"heads": "refuse"})
    draft = ArtifactStore(DirectoryObjects(folder)).draft("update", lineage)
    bias, weight = tensors["layer.bias"], tensors["layer.weight"]
    draft.add("layer.bias", {"tensor": bias}, role="linear.bias", dtype="F32", shape=bias.shape)
    bits = {"mask": np.packbits(weight != 0), "signs": np.packbits(weight[weight != 0] < 0)}
    squeezed = np.frombuffer(zstandard.ZstdCompressor(level=1).compress(bits["mask"].tobytes()), dtype=np.uint8)
    parts = {key: torch.from_numpy(np.array(one)) for key, one in {**bits, "mask": squeezed}.items()}
    parts["scale"] = torch.tensor([2.0])
    draft.add("layer.weight", parts, role="linear.weight", dtype="F32", shape=weight.shape, codec="ternary@1")
    left, right = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[2.0, 0.0]])
    parts = {**prefixed({"tensor": right}, "A"), **prefixed({"tensor": left}, "B")}
    draft.add("low.weight", parts, role="linear.weight", dtype="F32", shape=(3, 2), rank=1)
    draft.add_asset("config.json", b'{"hidden_size": 4}')
    draft.facts.update({"task": "Öl", "norm": 0.1})
    return UpdateRef(draft.commit())
