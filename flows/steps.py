"""The Prefect face of each task: refs and specs in, refs out. No logic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tasks.asking
import tasks.calibrate
import tasks.codec_search
import tasks.compress
import tasks.digits_base
import tasks.evaluate
import tasks.extract
import tasks.fine_tune
import tasks.ingest
import tasks.materialize
import tasks.merge
import tasks.receive
import tasks.register
import tasks.search
from configs.chain import AnyBase, Task
from flows import progress
from flows.policy import always, cached, costs, label, once
from flows.workplace import here
from storage.errors import InvalidInput
from storage.lines import Entry, Fold, Line
from storage.refs import CheckpointRef, ScoresRef, StateRef, UpdateRef
from tasks.codecs import AnyCodec
from tasks.digits_base import DigitsBase
from tasks.evaluate import NamedSuite, Summary
from tasks.extract import Extract
from tasks.gate import Verdict
from tasks.ingest import Checkpoint
from tasks.recipe import Recipe
from tasks.search import Search
from tasks.suites import AnySuite
from tasks.tuners import AnyTuner


def _report() -> Callable[[int, int, str], None]:
    name = label()
    return lambda done, total, note: progress.advanced(name, done, total, note)


@once(version=1)
def ingest(spec: Checkpoint) -> CheckpointRef:
    return tasks.ingest.ingest(spec, here().store)


@once(version=1)
def receive(content: str, reference: str, base: CheckpointRef) -> CheckpointRef:
    """`content` is the digest of the files: what else may come to lie at `reference` is another step."""
    return tasks.receive.receive(content, reference, base, here().store)


@once(version=1, gpu=True)
def train_base(spec: DigitsBase) -> CheckpointRef:
    return tasks.digits_base.train_digits_base(spec, here().store, here().settings.device, _report())


@once(version=1, gpu=True)
def fine_tune(
    base: CheckpointRef, task: str, suite: AnySuite, tuner: AnyTuner, start: CheckpointRef | None = None
) -> CheckpointRef:
    """`start`: the merged model to train from; not given if that is the base, so that it is the same training."""
    place, name = here(), label()
    return tasks.fine_tune.fine_tune(
        base,
        task,
        suite,
        tuner,
        place.store,
        place.settings.device,
        _report(),
        start,
        lambda line: progress.said(name, line),
    )


@once(version=1)
def extract(base: CheckpointRef, tuned: CheckpointRef, spec: Extract, start: CheckpointRef | None = None) -> UpdateRef:
    return tasks.extract.extract_update(base, tuned, spec, here().store, start)


@once(version=1, gpu=True)
def choose_codec(update: UpdateRef, codec: AnyCodec, task: Task) -> ScoresRef:
    place = here()
    device, budget = place.settings.device, place.settings.budget
    with tasks.calibrate.calibrated(update, codec, task, place.store, device, _report()) as seen:
        return tasks.codec_search.choose_codec(
            update, codec, task, place.store, device, inputs=seen.inputs, budget=budget, report=_report()
        )


@once(version=3, gpu=True)
def compress(update: UpdateRef, codec: AnyCodec, tried: ScoresRef | None = None, task: Task | None = None) -> UpdateRef:
    """`task`: where the codec's examples come from; not given if it has none, so that no result depends on it then."""
    place = here()
    device, budget = place.settings.device, place.settings.budget
    settled = codec.trials()[place.store.open(tried).manifest.facts["trial"]] if tried else codec
    with tasks.calibrate.calibrated(update, settled, task, place.store, device, _report()) as seen:
        return tasks.compress.compress_update(
            update,
            settled,
            place.store,
            device,
            inputs=seen.inputs,
            calibration=seen.facts,
            budget=budget,
            report=_report(),
        )


@once(version=2, gpu=True)
def fold(base: CheckpointRef, state: StateRef | None, update: UpdateRef, recipe: Recipe, weight: float) -> StateRef:
    place = here()
    settings = place.settings
    return tasks.merge.fold_update(
        base,
        state,
        update,
        recipe,
        place.store,
        settings.device,
        weight=weight,
        budget=settings.budget,
        report=_report(),
    )


@once(version=1, gpu=True)
def search(base: CheckpointRef, state: StateRef, seen: list[Task], spec: Search) -> ScoresRef:
    place = here()
    settings = place.settings
    return tasks.search.choose_factor(
        base, state, seen, spec, place.store, settings.device, budget=settings.budget, report=_report()
    )


@once(version=2, gpu=True)
def materialize(base: CheckpointRef, state: StateRef, factor: float = 1.0) -> CheckpointRef:
    place = here()
    settings = place.settings
    return tasks.materialize.materialize(
        base, state, place.store, settings.device, factor=factor, budget=settings.budget, report=_report()
    )


@once(version=tasks.asking.VERSION, gpu=True)
def evaluate(model: CheckpointRef, seen: Sequence[NamedSuite], base: CheckpointRef) -> ScoresRef:
    return tasks.evaluate.evaluate(model, seen, here().store, here().settings.device, _report(), base)


@always
def commit(line: str, after: Entry, folded: Fold) -> Entry:
    journal = Line(here().store.objects, line)
    return journal.fold(after, folded.task, folded.update, folded.state, folded.weight, folded.factor)


@always
def commit_rebuild(line: str, after: Entry, recipe: Recipe, folds: list[Fold], why: str) -> Entry:
    return Line(here().store.objects, line).rebuild(after, recipe.spec(), folds, why)


@always
def register(
    experiment: str,
    line: str,
    entries: list[Entry],
    model: CheckpointRef,
    scores: ScoresRef | None = None,
    summary: Summary | None = None,
    verdict: Verdict | None = None,
    left_out: bool = False,
    measured: Sequence[ScoresRef] = (),
    able: Sequence[ScoresRef] = (),
) -> Any:
    place = here()
    version = tasks.register.register(
        experiment,
        line,
        entries,
        model,
        scores,
        summary,
        place.store,
        place.registry,
        verdict,
        left_out,
        measured,
        costs(),
        able,
    )
    return version if version.fresh else cached(version)


def base_step(spec: AnyBase) -> Any:
    """The step that provides a base of this kind."""
    return train_base if isinstance(spec, DigitsBase) else ingest


def head_model(line: str) -> CheckpointRef:
    """The newest merged model of a line. Written again if it is no longer there: same inputs, same ref."""
    head = Line(here().store.objects, line).head()
    if head.state is None:
        raise InvalidInput(f"line {line!r} has no merges yet", remedy="Run the chain that grows it")
    place = here()
    return tasks.materialize.materialize(
        head.base, head.state, place.store, place.settings.device, factor=head.factor, budget=place.settings.budget
    )
