"""Describing: what people read first of a version, on its page in MLflow. Paragraphs in Markdown."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from storage.artifacts import ArtifactStore
from storage.lines import Entry
from storage.refs import ScoresRef, parse_ref
from storage.registry_lines import LineVersion
from tasks.evaluate import Summary, leading
from tasks.gate import Verdict
from tasks.lineage.words import WHERE_FROM
from tasks.sizes import size

_MOVED = 0.0005  # less than a digit that is shown


def describe(
    line: str,
    entries: Sequence[Entry],
    scores: ScoresRef | None,
    summary: Summary | None,
    verdict: Verdict | None,
    left_out: bool,
    before: LineVersion | None,
    store: ArtifactStore,
) -> str:
    """What is in it and how good it is, what its last merge did to the tasks before, what it weighs, and the way back.

    `before`: the version that the last of `entries` was merged onto, if there is one.
    """
    last = entries[-1]
    found = [_reached(entries, summary) + _judged(verdict, left_out, last)]
    if before is not None and scores is not None:
        found += _moved(last.task, scores, before, store)
    there = [one.update for one in entries if one.update and store.has(one.update)]  # the others were pruned
    weigh = sum(store.open(update).manifest.tensor_bytes for update in there)
    found += [f"{_updates(len(entries))} of {size(weigh)} in the store.", WHERE_FROM]
    if not left_out:
        command = shlex.join(["deltaworks", "line", "rollback", line, str(last.step), "--why", "..."])
        found.append(f"Back to it, once there are newer ones: `{command}`.")
    return "\n\n".join(found)


def _reached(entries: Sequence[Entry], summary: Summary | None) -> str:
    merged = " + ".join(entry.task for entry in entries)
    by = f"{merged}, merged one by one with {entries[-1].merger['name']}"
    if summary is None:
        return f"{by}: not evaluated"
    forgot = "" if summary.forgetting is None else f", forgetting {100 * summary.forgetting:.1f} points"
    return f"{by}: average {100 * summary.average:.1f} %, worst task {100 * summary.worst:.1f} %{forgot}"


def _judged(verdict: Verdict | None, left_out: bool, entry: Entry) -> str:
    if verdict is None:
        return ""
    if verdict.passed:
        again = f", and all were merged again: {entry.why}" if entry.action == "rebuild" else ""
        return f". The gate let it through{again}"
    return f". The gate did not let it through{', and it was left out' * left_out}: {'; '.join(verdict.reasons)}"


def _moved(task: str, scores: ScoresRef, before: LineVersion, store: ArtifactStore) -> Iterator[str]:
    """What the tasks of the version before lost and gained, the worst loss first."""
    known = before.tags.get("scores")
    if known is None or not store.has(parse_ref(known)):
        return
    new, old = leading(store.open(scores, "scores")), leading(store.open(parse_ref(known), "scores"))
    points = sorted((new[name] - score, name) for name, score in old.items() if name in new)
    moved = [f"{name} {100 * change:+.1f}".replace("-", "\u2212") for change, name in points if abs(change) >= _MOVED]
    yield f"Since version {before.number}, with {task}: {', '.join(moved) or 'no task moved'}, in points."


def _updates(count: int) -> str:
    return f"{count} updates" if count > 1 else "1 update"
