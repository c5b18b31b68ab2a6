"""Options: what to write on the command line so that a line merges by another recipe."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

_COMPOSED = ("sparsify", "scaling")  # what a recipe has beside the settings of its merger


def rebuild_options(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The options of `deltaworks line rebuild` that lead from merger `held` to merger `wanted`."""
    options: list[str] = []
    for kind in ("merger", *_COMPOSED):
        old, new = (_choice(spec, kind) for spec in (held, wanted))
        if new.get("name") != old.get("name"):
            options.append(f"--{kind} {new.get('name', 'none')}")
            old = {}
        prefix = "" if kind == "merger" else f"{kind}."
        for key, value in new.items():
            if key not in ("name", "version") and (key not in old or old[key] != value):
                text = value if isinstance(value, str) else json.dumps(value)
                options.append(f"--set {shlex.quote(f'{prefix}{key}={text}')}")
    return " ".join(options)


def _choice(spec: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """The settings of one of a recipe's choices; empty if it has none of the kind."""
    if kind == "merger":
        return {key: value for key, value in spec.items() if key not in _COMPOSED}
    found: Mapping[str, Any] = spec.get(kind) or {}
    return found
