"""Words and numbers of a lineage, as people read them: in the picture, the page and the terminal alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tasks.lineage.nodes import Kind, Node
from tasks.sizes import size

# of a version's first words, on MLflow's page; the page of its lineage leaves it out
WHERE_FROM = "Where all of it came from: `lineage.html` among the artifacts of the source run."

NAMES: Mapping[Kind, str] = {
    "base": "base",
    "data": "data",
    "tuned": "fine-tuned",
    "update": "update",
    "compressed": "compressed",
    "state": "merge state",
    "model": "merged model",
}
# what each kind of node shows in the picture, the first two that it has
_SHOWN: Mapping[Kind, tuple[str, ...]] = {
    "base": ("average", "parameters", "bytes"),
    "data": ("view", "train", "examples", "fingerprint"),
    "tuned": ("score", "tuner", "bytes"),
    "update": ("norm", "bytes"),
    "compressed": ("codec", "bytes", "ratio"),
    "state": ("merger", "bytes"),
    "model": ("average", "forgetting", "bytes"),
}
_SHARES = ("average", "worst", "score", "density", "error", "held out", "trade-off")
_LABELS = {
    "error": "worst error of a tensor",
    "average": "average score",
    "worst": "worst task",
    "held out": "on what the base can do",
    "bytes": "size",
    "seconds": "took",
    "evaluation seconds": "evaluation took",
    "ratio": "smaller than bfloat16",
}


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def figure(name: str, value: Any) -> str:
    """One key figure with its unit."""
    if name in ("forgetting", "forward transfer"):
        return f"{100 * value:.1f} points"
    if name in _SHARES:
        return f"{100 * value:.1f} %"
    if name == "bytes":
        return size(value)
    if name.endswith("seconds"):
        return duration(value)
    if name == "ratio":
        return f"{value:.1f} ×"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def label(name: str) -> str:
    return _LABELS.get(name, name)


def figures(node: Node) -> list[tuple[str, str]]:
    """All figures of a node: what it is called, and how much."""
    return [(label(name), figure(name, value)) for name, value in node.figures.items()]


def shown(node: Node) -> list[str]:
    """The two lines under a node's title in the picture."""
    if not node.stored and node.ref:
        return ["pruned"]
    words = {
        "forgetting": "forgot {}",
        "norm": "norm {}",
        "examples": "{} examples",
        "average": "average {}",
        "parameters": "{} numbers",
    }
    found = [name for name in _SHOWN[node.kind] if name in node.figures]
    if node.kind == "base" and "average" in node.figures:
        found = ["average", "parameters"]
    if node.kind == "data" and "fingerprint" in found:
        words["fingerprint"] = "{}…"
    if node.kind == "compressed":
        words["codec"] = f"{{}} {node.figures['density']:g}" if "density" in node.figures else "{}"
    return [words.get(name, "{}").format(figure(name, node.figures[name])) for name in found[:2]]


def cut(text: str, length: int) -> str:
    """A text that fits, with an ellipsis where something is missing."""
    return text if len(text) <= length else f"{text[: length - 1]}…"
