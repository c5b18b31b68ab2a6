"""One way to put and to get the same bytes, in a process of its own: `storing` runs it and reads what it prints."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from storage.address import open_objects
from storage.artifacts import ArtifactStore
from storage.files import write_all
from storage.manifest import Lineage
from storage.streams import pieces_of, save
from tests.benchmarks.usage import tell

THREADS = 8
PIECE = 1 << 20
Work = Callable[[], object]


def large_data(source: Path) -> bytearray:
    """The file's bytes; without a second copy of them."""
    data = bytearray(source.stat().st_size)
    with source.open("rb") as file:
        file.readinto(data)
    return data


class Small:
    """Many small objects: each is the same random bytes behind its number."""

    def __init__(self, size: int) -> None:
        self.count, self._rest = size // PIECE, os.urandom(PIECE - 8)

    def __getitem__(self, number: int) -> bytes:
        return number.to_bytes(8, "little") + self._rest

    def each(self, work: Callable[[int], object]) -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(work, range(self.count)):
                pass


def ours_large(url: str, source: Path, out: Path) -> tuple[Work, Work]:
    objects, size = open_objects(url), source.stat().st_size
    objects.size("warm")
    return lambda: objects.write("large", size, pieces_of(source)), lambda: save(objects.read("large"), out)


def ours_small(url: str, source: Path, out: Path) -> tuple[Work, Work]:
    objects, small = open_objects(url), Small(source.stat().st_size)
    objects.size("warm")
    put = lambda: small.each(lambda number: objects.put(f"small/{number}", small[number]))  # noqa: E731
    return put, lambda: small.each(lambda number: objects.view(f"small/{number}"))


def named_large(url: str, source: Path, out: Path) -> tuple[Work, Work]:
    """As an asset of an artifact: hashed to find its name, hashed again on its way, and when it is read."""
    store = ArtifactStore(open_objects(url))
    store.objects.size("warm")
    name = []
    put = lambda: name.append(store.write_file(source).blob)  # noqa: E731
    return put, lambda: save(store.stream_blob(name[0], what="benchmark"), out)


def named_small(url: str, source: Path, out: Path) -> tuple[Work, Work]:
    """As assets of one artifact: looked for, hashed, sent beside the hashing of the next."""
    store, small = ArtifactStore(open_objects(url)), Small(source.stat().st_size)
    store.objects.size("warm")
    refs = []

    def put() -> None:
        draft = store.draft("scores", Lineage("benchmark"))
        for number in range(small.count):
            draft.add_asset(f"{number}", small[number])
        refs.append(draft.commit())

    def get() -> None:
        artifact = store.open(refs[0])
        small.each(lambda number: artifact.asset(f"{number}"))

    return put, get


def held_large(url: str, source: Path, out: Path) -> tuple[Work, Work]:
    """A blob that is in memory, as a tensor is: hashed, written, synced; mapped and hashed when it is read."""
    store, name = ArtifactStore(open_objects(url)), []
    data = large_data(source)
    put = lambda: name.append(store.write_blob(data))  # type: ignore[arg-type]  # noqa: E731
    return put, lambda: store.read_blob(name[0], what="benchmark")


def synced_large(url: str, source: Path, out: Path) -> tuple[Work, Work]:
    """The same, durable when it returns."""
    copied, read = copy_large(url, source, out)

    def synced() -> None:
        copied()
        _sync(out)

    return synced, read


def synced_small(url: str, source: Path, out: Path) -> tuple[Work, Work]:
    _, read = copy_small(url, source, out)
    one, two = out.with_suffix(".one"), out.with_suffix(".synced")
    two.mkdir()

    def synced(number: int) -> None:
        shutil.copyfile(one / f"{number}", two / f"{number}")
        hashlib.sha256((two / f"{number}").read_bytes()).digest()
        _sync(two / f"{number}")

    small = Small(source.stat().st_size)
    return lambda: small.each(synced), read


def bare_small(url: str, source: Path, out: Path) -> tuple[Work, Work]:
    """What the system takes for the same bytes and the same promise, and nothing else: a name, a file, a sync."""
    small, folder = Small(source.stat().st_size), out.with_suffix(".bare")
    folder.mkdir()

    def written(number: int) -> None:
        data = small[number]
        with (folder / f"{number}").open("xb", buffering=0) as file:
            hashlib.sha256(data).digest()
            write_all(file.fileno(), data)
            os.fsync(file.fileno())

    read = lambda number: hashlib.sha256((folder / f"{number}").read_bytes()).digest()  # noqa: E731
    return lambda: small.each(written), lambda: small.each(read)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def copy_large(url: str, source: Path, out: Path) -> tuple[Work, Work]:
    """`cp` and one sha256: from the page cache, and durable some time later."""

    def copied() -> None:
        shutil.copyfile(source, out)
        with source.open("rb") as file:
            hashlib.file_digest(file, "sha256")

    return copied, copied


def copy_small(url: str, source: Path, out: Path) -> tuple[Work, Work]:
    small, one, two = Small(source.stat().st_size), out.with_suffix(".one"), out.with_suffix(".two")
    for folder in (one, two):
        folder.mkdir()
    for number in range(small.count):
        (one / f"{number}").write_bytes(small[number])

    def copied(number: int) -> None:
        shutil.copyfile(one / f"{number}", two / f"{number}")
        hashlib.sha256((two / f"{number}").read_bytes()).digest()

    return lambda: small.each(copied), lambda: small.each(copied)


def boto_large(url: str, source: Path, out: Path) -> tuple[Work, Work]:
    import boto3
    from boto3.s3.transfer import TransferConfig

    client, (bucket, key) = boto3.client("s3"), url.removeprefix("s3://").split("/", 1)
    config = TransferConfig(multipart_chunksize=32 * 2**20, max_concurrency=4, preferred_transfer_client="classic")
    client.head_bucket(Bucket=bucket)
    put = lambda: client.upload_file(str(source), bucket, f"{key}/large", Config=config)  # noqa: E731
    return put, lambda: client.download_file(bucket, f"{key}/large", str(out), Config=config)


def boto_small(url: str, source: Path, out: Path) -> tuple[Work, Work]:
    import boto3
    from botocore.config import Config

    client, (bucket, key) = (
        boto3.client("s3", config=Config(max_pool_connections=32)),
        url.removeprefix("s3://").split("/", 1),
    )
    small = Small(source.stat().st_size)
    client.head_bucket(Bucket=bucket)
    put = lambda n: client.put_object(Bucket=bucket, Key=f"{key}/small/{n}", Body=small[n])  # noqa: E731
    get = lambda n: client.get_object(Bucket=bucket, Key=f"{key}/small/{n}")["Body"].read()  # noqa: E731
    return lambda: small.each(put), lambda: small.each(get)


def obstore_large(url: str, source: Path, out: Path) -> tuple[Work, Work]:
    store = _obstore(url)
    import obstore

    put = lambda: obstore.put(store, "large", source, chunk_size=8 * 2**20, max_concurrency=8)  # noqa: E731
    return put, lambda: save(map(memoryview, obstore.get(store, "large").stream(min_chunk_size=8 * 2**20)), out)


def obstore_small(url: str, source: Path, out: Path) -> tuple[Work, Work]:
    store, small = _obstore(url), Small(source.stat().st_size)
    import obstore

    put = lambda: small.each(lambda number: obstore.put(store, f"small/{number}", small[number]))  # noqa: E731
    return put, lambda: small.each(lambda number: obstore.get(store, f"small/{number}").bytes())


def _obstore(url: str) -> object:
    from obstore.store import S3Store

    bucket, key = url.removeprefix("s3://").split("/", 1)
    names = {"endpoint": "ENDPOINT_URL", "access_key_id": "ACCESS_KEY_ID", "secret_access_key": "SECRET_ACCESS_KEY"}
    config = {f"aws_{name}": os.environ[f"AWS_{variable}"] for name, variable in names.items()}
    config["aws_region"] = os.environ["AWS_DEFAULT_REGION"]
    return S3Store(bucket, prefix=key, config=config, client_options={"allow_http": True})


def main(way: str, shape: str, url: str, source: str, out: str) -> None:
    put, get = globals()[f"{way}_{shape}"](url, Path(source), Path(out))
    for work in (put, get):
        _claim_memory(Path(out).with_suffix(".claim"), Path(source).stat().st_size)
        tell(work)


def _claim_memory(file: Path, size: int) -> None:
    """Write and remove as much as is about to be written, so that the pages are the machine's own. A virtual one
    gives free pages back to its host after seconds, and has 400 MB/s of new ones: the host's figure, not a store's."""
    bite = bytes(2**18)
    with file.open("wb", buffering=0) as out:
        for _ in range(size // len(bite)):
            out.write(bite)
    file.unlink()


if __name__ == "__main__":
    main(*sys.argv[1:])
