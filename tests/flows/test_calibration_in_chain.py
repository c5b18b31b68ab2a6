"""A chain gives a codec that asks for them its task's examples, and does so once per content."""

from __future__ import annotations

from dataclasses import replace

import pytest

from configs.chain import LineConfig, Task, load_chain
from flows.chain import Outcome, chain
from flows.policy import remembered
from flows.steps import compress
from flows.workplace import here
from storage.refs import UpdateRef
from tasks.codecs import AnyCodec, Auto
from tasks.codecs.rtn import Rtn
from tasks.codecs.skillpack import SkillPack
from tasks.data.digits import Digits
from tasks.mergers import Average

pytestmark = pytest.mark.usefixtures("prefect_server")

PACK = SkillPack(calibration=8)


def run(codec: AnyCodec) -> tuple[Outcome, Task]:
    """One task by this codec."""
    config = load_chain("smoke")
    config = replace(config, tasks=config.tasks[:1], codec=codec, lines=(LineConfig("calibrated", Average()),))
    return chain(config), config.tasks[0]


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    "codec",
    [PACK, Auto(error=0.9, codecs=(PACK, Rtn(bits=8))), Auto(drop=0.5, codecs=(PACK,))],
    ids=lambda one: one.name,
)
def test_a_chain_calibrates_on_the_tasks_examples(codec: AnyCodec) -> None:
    outcome, task = run(codec)
    small = here().store.open(outcome.prepared[0].update)
    facts = small.manifest.facts["calibration"]
    assert facts["rows"] == 8 and facts["task"] == task.name and facts["data"] == task.suite.fingerprint()
    assert any("order" in small.parts(one.name) for one in small.manifest.tensors)
    assert run(codec)[0].prepared == outcome.prepared


@pytest.mark.slow
@pytest.mark.usefixtures("home")
def test_other_examples_are_another_content() -> None:
    outcome, task = run(PACK)
    small = here().store.open(outcome.prepared[0].update)
    update = UpdateRef(small.manifest.lineage.inputs["update"])
    assert remembered(compress, update, PACK, None, task) == outcome.prepared[0].update
    suite = task.suite
    other = replace(task, suite=replace(suite, data=Digits(view="invert", limit=200)))  # type: ignore[type-var]
    assert remembered(compress, update, PACK, None, other) is None
