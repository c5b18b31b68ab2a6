"""Benchmark: arithmetic on two ternary updates as planes of bits, beside the same on dense float32 tensors."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from storage import blobs
from tasks.codecs import Leaf, Parts, Ternary
from tasks.packed import dot, planes_of, sign_conflicts, total
from tests.benchmarks.rows import Row, times
from tests.benchmarks.ternary_sizes import update
from tests.benchmarks.usage import in_own_process, used

DENSITY = 0.1
TIMES = 5
# what is timed -> on planes, on dense tensors
WORK: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]] = {
    "dot product": (dot, lambda a, b: float(torch.dot(a, b))),
    "sign conflicts": (sign_conflicts, lambda a, b: int(torch.count_nonzero(a * b < 0))),
    "sum, as a dense tensor": (lambda a, b: total([a, b]), lambda a, b: a + b),
}


def rows(elements: int) -> list[Row]:
    with TemporaryDirectory() as folder:
        found = {}
        for way in ("planes", "dense"):
            target = Path(folder, way)
            in_own_process(__name__, way, str(elements), str(target))
            found[way] = json.loads(target.read_text())
    ours, theirs = found["planes"], found["dense"]
    return [
        Row(
            what, *(f"{one[what] / scale:.{digits}f} {unit}" for one in (ours, theirs)), times(ours[what], theirs[what])
        )
        for what, (scale, digits, unit) in {
            "memory of both": (1e6, 0, "MB"),
            "reading both from files": (1e-3, 0, "ms"),
            **dict.fromkeys(WORK, (1e-3, 1, "ms")),
        }.items()
    ]


def figures(way: str, elements: int) -> dict[str, float]:
    """Seconds of CPU, the best of some; bytes that the two take."""
    files = [_file(elements, number) for number in (0, 1)]
    shape = (elements,)

    def read() -> list[Any]:
        parts = [_parts(data) for data in files]
        return [planes_of(one, shape) if way == "planes" else Ternary.decode(one, shape) for one in parts]

    pair = read()
    found = {"memory of both": float(sum(_size(one) for one in pair)), "reading both from files": _best(read)}
    for what, works in WORK.items():
        work = works[way == "dense"]
        found[what] = _best(lambda work=work: work(*pair))
    return found


def _file(elements: int, number: int) -> bytearray:
    """One of two updates: the same numbers at other places."""
    (delta,) = update("i.i.d.", elements)
    delta = delta.roll(number * (elements // 2))
    codec = Ternary(density=DENSITY)
    return bytearray(blobs.encode_parts(codec.encode(Leaf("w", "bare", delta), codec.survey(lambda: [delta])).parts))


def _parts(data: bytearray) -> Parts:
    return blobs.decode_parts(memoryview(data), what="a file of the benchmark")


def _size(one: Any) -> int:
    return int(one.nbytes if isinstance(one, torch.Tensor) else one.positive.nbytes + one.negative.nbytes)


def _best(work: Callable[[], object]) -> float:
    return min(used(work).cpu for _ in range(TIMES))


if __name__ == "__main__":
    torch.set_num_threads(1)
    Path(sys.argv[3]).write_text(json.dumps(figures(sys.argv[1], int(sys.argv[2]))))
