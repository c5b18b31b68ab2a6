"""One update per codec and version, kept as it was written: it is read for ever, and written the same today.

    python -m tests.storage.test_golden_codecs rtn@1        # writes tests/golden/codecs/rtn@1 anew

Only for a codec that no release has written yet. After that, a codec that writes other bytes gets another version.

Inputs are whole numbers over powers of two, so that sums and products have no last bits that depend on a library.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from torch import Tensor

from storage.artifacts import Artifact, ArtifactStore
from storage.blobs import Parts
from storage.directory import DirectoryObjects
from storage.drafts import Draft
from storage.manifest import Lineage
from tasks.codecs import READABLE, Codec, Coded, Dense, Exact, Leaf, Ternary
from tasks.codecs.bitdelta import BitDelta
from tasks.codecs.dense import dense_parts
from tasks.codecs.gptq import Rounded, consecutive
from tasks.codecs.low_rank import LowRank
from tasks.codecs.rtn import Rtn
from tasks.codecs.seeded_dare import SeededDare
from tasks.codecs.skillpack import SkillPack
from tasks.codecs.streams import stream, tensor_digest
from tasks.codecs.triplets import Groups, Pair, write_groups
from tasks.tensors import dtype_name, prefixed, read_tensor
from tests.storage.test_codec_page import FORMS, code_of_page

GOLDEN = Path(__file__).parents[1] / "golden" / "codecs"
ALONE = """
import sys
sys.modules.update(dict.fromkeys(("torch", "flows", "configs", "tasks", "storage")))  # importing them fails
{page}
for store in sys.argv[1:]:
    about = json.loads((Path(store) / "numbers.json").read_text())
    manifest, found = json.loads((Path(store) / about["ref"]).read_text()), read_artifact(store, about["ref"])
    for record in manifest["tensors"]:
        values = found[record["name"]]
        assert list(values.shape) == record["shape"], record
        if values.dtype.kind == "f":
            values = values + 0.0
        if record["dtype"] == "BF16":  # numpy has none: the upper halves
            values = (values.view("<u4") >> 16).astype("<u2")
        assert hashlib.sha256(values.tobytes()).hexdigest() == about["sha256"][record["name"]], record
print("all")
"""
LIBRARIES = ("pcodec", "zstandard")  # another version of these may write other bytes that mean the same


def whole(shape: tuple[int, ...], seed: int, top: int = 1024) -> np.ndarray:
    """Integers from -top to top, a quarter of them zeros; the generator's raw output, which numpy keeps for ever."""
    count = int(np.prod(shape))
    drawn = np.random.Philox(key=seed).random_raw(2 * count)
    found = (drawn[:count] >> np.uint64(8)).astype(np.int64) % (2 * top + 1) - top
    return np.where(drawn[count:] % np.uint64(4) == 0, 0, found).reshape(shape)


def delta_of(shape: tuple[int, ...], seed: int = 1) -> Tensor:
    return torch.from_numpy(whole(shape, seed).astype(np.float32)) / 2**16


def add(draft: Draft, name: str, codec: Codec, delta: Tensor, role: str = "linear.weight") -> None:
    """Coded as `compress_update` does it."""
    coded = codec.encode(Leaf(name, role, delta, f"update/{'0' * 64}"), codec.survey(lambda: [delta]))
    add_coded(draft, name, coded, tuple(delta.shape), role)


def add_coded(draft: Draft, name: str, coded: Coded, shape: tuple[int, ...], role: str = "linear.weight") -> None:
    draft.add(name, coded.parts, role=role, dtype="F32", shape=shape, codec=coded.codec, rank=coded.rank)


def write_dense_1(draft: Draft) -> None:
    tensors = {
        "f32": delta_of((3, 5)),
        "f64": delta_of((7,)).double() / 3,
        "f16": delta_of((2, 3, 4)).half(),
        "bf16": delta_of((9,)).bfloat16(),
        "i64": torch.from_numpy(whole((4,), 2)),
        "bool": torch.from_numpy(whole((5,), 3) > 0),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(-0.5),
        "zeros": torch.zeros(100, 100),
    }
    for name, tensor in tensors.items():
        draft.add(name, dense_parts(tensor), role="bare", dtype=dtype_name(tensor.dtype), shape=tensor.shape)
    add(draft, "update", Dense(), delta_of((4, 6)))
    product = torch.ones(4, 1) @ torch.tensor([[1.0, -1.0, 1.0, 1.0]])
    add(draft, "low_rank", LowRank(rank=1), product)
    add(draft, "low_rank_vector", LowRank(), delta_of((6,)))


def write_ternary_1(draft: Draft) -> None:
    """What the codec of that version wrote, byte by byte: it is gone."""

    def parts(places: list[int], signs: list[bool], elements: int, mask: bool) -> Parts:
        if mask:
            kept = np.zeros(elements, np.bool_)
            kept[places] = True
            key, plain = "mask", np.packbits(kept).tobytes()
        else:
            gaps = np.diff(places, prepend=-1) - 1
            key, plain = "gaps", b"".join(bytes([255] * (gap // 255) + [gap % 255]) for gap in gaps.tolist())
        squeezed = zstandard.ZstdCompressor(level=1).compress(plain)
        return {"scale": torch.tensor([0.375]), key: stream(squeezed), "signs": stream(np.packbits(signs).tobytes())}

    far = parts([0, 1, 256, 767, 1277, 1999], [True, False, True, True, False, True], 2000, False)
    near = parts([0, 2, 3, 5, 6, 7, 9, 10, 20], [False] * 8 + [True], 21, True)
    factors = prefixed(parts([1], [True], 5, False), "A") | prefixed(parts([0, 3], [False, True], 4, True), "B")
    for name, found, shape, rank in (
        ("far", far, (40, 50), None),
        ("near", near, (3, 7), None),
        ("factors", factors, (4, 5), 1),
        ("zeros", {}, (3, 3), None),
    ):
        add_coded(draft, name, Coded(found, "ternary@1", rank), shape)


def write_ternary_2(draft: Draft) -> None:
    facts = {"threshold": 900 / 2**16, "magnitude": 0.375}

    def coded(name: str, delta: Tensor, role: str = "linear.weight") -> Coded:
        return Ternary().encode(Leaf(name, role, delta), facts)

    for name, delta, many in (
        ("few", delta_of((40, 50)), 1.0),
        ("many", delta_of((20, 31)), 5.0),
        ("far", torch.cat([torch.zeros(70_000), delta_of((30,))]), 1.0),
        ("scalar", torch.tensor(-0.5), 1.0),
        ("zeros", torch.zeros(3, 3), 1.0),
    ):
        add_coded(draft, name, coded(name, delta * many), tuple(delta.shape))
    A, B = (coded(f"factors.{side}", delta_of(shape) * 4) for side, shape in (("A", (2, 9)), ("B", (7, 2))))
    add_coded(draft, "factors", Coded(prefixed(A.parts, "A") | prefixed(B.parts, "B"), A.codec, 2), (7, 9))


def write_rtn_1(draft: Draft) -> None:
    for bits in (2, 3, 4, 8):
        add(draft, f"bits_{bits}", Rtn(bits=bits), delta_of((6, 40), bits))  # type: ignore[arg-type]
    add(draft, "groups", Rtn(bits=3, group=16, scales="f16"), delta_of((5, 40)))
    add(draft, "vector", Rtn(bits=4), delta_of((70,)), "linear.bias")
    add(draft, "scalar", Rtn(bits=8), torch.tensor(-0.5), "bare")
    add(draft, "stack", Rtn(bits=2, group=5), delta_of((2, 3, 7)), "conv.weight")
    lone = torch.zeros(64, 50)
    lone[::9, 1::7] = torch.from_numpy(whole((8, 7), 5)) / 64
    add(draft, "lone", Rtn(bits=2), lone)
    add(draft, "bell", Rtn(bits=3), sum((delta_of((20, 60), seed) for seed in range(2, 6)), torch.zeros(20, 60)))
    add(draft, "zeros", Rtn(), torch.zeros(3, 4))


def write_bitdelta_1(draft: Draft) -> None:
    some, none = delta_of((16, 24)), delta_of((8, 10)).abs() + 2**-16
    none[::2, ::3] *= -1
    add(draft, "matrix", BitDelta(), some)
    add(draft, "row", BitDelta(scale="row"), some)
    add(draft, "plus", BitDelta(zeros="plus"), some)
    add(draft, "full", BitDelta(), none)
    add(draft, "zeros", BitDelta(), torch.zeros(3, 4))


def write_dare_1(draft: Draft) -> None:
    add(draft, "bf16", SeededDare(density=0.25), delta_of((20, 30)))
    add(draft, "f16", SeededDare(density=0.5, seed=7, values="f16"), delta_of((9, 11)))
    add(draft, "f32", SeededDare(density=0.5, values="f32"), delta_of((20, 30)))
    add(draft, "all", SeededDare(density=1.0, values="f32"), torch.full((20, 20), 0.25))
    add(draft, "zeros", SeededDare(), torch.zeros(30))


def groups(seen: bool, scales: str) -> Groups:
    """Two groups of triplets of a matrix [12, 20], as they would have been rounded: powers of two and codes."""

    def side(rows: int, columns: int, bits: int, seed: int) -> Rounded:
        codes = np.abs(whole((rows, columns), seed)).astype(np.int64)
        grid = (rows, -(-columns // 8))
        order = consecutive(columns, 8)
        scale, zero = 2.0 ** -(codes[:, : grid[1]] % 2), codes[:, -grid[1] :]
        return Rounded(
            (codes % 2**bits).astype(np.uint8),
            scale.astype(np.float32),
            (zero % 2**bits).astype(np.uint8),
            order[::-1].copy() if seen else order,
        )

    pairs = (Pair(side(12, 2, 8, 1), side(2, 20, 8, 2)), Pair(side(12, 9, 2, 3), side(9, 20, 2, 4)))
    shares = 2.0 ** -np.array([0, 0, *[1] * 4, *[2] * 5], dtype=np.float32)
    return Groups(pairs, (8, 2), shares, 2.0**-12, 8, seen, scales)


def write_skillpack_1(draft: Draft) -> None:
    add(draft, "embed.weight", SkillPack(), delta_of((30, 20)), "embedding.weight")
    add(draft, "lm_head.weight", SkillPack(density=0.2, values="f32"), delta_of((20, 30)))
    for seen, scales in ((False, "f16"), (True, "f32")):
        coded = Coded(write_groups(groups(seen, scales), "skillpack@1"), "skillpack@1")
        add_coded(draft, f"triplets_{scales}", coded, (12, 20))
    add_coded(draft, "stack", Coded(write_groups(groups(False, "f32"), "skillpack@1"), "skillpack@1"), (12, 4, 5))
    add(draft, "q_proj.weight", SkillPack(), torch.zeros(3, 4))


def write_exact_1(draft: Draft) -> None:
    """The bases are tensors of the same update."""

    def side(name: str, base: Tensor) -> str:
        dtype = dtype_name(base.dtype)
        draft.add(f"{name}.base", {"tensor": base}, role="bare", dtype=dtype, shape=base.shape)
        return blob_of(draft, f"{name}.base")

    def exact(name: str, base: Tensor, tuned: Tensor, onto: str, through: tuple[str, ...] = ()) -> None:
        coded = Exact().encode(Leaf(name, "linear.weight", torch.zeros(()), sides=lambda: (base, tuned)), {})
        about = {"dtype": dtype_name(tuned.dtype), "shape": tuned.shape, "codec": coded.codec, "digest": coded.digest}
        draft.add(name, coded.parts, role="linear.weight", onto=onto, through=through, **about)  # type: ignore[arg-type]

    shape = (12, 20)
    base, far = delta_of(shape) + 2**-20, delta_of(shape, 2) * 3
    few = torch.from_numpy(whole(shape, 3) % 10 == 1)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        name, old = str(dtype).removeprefix("torch."), base.to(dtype)
        onto = side(name, old)
        exact(f"{name}.few", old, torch.where(few, old * 1.0625, old), onto)
        exact(f"{name}.most", old, torch.where(few, old, old * 1.0078125), onto)
    old, onto = base.bfloat16(), blob_of(draft, "bfloat16.base")
    exact("far", old, far.bfloat16(), onto)
    exact("same", old, old, onto)
    first, between = torch.where(few, old * 1.0625, old), blob_of(draft, "bfloat16.few")
    exact("next", first, torch.where(few, -old, first), onto, (between,))
    odd = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-45, 1.0])
    exact("odd", odd, odd.flip(0), side("odd", odd))
    exact("wider", base.half(), base, blob_of(draft, "float16.base"))
    counted = torch.from_numpy(whole((9,), 4))
    exact("counted", counted, counted + 1, side("counted", counted))


def blob_of(draft: Draft, name: str) -> str:
    return next(record.blob for record in draft.records if record.name == name)


WRITERS: dict[str, Callable[[Draft], None]] = {
    "dense@1": write_dense_1,
    "ternary@1": write_ternary_1,
    "ternary@2": write_ternary_2,
    "rtn@1": write_rtn_1,
    "bitdelta@1": write_bitdelta_1,
    "dare@1": write_dare_1,
    "skillpack@1": write_skillpack_1,
    "exact@1": write_exact_1,
}


def write_golden(codec: str, folder: Path) -> None:
    """A store of one update, and beside it what its tensors come to."""
    shutil.rmtree(folder, ignore_errors=True)
    store = ArtifactStore(DirectoryObjects(folder))
    draft = store.draft("update", Lineage("compress", {"base": f"checkpoint/{'0' * 64}"}, {"name": codec}))
    WRITERS[codec](draft)
    artifact = store.open(draft.commit())
    about = {
        "ref": artifact.ref,
        "libraries": {library: version(library) for library in LIBRARIES},
        "sha256": numbers_of(artifact),
    }
    (folder / "numbers.json").write_text(json.dumps(about, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def numbers_of(artifact: Artifact) -> dict[str, str]:
    """sha256 of every tensor's bytes, decoded; -0 counts as 0, for products have either."""
    tensors = {name: read_tensor(artifact, name) for name in artifact.names}
    return {name: tensor_digest(one + 0.0 if one.is_floating_point() else one) for name, one in tensors.items()}


def golden(codec: str) -> tuple[Artifact, dict[str, dict[str, str]]]:
    about = json.loads((GOLDEN / codec / "numbers.json").read_text(encoding="utf-8"))
    return ArtifactStore(DirectoryObjects(GOLDEN / codec)).open(about["ref"], "update"), about


def test_every_codec_and_version_that_is_read_is_kept() -> None:
    assert set(WRITERS) == set(READABLE) == {path.name for path in GOLDEN.iterdir()}


def test_every_form_is_kept() -> None:
    found = set()
    for codec in WRITERS:
        artifact, _ = golden(codec)
        found |= {
            " ".join([record.codec, *sorted(artifact.parts(record.name))]) for record in artifact.manifest.tensors
        }
    assert found >= FORMS


@pytest.mark.parametrize("codec", WRITERS)
def test_what_was_written_is_read_to_the_same_numbers(codec: str) -> None:
    artifact, about = golden(codec)
    assert numbers_of(artifact) == about["sha256"]


def test_the_page_reads_them_without_deltaworks(tmp_path: Path) -> None:
    """In a Python of its own, which finds no room of the house and no torch."""
    stores = [str(GOLDEN / codec) for codec in WRITERS]
    command = [sys.executable, "-I", "-c", ALONE.replace("{page}", code_of_page()), *stores]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert (done.stdout, done.stderr) == ("all\n", "")


@pytest.mark.parametrize("codec", WRITERS)
def test_the_same_input_is_written_the_same_today(codec: str, tmp_path: Path) -> None:
    """To the byte, if pcodec and zstandard are those of then; else all but what they compress."""
    write_golden(codec, tmp_path / codec)
    old, about = golden(codec)
    new = ArtifactStore(DirectoryObjects(tmp_path / codec))
    now = json.loads((tmp_path / codec / "numbers.json").read_text(encoding="utf-8"))
    remedy = f"{codec} no longer writes what it wrote: raise the codec's version, keep reading this one, and keep both"
    assert now["sha256"] == about["sha256"], remedy
    if now["libraries"] == about["libraries"]:
        assert now["ref"] == about["ref"], remedy
    for record in old.manifest.tensors:
        before, after = old.parts(record.name), new.open(now["ref"]).parts(record.name)
        assert sorted(before) == sorted(after), f"{record.name}: {remedy}"
        for key in before.keys() & {"meta", "A.meta", "B.meta"}:
            assert torch.equal(before[key], after[key]), f"{record.name}: {remedy}"


if __name__ == "__main__":
    for one in sys.argv[1:]:
        write_golden(one, GOLDEN / one)
