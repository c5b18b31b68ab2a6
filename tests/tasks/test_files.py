"""Examples in files: JSON lines, files on S3, large files, and what is held out by a hash."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.errors import InvalidInput, Mismatch, Unavailable
from tasks.data import Digits, Hub, Jsonl, Parquet
from tasks.data import parquet as parquet_source
from tasks.data.base import column
from tests.storage.s3_fixtures import client

ROWS = [{"text": f"row {n}", "label": n % 3} for n in range(200)]


def lines(path: Path, rows: Sequence[Any], end: str = "\n") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(end.join(json.dumps(row, ensure_ascii=False) for row in rows) + end)
    return str(path)


def parquet(path: Path, rows: Sequence[Any], **settings: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path, **settings)
    return str(path)


# -- JSON lines


def test_lines_are_rows_in_path_order(tmp_path: Path) -> None:
    lines(tmp_path / "b.jsonl", [{"text": "drei", "note": [1, {"x": None}]}])
    lines(tmp_path / "a.jsonl", [{"text": "ein Ä"}, {"text": "zwei"}], end="\n\n")  # empty lines are none
    rows = Jsonl(train=(f"{tmp_path}/*.jsonl",), holdout=0.1, limit=10)._read(sorted(tmp_path.iterdir()), None)
    assert list(rows) == [{"text": "ein Ä"}, {"text": "zwei"}, {"text": "drei", "note": [1, {"x": None}]}]
    assert rows[-1]["text"] == "drei"
    assert [row["text"] for row in rows[1:]] == ["zwei", "drei"]
    assert list(column(rows, "note")) == [None, None, [1, {"x": None}]]
    with pytest.raises(IndexError):
        rows[3]


def test_lines_limit_columns_and_fingerprint(tmp_path: Path) -> None:
    train, test = lines(tmp_path / "train.jsonl", ROWS), lines(tmp_path / "test.jsonl", ROWS[:5])
    spec = Jsonl(train=(train,), test=(test,), limit=2, columns=("label",))
    assert list(spec.rows("train")) == [{"label": 0}, {"label": 1}]
    moved = Jsonl(train=(lines(tmp_path / "x" / "y.jsonl", ROWS),), test=(test,), limit=2, columns=("label",))
    assert spec.fingerprint() == moved.fingerprint()
    before = spec.fingerprint()
    lines(tmp_path / "train.jsonl", ROWS[:-1])
    assert spec.fingerprint() != before
    with pytest.raises(Mismatch, match=r"train\.jsonl: expected lable, found no lable; its first line has label, text"):
        Jsonl(train=(train,), test=(test,), columns=("lable",)).rows("train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n{"a": \n', r"t\.jsonl line 2: expected a JSON object, found '\{\"a\":'.*Correct the line"),
        ('{"a": 1}\n\n[1, 2]\n', r"t\.jsonl line 3: expected a JSON object, found '\[1, 2\]'.*one object a line"),
        ("\n \n", "the train split is empty"),
        ("\ufeff\x00", "line 1: expected a JSON object"),
    ],
)
def test_broken_lines_are_named_before_anything_runs(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.jsonl").write_text(text)
    with pytest.raises(InvalidInput, match=message):
        Jsonl(train=(f"{tmp_path}/t.jsonl",), test=(f"{tmp_path}/t.jsonl",)).rows("train")


def test_lines_stay_on_the_disk(tmp_path: Path) -> None:
    """20 MB of lines: what stays in memory is eight bytes a line."""
    import tracemalloc

    path = lines(tmp_path / "big.jsonl", [{"text": "x" * 10_000, "number": n} for n in range(2000)])
    tracemalloc.start()
    rows = Jsonl(train=(path,), test=(path,)).rows("train")
    assert [rows[n]["number"] for n in (1999, 0, 1000)] == [1999, 0, 1000]
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 200_000
    assert peak < 2_000_000


# -- What is held out


def labels(spec: Any, split: Any) -> list[str]:
    return sorted(row["text"] for row in spec.rows(split))


def test_held_out_rows_do_not_depend_on_order_files_or_format(tmp_path: Path) -> None:
    whole = Jsonl(train=(lines(tmp_path / "a.jsonl", ROWS),), holdout=0.2)
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    halves = (lines(tmp_path / "b0.jsonl", shuffled[:77]), lines(tmp_path / "b1.jsonl", shuffled[77:]))
    others = [
        Jsonl(train=halves, holdout=0.2),
        Parquet(train=(parquet(tmp_path / "c.parquet", shuffled, row_group_size=9),), holdout=0.2),
    ]
    splits = {split: labels(whole, split) for split in ("train", "validation", "test")}
    assert sorted(text for part in splits.values() for text in part) == sorted(row["text"] for row in ROWS)
    assert 20 <= len(splits["validation"]) <= 60 and 20 <= len(splits["test"]) <= 60
    for other in others:
        assert {split: labels(other, split) for split in splits} == splits
    more = Jsonl(train=(lines(tmp_path / "d.jsonl", [*ROWS, {"text": "new", "label": 0}]),), holdout=0.2)
    assert set(splits["validation"]) <= set(labels(more, "validation"))  # nobody changes sides when rows are added


def test_splits_with_files_of_their_own_take_no_rows(tmp_path: Path) -> None:
    train, test = lines(tmp_path / "a.jsonl", ROWS), lines(tmp_path / "t.jsonl", [{"text": "t", "label": 0}])
    spec = Jsonl(train=(train,), test=(test,), holdout=0.2)
    assert labels(spec, "test") == ["t"]
    assert len(labels(spec, "train")) + len(labels(spec, "validation")) == len(ROWS)
    named = Jsonl(train=(train,), validation=(test,), test=(test,), holdout=0.2)
    assert len(labels(named, "train")) == len(ROWS)
    assert labels(named, "validation") == ["t"]


def test_equal_rows_are_on_one_side(tmp_path: Path) -> None:
    spec = Jsonl(train=(lines(tmp_path / "a.jsonl", ROWS[:30] * 3),), holdout=0.3)
    splits = [set(labels(spec, split)) for split in ("train", "validation", "test")]
    assert not splits[0] & splits[1] and not splits[0] & splits[2] and not splits[1] & splits[2]


def test_holdout_of_a_data_set_of_the_hub_and_of_the_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    parquet(tmp_path / "set" / "train.parquet", ROWS)
    hub = Hub(repo=str(tmp_path / "set"), test_split=None, holdout=0.2)
    plain = Jsonl(train=(lines(tmp_path / "a.jsonl", ROWS),), holdout=0.2)
    for split in ("train", "validation", "test"):
        assert labels(hub, split) == labels(plain, split)
    assert hub.fingerprint() != Hub(repo=hub.repo, test_split=None, holdout=0.3).fingerprint()
    counts = [len(Digits(holdout=0.1).rows(split)) for split in ("train", "validation", "test")]  # type: ignore[arg-type]
    assert sum(counts[:2]) == len(Digits().rows("train")) and counts[2] == len(Digits().rows("test"))
    assert 60 <= counts[1] <= 160


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", ROWS[:3])
    with pytest.raises(InvalidInput, match=r"no validation split.*set holdout"):
        Jsonl(train=(path,), test=(path,)).rows("validation")
    with pytest.raises(InvalidInput, match="test must be one or more files or patterns, or left out where holdout"):
        Jsonl(train=(path,))
    with pytest.raises(InvalidInput, match=r"no row falls into the validation split at holdout 1e-06"):
        Jsonl(train=(path,), holdout=1e-6).rows("validation")
    with pytest.raises(InvalidInput, match=r"holdout must be in \[0, 0\.5\), found 0\.5"):
        Jsonl(train=(path,), holdout=0.5)


# -- Large files


def test_large_parquet_files_are_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "x" * 5000 + str(n), "label": n} for n in range(4000)]
    path = parquet(tmp_path / "big.parquet", rows, row_group_size=500)
    small = Parquet(train=(path,), test=(path,)).rows("train")
    monkeypatch.setattr(parquet_source, "_LARGE", 1)
    before = pa.total_allocated_bytes()
    spec = Parquet(train=(path,), test=(path,), columns=("label", "text"))
    mapped = spec.rows("train")
    assert pa.total_allocated_bytes() - before < 2_000_000  # 20 MB of text are in the map
    assert [mapped[n] for n in (3999, 0, 1717)] == [small[n] for n in (3999, 0, 1717)]
    assert list(column(mapped, "label")) == list(range(4000))


# -- S3


def test_files_on_s3(s3_url: str, s3_environment: dict[str, str], tmp_path: Path) -> None:
    bucket, _, prefix = s3_url.removeprefix("s3://").partition("/")
    s3 = client(s3_environment)
    local = [lines(tmp_path / f"{n}.jsonl", ROWS[n * 100 : n * 100 + 100]) for n in range(2)]
    for number, path in enumerate(local):
        s3.upload_file(path, bucket, f"{prefix}/data/train-{number}.jsonl")
    s3.upload_file(parquet(tmp_path / "t.parquet", ROWS[:7]), bucket, f"{prefix}/data/deep/t.parquet")

    spec = Jsonl(train=(f"{s3_url}/data/train-*.jsonl",), holdout=0.2)
    there = Jsonl(train=tuple(local), holdout=0.2)
    assert spec.fingerprint() == there.fingerprint()  # by what is in the files, not by where they are
    assert list(spec.rows("validation")) == list(there.rows("validation"))
    assert len(Parquet(train=(f"{s3_url}/**/*.parquet",), holdout=0.4)._read([tmp_path / "t.parquet"], None)) == 7
    named = Parquet(train=(f"{s3_url}/data/deep/t.parquet",), test=(f"{s3_url}/data/deep/t.parquet",))
    assert list(named.rows("test")) == ROWS[:7]

    before = spec.fingerprint()
    s3.upload_file(local[1], bucket, f"{prefix}/data/train-0.jsonl")
    assert spec.fingerprint() != before
    with pytest.raises(InvalidInput, match=r"no object matches 's3://.*/data/\*\.parquet' of the train split"):
        Parquet(train=(f"{s3_url}/data/*.parquet",), holdout=0.1).rows("train")
    with pytest.raises(InvalidInput, match=r"no object matches|bucket"):
        Parquet(train=("s3://no-such-bucket-here/x.parquet",), holdout=0.1).rows("train")


def test_s3_that_does_not_answer_or_refuses(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Parquet(train=(f"{s3_url}/x.parquet",), holdout=0.1)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(InvalidInput, match=r"(?s)refused.*AWS_SECRET_ACCESS_KEY"):
        spec.rows("train")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(Unavailable, match="AWS_ENDPOINT_URL"):
        spec.rows("train")
