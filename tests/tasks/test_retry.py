"""Other recipes: what they leave as it is, which a line can come to, and which cannot merge what it has."""

from __future__ import annotations

import pytest

from storage.errors import InvalidInput
from tasks.mergers import Opcm, Slerp, Ties, TsvM
from tasks.recipe import Recipe
from tasks.retry import Nothing, OtherRecipe, reachable, unfit
from tasks.scalings import Lines, MatchNorm
from tasks.sparsifiers import Dare

LINE = Recipe(Ties(density=0.3), Dare(density=0.5), MatchNorm())


def test_what_is_not_named_stays_as_the_line_has_it() -> None:
    assert OtherRecipe(TsvM()).instead_of(LINE) == Recipe(TsvM(), Dare(density=0.5), MatchNorm())
    assert OtherRecipe(scaling=Lines()).instead_of(LINE) == Recipe(Ties(density=0.3), Dare(density=0.5), Lines())
    assert OtherRecipe(Opcm(), Nothing(), Nothing()).instead_of(LINE) == Recipe(Opcm())
    with pytest.raises(InvalidInput, match="names nothing"):
        OtherRecipe()


def test_a_line_can_come_to_every_combination_that_is_listed() -> None:
    """Each starts from what the line has by then."""
    first = Recipe(Ties())
    found = reachable(
        first, (0.5, OtherRecipe(TsvM()), OtherRecipe(scaling=Lines()), OtherRecipe(TsvM(), None, Lines()))
    )
    assert found[0] == first
    assert set(found) == {Recipe(merger, None, scaling) for merger in (Ties(), TsvM()) for scaling in (None, Lines())}
    assert len(found) == 4
    assert reachable(first, (0.5, OtherRecipe(Ties()))) == [first]


def test_what_cannot_merge_them_is_known_beforehand() -> None:
    assert unfit(Recipe(Ties()), [1.0, 2.0, 3.0]) == ""
    assert unfit(Recipe(Opcm()), [1.0] * 9) == ""
    assert unfit(Recipe(Opcm()), [1.0, 2.0]) == "merger 'opcm' lets every update count the same"
    assert unfit(Recipe(Slerp()), [1.0] * 2) == ""
    assert unfit(Recipe(Slerp()), [1.0] * 3) == "merger 'slerp' merges 2 updates"
