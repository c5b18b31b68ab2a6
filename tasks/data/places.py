"""Places: where files of examples are, on a disk or on S3, and how those on S3 come here.

A file on S3 is copied to a temporary folder in pieces, once per process as long as it does not change there: its bytes
are hashed for the fingerprint in any case, and random access over a network would be slow. pyarrow reads S3 with the
same AWS_ variables as the store.
"""

from __future__ import annotations

import atexit
import glob
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from storage.errors import InvalidInput, StoreFull, Unavailable

_PIECE = 8 * 2**20
_S3 = "s3://"


def find(patterns: Sequence[str], split: str) -> list[Path]:
    """The files of these patterns, on this machine, in the order of their paths."""
    found: dict[str, Path] = {}
    for pattern in patterns:
        matches = _find_remote(pattern, split) if pattern.startswith(_S3) else _find_local(pattern, split)
        found.update(matches)
    return [found[key] for key in sorted(found)]


def digest(path: Path) -> str:
    state = path.stat()
    return _digest_of_version(path, state.st_size, state.st_mtime_ns)


def version(path: Path) -> tuple[str, int, int]:
    """What a file is known by as long as it does not change."""
    state = path.stat()
    return str(path), state.st_size, state.st_mtime_ns


@cache
def _digest_of_version(path: Path, size: int, mtime_ns: int) -> str:
    """sha256 of a file, once per process as long as the file does not change: it is asked for before every step."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _find_local(pattern: str, split: str) -> dict[str, Path]:
    matches = [Path(match) for match in glob.glob(str(Path(pattern).expanduser()), recursive=True)]
    if not matches:
        raise InvalidInput(
            f"no file matches {pattern!r} of the {split} split",
            remedy="Check the path; a relative one starts from the folder that the command is run in",
        )
    folders = sorted(path for path in matches if path.is_dir())
    if folders:
        raise InvalidInput(f"{folders[0]} is a folder", remedy=f"Name its files: {folders[0]}/*.parquet")
    return {str(path): path for path in matches}


def _find_remote(pattern: str, split: str) -> dict[str, Path]:
    from pyarrow.fs import FileSelector, FileType

    address = pattern.removeprefix(_S3)
    steady = re.split(r"[*?\[]", address, maxsplit=1)[0]
    with _errors(pattern):
        files = _connect()
        if steady == address:
            infos = [files.get_file_info(address)]
        else:
            listed = files.get_file_info(FileSelector(steady.rpartition("/")[0], recursive=True))
            wanted = re.compile(_expression(address))
            infos = [info for info in listed if wanted.fullmatch(info.path)]
        infos = [info for info in infos if info.type == FileType.File]
        if not infos:
            raise InvalidInput(
                f"no object matches {pattern!r} of the {split} split",
                remedy="Check the address, and AWS_ENDPOINT_URL; patterns are written like s3://bucket/data/*.parquet",
            )
        return {f"{_S3}{info.path}": _copied(info.path, info.size, info.mtime_ns) for info in infos}


def _expression(pattern: str) -> str:
    """A pattern of names as a regular expression: `*` and `?` stay in one folder, `**` does not."""
    words = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    return "".join(words.get(one, re.escape(one)) for one in parts)


@cache
def _folder() -> Path:
    folder = tempfile.mkdtemp(prefix="deltaworks-data-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@cache
def _copied(path: str, size: int, mtime_ns: int) -> Path:
    """The copy of one version of an object."""
    name = hashlib.sha256(f"{path} {size} {mtime_ns}".encode()).hexdigest()[:16]
    place = _folder() / f"{name}-{path.rpartition('/')[2]}"
    if shutil.disk_usage(place.parent).free < size:
        raise StoreFull(f"no room for {_S3}{path} ({size:,} bytes) in {place.parent}", remedy="Set TMPDIR to a disk")
    descriptor, name = tempfile.mkstemp(dir=place.parent)  # two threads may copy the same object at the same time
    part = Path(name)
    with _connect().open_input_stream(path) as source, open(descriptor, "wb") as target:
        while piece := source.read(_PIECE):
            target.write(piece)
    if part.stat().st_size != size:
        raise Unavailable(f"{_S3}{path}: {part.stat().st_size:,} of {size:,} bytes came", remedy="Run again")
    part.rename(place)
    return place


def _connect() -> Any:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    # the keys are part of what a connection is known by, because it would keep those that it began with
    keys = tuple(os.environ.get(name) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"))
    return _connected(endpoint, region, os.environ.get("AWS_CA_BUNDLE"), hash(keys))


@cache
def _connected(endpoint: str, region: str, authorities: str | None, keys: int) -> Any:
    from pyarrow.fs import S3FileSystem

    scheme, _, host = endpoint.rstrip("/").rpartition("://")
    where = {"endpoint_override": host, "scheme": scheme or "https"} if endpoint else {}
    if authorities:
        where["tls_ca_file_path"] = authorities
    return S3FileSystem(region=region, connect_timeout=10, request_timeout=60, **where)


@contextmanager
def _errors(pattern: str) -> Iterator[None]:
    """What pyarrow says about S3, as an error of ours: it has one kind of exception for all, and a word in its text."""
    try:
        yield
    except FileNotFoundError as error:
        raise InvalidInput(f"{pattern}: {error}", remedy="Check bucket and path") from error
    except OSError as error:
        text = str(error)
        if any(word in text for word in ("ACCESS_DENIED", "INVALID_ACCESS_KEY", "SIGNATURE", "InvalidAccessKeyId")):
            raise InvalidInput(
                f"{pattern}: the server refused: {text}", remedy="Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from error
        if "NO_SUCH_BUCKET" in text or "NoSuchBucket" in text:
            raise InvalidInput(f"{pattern}: there is no such bucket: {text}", remedy="Correct the address") from error
        raise Unavailable(f"{pattern}: {text}", remedy="Check AWS_ENDPOINT_URL and that the server runs") from error
