"""What ways of writing tensors cost: bytes, speed on one core, and memory, each case in processes of its own.

A case runs twice: once for speed, as any process is, and once for memory, where freed memory is given back at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from tests.benchmarks.usage import in_own_process, used

TIMES = 3


class Way(NamedTuple):
    """One way to write the tensors of a case, addressed by their number.

    encode: number -> bytes; decode: bytes, number -> tensor; right: tensor, number -> whether that is the right one
    survey: a look at all tensors before the first is encoded
    """

    name: str
    encode: Callable[[int], bytes]
    decode: Callable[[Any, int], Any]
    right: Callable[[Any, int], bool]
    survey: Callable[[], object] = lambda: None
    ours: bool = False


class Case(NamedTuple):
    """Tensors, and the ways to write them. `bound`: bits per parameter that theory says; `missing`: ways left out."""

    tensors: int
    elements: int
    bound: float
    ways: Sequence[Way]
    missing: Sequence[str] = ()


@dataclass(frozen=True)
class Measured:
    """A way in a case.

    data, share: which case
    bytes:       of all files; 0 if the program is not installed
    survey ...:  seconds of CPU for all tensors, the best of three
    *_peak:      bytes of memory above those before, with what was encoded; of decoding one tensor after the other
    """

    data: str
    share: float
    way: str
    ours: bool
    elements: int
    bound: float
    bytes: int
    survey: float = 0.0
    encode: float = 0.0
    decode: float = 0.0
    encode_peak: int = 0
    decode_peak: int = 0

    @property
    def per_parameter(self) -> float:
        return self.bytes / self.elements

    def speed(self, seconds: float) -> float:
        """GB of dense bfloat16 per second."""
        return 2 * self.elements / seconds / 1e9 if seconds else 0.0


def measure(module: str, data: str, share: float, elements: int) -> list[Measured]:
    """Have `module` answer for a case."""
    found: dict[str, list[dict[str, Any]]] = {}
    with TemporaryDirectory() as folder:
        for mode in ("speed", "memory"):
            target = Path(folder, mode)
            in_own_process(module, mode, data, str(share), str(elements), str(target), steady=mode == "memory")
            found[mode] = json.loads(target.read_text())
    peaks = [{key: value for key, value in row.items() if key.endswith("_peak")} for row in found["memory"]]
    return [Measured(**{**row, **peak}) for row, peak in zip(found["speed"], peaks, strict=True)]


def answer(make: Callable[[str, float, int], Case]) -> None:
    """The side of the module that was asked: make the case, measure every way, write the figures."""
    mode, data, share, elements, target = sys.argv[1:]
    case = make(data, float(share), int(elements))
    same = {"data": data, "share": float(share), "elements": case.elements, "bound": case.bound}
    rows = [{**same, "way": way.name, "ours": way.ours, **_figures(way, case, mode)} for way in case.ways]
    rows += [{**same, "way": name, "ours": False, "bytes": 0} for name in case.missing]
    Path(target).write_text(json.dumps(rows))


def _figures(way: Way, case: Case, mode: str) -> dict[str, float]:
    times = TIMES if mode == "speed" else 1
    written: list[bytes] = []

    def encode() -> None:
        written[:] = [way.encode(number) for number in range(case.tensors)]

    found: dict[str, float] = {}
    survey = [used(way.survey) for _ in range(times)]
    encoding = [used(encode) for _ in range(times)]
    files = [bytearray(data) for data in written]  # tensors are read from memory that may be written

    def decode() -> None:
        for number, data in enumerate(files):
            way.decode(data, number)

    decoding = [used(decode) for _ in range(times)]
    for number, data in enumerate(files):
        if not way.right(way.decode(data, number), number):
            raise AssertionError(f"{way.name} does not give back tensor {number}")
    found["bytes"] = sum(map(len, files))
    for what, usages in (("survey", survey), ("encode", encoding), ("decode", decoding)):
        found[what] = min(usage.cpu for usage in usages)
    # the survey runs before the encoding: what both need is the larger of both
    found["encode_peak"] = max(usages[0].peak for usages in (survey, encoding))
    found["decode_peak"] = decoding[0].peak
    return found
