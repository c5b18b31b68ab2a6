"""Hub: a data set of the Hugging Face hub, or a folder laid out like one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from storage.errors import InvalidInput, Unavailable
from tasks.choice import Choice, require
from tasks.data.base import Rows, Split
from tasks.data.held_out import content, part, require_share, spec_without_holdout

_HASHED_AT_ONCE = 1000  # rows; also part of what the fingerprint means, so it never changes


@dataclass(frozen=True)
class Hub(Choice):
    """`repo`: a data set such as `tanganke/sun397`, or a folder. `config`: its subset, if it has several.

    `train_split`, `test_split`: names of splits, or parts of them such as `train[90%:]`. `revision`: branch, tag or
    commit; give a commit for a chain that must never change. `limit` keeps only the first rows of a split. `holdout`:
    with it `validation_split` and `test_split` may be none, and take this share of the training rows each, by a hash.
    Code in data sets is never run; data sets of private repositories need HF_TOKEN.
    """

    name: Literal["hub"] = "hub"
    version: Literal[1] = 1
    repo: str = ""
    config: str | None = None
    train_split: str = "train"
    test_split: str | None = "test"
    validation_split: str | None = None
    revision: str | None = None
    limit: int | None = None
    holdout: float = 0.0

    def __post_init__(self) -> None:
        require_share(self.holdout)
        require(bool(self.test_split or self.holdout), "test_split", "a name, or none where holdout is set", None)
        require(bool(self.repo), "repo", "a data set's name on the hub or a folder", self.repo)
        require(self.limit is None or self.limit > 0, "limit", "positive", self.limit)

    def spec(self) -> dict[str, Any]:
        return spec_without_holdout(super().spec())

    def fingerprint(self) -> str:
        """A digest of the rows of both splits and of their types, whatever cache or commit they were read from.

        The library's own fingerprint and the commit name places and times, and would change while the rows do not.
        """
        splits: list[Split] = ["train", "test"]
        if self.validation_split or self.holdout:
            splits.append("validation")
        return hashlib.sha256(" ".join(_digest_split(self, split) for split in splits).encode()).hexdigest()

    def rows(self, split: Split) -> Rows:
        found: Rows = _load(self, split)
        return found

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """The names of a `ClassLabel` column, with spaces for underscores."""
        names = getattr(_load(self, "test").features.get(column), "names", None)
        return None if names is None else tuple(str(name).replace("_", " ") for name in names)


def _load(spec: Hub, split: Split) -> Any:
    # a folder may change between two runs of one process, a data set of the hub is looked up once
    return _load_now(spec, split) if Path(spec.repo).expanduser().is_dir() else _load_once(spec, split)


@cache
def _load_once(spec: Hub, split: Split) -> Any:
    return _load_now(spec, split)


def _load_now(spec: Hub, split: Split) -> Any:
    import httpx
    from datasets import load_dataset
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    own: dict[Split, str | None] = {"validation": spec.validation_split, "test": spec.test_split}
    wanted = own.get(split) or spec.train_split
    folder = Path(spec.repo).expanduser()
    path = str(folder) if folder.is_dir() else spec.repo
    try:
        dataset = load_dataset(path, spec.config, split=wanted, revision=spec.revision)
    except (ConnectionError, TimeoutError, HfHubHTTPError, httpx.TransportError) as error:
        raise Unavailable(f"cannot read data set {spec.repo!r} from the hub: {_text(error)}") from error
    except (DataFilesNotFoundError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "scripts" not in str(error):
            raise
        raise InvalidInput(
            f"data set {spec.repo!r} has no files that can be read without running its code: {_text(error)}",
            remedy="Use a copy in Parquet; the hub often keeps one under revision refs/convert/parquet",
        ) from error
    except FileNotFoundError as error:
        access = "for private or gated data sets accept their terms and set HF_TOKEN"
        raise InvalidInput(
            f"there is no data set {spec.repo!r} that you may read: {_text(error)}",
            remedy=f"Check repo and revision; {access}" if isinstance(error, DatasetNotFoundError) else "Check repo",
        ) from error
    except (DatasetsError, pa.ArrowException) as error:
        raise InvalidInput(
            f"a file of data set {spec.repo!r} cannot be read: {_text(error.__cause__ or error)}",
            remedy="Copy or download it again",
        ) from error
    except ValueError as error:  # names the configs or splits there are
        raise InvalidInput(
            f"data set {spec.repo!r} has no config {spec.config!r} with a split {wanted!r}: {_text(error)}",
            remedy="Correct config, train_split or test_split",
        ) from error
    if not own.get(split) and (split != "train" or spec.holdout):
        mine = [one for one in own if own[one]]
        dataset = dataset.select(part(_contents(dataset), split, spec.holdout, mine))
    if spec.limit is not None:
        dataset = dataset.select(range(min(spec.limit, len(dataset))))
    if len(dataset) == 0:
        raise InvalidInput(f"split {wanted!r} of data set {spec.repo!r} is empty", remedy="Name another split")
    return dataset


def _contents(dataset: Any) -> Iterator[bytes]:
    """What stands for each row, with the bytes of the files that rows only point to."""
    from datasets.table import embed_table_storage

    for table in dataset.with_format("arrow").iter(_HASHED_AT_ONCE):
        yield from map(content, embed_table_storage(table).to_pylist())


def _text(error: BaseException) -> str:
    return str(error).strip().rstrip(".")


def _digest_split(spec: Hub, split: Split) -> str:
    if Path(spec.repo).expanduser().is_dir():
        return _digest(_load_now(spec, split))
    return _digest_once(spec, split)


@cache
def _digest_once(spec: Hub, split: Split) -> str:
    """Hashing reads the whole data set, and the fingerprint is asked for before every step."""
    return _digest(_load_once(spec, split))


def _digest(dataset: Any) -> str:
    """sha256 of types and rows. Files that rows only point to, such as images in a folder, are read and hashed too."""
    from datasets.table import embed_table_storage

    digest = hashlib.sha256(json.dumps(dataset.features.to_dict(), sort_keys=True).encode())
    schema: pa.Schema | None = None
    for table in dataset.with_format("arrow").iter(_HASHED_AT_ONCE):
        # batches of a fixed size in one piece each, so that the pieces of the files do not show
        whole = embed_table_storage(table).replace_schema_metadata(None).combine_chunks()
        if schema is None:
            schema = whole.schema
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, schema) as writer:
            writer.write_table(whole)
        digest.update(sink.getvalue())
    return digest.hexdigest()
