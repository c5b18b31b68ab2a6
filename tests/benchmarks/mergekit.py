"""Benchmark: merging folders of 1.1 billion parameters, beside mergekit and beside `cp`.

python -m tests.benchmarks.mergekit      MERGEKIT=<its mergekit-yaml command> for the peer's rows

Whole commands are timed, with the start of Python. Memory is what a process has for itself; mapped files do not count.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.benchmarks.rows import Row, times

_HIDDEN, _INNER, _KEYS, _LAYERS, _WORDS = 2048, 5632, 256, 22, 32000  # TinyLlama's
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": _HIDDEN,
    "intermediate_size": _INNER,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": _WORDS,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
_COMMAND = (str(Path(sys.executable).parent / "deltaworks"), "merge")
_SEEN = "model.layers.3.mlp.up_proj.weight"  # whose numbers are compared


@dataclass(frozen=True)
class Job:
    """The same work for both commands. `same`: whether the numbers should be the same."""

    name: str
    ours: tuple[str, ...]
    theirs: str
    entry: str
    same: bool = True
    based: bool = True


JOBS = (
    Job("linear", ("--merger", "average"), "merge_method: linear", "weight: 0.5", based=False),
    Job(
        "TIES, density 0.2",
        ("--merger", "ties", "--set", "density=0.2", "--set", "trim=tensor", "--set", "tie=positive"),
        "merge_method: ties",
        "weight: 1.0, density: 0.2",
    ),
    Job(
        "SCE, select_topk 0.1",
        ("--merger", "sce", "--set", "variant=mergekit", "--set", "select_topk=0.1"),
        "merge_method: sce\nparameters: {select_topk: 0.1}",
        "",
    ),
    Job(
        "DARE, density 0.5",
        ("--merger", "average", "--sparsify", "dare", "--set", "sparsify.density=0.5"),
        "merge_method: dare_linear\nparameters: {normalize: false}",
        "weight: 0.5, density: 0.5",
        same=False,  # at random
    ),
)


@dataclass(frozen=True)
class Run:
    """Seconds of a whole command, and the most bytes that it had for itself."""

    wall: float
    peak: int


def rows() -> Iterator[Row]:
    peer = os.environ.get("MERGEKIT")
    with TemporaryDirectory(ignore_cleanup_errors=True) as name:
        place = Path(name)
        inputs = _checkpoints(place)
        yardstick = _copied(inputs, place / "copy")
        for job in JOBS:
            ours = min((_ours(job, inputs, place / "ours") for _ in range(2)), key=lambda run: run.wall)
            if job.name == "linear":
                yield Row(
                    "linear, 8.8 GB read and written",
                    _said(ours),
                    f"{yardstick:.1f} s  cp reading and writing as much",
                    f"{yardstick / ours.wall:.0%} of its speed",
                )
            if not peer:
                yield Row(f"{job.name}, two of 1.1 B in bf16", _said(ours), "MERGEKIT is not set", "")
                continue
            theirs = _theirs(peer, job, inputs, place / "theirs")
            ratio = f"{theirs.wall / ours.wall:.1f} times as fast, memory {times(ours.peak, theirs.peak)}"
            if job.same:
                ratio += f", {_equal(place / 'ours', place / 'theirs'):.2%} of the numbers equal in bf16"
            yield Row(f"{job.name}, two of 1.1 B in bf16", _said(ours), f"{_said(theirs)}  mergekit", ratio)


def _checkpoints(place: Path) -> list[Path]:
    """A base and two models tuned from it, shaped like TinyLlama."""
    generator = torch.Generator().manual_seed(0)
    base = {name: (torch.randn(shape, generator=generator) * 0.02).bfloat16() for name, shape in _shapes()}
    folders = [place / name for name in ("base", "one", "two")]
    for number, folder in enumerate(folders):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(_CONFIG))
        tensors = base
        if number:
            tensors = {
                name: torch.randn(tensor.shape, generator=generator).mul_(1e-3).add_(tensor).bfloat16()
                for name, tensor in base.items()
            }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folders


def _shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from (("model.embed_tokens.weight", (_WORDS, _HIDDEN)), ("lm_head.weight", (_WORDS, _HIDDEN)))
    yield "model.norm.weight", (_HIDDEN,)
    for layer in range(_LAYERS):
        for name, shape in {
            "self_attn.q_proj": (_HIDDEN, _HIDDEN),
            "self_attn.k_proj": (_KEYS, _HIDDEN),
            "self_attn.v_proj": (_KEYS, _HIDDEN),
            "self_attn.o_proj": (_HIDDEN, _HIDDEN),
            "mlp.gate_proj": (_INNER, _HIDDEN),
            "mlp.up_proj": (_INNER, _HIDDEN),
            "mlp.down_proj": (_HIDDEN, _INNER),
            "input_layernorm": (_HIDDEN,),
            "post_attention_layernorm": (_HIDDEN,),
        }.items():
            yield f"model.layers.{layer}.{name}.weight", shape


def _copied(inputs: list[Path], place: Path) -> float:
    """Seconds of `cp` for two of the inputs: it reads and writes as many bytes as a merge that reads three and writes
    one. The best of three."""
    found = []
    for _ in range(3):
        place.mkdir()
        start = time.perf_counter()
        for number, folder in enumerate(inputs[1:]):
            subprocess.run(["cp", folder / "model.safetensors", place / str(number)], check=True)
        found.append(time.perf_counter() - start)
        shutil.rmtree(place)
    return min(found)


def _ours(job: Job, inputs: list[Path], out: Path) -> Run:
    shutil.rmtree(out, ignore_errors=True)
    return _run([*_COMMAND, *map(str, inputs), str(out), *job.ours, "--memory", "1GiB"])


def _theirs(command: str, job: Job, inputs: list[Path], out: Path) -> Run:
    shutil.rmtree(out, ignore_errors=True)
    models = "\n".join(f"  - {{model: {one}, parameters: {{{job.entry}}}}}" for one in inputs[1:])
    based = f"base_model: {inputs[0]}\n" if job.based else ""
    config = out.with_suffix(".yaml")
    config.write_text(f"{job.theirs}\n{based}dtype: bfloat16\nmodels:\n{models}\n")
    return _run([command, str(config), str(out), "--no-copy-tokenizer", "--quiet"])


def _run(command: list[str]) -> Run:
    """Run a command, and look every few milliseconds at the memory that it has for itself."""
    peak = 0
    start = time.perf_counter()
    with TemporaryDirectory() as folder, (Path(folder) / "log").open("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        while process.poll() is None:
            peak = max(peak, _private(process.pid))
            time.sleep(0.02)
        wall = time.perf_counter() - start
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{log.read()[-3000:]}")
    return Run(wall, peak)


def _private(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def _equal(ours: Path, theirs: Path) -> float:
    """The share of equal numbers in one matrix."""
    found = []
    for folder in (ours, theirs):
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                if _SEEN in tensors.keys():  # noqa: SIM118  # not a mapping
                    found.append(tensors.get_tensor(_SEEN))
    return float((found[0] == found[1]).float().mean())


def _said(run: Run) -> str:
    return f"{run.wall:.1f} s, {run.peak / 1e9:.2f} GB"


if __name__ == "__main__":
    for row in rows():
        print(row)
