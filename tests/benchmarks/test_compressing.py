"""The benchmark of compression measures what it says: peers give back what they got, and no codec is left out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tasks.codecs import CODECS
from tests.benchmarks import codec_quality, compressing, lossless_sizes, ternary_sizes
from tests.benchmarks.coding import Case, Measured, Way
from tests.benchmarks.peers import layouts

LOSSLESS = {name: layout for name, layout in layouts.lossless().items() if layout}


@pytest.mark.parametrize("name", layouts.TERNARY)
@pytest.mark.parametrize("density", [0.0005, 0.05, 0.5])
def test_ternary_peers_give_back_what_they_were_given(name: str, density: float) -> None:
    """At the lowest density most gaps are longer than a byte holds."""
    delta = np.random.default_rng(0).standard_normal(200_003).astype(np.float32)
    threshold = float(np.quantile(np.abs(delta), 1 - density))
    layout = layouts.TERNARY[name]
    wanted = np.where(np.abs(delta) >= threshold, np.sign(delta) * np.float32(0.25), np.float32(0))
    assert np.array_equal(layout.decode(layout.encode(delta, threshold), delta.size, 0.25), wanted)


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_peers_give_back_what_they_were_given(name: str) -> None:
    layout = LOSSLESS[name]
    pair = st.integers(1, 3000).flatmap(lambda n: st.tuples(*[arrays.arrays(np.uint16, n)] * 2))

    @settings(max_examples=25, deadline=None)
    @given(pair)
    def holds(found: tuple[np.ndarray, np.ndarray]) -> None:
        base, tuned = found
        assert np.array_equal(layout.decode(base, layout.encode(base, tuned)), tuned)

    holds()


@pytest.mark.parametrize("share", [0.05, 0.48, 0.9])
def test_as_many_numbers_change_as_the_case_says(share: float) -> None:
    bases, tuneds = lossless_sizes.checkpoints(40, share, 200_000)
    changed = sum(int((base != tuned).sum()) for base, tuned in zip(bases, tuneds, strict=True))
    assert changed / 200_000 == pytest.approx(share, rel=0.1)


def test_entropies() -> None:
    """Of ternary entries as the literature has them; of differences, in a case that is known."""
    assert [round(ternary_sizes.entropy(k), 4) for k in (0.05, 0.1, 0.2, 0.5)] == [0.3364, 0.569, 0.9219, 1.5]
    base = torch.ones(4, 4, dtype=torch.bfloat16)  # of one exponent
    tuned = base.clone()
    tuned[0], tuned[1] = 1 + 2**-7, 1 + 2**-6  # one and two steps up, a quarter of the numbers each
    assert lossless_sizes.entropy([base], [tuned]) == pytest.approx(0.5 * math.log2(2) + 0.5 * math.log2(4))
    mixed = torch.tensor([1.0, 1.0, 4.0, 4.0], dtype=torch.bfloat16)
    moved = torch.tensor([1.0, 1.0, 4.0 + 2**-5, 4.0 + 2**-5], dtype=torch.bfloat16)
    assert lossless_sizes.entropy([mixed], [moved]) == 0  # the exponent says which of them changed


@pytest.mark.parametrize(("kind", "density"), [("i.i.d.", 0.2), ("structured", 0.5)])
def test_the_ways_of_a_ternary_case_give_the_right_tensors(kind: str, density: float) -> None:
    _all_right(ternary_sizes.case(kind, density, 40_000))


def test_the_ways_of_a_lossless_case_give_the_right_tensors() -> None:
    _all_right(lossless_sizes.case("4 tensors", 0.2, 40_000))


def _all_right(case: Case) -> None:
    assert case.ways
    for way in case.ways:
        for number in range(case.tensors):
            found = way.decode(bytearray(way.encode(number)), number)
            assert way.right(found, number), way.name
            assert not way.right(_altered(way, found), number), way.name


def _altered(way: Way, found: object) -> object:
    copy = found.clone() if isinstance(found, torch.Tensor) else np.array(found)
    copy.reshape(-1)[0] += 1
    return copy


def test_every_codec_is_measured() -> None:
    assert {name for name, _ in codec_quality.settings()} == set(CODECS)


def test_a_codec_without_settings_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CODECS, "morse", CODECS["dense"])
    with pytest.raises(KeyError, match="morse"):
        codec_quality.settings()


def _row(way: str, size: int, *, seconds: float = 0.01, data: str = "4 tensors", share: float = 0.2) -> Measured:
    ours = way in ("exact", "ternary")
    return Measured(data, share, way, ours, 1_000_000, 1.0, size, seconds, seconds, seconds)


def test_goals_are_judged_by_what_was_measured() -> None:
    half, more = _row("exact", 50_000), _row("exact", 50_001)
    other = _row(compressing.YARDSTICK, 100_000)
    assert compressing.goals("lossless", half, [other]) == {"size": True, "encode": True, "decode": False}
    assert not compressing.goals("lossless", more, [other])["size"]
    assert "size" not in compressing.goals("lossless", _row("exact", 1, share=0.9), [])
    for data, size, met in (("i.i.d.", 126_250, True), ("i.i.d.", 126_300, False), ("structured", 125_000, False)):
        assert compressing.goals("ternary", _row("ternary", size, data=data), [])["size"] is met
