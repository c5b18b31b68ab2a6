"""Receive: what was submitted to a line, from wherever it lies, into the store."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

from storage.address import open_objects
from storage.artifacts import ArtifactStore
from storage.directory import DirectoryObjects
from storage.errors import DeltaworksError, InvalidInput, Mismatch
from storage.objects import ObjectStore
from storage.refs import CheckpointRef, parse_ref, short
from tasks.adapters import ingest_adapter
from tasks.inbox import Offer, fingerprint, fingerprint_of, offer_at
from tasks.ingest import Checkpoint, ingest

_HOUSE = Path(__file__).parents[1]
_BUGS = (TypeError, AttributeError, NameError, LookupError, AssertionError)


def receive(content: str, reference: str, base: CheckpointRef, store: ArtifactStore) -> CheckpointRef:
    """The checkpoint at `reference`: a ref of this store, a folder, or the address of a bucket.

    A Hugging Face folder or an adapter of peft, which `base` is needed for. Raises Mismatch if the files no longer are
    those with the digest `content`, and what an ingest raises.
    """
    if reference.startswith("checkpoint/"):
        ref = CheckpointRef(parse_ref(reference, "checkpoint"))
        if not store.has(ref):
            raise InvalidInput(f"{short(ref)} was submitted, but is no longer in {store.url}", remedy="Submit it again")
        return ref
    place = open_objects(reference)
    offer = offer_at(place)
    with _here(place, offer, content, reference) as folder:
        try:
            if offer.is_adapter:
                return ingest_adapter(folder, base, store)
            return ingest(Checkpoint(source=str(folder)), store)
        except InvalidInput as error:
            error.args = (str(error).replace(str(folder), reference),)  # a folder of ours tells nobody anything
            raise
        except (DeltaworksError, OSError, MemoryError):
            raise
        except Exception as error:  # libraries have errors of all kinds for configs and files that make no sense
            if _is_ours(error):
                raise  # a bug, of which the files are not to blame
            said = str(error).replace(str(folder), reference)
            raise InvalidInput(f"{reference} cannot be read: {type(error).__name__}: {said}") from error


def _is_ours(error: Exception) -> bool:
    """Whether it is a bug of this project: a mistake in Python, made by a line of these rooms and not of a library."""
    *_, last = traceback.walk_tb(error.__traceback__)
    path = Path(last[0].f_code.co_filename)
    return isinstance(error, _BUGS) and any(path.is_relative_to(_HOUSE / room) for room in ("tasks", "storage"))


@contextmanager
def _here(place: ObjectStore, offer: Offer, content: str, reference: str) -> Iterator[Path]:
    """The folder with the files, held against their digest; those of a bucket are copied for as long as needed."""
    if isinstance(place, DirectoryObjects):
        _check(fingerprint(place, offer), content, reference)
        yield place.root
        if offer_at(place).signature != offer.signature:
            raise InvalidInput(f"{reference} was written to while it was read", remedy="Submit it when it is complete")
        return
    with TemporaryDirectory(prefix="deltaworks-") as folder:
        digests = {}
        for name in offer.content:
            seen = sha256()
            with open(Path(folder, name), "xb") as file:
                for piece in place.read(offer.files[name].key):
                    seen.update(piece)
                    file.write(piece)
            digests[name] = seen.hexdigest()
        _check(fingerprint_of(offer, digests), content, reference)
        yield Path(folder)


def _check(found: str, content: str, reference: str) -> None:
    if found != content:
        raise Mismatch(
            f"the files at {reference}",
            expected=f"those that were submitted, with digest {content[:12]}…",
            found=f"others, with digest {found[:12]}…",
            remedy="Somebody wrote over them: what is there now is a submission of its own",
        )
