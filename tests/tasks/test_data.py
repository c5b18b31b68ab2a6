"""Parquet and hub data: the rows they give, what their fingerprints depend on, and what they say about bad files."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.errors import InvalidInput, Mismatch, Unavailable
from tasks.data import Hub, Parquet

ROOT = Path(__file__).parents[2]


def table(start: int, stop: int, **more: list[Any]) -> pa.Table:
    return pa.table({"text": [f"row {n}" for n in range(start, stop)], "label": list(range(start, stop)), **more})


def write(folder: Path, train: pa.Table | None = None, test: pa.Table | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(0, 20) if train is None else train, folder / "train.parquet")
    pq.write_table(table(20, 25) if test is None else test, folder / "test.parquet")
    return folder


def source(folder: Path, **settings: Any) -> Parquet:
    return Parquet(train=(f"{folder}/train*.parquet",), test=(f"{folder}/test*.parquet",), **settings)


# -- Parquet


def test_parquet_rows_are_those_of_the_files_in_path_order(tmp_path: Path) -> None:
    pq.write_table(table(3, 5), tmp_path / "train-1.parquet")
    pq.write_table(table(0, 3), tmp_path / "train-0.parquet")
    pq.write_table(table(9, 10), tmp_path / "test.parquet")
    rows = source(tmp_path).rows("train")
    assert [rows[n] for n in range(len(rows))] == [{"text": f"row {n}", "label": n} for n in range(5)]
    assert rows[-1]["label"] == 4
    assert [row["label"] for row in rows[1:4:2]] == [1, 3]
    assert list(source(tmp_path).rows("test")) == [{"text": "row 9", "label": 9}]
    with pytest.raises(IndexError):
        rows[5]


def test_parquet_limit_and_columns(tmp_path: Path) -> None:
    write(tmp_path)
    rows = source(tmp_path, limit=3, columns=("label",)).rows("train")
    assert list(rows) == [{"label": 0}, {"label": 1}, {"label": 2}]


def test_parquet_files_named_twice_are_read_once(tmp_path: Path) -> None:
    write(tmp_path)
    twice = (f"{tmp_path}/train.parquet", f"{tmp_path}/tr*.parquet")
    assert len(Parquet(train=twice, test=twice).rows("train")) == 20


def test_parquet_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    first = source(write(tmp_path / "a"))
    assert first.fingerprint() == source(write(tmp_path / "b")).fingerprint()
    other = table(20, 25).set_column(0, "text", pa.array(["row 20", "row 21", "row 22", "row 23", "row 2!"]))
    assert first.fingerprint() != source(write(tmp_path / "c", test=other)).fingerprint()
    assert first.fingerprint() != source(tmp_path / "a", limit=2).fingerprint()
    assert first.fingerprint() != source(tmp_path / "a", columns=("label",)).fingerprint()


def test_parquet_fingerprint_sees_a_file_change_in_place(tmp_path: Path) -> None:
    spec = source(write(tmp_path))
    before = spec.fingerprint()
    write(tmp_path, train=table(1, 21))
    assert spec.fingerprint() != before


def test_parquet_splits_are_not_interchangeable(tmp_path: Path) -> None:
    write(tmp_path)
    files = (f"{tmp_path}/train.parquet",), (f"{tmp_path}/test.parquet",)
    there, back = Parquet(train=files[0], test=files[1]), Parquet(train=files[1], test=files[0])
    assert there.fingerprint() != back.fingerprint()


def test_parquet_without_a_match_names_the_pattern(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"no file matches .*train\*\.parquet.* of the train split"):
        source(tmp_path).rows("train")


@pytest.mark.parametrize("damage", ["truncated", "text", "empty file"])
def test_parquet_names_a_file_that_cannot_be_read(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path) / "train.parquet"
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"label\n1\n2\n", "empty file": b""}[damage])
    with pytest.raises(InvalidInput, match=r"train\.parquet: expected a whole Parquet file, found [\d,]+ bytes"):
        source(tmp_path).rows("train")


def test_parquet_names_the_folder_that_stands_for_files(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"is a folder\. Name its files: .*\*\.parquet"):
        Parquet(train=(str(tmp_path),), test=(str(tmp_path),)).rows("train")


def test_parquet_names_missing_and_differing_columns(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(Mismatch, match=r"train\.parquet: expected text, labels, found no labels; the file has text"):
        source(tmp_path, columns=("text", "labels")).rows("train")
    pq.write_table(pa.table({"text": ["x"], "label": ["one"]}), tmp_path / "train2.parquet")
    with pytest.raises(Mismatch, match=r"train2\.parquet: expected those of .*train\.parquet, .*label \(int64\)"):
        source(tmp_path).rows("train")
    assert len(source(tmp_path, columns=("text",)).rows("train")) == 21


def test_parquet_refuses_an_empty_split(tmp_path: Path) -> None:
    write(tmp_path, test=table(0, 0))
    with pytest.raises(InvalidInput, match=r"the test split is empty: expected rows in .*test\.parquet"):
        source(tmp_path).rows("test")


def test_parquet_settings_are_checked() -> None:
    with pytest.raises(InvalidInput, match="test must be one or more files"):
        Parquet(train=("x.parquet",))
    with pytest.raises(InvalidInput, match="limit must be positive"):
        Parquet(train=("x",), test=("x",), limit=0)


# -- Hub


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield tmp_path / "cache"
    datasets.enable_progress_bars()


def classified(folder: Path, names: list[str]) -> Path:
    """A folder whose files carry the names of their labels, as the hub's do."""
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        rows = {"text": [f"{split} {n}" for n in range(4)], "label": [0, 1, 1, 0]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}.parquet"))
    return folder


@pytest.mark.usefixtures("hub_cache")
def test_hub_reads_a_folder(tmp_path: Path) -> None:
    spec = Hub(repo=str(write(tmp_path / "set")), limit=3)
    assert list(spec.rows("train")) == [{"text": f"row {n}", "label": n} for n in range(3)]
    assert [row["label"] for row in Hub(repo=spec.repo).rows("test")] == [20, 21, 22, 23, 24]
    assert [row["label"] for row in Hub(repo=spec.repo, test_split="train[90%:]").rows("test")] == [18, 19]
    assert len(Hub(repo=spec.repo, train_split="train+test").rows("train")) == 25


@pytest.mark.usefixtures("hub_cache")
def test_hub_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    first = Hub(repo=str(write(tmp_path / "a")))
    (tmp_path / "b").mkdir()
    pq.write_table(table(0, 20), tmp_path / "b" / "train.parquet", row_group_size=3, compression="zstd")
    pq.write_table(table(20, 25), tmp_path / "b" / "test.parquet")
    assert first.fingerprint() == Hub(repo=str(tmp_path / "b")).fingerprint()
    other = table(0, 20).set_column(0, "text", pa.array([f"row {n}" for n in range(19)] + ["row !"]))
    assert first.fingerprint() != Hub(repo=str(write(tmp_path / "c", train=other))).fingerprint()
    assert first.fingerprint() != Hub(repo=first.repo, limit=2).fingerprint()
    assert first.fingerprint() != Hub(repo=first.repo, train_split="test", test_split="train").fingerprint()


def test_hub_fingerprint_is_the_same_in_another_process(tmp_path: Path, hub_cache: Path) -> None:
    spec = Hub(repo=str(write(tmp_path / "set")))
    code = f"from tasks.data import Hub; print(Hub(repo={spec.repo!r}).fingerprint())"
    there = {"HF_DATASETS_CACHE": str(tmp_path / "other cache"), "HOME": str(tmp_path), "PYTHONHASHSEED": "7"}
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=there, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == spec.fingerprint()


@pytest.mark.usefixtures("hub_cache")
def test_hub_fingerprint_reads_the_images_of_a_folder(tmp_path: Path) -> None:
    from PIL import Image

    def folder(name: str, shade: int) -> Hub:
        for split in ("train", "test"):
            for label in ("cat", "dog"):
                path = tmp_path / name / split / label / "0.png"
                path.parent.mkdir(parents=True)
                Image.new("RGB", (4, 4), (shade, 0, 0)).save(path)
        return Hub(repo=str(tmp_path / name))

    assert folder("a", 1).fingerprint() == folder("b", 1).fingerprint() != folder("c", 2).fingerprint()


@pytest.mark.usefixtures("hub_cache")
def test_class_names_come_from_the_features(tmp_path: Path) -> None:
    folder = classified(tmp_path / "a", ["annual_crop", "forest"])
    assert Hub(repo=str(folder)).class_names("label") == ("annual crop", "forest")
    assert source(folder).class_names("label") == ("annual crop", "forest")
    assert Hub(repo=str(folder)).class_names("text") is None
    assert source(write(tmp_path / "b")).class_names("label") is None
    renamed = classified(tmp_path / "c", ["annual_crop", "woods"])
    assert Hub(repo=str(folder)).fingerprint() != Hub(repo=str(renamed)).fingerprint()


@pytest.mark.usefixtures("hub_cache")
def test_hub_names_the_choices_there_are(tmp_path: Path) -> None:
    repo = str(write(tmp_path / "set"))
    with pytest.raises(InvalidInput, match=r"'valid'.*Should be one of \['train', 'test'\]"):
        Hub(repo=repo, test_split="valid").rows("test")
    with pytest.raises(InvalidInput, match=r"no config 'small'.*Available: \['default'\]"):
        Hub(repo=repo, config="small").rows("test")


@pytest.mark.usefixtures("hub_cache")
def test_hub_maps_bad_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for repo in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(InvalidInput, match="there is no data set"):
            Hub(repo=str(repo)).rows("test")
    broken = write(tmp_path / "broken")
    (broken / "train.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InvalidInput, match=r"a file of data set .* cannot be read"):
        Hub(repo=str(broken)).rows("train")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "code.py").write_text("print('never run')")
    with pytest.raises(InvalidInput, match="without running its code"):
        Hub(repo=str(tmp_path / "code")).rows("train")


@pytest.mark.usefixtures("hub_cache")
def test_hub_without_network_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(Unavailable, match="cannot read data set 'deltaworks/no-such-data'"):
        Hub(repo="deltaworks/no-such-data").rows("test")
