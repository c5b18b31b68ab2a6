"""Auto: per tensor the fewest bytes within a budget of error, and the rules of its search."""

from __future__ import annotations

import pytest
import torch

from storage.errors import InvalidInput
from storage.refs import UpdateRef
from tasks.codecs import Auto, Codec, Dense, Exact, Ternary, Trial
from tasks.codecs.base import Option
from tasks.codecs.low_rank import LowRank
from tasks.codecs.rtn import Rtn
from tasks.compress import compress_update
from tests.builders import memory_store
from tests.tasks.test_compress import deltas, stored

CODECS: tuple[Codec, ...] = (Ternary(density=0.1), Rtn(bits=2), Rtn(bits=4), Rtn(bits=8))


@pytest.mark.parametrize("error", [0.02, 0.15, 0.3, 0.8])
def test_the_smallest_within_the_budget_stays(error: float) -> None:
    store = memory_store()
    update = stored(store, deltas(), rank=2)
    found = store.open(compress_update(update, Auto(error=error, codecs=CODECS), store))  # type: ignore[arg-type]
    alone = {codec: store.open(compress_update(update, codec, store)) for codec in CODECS}
    for record in found.manifest.tensors:
        options = [one.record(record.name) for one in alone.values()]
        fit = [one for one in options if (one.error or 0.0) <= error] or [min(options, key=lambda one: one.error or 0)]
        assert record.bytes == min(one.bytes for one in fit), record.name
        assert record.error in [one.error for one in fit]


def test_a_smaller_budget_costs_bytes() -> None:
    store = memory_store()
    update = stored(store, deltas())
    sizes = [
        store.open(compress_update(update, Auto(error=error), store)).manifest.facts["file_bytes"]
        for error in (0.9, 0.3, 0.05)
    ]
    assert sizes == sorted(sizes) and len(set(sizes)) == len(sizes)


def test_factors_that_there_are_stay_factors() -> None:
    store = memory_store()
    update = stored(store, {"b": torch.randn(8)}, rank=2)
    auto = Auto(error=1e-9, codecs=(LowRank(), Dense()))
    found = store.open(compress_update(update, auto, store)).record("layers.1.fc1.weight")
    assert found.rank == 2 and found.error == 0 and found.codec == "dense@1"


def test_out_of_reach_the_least_error_stays() -> None:
    assert Auto(error=0.1).pick([Option(10, 0.5), Option(20, 0.2), Option(30, 0.2)]) == 1


def test_a_drop_is_looked_for_and_the_fewest_bytes_within_it_win() -> None:
    codec = Auto(drop=0.01)
    trials = codec.trials()
    assert all(one.drop is None for one in trials) and len({one.error for one in trials}) == len(trials)
    assert codec.best(0.9, [Trial(10, 0.5), Trial(20, 0.895), Trial(30, 0.9)]) == 1
    assert codec.best(0.9, [Trial(10, 0.5), Trial(20, 0.6)]) == 1
    with pytest.raises(InvalidInput, match="drop"):
        compress_update(UpdateRef(stored(store := memory_store(), deltas())), codec, store)


@pytest.mark.parametrize(
    "settings",
    [{"error": 0}, {"drop": -1}, {"codecs": ()}, {"codecs": (Exact(),)}, {"codecs": (Ternary(alpha="grid"),)}],
)
def test_invalid_settings(settings: dict[str, object]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(settings))):
        Auto(**settings)  # type: ignore[arg-type]
