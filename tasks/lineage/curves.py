"""Curves against the number of merges, laid out for SVG: no library, a few lines, and text that can be selected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

WIDTH, HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 96, 12, 44


@dataclass(frozen=True)
class Curve:
    """A named curve of shares in [0, 1]; a step without a value is a gap. `style`: its class in the page's CSS."""

    name: str
    style: str
    points: Sequence[tuple[int, float | None]]


@dataclass(frozen=True)
class Mark:
    """A point of a curve, and what it says."""

    x: float
    y: float
    said: str


@dataclass(frozen=True)
class Drawn:
    curve: Curve
    d: str
    marks: Sequence[Mark]
    label_y: float


@dataclass(frozen=True)
class Chart:
    """Pixels of everything. `ticks` of both axes: place and text."""

    curves: Sequence[Drawn]
    across: Sequence[tuple[float, str]]
    up: Sequence[tuple[float, str]]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    bottom: int = HEIGHT - _BOTTOM


def chart(curves: Sequence[Curve], steps: Sequence[tuple[int, str]]) -> Chart:
    """`steps`: the number of a step, and what it is called."""
    numbers = [number for number, _ in steps]
    first, last = min(numbers), max(numbers)

    def across(step: int) -> float:
        return round(_LEFT + 10 + (WIDTH - _LEFT - _RIGHT - 20) * (step - first) / max(last - first, 1), 1)

    def up(share: float) -> float:
        return round(HEIGHT - _BOTTOM - (HEIGHT - _BOTTOM - _TOP) * share, 1)

    drawn: list[tuple[Curve, str, list[Mark]]] = []
    for curve in curves:
        marks = [
            Mark(across(step), up(value), f"{curve.name} after {step}: {100 * value:.1f} %")
            for step, value in curve.points
            if value is not None
        ]
        if marks:
            drawn.append((curve, "M" + "L".join(f"{one.x} {one.y}" for one in marks), marks))
    labels = _apart([marks[-1].y for _, _, marks in drawn])
    every = -(-len(steps) // 8)  # so that names do not run into each other
    return Chart(
        [Drawn(curve, d, marks, y) for (curve, d, marks), y in zip(drawn, labels, strict=True)],
        [(across(number), name) for place, (number, name) in enumerate(steps) if place % every == 0],
        [(up(share / 100), f"{share}") for share in (0, 25, 50, 75, 100)],
    )


def _apart(wanted: Sequence[float], least: float = 15.0) -> list[float]:
    """Heights as wanted, moved so far that labels do not cover each other."""
    order = sorted(range(len(wanted)), key=lambda place: wanted[place])
    found = list(wanted)
    for one, other in pairwise(order):
        found[other] = max(found[other], found[one] + least)
    over = max(0.0, max(found, default=0.0) - (HEIGHT - _BOTTOM))
    for place in reversed(order):
        found[place] -= over if found[place] + 1e-9 >= HEIGHT - _BOTTOM - len(order) * least else 0.0
    return found
