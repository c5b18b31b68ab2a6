"""The grid of a comparison: which mergers, codecs, orders and seeds the updates of a chain are tried with."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import factorial

from configs.chain import ChainConfig, Task
from configs.codec_words import codec_from_words
from configs.recipe_words import recipe_from_words
from storage.errors import InvalidInput
from tasks.codecs import AnyCodec
from tasks.mergers import Joint
from tasks.recipe import Recipe
from tasks.tuners import AnyTuner

_SEED = 20240607  # of the orders that are drawn


@dataclass(frozen=True)
class Grid:
    """`mergers` and `codecs` under the words that named them. `orders`: tuples of places in the chain's tasks."""

    chain: ChainConfig
    mergers: dict[str, Recipe]
    codecs: dict[str, AnyCodec]
    orders: tuple[tuple[int, ...], ...]
    seeds: tuple[int, ...]

    def tuner_of(self, task: Task, seed: int) -> AnyTuner:
        tuner = self.chain.tuner_of(task)
        return replace(tuner, seed=tuner.seed + seed)

    @property
    def cells(self) -> int:
        return len(self.mergers) * len(self.codecs) * len(self.orders) * len(self.seeds)


def grid_of(chain: ChainConfig, mergers: Sequence[str], codecs: Sequence[str], orders: int, seeds: int) -> Grid:
    """The grid that these words ask for, `ties density=0.1`; none are those of the chain itself.

    The first order is the chain's; the others are drawn, always the same ones. InvalidInput for what cannot be.
    """
    if chain.start != "base":
        raise InvalidInput(
            f"chain {chain.name!r} trains from the head of its line, so that its updates depend on how they are merged",
            remedy="Compare a chain with start: base",
        )
    several = next((task.name for task in chain.tasks if task.rounds > 1), None)
    if several:
        raise InvalidInput(f"task {several!r} has several rounds, which depend on how they are merged")
    recipes = {one: _recipe(one) for one in mergers} or {line.name: line.recipe for line in chain.lines}
    for name, recipe in recipes.items():
        limit = recipe.merger.limit if isinstance(recipe.merger, Joint) else None
        if limit is not None and limit < len(chain.tasks):
            raise InvalidInput(f"merger {name!r} merges {limit} updates, and the chain has {len(chain.tasks)}")
    written = {one: _codec(one) for one in codecs} or {chain.codec.name: chain.codec}
    return Grid(chain, recipes, written, _orders(len(chain.tasks), orders), tuple(range(seeds)))


def _recipe(words: str) -> Recipe:
    name, *settings = words.split() or [""]
    return recipe_from_words(name, settings=settings)


def _codec(words: str) -> AnyCodec:
    name, *settings = words.split() or [""]
    return codec_from_words(name, settings)


def _orders(tasks: int, wanted: int) -> tuple[tuple[int, ...], ...]:
    """The order as it is, and others that all differ; fewer where there are no more."""
    found = [tuple(range(tasks))]
    draw = random.Random(_SEED)
    while len(found) < min(wanted, factorial(min(tasks, 8))):
        other = tuple(draw.sample(range(tasks), tasks))
        if other not in found:
            found.append(other)
    return tuple(found)
