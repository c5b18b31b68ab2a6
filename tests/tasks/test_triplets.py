"""Groups of triplets and pruned tensors: the released code's matrix, what comes back, and streams that are damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import Damaged
from tasks.codecs import Coded, Parts, decode_parts
from tasks.codecs.skillpack import SkillPack
from tasks.codecs.streams import with_meta
from tasks.codecs.triplets import Triplets, read_groups, rounded, write_groups
from tests.tasks.test_gptq import case, moments_of
from tests.tasks.test_skillpack import GROUPS, back, low, made


def test_the_released_code_from_its_triplets() -> None:
    expected, moments = case()
    values = expected["svd.S"]
    found = Triplets(expected["svd.U"], values / values[0], expected["svd.V"].T, float(values[0]))
    groups = rounded(found, [(8, 2), (4, 8), (2, 38)], 128, "f32", moments)
    read = read_groups(write_groups(groups, "skillpack@1"), (96, 192))
    torch.testing.assert_close(read.numbers(), expected["delta"], rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("scales", ["f16", "f32"])
@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize(("rows", "columns", "group"), [(40, 300, 128), (300, 40, 7), (150, 160, 64)])
def test_groups_come_back_as_they_were(rows: int, columns: int, group: int, seen: bool, scales: str) -> None:
    delta = low(rows, columns, 0.02)
    moments = moments_of(2 * columns, columns) if seen else None
    codec = SkillPack(mlp=((8, 3), (3, 0.6), (2, 0.3)), group=group, scales=scales, rivals=())  # type: ignore[arg-type]
    coded = made(codec, delta, moments=moments)
    assert ("order" in coded.parts) == seen
    groups = read_groups(coded.parts, (rows, columns))
    dense = sum(
        torch.from_numpy(pair.left.numbers()).double()
        @ torch.diag(torch.from_numpy(share).double() * groups.top)
        @ torch.from_numpy(pair.right.numbers()).double()
        for pair, share in zip(groups.pairs, np.split(groups.share_K, _ends(groups.pairs)), strict=True)
    )
    found = back(coded, (rows, columns))
    torch.testing.assert_close(found.double(), dense, rtol=1e-4, atol=1e-8)
    assert torch.equal(found, back(made(codec, delta, moments=moments), (rows, columns)))
    kept = torch.linalg.svdvals(delta)[: len(groups.share_K)]
    torch.testing.assert_close(torch.from_numpy(groups.share_K) * groups.top, kept, rtol=2e-3, atol=1e-7)


def _ends(pairs: object) -> list[int]:
    return list(np.cumsum([one.right.codes_RC.shape[0] for one in pairs])[:-1])  # type: ignore[attr-defined]


def _seen() -> Coded:
    return made(SkillPack(mlp=((8, 3), (2, 20)), group=16, rivals=()), low(40, 50), moments=moments_of(200, 50))


@pytest.mark.parametrize(
    "make",
    [_seen, lambda: made(GROUPS, low(40, 50)), lambda: made(SkillPack(), low(40, 50), "lm_head.weight")],
    ids=["seen", "unseen", "pruned"],
)
def test_altered_bytes_never_crash(make: Callable[[], Coded]) -> None:
    coded = make()
    assert coded.codec == "skillpack@1"

    @settings(max_examples=300, deadline=None)
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        parts: Parts = dict(coded.parts)
        key = data.draw(st.sampled_from(sorted(parts)))
        raw = bytearray(parts[key].numpy().tobytes())
        if data.draw(st.booleans()):
            raw = raw[: data.draw(st.integers(0, len(raw)))]
        for _ in range(data.draw(st.integers(0, 4))):
            if raw:
                raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        parts[key] = torch.tensor(list(raw), dtype=torch.uint8)
        if data.draw(st.integers(0, 9)) == 0:
            del parts[key]
        with suppress(Damaged):
            assert decode_parts(coded.codec, parts, (40, 50)).shape == (40, 50)

    holds()


@pytest.mark.parametrize(
    "change",
    [
        {"form": "waves"},
        {"shape": [-40, -50]},
        {"shape": [2000]},
        {"bits": [8, 9]},
        {"counts": [3, 38]},
        {"counts": [10**9, 20]},
        {"counts": [True, 20]},
        {"sizes": [1, 2, 3]},
        {"sizes": [-1, 2, 3, 4]},
        {"sizes": "many"},
        {"group": 0},
        {"group": 10**30},
        {"scales": "f8"},
        {"top": "inf"},
    ],
    ids=str,
)
def test_metadata_that_lies_is_damaged(change: dict[str, object]) -> None:
    coded = _seen()
    meta = json.loads(coded.parts["meta"].numpy().tobytes()) | change
    parts = {**coded.parts, "meta": with_meta(meta, {})["meta"]}
    with pytest.raises(Damaged):
        decode_parts(coded.codec, parts, (40, 50))
