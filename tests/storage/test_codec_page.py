"""The codecs' page: its Python, run without Deltaworks, reads what every codec writes, number by number."""

from __future__ import annotations

import ast
import hashlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from storage.artifacts import ArtifactStore
from storage.blobs import encode_parts
from storage.directory import DirectoryObjects
from storage.manifest import Lineage
from tasks.codecs import READABLE, Codec, Coded, Dense, Exact, Leaf, Ternary, decode_parts, restore_parts
from tasks.codecs.bitdelta import BitDelta
from tasks.codecs.low_rank import LowRank
from tasks.codecs.rtn import Rtn
from tasks.codecs.seeded_dare import SeededDare
from tasks.codecs.skillpack import SkillPack
from tasks.codecs.streams import tensor_digest
from tasks.codecs.triplets import read_groups
from tasks.tensors import dtype_name, prefixed, read_tensor, unprefixed
from tests.tasks.test_gptq import moments_of

PAGE = Path(__file__).parents[2] / "storage" / "CODECS.md"
SHAPES = [(), (0,), (1,), (7,), (1000,), (3, 0), (33, 17), (64, 48), (2, 3, 4, 5)]
ATTENTION, EMBEDDING, NORM = "layers.0.self_attn.q_proj.weight", "embed_tokens.weight", "layers.0.norm.weight"
ROLES = {ATTENTION: "linear.weight", EMBEDDING: "embedding.weight", NORM: "norm.weight"}


def code_of_page() -> str:
    """All blocks of the page, one after the other."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S))


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    found: dict[str, Any] = {"__name__": "page"}
    exec(compile(code_of_page(), str(PAGE), "exec"), found)
    return found


def drawn(shape: tuple[int, ...], seed: int = 0, zeros: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(shape, generator=generator) > zeros
    return torch.randn(shape, generator=generator) * kept * 1e-3


def few(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Numbers that codes of two bits in rows of bytes say shortest: all alike, one in a thousand apart."""
    found = torch.full(shape, 0.25)
    if found.numel():
        found.reshape(-1)[0] = -0.5
    return found


# codec and parts: what the page describes, and so what must occur in the cases
FORMS = {
    "dense@1",
    "dense@1 tensor",
    "dense@1 A.tensor B.tensor",
    "ternary@2",
    "ternary@2 gaps meta signs",
    "ternary@2 fours meta",
    "rtn@1",
    "rtn@1 meta packed scales zeros",
    "rtn@1 codes meta scales zeros",
    "bitdelta@1",
    "bitdelta@1 meta scales signs",
    "bitdelta@1 mask meta scales signs",
    "dare@1",
    "dare@1 meta raw",
    "dare@1 coded meta",
    "skillpack@1",
    "skillpack@1 gaps meta values",
    "skillpack@1 codes meta scales shares zeros",
    "skillpack@1 codes meta order scales shares zeros",
    "exact@1",
    "exact@1 fields meta more",
    "exact@1 gaps meta more",
    "exact@1 meta planes",
}

Case = tuple[Codec, Callable[[tuple[int, ...]], Tensor], str]
CASES: dict[str, Case] = {
    "dense": (Dense(), drawn, ATTENTION),
    "dense of zeros": (Dense(), torch.zeros, ATTENTION),
    "ternary": (Ternary(), drawn, ATTENTION),
    "ternary of many": (Ternary(density=0.6), drawn, ATTENTION),
    "rtn of 2 bits": (Rtn(bits=2), drawn, ATTENTION),
    "rtn of 3 bits in groups": (Rtn(bits=3, group=5, scales="f16"), drawn, ATTENTION),
    "rtn of 8 bits": (Rtn(bits=8), drawn, ATTENTION),
    "rtn of few": (Rtn(bits=3, group=16), few, ATTENTION),
    "bitdelta": (BitDelta(), drawn, ATTENTION),
    "bitdelta by row": (BitDelta(scale="row"), drawn, ATTENTION),
    "bitdelta without zeros": (BitDelta(zeros="plus"), drawn, ATTENTION),
    "low_rank": (LowRank(rank=2), drawn, ATTENTION),
    "low_rank in f32": (LowRank(energy=0.3, values="f32"), drawn, ATTENTION),
    "dare": (SeededDare(), drawn, ATTENTION),
    "dare in f16": (SeededDare(density=0.37, seed=5, values="f16"), drawn, ATTENTION),
    "dare in f32": (SeededDare(density=0.9, values="f32"), drawn, ATTENTION),
    "dare of all": (SeededDare(density=1.0), few, ATTENTION),
    "skillpack": (SkillPack(), drawn, ATTENTION),
    "skillpack of groups": (SkillPack(rivals=(), group=16), drawn, ATTENTION),
    "skillpack of groups in f32": (SkillPack(rivals=(), scales="f32", attention=((3, 2), (2, 9))), drawn, ATTENTION),
    "skillpack of an embedding": (SkillPack(), drawn, EMBEDDING),
    "skillpack of an embedding in f32": (SkillPack(values="f32", density=0.3), drawn, EMBEDDING),
    "skillpack of a norm": (SkillPack(), drawn, NORM),
}


def cases(name: str) -> Iterator[tuple[Tensor, Coded]]:
    """What a codec makes of every shape; of matrices of linear layers also with calibration data, which some use."""
    codec, draw, tensor = CASES[name]
    for shape in SHAPES:
        delta = draw(shape)
        known = codec.survey(lambda delta=delta: [delta])  # type: ignore[misc]
        data = (None, moments_of(3, shape[-1])) if codec.examples and shape in [(33, 17), (64, 48)] else (None,)
        for moments in data:
            inputs = None if moments is None else lambda moments=moments: moments
            yield delta, codec.encode(Leaf(tensor, ROLES[tensor], delta, "update/ä", inputs=inputs), known)


def exact_cases() -> Iterator[tuple[Tensor, Tensor, Coded]]:
    """Base, tuned, and what `exact` makes of them: of every dtype, with nothing, little and all of it changed."""
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            for share, size in ((0.0, 0.0), (0.1, 1e-2), (0.5, 1e-2), (1.0, 1e3)):
                base = (drawn(shape, zeros=0.0) * 30).to(dtype)
                kept = torch.rand(shape, generator=torch.Generator().manual_seed(2)) >= share
                tuned = torch.where(kept, base, (base + drawn(shape, 1) * size).to(dtype))
                tuned.reshape(-1)[5:7] = torch.tensor([-0.0, -torch.inf])[: max(tuned.numel() - 5, 0)]
                yield base, tuned, exactly(base, tuned)
        for base, tuned in (
            (drawn(shape).bfloat16(), drawn(shape, 1)),
            (drawn(shape).sign().long(), drawn(shape, 1).sign().long()),
            (drawn(shape) > 0, drawn(shape, 1) > 0),
        ):
            yield base, tuned, exactly(base, tuned)


def exactly(base: Tensor, tuned: Tensor) -> Coded:
    return Exact().encode(Leaf(ATTENTION, "linear.weight", torch.zeros(()), sides=lambda: (base, tuned)), {})


def same(found: np.ndarray, expected: Tensor) -> bool:
    """Bit by bit; of bfloat16, which numpy lacks, the numbers."""
    wanted = expected.float() if expected.dtype == torch.bfloat16 else expected
    return found.shape == tuple(wanted.shape) and found.tobytes() == wanted.contiguous().numpy().tobytes()


def test_its_code_needs_nothing_of_deltaworks() -> None:
    """The standard library, and the four packages that it names."""
    found = set()
    for node in ast.walk(ast.parse(code_of_page())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])
    assert found - set(sys.stdlib_module_names) == {"numpy", "pcodec", "safetensors", "zstandard"}


def test_every_form_occurs() -> None:
    found = {" ".join([coded.codec, *sorted(coded.parts)]) for name in CASES for _, coded in cases(name)}
    found |= {" ".join([coded.codec, *sorted(coded.parts)]) for *_, coded in exact_cases()}
    assert found == FORMS


def test_it_has_every_codec_that_is_read(page: dict[str, Any]) -> None:
    headings = set(re.findall(r"^## (\w+@\d+)", PAGE.read_text(encoding="utf-8"), re.M))
    assert set(page["DECODERS"]) | set(page["RESTORERS"]) == set(READABLE) == headings


@pytest.mark.parametrize("name", CASES)
def test_it_decodes_what_the_codec_wrote(page: dict[str, Any], name: str) -> None:
    for delta, coded in cases(name):
        blob, shape = encode_parts(coded.parts), tuple(delta.shape)
        parts, ours = page["parts_of"](blob), safetensors.torch.load(blob)
        if coded.rank is not None:
            record = {"codec": coded.codec, "shape": list(shape), "rank": coded.rank}
            for side, across, found in zip(
                ("B", "A"),
                ((shape[0], coded.rank), (coded.rank, shape[1])),
                page["factors"](record, parts),
                strict=True,
            ):
                assert same(found, decode_parts(coded.codec, unprefixed(ours, side), across).float())
            continue
        found, expected = page["decoded"](coded.codec, parts, list(shape)), decode_parts(coded.codec, ours, shape)
        if "shares" not in parts:
            assert same(found, expected), (shape, coded.codec)
            continue
        # factors bit by bit; of their product the last bits are the library's
        for factor, wanted in zip(page["triplets"](parts), read_groups(ours, shape).factors(), strict=True):
            assert same(factor, wanted)
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_it_restores_what_exact_wrote(page: dict[str, Any]) -> None:
    for base, tuned, coded in exact_cases():
        blob, shape = encode_parts(coded.parts), tuple(tuned.shape)
        parts, side = page["parts_of"](blob), page["parts_of"](encode_parts({"tensor": base}))["tensor"]
        found = page["RESTORERS"][coded.codec](parts, shape, side) if parts else side
        restored = restore_parts(coded.codec, safetensors.torch.load(blob), shape, base)
        assert found.dtype == dtype_name(restored.dtype) and tuple(found.shape) == shape
        assert hashlib.sha256(found.raw).hexdigest() == tensor_digest(restored) == coded.digest == tensor_digest(tuned)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_it_adds_to_what_a_tensor_is_stated_against(page: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    """As a LoRA-tuned checkpoint is; a product of rank 1 has no sums, and so no bits but the sign of 0 to differ in."""
    store = ArtifactStore(DirectoryObjects(tmp_path))
    draft, base = store.draft("checkpoint", Lineage("test")), drawn((40, 30)).to(dtype)
    about: dict[str, Any] = {"role": "linear.weight", "dtype": dtype_name(dtype), "shape": (40, 30)}
    draft.add("base", {"tensor": base}, **about)
    onto = draft.records[0].blob
    factors = prefixed({"tensor": drawn((1, 30), 1)}, "A") | prefixed({"tensor": drawn((40, 1), 2).bfloat16()}, "B")
    draft.add("factors", factors, **about, rank=1, onto=onto)
    draft.add("delta", {"tensor": drawn((40, 30), 3) * 1e-3}, **about, onto=onto)
    draft.add("zeros", {}, **about, onto=onto)
    ref = draft.commit()
    found = page["read_artifact"](tmp_path, ref)
    assert found.keys() == {"base", "factors", "delta", "zeros"}
    for name, values in found.items():
        assert same(values + 0.0, read_tensor(store.open(ref), name) + 0.0), name


def test_it_refuses_what_is_damaged(page: dict[str, Any], tmp_path: Path) -> None:
    store = ArtifactStore(DirectoryObjects(tmp_path))
    draft = store.draft("update", Lineage("test"))
    draft.add("w", {"tensor": torch.ones(9)}, role="bare", dtype="F32", shape=(9,))
    blob = draft.records[0].blob
    ref = draft.commit()
    path = tmp_path / "blob" / blob
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(AssertionError, match=f"blob/{blob} is damaged"):
        page["read_artifact"](tmp_path, ref)
