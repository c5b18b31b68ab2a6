"""The verdict: which codec fits an update, and why, in plain words. Few rules, each with where its number is from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tasks.inspection.costs import CodecCost
from tasks.inspection.findings import OUTSIDE, Group, Inspection

# arXiv 2505.11711, table 6: compared exactly, reinforcement learning changed 12 to 50 % of the weights in bfloat16;
# table 1: supervised fine-tuning changed 85 % and more
SPARSE = 0.5
# the same paper: updates of reinforcement learning have 99.2 to 99.8 % of full rank, and reach all layers
FULL_RANK = 0.95
EVERYWHERE = 0.1  # share of the least changed layer, over that of all
UNTOUCHED = 0.1  # share of the norms, over that of all; "norms are almost never updated"
# half of the smaller side: two factors of so many columns have as many numbers as a square matrix
BROAD = 0.5
# a tenth: the factors of a square matrix have a fifth of its numbers
NARROW = 0.1
# excess kurtosis twice that of Laplace's distribution. At 13.5, a small language model tuned as a whole, alpha = 1
# brought back 7, 18 and 44 % of the gain at densities of 5, 10 and 20 %, the projection 41, 68 and 87 %
HEAVY = 6.0
# the budget of error that `auto` has
ERROR = 0.3
# `exact` comes first where it is this many times smaller than bfloat16 and the update is sparse, or where what is lossy
# and within the budget is not this many times smaller still
WORTH = 2.0


@dataclass(frozen=True)
class Verdict:
    """fits: the codec to begin with; empty if there is nothing to write. lines: why, a sentence or two each."""

    fits: str
    lines: tuple[str, ...]


def verdict(found: Inspection) -> Verdict:
    total = found.total
    if not total.moments.squares and not total.changed:
        return Verdict("", ("nothing changed: all numbers are zero, and every codec writes next to nothing",))
    lines = [*_changes(found), *_directions(found), *_tails(found), *_sizes(found)]
    return Verdict(_fits(found), tuple(lines))


def is_sparse(found: Inspection) -> bool:
    return found.by_bits and not found.lossy and found.total.changed <= SPARSE


def looks_like_rl(found: Inspection) -> bool:
    """Few numbers changed, in every layer, and the matrices are of nearly full rank: the signature in arXiv 2505.11711.

    Without layers, or without ranks, the question is not answered with yes.
    """
    total, layers = found.total, [one for one in found.layers if one.label != OUTSIDE]
    everywhere = bool(layers) and min(one.changed for one in layers) >= EVERYWHERE * total.changed
    return is_sparse(found) and everywhere and (total.rank or 0.0) >= FULL_RANK


def _changes(found: Inspection) -> Iterator[str]:
    total, exact = found.total, _cost(found, "exact")
    share = percent(total.changed)
    if found.lossy:
        yield f"a codec has changed it before: {share} of its numbers are not zero; measured is what is stored"
        return
    if not is_sparse(found):
        yield f"{share} of the numbers changed" + ("" if exact is None else f": to keep every bit takes {_part(exact)}")
        return
    if looks_like_rl(found):
        norms = total.only("norm")
        still = norms.members and norms.changed <= UNTOUCHED * total.changed
        yield (
            f"looks like an update of reinforcement learning: {share} of the numbers changed, in every layer, of "
            f"nearly full rank ({percent(total.rank or 0.0)}){', norms hardly touched' if still else ''}"
        )
    else:
        yield f"{share} of the numbers changed"
    if exact is not None:
        yield f"`exact` keeps every bit in {_part(exact)}"
    elif not found.costs:
        yield "`exact` writes places and steps of what changed, and keeps every bit"


def _directions(found: Inspection) -> Iterator[str]:
    total = found.total
    if _factored(total):
        yield "low-rank factors already: `dense`, `exact` and `low_rank` leave them, the other codecs code the factors"
    elif total.effective is None:
        return
    elif total.effective > BROAD:
        yield (
            f"spread over many directions (effective rank {percent(total.effective)} of the smaller side): `low_rank` "
            "and `skillpack` are the wrong tool"
        )
    elif total.effective <= NARROW:
        yield f"few directions (effective rank {percent(total.effective)} of the smaller side): `low_rank` fits"


def _tails(found: Inspection) -> Iterator[str]:
    kurtosis = found.total.moments.kurtosis
    if found.total.changed > SPARSE and kurtosis is not None and kurtosis > HEAVY:
        yield (
            f"heavy tails (kurtosis {kurtosis:.0f}): `ternary` with alpha=1 loses much; keep alpha=projection, or "
            "let a chain choose it (grid)"
        )


def _sizes(found: Inspection) -> Iterator[str]:
    # with an error of 1 and more, no update at all would be nearer
    lossy = [one for one in found.costs if one.bytes and not one.lossless and 0 < (one.error or 0.0) < 1]
    if not lossy:
        return
    within, least = _within(found), min(lossy, key=lambda one: (one.bytes or 0, one.error or 0.0))
    if within is not None:
        yield f"smallest that loses at most {percent(ERROR)} of the norm: `{within.codec}`, {_brief(within)}"
    if least != within:
        yield f"smallest: `{least.codec}`, {_brief(least)}; an error says little about the task, so evaluate it"


def _fits(found: Inspection) -> str:
    exact, within = _cost(found, "exact"), _within(found)
    if exact is None and is_sparse(found):
        return "exact"
    if exact is not None and (exact.ratio or 0.0) >= WORTH:
        near = within is not None and (exact.bytes or 0) <= WORTH * (within.bytes or 0)
        if is_sparse(found) or near or within is None:
            return "exact"
    if not _factored(found.total) and (found.total.effective or 1.0) <= NARROW:
        return "low_rank"
    return within.codec if within else "auto"


def _factored(total: Group) -> bool:
    return 2 * sum(one.elements for one in total.members if one.factors) > total.elements


def _within(found: Inspection) -> CodecCost | None:
    """The smallest of those that lose something, but little."""
    few = [one for one in found.costs if one.bytes and not one.lossless and (one.error or 0.0) <= ERROR]
    return min(few, key=lambda one: (one.bytes or 0, one.error or 0.0), default=None)


def _cost(found: Inspection, name: str) -> CodecCost | None:
    return next((one for one in found.costs if one.codec == name and one.bytes), None)


def _part(cost: CodecCost) -> str:
    ratio = cost.ratio or 0.0
    if ratio < 1:
        return f"{1 / ratio:.1f} times the bytes of bfloat16" if ratio else "no bytes"
    return f"1/{ratio:.0f} of bfloat16" if ratio >= 10 else f"1/{ratio:.1f} of bfloat16"


def _brief(cost: CodecCost) -> str:
    return f"{cost.ratio or 0.0:.1f} times smaller than bfloat16 with an error of {percent(cost.error or 0.0)}"


def percent(share: float) -> str:
    """A share with the digits that it needs: 99.97 % is not all, and 0.003 % not nothing."""
    if 0 < share < 0.001 or 0.999 < share < 1:
        return f"{100 * share:.2g} %" if share < 0.5 else f"{100 * share:.2f} %"
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"
