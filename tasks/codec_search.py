"""Codec search: which of a codec's trials to compress an update with, seen on examples that its task was trained on."""

from __future__ import annotations

from storage.artifacts import ArtifactStore
from storage.manifest import Lineage
from storage.refs import CheckpointRef, ScoresRef, UpdateRef, parse_ref
from storage.tables import write_rows
from tasks.aside import aside
from tasks.checkpoints import load_model
from tasks.codecs import Codec, Trial
from tasks.compress import Inputs, compress_update
from tasks.evaluate import TABLE, NamedSuite
from tasks.materialize import materialize
from tasks.merge import fold_update
from tasks.mergers import TaskArithmetic
from tasks.parallel import Budget, Report
from tasks.recipe import Recipe

SAMPLES = 256  # rows of the training split


def choose_codec(
    update: UpdateRef,
    codec: Codec,
    task: NamedSuite,
    store: ArtifactStore,
    device: str = "cpu",
    *,
    inputs: Inputs | None = None,
    budget: Budget | None = None,
    report: Report = lambda done, total, note: None,
) -> ScoresRef:
    """The score of base plus update for every trial, with the best one's number (from 0) as the fact `trial`.

    The score is the suite's leading one on the first `SAMPLES` rows of the task's training split: no test example has a
    part in the choice. What was tried is not kept. An update that is the difference to what its training started from
    is added to that instead of the base.
    """
    trials = codec.trials()
    source = store.open(update, "update")
    base = CheckpointRef(parse_ref(source.manifest.lineage.inputs["base"], "checkpoint"))
    start = source.manifest.lineage.inputs.get("start")
    onto = None if start is None else CheckpointRef(parse_ref(start, "checkpoint"))
    problem = task.suite.open(store.open(base, "checkpoint"))

    def score(which: UpdateRef, trial: ArtifactStore) -> float:
        state = fold_update(base, None, which, Recipe(TaskArithmetic(scale=1.0)), trial, device, budget=budget)
        model = materialize(base, state, trial, device, onto=onto, budget=budget)
        backbone = load_model(trial.open(model), device)
        return problem.score(backbone, device, lambda done, total: None, "train", SAMPLES)[0].value

    with aside(store) as trial:
        exact = score(update, trial)
    tried, rows = [], []
    for number, one in enumerate(trials, 1):
        with aside(store) as trial:
            small = compress_update(update, one, trial, device, inputs=inputs, budget=budget)
            size = int(trial.open(small).manifest.facts["file_bytes"])
            tried.append(Trial(size, score(small, trial)))
        settings = {key: value for key, value in one.spec().items() if value != codec.spec().get(key)}
        rows.append({"trial": number, "task": task.name, "settings": str(settings), **tried[-1]._asdict()})
        report(number, len(trials), f"score {tried[-1].score:.3f}")
    spec = {"codec": codec.spec(), "samples": SAMPLES, "suite": task.suite.spec(), "data": task.suite.fingerprint()}
    draft = store.draft("scores", Lineage("codec_search", {"base": base, "update": update}, spec))
    draft.add_asset(TABLE, write_rows(rows))
    draft.facts.update({"trial": codec.best(exact, tried), "exact": exact, "tried": [list(one) for one in tried]})
    return ScoresRef(draft.commit())
