"""Model cards: the README.md of an exported folder, in the form of the Hugging Face hub, so that other tools see what a
model was made of: `base_model`, `base_model_relation: merge` and the scores as `model-index`.

A card says what the store knows: the journals of lines, the lineages of artifacts, and the scores of this very model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from storage.artifacts import ArtifactStore
from storage.index import Row
from storage.lines import Entry, history_of
from storage.refs import CheckpointRef, Ref, UpdateRef, short
from storage.roots import LineJournal
from tasks.checkpoints import CONFIG

_HUB_ID = re.compile(r"[\w\-.]+/[\w\-.]+")
_CLASSIFIES = {"image_classification": "image-classification", "text_classification": "text-classification"}
_ASKS = {"text_embedding": "sentence-similarity", "causal_lm": "text-generation", "multiple_choice": "multiple-choice"}
_TASK_TYPES = {**_CLASSIFIES, **_ASKS, "lm_eval": "text-generation"}  # the hub's words for what a suite asks
_SPECIAL = re.compile(r"([\\`*{}\[\]<>#|!&~])")  # of Markdown and HTML


@dataclass(frozen=True)
class Known:
    """What cards are written from: the rows of all artifacts (storage/index.py) and the journals of all lines.

    `base_model`: the base's name on the hub, if somebody said it.
    """

    rows: Mapping[Ref, Row]
    lines: Sequence[LineJournal]
    base_model: str | None = None


@dataclass(frozen=True)
class _Merge:
    """Where a model stands in a line: its entry, and the folds up to it."""

    line: str
    entry: Entry
    history: Sequence[Entry]


def card_of_model(model: CheckpointRef, store: ArtifactStore, known: Known) -> str:
    """The card of a checkpoint: a merged one with its updates, recipe and scores, any other with its scores."""
    merge = _merge_of(model, store, known.lines)
    title = f"{merge.line}, {_steps(merge)}" if merge else short(model)
    scores = list(_scores_of(model, known.rows))
    base = merge.entry.base if merge else model
    tags = ["deltaworks", *(["merge", str(merge.entry.merger["name"])] if merge else [])]
    head = _metadata(title, tags, _base_model(base, store, known), scores, merge=merge is not None)
    body = [f"# {_plain(title)}", ""]
    body += _merged(merge, known.rows) if merge else ["A checkpoint from a Deltaworks store.", ""]
    body += _score_table(scores)
    body += ["## Names", "", *_names({"model": model, **({"base": base, **_state(merge)} if merge else {})}), ""]
    if merge:
        body += _way_back(merge)
    return f"---\n{head}\n---\n\n" + "\n".join(body).rstrip() + "\n"


def card_of_update(update: UpdateRef, base: Ref, store: ArtifactStore, known: Known, form: str) -> str:
    """The card of what was exported of one update. `form`: `checkpoint`, `lora`, `patch` or `delta`."""
    row: Row = known.rows.get(update, {})
    tuned = _tuned(row, known.rows)
    task = row.get("task") or (tuned and known.rows.get(tuned, {}).get("spec", {}).get("task")) or short(update)
    relation = "adapter" if form == "lora" else "finetune"
    library = "peft" if form == "lora" else "transformers"
    named = _base_model(base, store, known)
    scores = list(_scores_of(tuned, known.rows)) if tuned else []
    head = _metadata(str(task), ["deltaworks", form], named, [], relation=relation, library=library)
    what = {
        "checkpoint": "The base with one update added, as a whole model.",
        "lora": "One update as an adapter for peft; what its rank left out is in `deltaworks.json`.",
        "patch": "One update as positions and new values.",
        "delta": "One update, tuned minus base, as dense tensors.",
    }[form]
    body = [f"# {_plain(str(task))}", "", what, "", *_names({"update": update, "base": base})]
    body += [*_names({"tuned": tuned} if tuned else {}), ""]
    body += [f"Stored as {_plain(str(row['codecs']))}.", ""] if row.get("codecs") else []
    body += _score_table(scores, "Scores of the tuned model itself") if scores else []
    return f"---\n{head}\n---\n\n" + "\n".join(body).rstrip() + "\n"


def _merge_of(model: CheckpointRef, store: ArtifactStore, lines: Sequence[LineJournal]) -> _Merge | None:
    """The newest entry of any line whose written model this is."""
    lineage = store.open(model, "checkpoint").manifest.lineage
    state, factor = lineage.inputs.get("state"), float(lineage.spec.get("factor", 1.0))
    for line in lines:
        for at in range(len(line.entries) - 1, 0, -1):
            entry = line.entries[at]
            if entry.state == state and entry.factor == factor and entry.base == lineage.inputs.get("base"):
                return _Merge(line.name, entry, history_of(line.entries[: at + 1], line.name))
    return None


def _scores_of(model: Ref, rows: Mapping[Ref, Row]) -> Iterator[dict[str, Any]]:
    """Every score that was taken of this model, each task and metric once; `suite` and `data` are what was asked."""
    seen = set()
    for row in rows.values():
        if row["kind"] != "scores" or row["step"] != "evaluate" or row["inputs"].get("model") != model:
            continue
        asked = row["spec"].get("tasks", {})
        for score in row["scores"]:
            key = (score["task"], score["metric"])
            if score["value"] is not None and key not in seen:
                seen.add(key)
                suite = asked.get(score["task"], {}).get("suite", {})
                yield {**score, "suite": suite.get("name", ""), "data": suite.get("data", {})}


def _tuned(row: Row, rows: Mapping[Ref, Row]) -> Ref | None:
    """What an update was extracted from; of a compressed one, what the update before it was."""
    inputs = row.get("inputs", {})
    found = inputs.get("tuned") or rows.get(Ref(inputs.get("update", "")), {}).get("inputs", {}).get("tuned")
    return Ref(found) if found else None


def _base_model(base: Ref, store: ArtifactStore, known: Known) -> str | None:
    """The base's name on the hub: as somebody said, or as its own config.json remembers it."""
    if known.base_model or not store.has(base):
        return known.base_model
    artifact = store.open(base, "checkpoint")
    name = json.loads(artifact.asset(CONFIG)).get("_name_or_path") if CONFIG in artifact.manifest.assets else None
    return name if isinstance(name, str) and _HUB_ID.fullmatch(name) else None


def _metadata(
    name: str,
    tags: list[str],
    base_model: str | None,
    scores: Sequence[Mapping[str, Any]],
    *,
    merge: bool = False,
    relation: str | None = None,
    library: str = "transformers",
) -> str:
    """The block between the `---` lines, as YAML."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type=_TASK_TYPES.get(score["suite"], "other"),
            dataset_type=str(score["data"].get("name", score["task"])),
            dataset_name=str(score["task"]),
            dataset_config=str(score["task"]),  # by which the hub tells the tasks apart
            metric_type=str(score["metric"]),
            metric_value=float(score["value"]),
        )
        for score in scores
    ]
    relation = "merge" if merge else relation
    more = {"base_model_relation": relation} if relation and base_model else {}
    found = ModelCardData(
        base_model=base_model,
        library_name=library,
        tags=tags,
        model_name=name if results else None,
        eval_results=results or None,
        **more,
    )
    return str(found.to_yaml(line_break="\n")).strip()


def _merged(merge: _Merge, rows: Mapping[Ref, Row]) -> list[str]:
    recipe = dict(merge.entry.merger)
    name = recipe.pop("name")
    settings = ", ".join(f"{key} {value}" for key, value in recipe.items() if key != "version")
    count = len(merge.history)
    said = [f"{count} {'updates' if count > 1 else 'update'} of one base, merged by `{name}`", ""]
    if settings:
        said[0] += f" ({_plain(settings)})"
    said[0] += "."
    if merge.entry.factor != 1:
        said[0] += f" The merged delta is written {merge.entry.factor:g} times."
    said += ["## Updates", "", "| step | task | weight | update | stored as |", "|---:|---|---:|---|---|"]
    for number, entry in enumerate(merge.history, 1):
        codecs = rows.get(Ref(entry.update or ""), {}).get("codecs", "")
        task, ref = _plain(entry.task), short(entry.update or "")
        said.append(f"| {number} | {task} | {entry.weight:g} | `{ref}` | {_plain(str(codecs))} |")
    return [*said, ""]


def _score_table(scores: Sequence[Mapping[str, Any]], title: str = "Scores") -> list[str]:
    if not scores:
        return [f"## {title}", "", "None are stored.", ""]
    said = [f"## {title}", "", "| task | metric | value | 95 % interval | samples |", "|---|---|---:|---|---:|"]
    for one in scores:
        known = one["low"] is not None and one["high"] is not None
        interval = f"{one['low']:.4f} to {one['high']:.4f}" if known else ""
        cells = [_plain(str(one["task"])), _plain(str(one["metric"])), f"{one['value']:.4f}", interval]
        said.append(f"| {' | '.join(cells)} | {one['samples'] or ''} |")
    return [*said, ""]


def _names(refs: Mapping[str, Ref]) -> list[str]:
    return [f"- {what}: `{ref}`" for what, ref in refs.items()]


def _state(merge: _Merge) -> dict[str, Ref]:
    return {"state": merge.entry.state} if merge.entry.state else {}


def _way_back(merge: _Merge) -> list[str]:
    line, before = merge.line, merge.entry.number - 1
    commands = {
        f"deltaworks line show {line}": "what is in it now",
        f"deltaworks line rollback {line} --entry {before} --why ...": "back to what it was before this merge",
        f"deltaworks line rebuild {line} --drop TASK": "merged again, without one of its updates",
    }
    return [
        "## Again, and back",
        "",
        "Where the store is (`DELTAWORKS_STORE`):",
        "",
        "```",
        *(f"{command:<60} # {why}" for command, why in commands.items()),
        "```",
        "",
    ]


def _steps(merge: _Merge) -> str:
    return f"entry {merge.entry.number}"


def _plain(text: str) -> str:
    """Text that people wrote, as one line that no Markdown or HTML is read in."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))
