"""Register: one step of a line, as the stages that made it, read from the lineages of its artifacts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from storage.artifacts import Artifact, ArtifactStore
from storage.lines import Entry
from storage.manifest import canonical, digest
from storage.refs import CheckpointRef, ScoresRef, short
from storage.registry import DataInput, ModelVersion, Registry, Stage
from storage.registry_lines import LineVersions
from storage.registry_pyfunc import folder_of
from tasks.checkpoints import HISTORY
from tasks.describing import describe
from tasks.evaluate import Summary, read_scores
from tasks.fine_tune import trained_from
from tasks.gate import Verdict
from tasks.lineage.kept import keep_lineage
from tasks.lineage.versions import ABLE, COST, MEASURED
from tasks.serving import LOADER, PARAMETERS, SETTINGS, rows_of
from tasks.surroundings import surroundings


def register(
    experiment: str,
    line: str,
    entries: Sequence[Entry],
    model: CheckpointRef,
    scores: ScoresRef | None,
    summary: Summary | None,
    store: ArtifactStore,
    registry: Registry,
    verdict: Verdict | None = None,
    left_out: bool = False,
    measured: Sequence[ScoresRef] = (),
    costs: Mapping[str, Mapping[str, Any]] | None = None,
    able: Sequence[ScoresRef] = (),
) -> ModelVersion:
    """Write the last of `entries`, the folds of `line` so far, to the registry: a version with all that made it.

    `model` is the merged checkpoint and `scores` what it reached; `summary` says what that means for the line, and
    `verdict` what its gate says: whether this version is the new champion. `left_out`: the last entry did not enter
    the line. What came without data to evaluate it on has no scores and no summary. `measured`: scores of the models
    beside it, the base, the one that was tuned for the last update, the merged one before it. `able`: of the base and
    of this model on what the base can do. `costs`: ref -> `seconds` and `device`, as far as they are known. The page of
    its lineage is written too, by `tasks/lineage`.
    """
    entry = entries[-1]
    assert entry.update is not None and entry.state is not None
    parent = registry.find(line, step_key(store, line, entries[:-1])) if len(entries) > 1 else None
    tags = {
        "run": f"{line} {entry.step}: {entry.task}",
        "line": line,
        "step": str(entry.step),
        "task": entry.task,
        "base": entry.base,
        "merger": canonical(dict(entry.merger)).decode(),
        "update": entry.update,
        "updates": " ".join(short(one.update) for one in entries if one.update),
        "tasks": " ".join(one.task for one in entries),
        "state": entry.state,
        **({"scores": scores} if scores else {}),
        "store": store.url,
        "parent_version": str(parent) if parent else "none",
        **surroundings(),
    }
    start = _start(store, entry.update)
    if start is not None:
        tags["start"] = start
    if store.open(entry.update, "update").manifest.facts.get("external"):
        tags["external"] = "true"
    if entry.factor != 1:
        tags["factor"] = f"{entry.factor:g}"
    if measured:
        tags[MEASURED] = " ".join(measured)
    if able:
        tags[ABLE] = " ".join(able)
    numbers = {name: value for name, value in (summary.__dict__ if summary else {}).items() if value is not None}
    if verdict is not None:
        numbers |= {f"gate/{name}": value for name, value in verdict.facts.items()}
    stages = [_with_cost(stage, costs or {}) for stage in _stages(store, entry, model, scores)]
    refs = [*(stage.ref for stage in stages), entry.base, *measured, *able]
    told = {ref: costs[ref] for ref in refs if costs and ref in costs}
    if told:
        tags[COST] = canonical(
            {short(ref): [one.get("seconds"), one.get("device")] for ref, one in told.items()}
        ).decode()
    accuracies = {f"accuracy/{name}": value for name, value in stages[-1].metrics.items()} if scores else {}
    step = Stage(line, model, {"merger": dict(entry.merger)}, {**numbers, **accuracies}, tags=tags)
    key = step_key(store, line, entries, left_out)
    before = LineVersions(registry, line).one(str(parent)) if parent else None
    described = describe(line, entries, scores, summary, verdict, left_out, before, store)
    rows = rows_of(store.open(model, "checkpoint"))
    folder = folder_of(model, store.url, LOADER, SETTINGS, PARAMETERS, scores, rows)
    made = registry.register(
        experiment, key, step, stages, store.address(model), described, left_out=left_out, folder=folder
    )
    if verdict is not None:
        with registry.champions(line) as champions:
            champions.judged(made.version, verdict.reasons)
    keep_lineage(made, entries, store, registry)
    return made


def step_key(store: ArtifactStore, line: str, entries: Sequence[Entry], left_out: bool = False) -> str:
    """The content key of a registered step: the line, its store, and the state that was reached, or was left out."""
    entry = entries[-1]
    scaled = [] if entry.factor == 1 else [entry.factor]
    return digest(canonical([store.url, line, entry.number, entry.state, *scaled, *["left out"] * left_out]))


def _start(store: ArtifactStore, update: str) -> str | None:
    """What the training behind an update started from; None if no training is known."""
    tuned = store.open(update, "update").manifest.lineage.inputs.get("tuned")
    lineage = store.open(tuned, "checkpoint").manifest.lineage if tuned else None
    return trained_from(lineage) if lineage else None


def _stages(store: ArtifactStore, entry: Entry, model: CheckpointRef, scores: ScoresRef | None) -> list[Stage]:
    assert entry.update is not None and entry.state is not None
    update = store.open(entry.update, "update")
    inputs = update.manifest.lineage.inputs
    chain = [inputs.get("tuned"), inputs.get("update"), entry.update, entry.state, model]
    stages = [_stage(store.open(ref)) for ref in chain if ref]
    if scores is None:
        return stages
    rows = read_scores(store.open(scores, "scores"))
    metrics = {row.task if row.metric == "accuracy" else f"{row.task}.{row.metric}": row.value for row in rows}
    return [*stages, Stage("evaluate", scores, {"model": model}, metrics)]


def _with_cost(stage: Stage, costs: Mapping[str, Mapping[str, Any]]) -> Stage:
    """A stage with what it took when it was done: numbers of MLflow, because manifests hold no clock."""
    cost = costs.get(stage.ref)
    if cost is None:
        return stage
    device = {"device": str(cost["device"])} if "device" in cost else {}
    seconds = {"seconds": float(cost["seconds"])} if "seconds" in cost else {}
    return replace(stage, metrics={**stage.metrics, **seconds}, tags={**stage.tags, **device})


def _stage(artifact: Artifact) -> Stage:
    """A stage as its artifact tells it: settings and inputs become parameters, numeric facts become metrics."""
    lineage, facts = artifact.manifest.lineage, artifact.manifest.facts
    params: dict[str, Any] = {**{f"input.{role}": ref for role, ref in lineage.inputs.items()}, **lineage.spec}
    numbers = {name: float(value) for name, value in facts.items() if isinstance(value, (int, float))}
    return Stage(lineage.step, artifact.ref, params, numbers, _series(artifact), data=_data(artifact))


def _data(artifact: Artifact) -> DataInput | None:
    """What a tuned checkpoint was trained on, from its lineage."""
    spec, facts = artifact.manifest.lineage.spec, artifact.manifest.facts
    if artifact.manifest.lineage.step != "fine_tune":
        return None
    counts = {name: int(facts[name]) for name in ("examples", "cut") if name in facts}
    return DataInput(str(spec["task"]), spec["data"], spec["suite"]["data"], counts)


def _series(artifact: Artifact) -> Mapping[str, list[tuple[int, float]]]:
    if HISTORY not in artifact.manifest.assets:
        return {}
    points = json.loads(artifact.asset(HISTORY))
    found: dict[str, list[tuple[int, float]]] = {}
    for name, curve in (("loss", "training_loss"), ("validation_loss", "validation_loss")):
        values = [(int(point["step"]), float(point[name])) for point in points if name in point]
        found |= {curve: values} if values else {}
    return found
