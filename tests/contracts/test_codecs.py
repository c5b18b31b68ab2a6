"""The contract of codecs: what every codec promises. The table drives it, so a new codec is tested when listed.

What decoders promise of parts that are damaged: tests/contracts/test_damaged_parts.py.
"""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from storage.blobs import encode_parts
from storage.errors import Damaged
from tasks.codecs import CODECS, Codec, Leaf, Parts, decode_parts
from tasks.tensors import unprefixed

SHAPES = [(), (0,), (1,), (7,), (1000,), (3, 0), (33, 17), (2, 3, 4, 5)]


# lossless ones: tests/tasks/test_exact.py; `auto` writes nothing by itself: tests/tasks/test_auto.py
WRITERS = {name: codec for name, codec in CODECS.items() if not codec.lossless and codec().alternatives == (codec(),)}
# what is written once is on no grid that a second look would find again: DARE rescales what it keeps, the range of a
# row shrinks with rounding, singular values are computed
DRIFTING = {"dare", "rtn", "low_rank", "skillpack"}
SPREADING = {"low_rank", "skillpack"}  # a product of factors has no zeros and signs of its own
PER_TENSOR = {"rtn", "bitdelta", "dare", "low_rank", "skillpack"}  # scales of rows and matrices, masks by tensor


@pytest.fixture(params=WRITERS.values(), ids=WRITERS.keys())
def codec(request: pytest.FixtureRequest) -> Codec:
    """Every codec of the table, with its defaults."""
    made: Codec = request.param()
    return made


def through_file(codec: Codec, delta: Tensor, facts: object = None) -> Tensor:
    """Encoded, written as a file, read, and decoded from the parts and the shape alone."""
    known = codec.survey(lambda: [delta]) if facts is None else facts
    coded = codec.encode(Leaf("layers.0.weight", "linear.weight", delta), known)  # type: ignore[arg-type]
    parts = safetensors.torch.load(encode_parts(coded.parts))
    if coded.rank is None:
        decoded = decode_parts(coded.codec, parts, tuple(delta.shape)).float()
    else:
        rows, columns = delta.shape
        left = decode_parts(coded.codec, unprefixed(parts, "B"), (rows, coded.rank)).float()
        decoded = left @ decode_parts(coded.codec, unprefixed(parts, "A"), (coded.rank, columns)).float()
    assert decoded.shape == delta.shape
    return decoded


def written(codec: Codec, delta: Tensor) -> Parts:
    return codec.encode(Leaf("weight", "linear.weight", delta), codec.survey(lambda: [delta])).parts


def drawn(shape: tuple[int, ...], seed: int = 0, zeros: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(shape, generator=generator) > zeros
    return torch.randn(shape, generator=generator) * kept * 1e-3


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_second_round_trip_changes_nothing(codec: Codec, shape: tuple[int, ...]) -> None:
    if codec.name in DRIFTING:
        pytest.skip("see DRIFTING")
    delta = drawn(shape)
    facts = codec.survey(lambda: [delta])
    once = through_file(codec, delta, facts)
    assert torch.equal(through_file(codec, once, facts), once)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_zeros_stay_zeros(codec: Codec, shape: tuple[int, ...]) -> None:
    delta = drawn(shape)
    assert codec.name in SPREADING or not through_file(codec, delta)[delta == 0].any()
    nothing = torch.zeros(shape)
    assert torch.equal(through_file(codec, nothing), nothing)


def test_an_update_of_zeros_costs_a_header_only(codec: Codec) -> None:
    nothing = torch.zeros(1000, 100)
    assert len(encode_parts(written(codec, nothing))) < 100


def test_signs_are_never_flipped(codec: Codec) -> None:
    delta = drawn((64, 64))
    assert codec.name in SPREADING or (through_file(codec, delta) * delta >= 0).all()
    assert through_file(codec, delta).any()


def test_equal_updates_give_equal_bytes(codec: Codec) -> None:
    first, second = (encode_parts(written(codec, delta)) for delta in (drawn((33, 17)), drawn((33, 17))))
    assert first == second


@pytest.mark.parametrize(
    "view",
    [lambda x: x.T, lambda x: x[::2, 1::3], lambda x: x[:, 5], lambda x: x[:1].expand(5, 17)],
    ids=["transposed", "strided", "column", "expanded"],
)
def test_memory_layout_does_not_matter(codec: Codec, view) -> None:  # type: ignore[no-untyped-def]
    delta = view(drawn((33, 17)))
    copy = delta.clone(memory_format=torch.contiguous_format)
    assert not delta.is_contiguous() and copy.is_contiguous()
    assert torch.equal(through_file(codec, delta), through_file(codec, copy))


def test_the_survey_sees_the_whole_update(codec: Codec) -> None:
    """However an update is cut into tensors, each entry is coded the same."""
    if codec.name in PER_TENSOR:
        pytest.skip("see PER_TENSOR")
    whole = drawn((40, 25))
    pieces = [whole[:3], whole[3:4], whole[4:]]
    facts = codec.survey(lambda: pieces)
    assert torch.equal(torch.cat([through_file(codec, piece, facts) for piece in pieces]), through_file(codec, whole))


def test_input_is_left_alone(codec: Codec) -> None:
    delta = drawn((33, 17))
    through_file(codec, delta)
    assert torch.equal(delta, drawn((33, 17)))


# 2**50 is far above any update, and scales of a few times that still fit into float32
ELEMENTS = st.sampled_from([0.0, -0.0, 1e-3, -1e-3, 2e-3, 1.4e-45, -1e-40]) | st.floats(-(2**50), 2**50, width=32)
SHAPE = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=12)


@pytest.mark.parametrize("name", WRITERS)
def test_any_floats(name: str) -> None:
    """Ties, many zeros and denormals included: idempotent, zeros and signs kept, everything finite."""
    codec: Codec = CODECS[name]()

    @settings(max_examples=150, deadline=None)
    @given(arrays.arrays(np.float32, SHAPE, elements=ELEMENTS, fill=st.just(0.0)))
    def holds(array: np.ndarray) -> None:
        delta = torch.from_numpy(array)
        facts = codec.survey(lambda: [delta])
        once = through_file(codec, delta, facts)
        assert torch.isfinite(once).all()
        if name not in SPREADING:
            assert not once[delta == 0].any()
            assert (once.sign() * delta.sign() >= 0).all()
        if name not in DRIFTING:
            assert torch.equal(through_file(codec, once, facts), once)

    holds()


def test_other_shapes_are_refused_or_make_no_difference(codec: Codec) -> None:
    delta = drawn((6, 4))
    coded = codec.encode(Leaf("weight", "linear.weight", delta), codec.survey(lambda: [delta]))
    if coded.rank is not None:
        return  # factors have the shapes that the record says
    for shape in [(24,), (4, 6), (2, 3, 4)]:
        assert prod(shape) == delta.numel()
        found = decode_parts(coded.codec, coded.parts, shape)
        assert torch.equal(found, decode_parts(coded.codec, coded.parts, (6, 4)).reshape(shape))
    for shape in [(25,), (5, 4), ()]:
        with pytest.raises(Damaged):
            decode_parts(coded.codec, coded.parts, shape)


def test_an_unknown_codec_is_named() -> None:
    with pytest.raises(Damaged, match="morse@3"):
        decode_parts("morse@3", {}, (1,))
