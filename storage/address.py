"""Addresses: the object store that a URL names."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlparse

from storage.cache import CachedObjects
from storage.directory import DirectoryObjects
from storage.errors import InvalidInput
from storage.objects import MemoryObjects, ObjectStore


def open_objects(url: str, cache: Path | None = None, cache_size: int = 0) -> ObjectStore:
    """The object store at `url`: `file:///path`, a plain path, `s3://bucket/prefix` or `memory:`.

    Of a remote one, up to `cache_size` bytes of what is read and written are also kept in the folder `cache`.
    """
    parsed = urlparse(url)
    match parsed.scheme:
        case "s3":
            from storage.s3 import S3Objects  # boto3 takes half a second to import: only for those who need it

            remote = S3Objects(parsed.netloc, parsed.path.strip("/"))
            return CachedObjects(remote, cache, cache_size) if cache else remote
        case "file":
            return DirectoryObjects(Path(unquote(parsed.path)))
        case "memory":
            return MemoryObjects()
        case "" if url:
            return DirectoryObjects(Path(url))
        case _:
            raise InvalidInput(
                f"store address {url!r} is not understood",
                remedy="Use file:///path, s3://bucket/prefix (endpoint in AWS_ENDPOINT_URL) or memory:",
            )
