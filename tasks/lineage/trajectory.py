"""The trajectory: what a line gained, against what it holds of the base's abilities, as merges come.

The plane of FoMo-in-Flux (Roth et al. 2024), laid out for SVG like the curves (curves.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor
from statistics import fmean

from tasks.evaluate import tradeoff
from tasks.lineage.curves import Mark
from tasks.lineage.nodes import Lineage

SIZE = 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 24, 20, 44


@dataclass(frozen=True)
class Place:
    """Where the base, or a merged model, stands between what was gained and what is held. Shares in [0, 1]."""

    name: str
    gained: float
    held: float
    tradeoff: float | None
    retained: float | None


@dataclass(frozen=True)
class Plane:
    """A way in a plane: its path, and its places with their names."""

    d: str
    marks: Sequence[Mark]
    names: Sequence[str]
    across: Sequence[tuple[float, str]]
    up: Sequence[tuple[float, str]]
    size: int = SIZE
    left: int = _LEFT
    bottom: int = SIZE - _BOTTOM


def trajectory(lineage: Lineage) -> list[Place]:
    """Knowledge gained against what is held of the base's abilities, merge by merge, from the base on."""
    accuracy = lineage.accuracy
    found: list[Place] = []
    if accuracy.able and accuracy.base_average is not None:
        held = fmean(accuracy.able.values())
        found.append(Place("base", accuracy.base_average, held, tradeoff(accuracy.base_average, held), 1.0))
    for row in accuracy.rows:
        if row.average is not None and row.held_out is not None:
            left = row.summary.retained if row.summary else None
            found.append(Place(f"+ {row.merged}", row.average, row.held_out, row.tradeoff, left))
    return found if len(found) > 1 else []


def plane(places: Sequence[Place]) -> Plane:
    """The way through places: across what was gained, up what is held.

    Both axes reach as far as the places do, in tenths, so that what lies close together can be told apart.
    """
    x_least, x_most = _reach([one.gained for one in places])
    y_least, y_most = _reach([one.held for one in places])

    def across(share: float) -> float:
        return round(_LEFT + 12 + (SIZE - _LEFT - _RIGHT - 12) * (share - x_least) / (x_most - x_least), 1)

    def up(share: float) -> float:
        return round(SIZE - _BOTTOM - (SIZE - _BOTTOM - _TOP) * (share - y_least) / (y_most - y_least), 1)

    marks = [
        Mark(
            across(one.gained),
            up(one.held),
            f"{one.name}: {100 * one.gained:.1f} % on the tasks, {100 * one.held:.1f} % on what the base can do",
        )
        for one in places
    ]
    return Plane(
        "M" + "L".join(f"{one.x} {one.y}" for one in marks),
        marks,
        [one.name for one in places],
        [(across(share), f"{100 * share:.0f}") for share in _tenths(x_least, x_most)],
        [(up(share), f"{100 * share:.0f}") for share in _tenths(y_least, y_most)],
    )


def _reach(shares: Sequence[float]) -> tuple[float, float]:
    least, most = floor(10 * min(shares)) / 10, ceil(10 * max(shares)) / 10
    return (least, most) if most > least else (least, least + 0.1)


def _tenths(least: float, most: float) -> list[float]:
    """Places of ticks, six at most."""
    count = round(10 * (most - least))
    every = -(-count // 5)
    return [least + tenth / 10 for tenth in range(0, count + 1, every)]
