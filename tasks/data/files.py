"""Files: what the sources have in common whose examples are files, on a disk or on S3."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.errors import InvalidInput
from tasks.choice import Choice, require
from tasks.data import places
from tasks.data.base import Rows, Selected, Split
from tasks.data.held_out import part, require_share, spec_without_holdout


@dataclass(frozen=True, kw_only=True)
class Files(Choice):
    """`train`, `validation`, `test`: files, or patterns such as `data/train-*.parquet`, or `s3://bucket/data/*`.

    They are read in the order of their paths. `columns`: the columns to read, all if not given; name them where others
    are large. `limit` keeps only the first rows of a split. `holdout`: a validation or test split without files of its
    own takes this share of the rows of `train`, by a hash of their content, and they are not trained on.
    """

    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    columns: tuple[str, ...] | None = None
    limit: int | None = None
    holdout: float = 0.0

    def __post_init__(self) -> None:
        require_share(self.holdout)
        require(bool(self.train), "train", "one or more files or patterns", list(self.train))
        need = "one or more files or patterns, or left out where holdout is set"
        require(bool(self.test) or self.holdout > 0, "test", need, list(self.test))
        require(self.columns is None or len(self.columns) > 0, "columns", "names, or left out", self.columns)
        require(self.limit is None or self.limit > 0, "limit", "positive", self.limit)

    def spec(self) -> dict[str, Any]:
        return spec_without_holdout(super().spec())

    def fingerprint(self) -> str:
        """Depends on what is in the files and on which rows are taken, not on where the files are."""
        named: dict[str, tuple[str, ...]] = {"train": self.train, "test": self.test}
        if self.validation:
            named["validation"] = self.validation
        files = {split: [places.digest(path) for path in places.find(named[split], split)] for split in named}
        selection: dict[str, Any] = {"columns": self.columns, "limit": self.limit}
        if self.holdout:
            selection["holdout"] = self.holdout
        return hashlib.sha256(json.dumps([files, selection], sort_keys=True).encode()).hexdigest()

    def rows(self, split: Split) -> Rows:
        own: dict[Split, tuple[str, ...]] = {"validation": self.validation, "test": self.test}
        files = places.find(own.get(split) or self.train, split)
        whole = bool(own.get(split)) or (split == "train" and not self.holdout)
        rows = self._read(files, self.limit if whole else None)
        if len(rows) == 0:
            raise InvalidInput(
                f"the {split} split is empty: expected rows in {', '.join(map(str, files))}, found none",
                remedy="Check the patterns, or write the files again",
            )
        if whole:
            return rows
        mine = [one for one in own if own[one]]
        return Selected(rows, part(self._contents(rows), split, self.holdout, mine)[: self.limit])

    def _read(self, files: list[Path], limit: int | None) -> Rows:
        """The first `limit` rows of the files, or all."""
        raise NotImplementedError

    def _contents(self, rows: Any) -> Iterable[bytes]:
        """What stands for each row when the rows are divided."""
        raise NotImplementedError
