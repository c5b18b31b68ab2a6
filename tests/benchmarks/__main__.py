"""Benchmarks: speed and memory as ratios to a yardstick measured in the same run, because machines differ.

python -m tests.benchmarks        in about a minute on two cores, with 2 GB of memory and 1.5 GB of disk
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import zstandard
from rich.console import Console
from rich.table import Table
from torch import Tensor

from storage.artifacts import ArtifactStore
from storage.directory import DirectoryObjects
from tasks.codecs import Leaf, Ternary
from tasks.mergers import Opcm, Target
from tasks.select import kth_magnitude
from tests.benchmarks.memory import peak_of_fold
from tests.benchmarks.rows import Row

VALUES = 20_000_000
MEGA = 1e6


def seconds(work: Callable[[], object], times: int = 3) -> float:
    """The median of a few runs."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1e-4


def compare(what: str, ours: float, yardstick: float, name: str) -> Row:
    """Two durations in seconds."""
    return Row(what, f"{ours:.2f} s", f"{yardstick:.2f} s  {name}", f"{yardstick / ours:.2f} times as fast")


def ternary() -> Iterator[Row]:
    """Against zstd level 1 on the same update as dense bfloat16, in MB of those dense bytes."""
    update = drawn(VALUES)
    dense = update.bfloat16().view(torch.int16).numpy().tobytes()
    press, expand = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()
    plain = press.compress(dense)
    there, back = seconds(lambda: press.compress(dense)), seconds(lambda: expand.decompress(plain))
    for density in (0.05, 0.2):
        codec = Ternary(density=density)
        survey = seconds(lambda codec=codec: codec.survey(lambda: [update]))  # type: ignore[misc]
        facts = codec.survey(lambda: [update])
        leaf = Leaf("weight", "linear.weight", update)
        parts = codec.encode(leaf, facts).parts
        rows = {
            "survey + encode": (survey + seconds(lambda c=codec, f=facts, one=leaf: c.encode(one, f)), there),  # type: ignore[misc]
            "decode": (seconds(lambda p=parts: Ternary.decode(p, (VALUES,))), back),  # type: ignore[misc]
        }
        for step, (ours, yardstick) in rows.items():
            yield Row(
                f"ternary {density:.0%}, {step}",
                f"{len(dense) / MEGA / ours:,.0f} MB/s",
                f"{len(dense) / MEGA / yardstick:,.0f} MB/s  zstd-1 of dense bf16",
                f"{yardstick / ours:.2f} times as fast",
            )
        size = sum(part.nbytes for part in parts.values())
        yield Row(
            f"ternary {density:.0%}, size",
            f"{len(dense) / size:.1f} times smaller than bf16",
            f"{len(dense) / len(plain):.2f}  zstd-1 of dense bf16",
            f"{len(plain) / size:.1f} times as small",
        )


def reference_step(merged: Tensor, tau: Tensor, alpha: float) -> Tensor:
    """OPCM as fusion_bench writes it: full bases, and the whole projection in them."""
    U, s, Vh = torch.linalg.svd(merged, full_matrices=True)
    V = Vh.T
    split = int((s.cumsum(0) / s.sum() > alpha).float().argmax())
    projected = U.T @ tau @ V
    projected.diagonal().fill_(0)
    projected[:split, :split] = 0
    return merged + U @ projected @ V.T


def opcm() -> Iterator[Row]:
    for rows, columns in ((1024, 1024), (3072, 768)):
        merged, tau = drawn(rows, columns), drawn(rows, columns, seed=1)
        merger, target = Opcm(), Target("l.weight", "linear.weight")

        def ours(state: Tensor = merged, delta: Tensor = tau, target: Target = target) -> Tensor:
            return merger.fold({"sum": state}, delta, target, {}, {})[0]["sum"]  # noqa: B023

        def theirs(state: Tensor = merged, delta: Tensor = tau) -> Tensor:
            return reference_step(state, delta, 0.5)

        torch.testing.assert_close(ours(), theirs(), rtol=1e-3, atol=1e-8)
        what = f"OPCM fold of {rows} x {columns}"
        yield compare(what, seconds(ours), seconds(theirs), "reference, full_matrices=True")


def selection() -> Iterator[Row]:
    update, k = drawn(VALUES), int(0.8 * VALUES)
    assert kth_magnitude(lambda: [update], k) == torch.kthvalue(update.abs(), k).values.item()
    ours = seconds(lambda: kth_magnitude(lambda: [update], k))
    what = f"k-th magnitude of {VALUES / 1e6:.0f} M"
    yield compare(what, ours, seconds(lambda: torch.kthvalue(update.abs(), k)), "torch.kthvalue")
    yield compare(what, ours, seconds(lambda: update.abs().sort(), times=1), "torch.sort")


def memory() -> Iterator[Row]:
    """A fold must hold a few tensors, not a model: the same multiple of one tensor, however many there are."""
    for merger in ("average", "ties"):
        few, many = (peak_of_fold(merger, count) for count in (8, 32))
        yield Row(
            f"peak memory of a fold, {merger}",
            f"{many:.1f} tensors, of a model of 32",
            f"{few:.1f} tensors, of a model of 8",
            f"{many / few:.2f} (flat is 1)",
        )


def directory() -> Iterator[Row]:
    """The store hashes when it writes and when it reads, and waits until the disk has what it was given."""
    data = os.urandom(1 << 20) * 256
    with TemporaryDirectory() as folder:
        store = ArtifactStore(DirectoryObjects(Path(folder, "store")))
        original, copy = Path(folder, "original"), Path(folder, "copy")
        original.write_bytes(data)

        def ours() -> None:
            shutil.rmtree(folder + "/store", ignore_errors=True)
            store.read_blob(store.write_blob(data), what="benchmark")

        def theirs() -> None:
            shutil.copyfile(original, copy)
            hashlib.sha256(copy.read_bytes()).digest()

        yield compare("directory put + get of 256 MiB", seconds(ours), seconds(theirs), "file copy + one sha256")


def main() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    console, start = Console(), time.perf_counter()
    title = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread, torch {torch.__version__}"
    table = Table("what", "ours", "yardstick", "ratio", title=title)
    for benchmark in (ternary, opcm, selection, memory, directory):
        with console.status(f"{benchmark.__name__} ..."):
            for row in benchmark():
                table.add_row(row.what, row.ours, row.yardstick, row.ratio)
    console.print(table)
    console.print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
