"""Benchmarks of the store: 1 GiB, as one object and as a thousand, to a folder and to a real S3 server and back.

python -m tests.benchmarks.storing              both parts, ten minutes on two cores
python -m tests.benchmarks.storing directory    only one; the results of the other stay

SMALL=1 in the environment: 64 MiB, whose page goes into a temporary folder. obstore is measured where it is installed.
The S3 server is infra/s3-server, in memory and on the same cores, or the one that DELTAWORKS_TEST_S3_ENDPOINT names.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any
from uuid import uuid4

from rich.console import Console

from storage.s3 import S3Objects
from tests.benchmarks.rows import chosen, run_parts
from tests.benchmarks.usage import Usage, in_own_process
from tests.storage.s3_fixtures import client
from tests.storage.s3_server import running_s3_server

SMALL = bool(os.environ.get("SMALL"))
RESULTS = Path(mkdtemp()) if SMALL else Path(__file__).parent / "results"
SIZE = 64 * 2**20 if SMALL else 2**30
ROUNDS = 1 if SMALL else 5
PAGE, ROWS = "store.md", "store.json"
BUCKET = "deltaworks-bench"
_MEMORY_FOLDER = "/dev/shm" if os.path.isdir("/dev/shm") else None  # so that it is not the disk that is measured
SHAPES = {"large": "one object", "small": f"{SIZE >> 20} objects of 1 MiB, 8 threads"}
GOALS = {"large": 0.8, "small": 0.6}
FOLDER_GOAL = 0.8
MEMORY = 256 * 2**20
OURS = ("ours", "named", "held")
ONLY_LARGE, ONLY_SMALL = ("held",), ("bare",)
WORDS = {
    "ours": "**the object store**",
    "named": "**an artifact's assets**, named and checked by sha256",
    "held": "**a blob in memory**, named and checked by sha256",
    "boto": "boto3: upload_file, download_file; put_object, get_object",
    "obstore": "obstore",
    "copy": "cp + sha256",
    "synced": "cp + sha256 + fsync",
    "bare": "sha256, write and fsync of what is in memory, and nothing else",
}


@dataclass(frozen=True)
class Moved:
    """MB/s there and back, and the most memory that either took; the median of some rounds. 0: not installed."""

    shape: str
    way: str
    put: float
    get: float
    peak: int


def s3(console: Console) -> list[Moved]:
    os.environ["S3_SERVER_MEMORY"] = str(4 * SIZE)
    with running_s3_server() as environment:
        os.environ |= environment
        if BUCKET not in [bucket["Name"] for bucket in client(environment).list_buckets()["Buckets"]]:
            client(environment).create_bucket(Bucket=BUCKET)

        @contextmanager
        def place() -> Iterator[str]:
            prefix = uuid4().hex
            try:
                yield f"s3://{BUCKET}/{prefix}"
            finally:
                S3Objects(BUCKET, prefix).remove(prefix)

        return measure(("ours", "boto", "obstore", "named"), place, console, _MEMORY_FOLDER)


def directory(console: Console) -> list[Moved]:
    @contextmanager
    def place() -> Iterator[str]:
        with TemporaryDirectory() as folder:
            yield folder

    return measure(("copy", "synced", "bare", "held", "named"), place, console)


PARTS: Mapping[str, Callable[[Console], Sequence[Any]]] = {"s3": s3, "directory": directory}


def measure(ways: Sequence[str], place: Callable[[], Any], console: Console, beside: str | None = None) -> list[Moved]:
    """Every way in turn, in several rounds, so that no way has the quiet minute of the machine for itself.

    `beside`: where the file is that is put, and the one that is got."""
    found: dict[tuple[str, str], list[list[Usage]]] = {}
    with TemporaryDirectory(dir=beside) as folder:
        source = Path(folder, "source")
        with source.open("wb") as file:
            for _ in range(SIZE >> 20):
                file.write(os.urandom(1 << 20))
        for turn in range(ROUNDS):
            for shape in SHAPES:
                for way in ways:
                    if not _installed(way) or way in (ONLY_LARGE if shape == "small" else ONLY_SMALL):
                        continue
                    with place() as url, TemporaryDirectory(dir=beside) as out:
                        arguments = (way, shape, url, str(source), str(Path(out, "out")))
                        used = in_own_process("tests.benchmarks.transfers", *arguments, steady=False)
                    console.log(
                        f"round {turn + 1}: {shape} {way}: {[round(SIZE / one.wall / 1e6) for one in used]} MB/s"
                    )
                    found.setdefault((shape, way), []).append(used)
    rows = []
    for shape in SHAPES:
        for way in ways:
            rounds = found.get((shape, way), [])
            put, get = (_median([SIZE / used[step].wall / 1e6 for used in rounds]) for step in (0, 1))
            peak = max((one.peak for used in rounds for one in used), default=0)
            if rounds or not _installed(way):
                rows.append(Moved(shape, way, put, get, peak))
    return rows


def _median(rates: Sequence[float]) -> float:
    return median(rates) if rates else 0.0


def _installed(way: str) -> bool:
    return way != "obstore" or importlib.util.find_spec("obstore") is not None


def write_page(found: Mapping[str, Any]) -> None:
    lines = ["# The store, measured", "", "Written by `make bench-store`; what is compared was taken in one run.", ""]
    for name in (name for name in PARTS if name in found):
        rows = [Moved(**row) for row in found[name]["rows"]]
        lines += [f"## {name}", "", "; ".join(found[name]["machine"].values()) + ".", "", *_intro(name), ""]
        for shape, words in SHAPES.items():
            lines += [
                f"{SIZE >> 20} MiB as {words}:",
                "",
                *_table(name, [row for row in rows if row.shape == shape]),
                "",
            ]
    (RESULTS / PAGE).write_text("\n".join(lines))


def _intro(name: str) -> list[str]:
    if name == "s3":
        return [
            "Client and server share the cores, so whoever computes less leaves the server more. The large object goes",
            "from a file to a file, both in memory. `ratio` is to the faster of the other clients, each way. Goals for",
            f"the object store: at least {GOALS['large']:.0%} of it for the large object, {GOALS['small']:.0%} for the",
            f"small ones, and at most {MEMORY >> 20} MiB. Naming and checking by sha256, which no other client does,",
            "is on top.",
        ]
    return [
        "`cp + sha256` reads from the page cache and is durable some time later; what is put into the store is on the",
        "disk when `put` returns, as after `fsync`. `ratio` is to the fastest of the two, each way. Goal for a blob in",
        f"memory and for small assets: at least {FOLDER_GOAL:.0%} of it. A large asset is a file, read twice; a blob's",
        "memory is its own pages, mapped. `cp` has its bytes in the page cache already, an asset brings new ones:",
        "what the system takes for that, with a sync, is a row of its own.",
    ]


def _table(name: str, rows: Sequence[Moved]) -> Iterator[str]:
    yield "| way | put MB/s | ratio | get MB/s | ratio | peak MiB | goals |"
    yield "|---|---|---|---|---|---|---|"
    others = [row for row in rows if row.way not in (*OURS, "bare")]
    for row in rows:
        if not row.put:
            yield f"| {WORDS[row.way]} | not installed | | | | | |"
            continue
        best = [max(getattr(one, step) for one in others) for step in ("put", "get")]
        ratios = [row.put / best[0], row.get / best[1]]
        cells = [f"{row.put:.0f}", f"{ratios[0]:.2f}", f"{row.get:.0f}", f"{ratios[1]:.2f}", f"{row.peak / 2**20:.0f}"]
        yield f"| {WORDS[row.way]} | {' | '.join(cells)} | {_verdict(name, row, ratios)} |"


def _verdict(name: str, row: Moved, ratios: Sequence[float]) -> str:
    goals = {}
    if row.way == "ours":
        goals = {"speed": min(ratios) >= GOALS[row.shape], "memory": row.peak <= MEMORY}
    elif row.way == "held" or (name == "directory" and (row.way, row.shape) == ("named", "small")):
        goals = {"speed": min(ratios) >= FOLDER_GOAL}
    elif row.way == "named":
        goals = {"memory": row.peak <= MEMORY}
    missed = [goal for goal, met in goals.items() if not met]
    return f"missed: {', '.join(missed)}" if missed else f"met: {', '.join(goals)}" if goals else ""


def main() -> None:
    console = Console()
    write_page(run_parts(PARTS, chosen(PARTS), RESULTS / ROWS, console))
    console.print((RESULTS / PAGE).read_text(), markup=False)
    console.print(f"written to {RESULTS / PAGE}")


if __name__ == "__main__":
    main()
