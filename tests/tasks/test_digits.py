"""The digits: a fixed split, and views that move the pixels of the same scans."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tasks.data import Digits
from tasks.data.digits import VIEWS

torch.set_num_threads(1)


def scans(view: Any, split: Any = "test") -> torch.Tensor:
    return torch.stack([row["pixel_values"][0] for row in Digits(view=view).rows(split)])


def test_digits_split_is_fixed_and_disjoint() -> None:
    train, test = scans("id", "train"), scans("id")
    assert (len(train), len(test)) == (1078, 719)
    assert sorted({row["label"] for row in Digits().rows("test")}) == list(range(10))
    seen = {image.numpy().tobytes() for image in train}
    # scikit-learn's set holds no scan twice, so a shared one would be a leak
    assert not seen & {image.numpy().tobytes() for image in test}
    assert len(seen) == len(train)


@pytest.mark.parametrize("view", ["rot90", "rot180", "transpose", "roll", "permute"])
def test_digits_views_move_every_pixel_of_the_same_scan(view: Any) -> None:
    plain, shown = scans("id").flatten(1), scans(view).flatten(1)
    order = _order(plain, shown)
    assert sorted(order.tolist()) == list(range(64))
    assert order.tolist() != list(range(64))
    assert torch.equal(shown, plain[:, order])


def _order(plain: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
    """Which pixel of `plain` each of `shown` is, over all scans; of those that are alike, the first free."""
    free = list(range(64))
    found = []
    for column in shown.T:
        place = next(n for n in free if torch.equal(plain[:, n], column))
        free.remove(place)
        found.append(place)
    return torch.tensor(found)


def test_digits_invert_and_mixed() -> None:
    assert torch.equal(scans("invert"), -scans("id"))
    assert torch.equal(scans("mixed"), torch.cat([scans(view) for view in VIEWS]))
    labels = [row["label"] for row in Digits().rows("test")]
    assert [row["label"] for row in Digits(view="mixed").rows("test")] == labels * 7


def test_digits_fingerprint_follows_the_split() -> None:
    assert Digits(view="roll").fingerprint() == Digits(view="id").fingerprint()  # the view is in the spec
    assert Digits(seed=1).fingerprint() != Digits().fingerprint()
