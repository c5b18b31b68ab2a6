"""Every codec writes a chain's updates by one setting, and the chain says what that cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from configs.chain import LineConfig, load_chain
from flows.chain import Outcome, chain
from flows.workplace import here
from tasks.codecs import CODECS, AnyCodec, Auto, Dense, Exact, Ternary
from tasks.mergers import Average
from tasks.tensors import read_delta, read_tensor

pytestmark = pytest.mark.usefixtures("prefect_server")


def run(codec: AnyCodec, line: str) -> Outcome:
    """Two tasks, one of them tuned with LoRA, by this codec into this line."""
    config = load_chain("smoke")
    return chain(replace(config, tasks=config.tasks[:2], codec=codec, lines=(LineConfig(line, Average()),)))


@pytest.mark.slow
@pytest.mark.usefixtures("home")
def test_every_codec_by_one_setting() -> None:
    store = here().store
    plain = run(Dense(), "dense")
    for name, codec in CODECS.items():
        outcome = run(codec(), name.replace("_", "-"))
        assert len(outcome.lines[0].steps) == 2, name
        for one, before in zip(outcome.prepared, plain.prepared, strict=True):
            small, dense = store.open(one.update), store.open(before.update)
            assert small.manifest.facts["file_bytes"] <= 1.1 * dense.manifest.facts["file_bytes"], name
            assert small.manifest.lineage.spec["name"] == name
            if name in ("dense", "exact"):
                for record in dense.manifest.tensors:
                    assert torch.equal(read_delta(small, record.name), read_delta(dense, record.name))


@pytest.mark.usefixtures("home")
def test_exact_updates_give_the_tuned_checkpoint_and_the_same_merge() -> None:
    store = here().store
    plain, exact = run(Dense(), "dense"), run(Exact(), "exact")
    one = exact.prepared[0]
    update, tuned = store.open(one.update), store.open(one.tuned)
    for record in update.manifest.tensors:
        assert torch.equal(read_tensor(update, record.name), read_tensor(tuned, record.name))
    models = [store.open(outcome.lines[0].last.model) for outcome in (plain, exact)]
    for name in models[0].names:
        assert torch.equal(*(read_tensor(model, name) for model in models))


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    "codec",
    [
        pytest.param(Ternary(density=0.05, alpha="grid"), marks=pytest.mark.slow),
        Auto(drop=0.02, codecs=(Ternary(density=0.2),)),
    ],
    ids=["grid", "drop"],
)
def test_a_codec_is_chosen_on_examples_of_each_task(codec: AnyCodec) -> None:
    outcome = run(codec, "chosen")
    store = here().store
    settled = [store.open(one.update).manifest.lineage.spec for one in outcome.prepared]
    trials = [trial.spec() for trial in codec.trials()]
    assert all(spec in trials for spec in settled)
    assert run(codec, "chosen").prepared == outcome.prepared
