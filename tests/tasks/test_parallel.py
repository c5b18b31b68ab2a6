"""Work on many tensors at once: in order, within the budget, and with errors that come through."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import InvalidInput
from tasks.parallel import Budget, in_order, parse_bytes


def naps(count: int) -> list[float]:
    return [0.001 * (count - number) for number in range(count)]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_order(workers: int) -> None:
    """Even when the later ones are ready first."""

    def work(nap: float) -> float:
        time.sleep(nap)
        return nap

    assert list(in_order(naps(20), work, lambda _: 1, Budget(workers))) == naps(20)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 120), max_size=30), st.integers(2, 4))
def test_what_is_in_work_fits_the_memory(costs: list[int], workers: int) -> None:
    """All together at most 100, or one alone."""
    lock, inside, seen = threading.Lock(), [], []

    def work(cost: int) -> None:
        with lock:
            inside.append(cost)
            seen.append(tuple(inside))
        time.sleep(0.0005)
        with lock:
            inside.remove(cost)

    list(in_order(costs, work, float, Budget(workers, memory=100)))
    assert len(seen) == len(costs)
    assert all(sum(group) <= 100 or len(group) == 1 for group in seen)
    assert all(len(group) <= workers for group in seen)


def test_workers_work_at_the_same_time() -> None:
    meeting = threading.Barrier(2, timeout=10)
    assert list(in_order([1, 2], lambda _: meeting.wait() >= 0, lambda _: 1, Budget(2))) == [True, True]


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_error_comes_through_and_ends_the_work(workers: int) -> None:
    started = []

    def work(number: int) -> int:
        started.append(number)
        if number >= 3:
            raise ValueError(f"tensor {number}")
        return number

    results: list[int] = []
    with pytest.raises(ValueError, match="tensor 3"):
        results.extend(in_order(list(range(1000)), work, lambda _: 1, Budget(workers)))
    assert results == [0, 1, 2]
    assert len(started) < 50


def test_progress_counts_every_item() -> None:
    said: list[tuple[int, int]] = []
    list(in_order(list(range(7)), lambda n: n, lambda _: 1, Budget(3), lambda done, of, _: said.append((done, of))))
    assert said == [(done, 7) for done in range(1, 8)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4GiB", 4 * 2**30),
        ("500 MB", 500 * 10**6),
        ("1.5gib", 3 * 2**29),
        ("123", 123),
        ("10 KiB", 10240),
        ("7B", 7),
        ("2TiB", 2**41),
    ],
)
def test_amounts_of_memory(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "much", "4 GiBs", "-1GiB", "0", "GiB", "4PiB"])
def test_amounts_that_are_none(text: str) -> None:
    with pytest.raises(InvalidInput, match="memory"):
        parse_bytes(text)
