"""A chain goes on over a pruned store: nothing is trained again, and the refs are those of a store left alone."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from flows import progress
from flows.chain import chain
from flows.plan import plan_rebuild
from flows.rebuild import rebuild
from flows.words import registered
from flows.workplace import here
from storage.lines import Line
from storage.refs import StateRef
from storage.roots import read_journals
from storage.sweep import GRACE, Swept, Wishes, sweep
from storage.verify import verify
from tests.flows.test_chain import Count
from tests.flows.test_rebuild import OPCM, config, directly

pytestmark = pytest.mark.usefixtures("prefect_server")


def prune(registered_too: bool) -> Swept:
    place = here()
    kept = registered(place) if registered_too else frozenset()
    return sweep(place.store, Wishes(states=False, registered=kept), now=time.time() + GRACE + 60)


def states(name: str = "smoke-opcm") -> list[StateRef | None]:
    return [entry.state for entry in Line(here().store.objects, name).history()]


def test_a_chain_goes_on_over_a_pruned_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAWORKS_HOME", str(tmp_path / "undisturbed"))
    twin = chain(config("rot90", "invert", "permute"))
    expected = states()

    monkeypatch.setenv("DELTAWORKS_HOME", str(tmp_path / "home"))
    chain(config("rot90", "invert"))
    store = here().store
    held = set(store.refs())
    assert prune(registered_too=True).objects == 0  # all that a chain makes is wanted as long as it is registered
    assert set(store.refs()) == held

    assert prune(registered_too=False).objects > 0
    assert set(store.refs("state")) == {states()[-1]}
    count = Count()
    progress.watch(count)
    try:
        grown = chain(config("rot90", "invert", "permute"))
    finally:
        progress.watch(progress.Log())
    assert not {"fine-tune rot90", "fine-tune invert", "extract rot90", "compress invert"} & set(count.labels)
    assert states() == expected
    assert [step.model for step in grown.lines[0].steps] == [step.model for step in twin.lines[0].steps]
    assert verify(store, store.refs(), journals=read_journals(store.objects).lines).findings == ()

    prune(registered_too=False)
    line = Line(store.objects, "smoke-opcm")
    wanted = plan_rebuild(line, line.head(), OPCM, store, drop=["invert"])
    entry = rebuild(wanted)
    monkeypatch.setenv("DELTAWORKS_HOME", str(tmp_path / "undisturbed"))
    assert [one.state for one in entry.folds] == directly(wanted.folds, OPCM)
