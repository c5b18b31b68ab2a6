"""What an S3 store does when something between it and a real server breaks: nothing acknowledged is lost, nothing
half-written is seen, and the message says what to do."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from datetime import timedelta
from hashlib import sha256
from urllib.parse import parse_qs, urlparse

import botocore.auth
import pytest

from storage.artifacts import ArtifactStore
from storage.errors import Conflict, Damaged, DeltaworksError, InvalidInput, Missing, StoreFull, Unavailable
from storage.lines import Line
from storage.refs import CheckpointRef, Ref
from storage.s3 import S3Objects
from storage.s3_doctor import abandoned, remove_uploads
from storage.s3_transfer import PIECE, SINGLE
from storage.streams import checked
from tests.storage import s3_faults as faults
from tests.storage.s3_faults import Answer, Fault, Relay, Request, relay
from tests.storage.s3_fixtures import BUCKET

LARGE = random.Random(1).randbytes(SINGLE + 3 * 2**20 + 12345)
BASE = CheckpointRef(Ref(f"checkpoint/{'0' * 64}"))
RECIPE = {"name": "average", "version": 1}


def getting(request: Request) -> bool:
    return request.method == "GET" and "list-type" not in request.target


def putting(request: Request) -> bool:
    return request.method == "PUT"


def a_part(number: int) -> Callable[[Request], bool]:
    return lambda request: parse_qs(urlparse(request.target).query).get("partNumber") == [str(number)]


def completing(request: Request) -> bool:
    return request.method == "POST" and "uploadId" in request.target


class Place:
    """A store on the real server, and the same one through a relay."""

    def __init__(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prefix = url.rpartition("/")[2]
        self.direct = S3Objects(BUCKET, self.prefix)
        self.direct.connected()  # it keeps the server's address, whatever the environment says later
        self._endpoint, self._monkeypatch = os.environ["AWS_ENDPOINT_URL"], monkeypatch
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")

    def through(
        self, *broken: Fault, matches: Callable[[Request], bool] = lambda request: True, always: bool = False
    ) -> Iterator[tuple[S3Objects, Relay]]:
        with relay(self._endpoint, *broken, matches=matches, always=always) as (address, it):
            self._monkeypatch.setenv("AWS_ENDPOINT_URL", address)
            store = S3Objects(BUCKET, self.prefix)
            store.connected()
            self._monkeypatch.setenv("AWS_ENDPOINT_URL", self._endpoint)
            yield store, it

    def nothing_of(self, key: str) -> bool:
        """Neither the object nor parts of it are there."""
        return self.direct.size(key) is None and abandoned(self.direct, older=timedelta(0)) == []


@pytest.fixture
def place(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(s3_url, monkeypatch)


class TestConditions:
    """Journals are refused where the server does not decide between two writers."""

    @pytest.mark.parametrize(
        ("fault", "seen"),
        [(faults.ignore_conditions, "replaced the first"), (faults.look_then_write, "of 8 writers")],
        ids=["ignored", "not atomic"],
    )
    def test_a_server_that_lets_several_writers_win(self, place: Place, fault: Fault, seen: str) -> None:
        for store, _ in place.through(fault, matches=faults.conditional, always=True):
            line = Line(store, "main")
            for use in (store.ready, lambda line=line: line.open(BASE, RECIPE), store.ready):
                with pytest.raises(InvalidInput, match=seen) as caught:
                    use()
                assert "store doctor" in str(caught.value)
            assert list(store.list("")) == []  # no journal, and nothing is left of the trial
            name = ArtifactStore(store).write_blob(b"named by its content")
            assert ArtifactStore(store).read_blob(name, what="a blob") == b"named by its content"
        assert place.direct.create("line/main/00000000", b"the same bucket, by an address that can be trusted")

    def test_what_was_found_is_remembered_in_the_store(self, place: Place) -> None:
        for store, it in place.through():
            assert store.create("line/main/00000000", b"entry")
            again = S3Objects(BUCKET, place.prefix)
            again._client, again._transfer = store.connected(), store._transfer
            it.seen.clear()
            assert again.create("line/main/00000001", b"entry")
            assert [request.method for request in it.seen] == ["GET", "PUT"]
            assert list(store.list("")) == ["line/main/00000000", "line/main/00000001"]

    def test_lost_answers_do_not_condemn_a_server(self, place: Place) -> None:
        for store, it in place.through(*[faults.lose_the_answer] * 2, matches=faults.conditional):
            store.ready()
            assert len(it.met) == 2

    def test_a_lost_commit_is_not_a_conflict(self, place: Place) -> None:
        place.direct.ready()
        for store, it in place.through(
            faults.lose_the_answer, matches=lambda request: "line/" in request.target and putting(request)
        ):
            opened = Line(store, "main").open(BASE, RECIPE)
            assert it.met
            assert Line(place.direct, "main").head() == opened
            with pytest.raises(Conflict):
                Line(store, "main").open(CheckpointRef(Ref(f"checkpoint/{'1' * 64}")), RECIPE)


class TestReads:
    @pytest.mark.parametrize("size", [1000, len(LARGE)])
    def test_what_breaks_off_is_read_on(self, place: Place, size: int) -> None:
        place.direct.put("key", LARGE[:size])
        uses: list[Callable[[S3Objects], bytes]] = [
            lambda store: store.get("key"),
            lambda store: bytes(store.view("key")),
            lambda store: b"".join(store.read("key")),
        ]
        for use in uses:
            for store, it in place.through(faults.cut_short, matches=getting):
                assert sha256(use(store)).digest() == sha256(LARGE[:size]).digest()
                assert len(it.met) == 1

    @pytest.mark.parametrize(
        "fault", [faults.hang_up, faults.lose_the_answer, faults.refuse(503, "SlowDown")], ids=["reset", "lost", "503"]
    )
    def test_what_is_not_answered_is_asked_again(self, place: Place, fault: Fault) -> None:
        place.direct.put("key", LARGE)
        for store, it in place.through(fault, fault, matches=getting):
            assert store.view("key") == LARGE
            assert len(it.met) == 2

    def test_only_the_rest_is_read_again(self, place: Place) -> None:
        place.direct.put("key", LARGE)
        for store, it in place.through(faults.cut_short, matches=getting):
            assert store.view("key") == LARGE
            begun = [int(request.headers["Range"].split("=")[1].split("-")[0]) for request in it.seen]
            assert [start for start in begun if start % PIECE]
            assert len(begun) == -(-len(LARGE) // PIECE) + 1

    def test_a_server_that_knows_no_ranges(self, place: Place) -> None:
        place.direct.put("key", LARGE)
        for store, _ in place.through(faults.ignore_ranges, matches=getting, always=True):
            assert store.view("key") == LARGE
            assert sha256(b"".join(store.read("key"))).digest() == sha256(LARGE).digest()

    def test_a_server_that_knows_no_ranges_and_breaks_off(self, place: Place) -> None:
        place.direct.put("key", LARGE)
        for store, it in place.through(whole_and_cut, *[faults.ignore_ranges] * 4, matches=getting):
            assert sha256(b"".join(store.read("key"))).digest() == sha256(LARGE).digest()
            assert len(it.met) > 1

    def test_silence_ends(self, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        place.direct.put("key", b"data")
        monkeypatch.setenv("DELTAWORKS_S3_TIMEOUT", "1")
        for store, it in place.through(faults.stall(3), matches=getting):
            assert store.get("key") == b"data"
            assert len(it.met) == 1

    def test_what_never_comes_is_said(self, place: Place) -> None:
        place.direct.put("key", b"data")
        for store, _ in place.through(faults.refuse(503, "SlowDown"), always=True):
            with pytest.raises(Unavailable, match="AWS_ENDPOINT_URL"):
                store.get("key")

    def test_bytes_that_changed_on_their_way_are_asked_for_again(self, place: Place) -> None:
        artifacts = ArtifactStore(place.direct)
        name = artifacts.write_blob(LARGE[:100_000])
        for store, it in place.through(faults.alter_the_answer, matches=getting):
            assert ArtifactStore(store).read_blob(name, what="a blob") == LARGE[:100_000]
            assert len(it.met) == 1
        for store, _ in place.through(faults.alter_the_answer, matches=getting, always=True):
            with pytest.raises(Damaged, match=name):
                ArtifactStore(store).read_blob(name, what="a blob")
            with pytest.raises(Damaged, match=name):
                ArtifactStore(store).check_blob(name, what="a blob")

    def test_an_object_that_is_removed_or_replaced_while_it_is_read(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DELTAWORKS_S3_PARALLEL", "1")  # so that not all pieces are on their way already
        store = S3Objects(BUCKET, place.prefix)
        for change, expected in (("removed", Missing), ("replaced", Unavailable)):
            store.put("key", LARGE * 3)
            pieces = store.read("key")
            assert next(pieces) == LARGE[: 2**20]
            if change == "removed":
                store.remove(f"{place.prefix}/key")
            else:
                store.put("key", LARGE[::-1] * 3)
            with pytest.raises(expected):
                list(pieces)


class TestWrites:
    @pytest.mark.parametrize(
        "fault", [faults.hang_up, faults.lose_the_answer, faults.refuse(503, "SlowDown")], ids=["reset", "lost", "503"]
    )
    @pytest.mark.parametrize("size", [1000, len(LARGE)])
    def test_what_breaks_off_is_sent_again(self, place: Place, fault: Fault, size: int) -> None:
        for store, it in place.through(fault, matches=putting):
            store.put("key", LARGE[:size])
            assert len(it.met) == 1
        assert sha256(place.direct.view("key")).digest() == sha256(LARGE[:size]).digest()

    def test_the_lost_answer_to_the_end_of_an_upload(self, place: Place) -> None:
        for store, it in place.through(faults.lose_the_answer, matches=completing):
            store.put("key", LARGE)
            assert len(it.met) == 1
        assert sha256(place.direct.view("key")).digest() == sha256(LARGE).digest()
        assert abandoned(place.direct, older=timedelta(0)) == []

    @pytest.mark.parametrize("size", [1000, len(LARGE)])
    def test_bytes_that_changed_on_their_way_are_refused(self, place: Place, size: int) -> None:
        place.direct.put("old", b"old")
        for store, _ in place.through(faults.alter_the_request, matches=putting, always=True):
            for key in ("new", "old"):
                with pytest.raises(Unavailable):
                    store.put(key, LARGE[:size])
        assert place.nothing_of("new")
        assert place.direct.get("old") == b"old"

    @pytest.mark.parametrize(
        ("status", "code", "kind"),
        [(507, "InsufficientStorage", StoreFull), (403, "QuotaExceeded", StoreFull), (503, "SlowDown", Unavailable)],
    )
    def test_an_upload_that_ends_in_its_middle_leaves_nothing(
        self, place: Place, status: int, code: str, kind: type[DeltaworksError]
    ) -> None:
        for store, _ in place.through(faults.refuse(status, code), matches=a_part(2), always=True):
            with pytest.raises(kind, match=r"then run (the same command )?again"):
                store.put("key", LARGE)
        assert place.nothing_of("key")

    @pytest.mark.parametrize("size", [1000, len(LARGE)])
    def test_pieces_that_are_not_what_they_should_be_are_never_seen(self, place: Place, size: int) -> None:
        data = LARGE[:size]
        pieces = [data[start : start + 500_000] for start in range(0, size, 500_000)]
        with pytest.raises(Damaged, match="a file"):
            place.direct.write("key", size, checked(pieces, "0" * 64, what="a file"))
        for wrong in (size - 1, size + 1):
            with pytest.raises(InvalidInput, match=f"{wrong:,} bytes were announced"):
                place.direct.write("key", wrong, pieces)
        with pytest.raises(KeyboardInterrupt):
            place.direct.write("key", size, interrupted(pieces))
        assert place.nothing_of("key")

    def test_uploads_that_nobody_ended_are_found_and_removed(self, place: Place) -> None:
        client, key = place.direct.connected(), f"{place.prefix}/blob"
        client.create_multipart_upload(Bucket=BUCKET, Key=key)
        assert [found[0] for found in abandoned(place.direct, older=timedelta(0))] == [key]
        assert remove_uploads(place.direct) == 0  # it may still be going on
        assert remove_uploads(place.direct, older=timedelta(0)) == 1
        assert place.nothing_of("blob")


def whole_and_cut(request: Request, forward: Callable[[Request], Answer]) -> Answer:
    answer = faults.ignore_ranges(request, forward)
    answer.cut = len(answer.body) - PIECE
    return answer


def interrupted(pieces: list[bytes]) -> Iterator[bytes]:
    yield from pieces[:-1]
    raise KeyboardInterrupt


def test_clocks_that_differ(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's own refusal of a signature from another hour."""
    now = botocore.auth.get_current_datetime
    with monkeypatch.context() as changed:
        changed.setattr(botocore.auth, "get_current_datetime", lambda *args, **kwargs: now() + timedelta(hours=2))
        with pytest.raises(InvalidInput, match="set this machine's clock"):
            place.direct.put("key", b"data")
