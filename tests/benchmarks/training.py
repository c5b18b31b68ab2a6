"""Training beside the plain Trainer of transformers: the same module, batches and schedule; what does our loop cost?

python -m tests.benchmarks.training        in two minutes on two cores

Ours looks at every example first, reads every loss, and may measure a validation split and save its state; the plain
one logs ten times and does neither. Each training runs in a process of its own. Steps a second are those after the
first five; the start is from the call, with everything imported, to the end of the first step. Data is the share of the
whole training in which rows were read and put into batches.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tests.benchmarks.usage import machine, used

STEPS = {"vit": 300, "llama": 20}
WAYS = {
    "plain": "Trainer of transformers",
    "ours": "deltaworks",
    "watched": "deltaworks, saved and measured ten times",
}
_WARM = 5
RESULT = Path(__file__).parent / "results" / "training.md"
_COLUMNS = ("training", "by", "steps/s", "to step 1", "whole", "data", "peak memory")
_ABOUT = """One thread. The vit is the demo's, of 0.16 million parameters, batches of 64; the llama has 6 layers of
width 384, batches of 8. Steps a second are the best of three runs, after five steps; the rest is the least of
three. `data` is the share of the time in which rows were read and put into batches."""


def prepared(case: str, folder: Path) -> tuple[Any, Any, Any, Any]:
    """Store, base, suite and tuner of a case."""
    from storage.artifacts import ArtifactStore
    from storage.directory import DirectoryObjects
    from tasks.tuners import Full

    store = ArtifactStore(DirectoryObjects(folder / "store"))
    tuner = Full(weights="all", steps=STEPS[case], batch=64 if case == "vit" else 8, save_every=0)
    if case == "vit":
        from tasks.data import Digits
        from tasks.digits_base import DigitsBase, train_digits_base
        from tasks.suites import ImageClassification
        from tasks.suites.heads import Orthonormal

        suite: Any = ImageClassification(Digits(view="rot90", holdout=0.1), Orthonormal())
        return store, train_digits_base(DigitsBase(steps=1), store), suite, tuner
    from transformers import LlamaConfig, LlamaForCausalLM

    from tasks.data import Jsonl
    from tasks.ingest import Checkpoint, ingest
    from tasks.suites import CausalLm
    from tests.tasks.tiny_tokenizer import IDS, save_tokenizer

    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(IDS), max_position_embeddings=128, **sizes)).save_pretrained(folder)
    save_tokenizer(folder)
    rows = [
        {"prompt": " ".join(str((n * k + n // 20) % 20) for k in range(60)), "answer": f"is {n % 20}"}
        for n in range(400)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = CausalLm(Jsonl(train=(str(folder / "rows.jsonl"),), holdout=0.1), max_tokens=128)
    return store, ingest(Checkpoint(source=str(folder)), store), suite, tuner


def ours(case: str, way: str, folder: Path) -> tuple[Callable[[], object], list[float]]:
    from tasks.fine_tune import fine_tune

    store, base, suite, tuner = prepared(case, folder)
    if way == "watched":
        tuner = replace(tuner, save_every=tuner.steps // 10, validate_every=tuner.steps // 10)
    times: list[float] = []
    return lambda: fine_tune(base, "case", suite, tuner, store, report=lambda *_: times.append(time.monotonic())), times


def plain(case: str, folder: Path) -> tuple[Callable[[], object], list[float]]:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from tasks.checkpoints import load_model

    store, base, suite, tuner = prepared(case, folder)
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            times.append(time.monotonic())

    def work() -> None:
        source = store.open(base)
        problem = suite.open(source)
        model = problem.wrap(load_model(source, dtype=torch.float32)).requires_grad_(True)
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=tuner.steps,
            per_device_train_batch_size=tuner.batch,
            learning_rate=tuner.learning_rate,
            weight_decay=tuner.weight_decay,
            warmup_steps=round(tuner.warmup * tuner.steps),
            lr_scheduler_type="cosine",
            logging_steps=tuner.steps // 10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        rows = problem.rows("train")
        Trainer(model, arguments, problem.collate, train_dataset=rows, callbacks=[Clock()]).train()

    return work, times


def timed_reading() -> list[float]:
    """The seconds that reading each batch takes from now on, in this process."""
    from torch.utils.data._utils.fetch import _MapDatasetFetcher

    seconds: list[float] = []
    fetch = _MapDatasetFetcher.fetch

    def timed(self: Any, numbers: Any) -> Any:
        start = time.monotonic()
        try:
            return fetch(self, numbers)
        finally:
            seconds.append(time.monotonic() - start)

    _MapDatasetFetcher.fetch = timed  # type: ignore[method-assign]
    return seconds


def child(case: str, way: str) -> None:
    """One training, told as one line of JSON."""
    torch.set_num_threads(1)
    reading = timed_reading()
    with tempfile.TemporaryDirectory() as folder:
        work, times = plain(case, Path(folder)) if way == "plain" else ours(case, way, Path(folder))
        start = time.monotonic()
        del reading[:]  # those of the base
        usage = used(work)
    seconds = times[-1] - times[_WARM]
    found = {
        "rate": (len(times) - 1 - _WARM) / seconds,
        "start": times[0] - start,
        "peak": usage.peak,
        "wall": usage.wall,
        "data": sum(reading) / usage.wall,
    }
    print("\n" + json.dumps(found))


def measured(case: str, way: str) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.benchmarks.training", "child", case, way]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{case} {way} failed with {done.returncode}:\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        child(*sys.argv[2:])
        return
    console = Console()
    about = "; ".join(machine().values())
    table = Table(*_COLUMNS, title=about)
    lines = ["# Training, measured", "", "Written by `make bench-finetune`.", "", f"{about}.", "", _ABOUT, ""]
    lines += [f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
    for case, steps in STEPS.items():
        for way, name in WAYS.items():
            with console.status(f"{case}, {name} ..."):
                runs = [measured(case, way) for _ in range(3)]
            best = max(runs, key=lambda run: run["rate"])  # of three: others may be at work on this machine
            start, wall = min(run["start"] for run in runs), min(run["wall"] for run in runs)
            peak = f"{min(run['peak'] for run in runs) / 1e6:,.0f} MB"
            row = [f"{case}, {steps} steps", name, f"{best['rate']:.1f}", f"{start:.2f} s", f"{wall:.1f} s"]
            row += [f"{best['data']:.1%}", peak]
            table.add_row(*row)
            lines.append(f"| {' | '.join(row)} |")
        table.add_section()
    console.print(table)
    RESULT.write_text("\n".join(lines) + "\n")
    console.print(f"written to {RESULT}")


if __name__ == "__main__":
    main()
