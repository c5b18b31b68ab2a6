"""Benchmarks of compression: bytes, speed, memory and quality, as a page with pictures in tests/benchmarks/results.

python -m tests.benchmarks.compressing                    all of them, ten minutes on two cores
python -m tests.benchmarks.compressing ternary quality    only these; the results of the others stay

SMALL=1 in the environment: a minute of small tensors and one seed, whose page goes into a temporary folder.
zipnn is measured where it is installed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

from rich.console import Console

from tests.benchmarks import codec_quality, compress_plots, lossless_sizes, packed, ternary_sizes
from tests.benchmarks.codec_quality import Quality
from tests.benchmarks.coding import Measured
from tests.benchmarks.rows import Row, chosen, run_parts

SMALL = bool(os.environ.get("SMALL"))
RESULTS = Path(mkdtemp()) if SMALL else Path(__file__).parent / "results"
ELEMENTS = 2_000_000 if SMALL else 20_000_000
SEEDS = (0,) if SMALL else (0, 1, 2)
PAGE, ROWS = "compress.md", "compress.json"

SPEEDS = {"ternary": (0.4, 1.5), "lossless": (0.15, 0.3)}  # goals: encode and decode, GB/s of dense bfloat16
HALF = 0.48  # share of changed numbers up to which lossless files should be half of `YARDSTICK`
YARDSTICK = "XOR, zstd-1"


def quality(console: Console) -> list[Quality]:
    with TemporaryDirectory() as folder:
        return codec_quality.measure(Path(folder), SEEDS, console.log)


PARTS: Mapping[str, Callable[[Console], Sequence[Any]]] = {
    "ternary": lambda console: ternary_sizes.rows(ELEMENTS),
    "lossless": lambda console: lossless_sizes.rows(ELEMENTS),
    "quality": quality,
    "packed": lambda console: packed.rows(ELEMENTS),
}


def main() -> None:
    console = Console()
    write_page(run_parts(PARTS, chosen(PARTS), RESULTS / ROWS, console))
    console.print((RESULTS / PAGE).read_text(), markup=False)
    console.print(f"written to {RESULTS / PAGE}")


def write_page(found: Mapping[str, Any]) -> None:
    lines = ["# Compression, measured", "", "Written by `make bench-compress`; what is compared was taken in one run."]
    lines += ["Merging has [a page of its own](README.md).", ""]
    for name in (name for name in PARTS if name in found):
        part, picture = found[name], f"compress_{name}.png"
        lines += [f"## {name}", "", "; ".join(part["machine"].values()) + ".", ""]
        if name == "packed":
            lines += [*_packed_lines([Row(**row) for row in part["rows"]]), ""]
            continue
        if name == "quality":
            accuracies = [Quality(**row) for row in part["rows"]]
            lines += _quality_lines(accuracies)
            compress_plots.quality(accuracies, RESULTS / picture)
        else:
            rows = [Measured(**row) for row in part["rows"]]
            lines += [*_intro(name, rows), *_speed_lines(name, rows)]
            compress_plots.speeds(name, rows, SPEEDS[name], RESULTS / picture)
        lines += ["", f"![{name}]({picture})", ""]
    (RESULTS / PAGE).write_text("\n".join(lines))


def _intro(name: str, rows: Sequence[Measured]) -> list[str]:
    millions, (encode, decode) = rows[0].elements / 1e6, SPEEDS[name]
    what = {
        "ternary": [
            f"{millions:.0f} M numbers of which the largest are kept, with one magnitude: one tensor of independent",
            "Student-t draws, or 40 tensors with scales of tensor, row and column. `bound`: the entropy H2(k) + k of",
            "independent entries at that density. Goals for `ternary`: at most 1.01 × the bound for independent draws",
            "and less than the bound for structured ones,",
        ],
        "lossless": [
            f"{millions:.0f} M numbers in bfloat16, in few or many tensors, of which training changed a share. What is",
            "read is the tuned tensor, bit by bit. `bound`: the entropy of the difference in steps of bfloat16, given",
            f"the base's exponent. Goals for `exact`: at most half of {YARDSTICK!r} up to {HALF:.0%} changed,",
        ],
    }
    return [
        *what[name],
        f"encode ≥ {encode} GB/s and decode ≥ {decode} GB/s.",
        "",
        "GB/s are of the dense tensors in bfloat16, by CPU time on one core, the best of three. Our files count with",
        "their headers, those of the others are bare streams. Memory is what encoding all tensors, and decoding",
        "one after the other, took above what the process had; encoding includes the survey and the files.",
        *(["The encoding of `exact` includes a sha256 of every tensor."] if name == "lossless" else []),
        "",
    ]


def _speed_lines(name: str, rows: Sequence[Measured]) -> Iterator[str]:
    share = {"ternary": "kept", "lossless": "changed"}[name]
    survey = ["survey GB/s"] if name == "ternary" else []
    yield from _header(
        "data",
        share,
        "layout",
        "bytes per parameter",
        "× bound",
        "smaller than bf16",
        *survey,
        "encode GB/s",
        "decode GB/s",
        "memory MB, encode",
        "decode",
        "goals",
    )
    for row in rows:
        case = [row.data, f"{row.share:.0%}", f"**{row.way}**" if row.ours else row.way]
        if not row.bytes:
            yield _line([*case, "not installed", *[""] * (7 + len(survey))])
            continue
        speeds = [f"{row.speed(row.survey):.2f}" if row.ours else ""] if survey else []
        speeds += [f"{row.speed(seconds):.2f}" for seconds in (row.encode, row.decode)]
        sizes = [
            f"{row.per_parameter:.5f}",
            f"{8 * row.per_parameter / row.bound:.3f}",
            f"{2 / row.per_parameter:.1f} ×",
        ]
        memory = [f"{peak / 1e6:.0f}" for peak in (row.encode_peak, row.decode_peak)]
        yield _line([*case, *sizes, *speeds, *memory, _verdict(goals(name, row, rows)) if row.ours else ""])


def goals(name: str, row: Measured, rows: Iterable[Measured]) -> dict[str, bool]:
    """Goal -> whether this row of ours meets it. Some cases have no goal for the size."""
    found = {}
    if name == "ternary":
        ratio = 8 * row.per_parameter / row.bound
        found["size"] = ratio <= 1.01 if row.data == "i.i.d." else ratio < 1
    elif row.share <= HALF:
        other = next(one for one in rows if (one.data, one.share, one.way) == (row.data, row.share, YARDSTICK))
        found["size"] = 2 * row.bytes <= other.bytes
    encode, decode = SPEEDS[name]
    found["encode"] = row.speed(row.encode) >= encode
    found["decode"] = row.speed(row.decode) >= decode
    return found


def _verdict(found: Mapping[str, bool]) -> str:
    missed = [goal for goal, met in found.items() if not met]
    return f"missed: {', '.join(missed)}" if missed else f"met: {', '.join(found)}"


def _quality_lines(rows: Sequence[Quality]) -> Iterator[str]:
    one = rows[0]
    over = f"six tasks and {one.seeds} seeds" if one.seeds > 1 else "six tasks"
    yield f"Accuracy in % on the digits, the mean over {over}. `single`: base plus the decoded update of one"
    yield "task, on that task. The others: all six updates merged, on all tasks. Bytes are those of one update's files"
    yield "with their headers, which weigh on a model as small as this one: its tensors in bfloat16 are"
    yield f"{one.ratio * one.bytes / 1e3:.0f} kB. The dotted lines of the picture are the exact updates."
    yield "No codec was given calibration data."
    yield ""
    yield from _header("codec", "setting", "bytes", "smaller than bf16", "single", *codec_quality.RECIPES)
    for _, several in codec_quality.by_codec(rows):
        for row in several:
            scores = [row.single, *(getattr(row, recipe) for recipe in codec_quality.RECIPES)]
            cells = [row.codec, row.setting, f"{row.bytes:,}", f"{row.ratio:.2f} ×"]
            yield _line([*cells, *(f"{100 * score:.1f}" for score in scores)])


def _packed_lines(rows: Sequence[Row]) -> Iterator[str]:
    yield f"Two ternary updates of {packed.DENSITY:.0%}, as many numbers as in the parts above, as planes of bits"
    yield "(`tasks/packed.py`) beside dense float32. CPU time on one core, the best of some."
    yield ""
    yield from _header("what", "planes", "dense", "planes / dense")
    for row in rows:
        yield _line([row.what, row.ours, row.yardstick, row.ratio])


def _header(*names: str) -> Iterator[str]:
    yield _line(names)
    yield "|" + "---|" * len(names)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
