"""Signed messages: what is taken once, and all that is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.deliveries import TOLERANCE, Deliveries, Refused, read_secrets, secrets_of, signature
from storage.errors import InvalidInput

SECRET, NEW = "a secret of thirty-two characters", "another secret of many characters"
BODY = b'{"Records": []}'
NOW = 1_800_000_000


class Clock:
    now = float(NOW)

    def __call__(self) -> float:
        return self.now


def signed(found: str = "one", moment: int = NOW, body: bytes = BODY, secret: str = SECRET) -> dict[str, str]:
    names = ("webhook-id", "webhook-timestamp", "webhook-signature")
    return dict(zip(names, (found, str(moment), signature(secret, found, moment, body)), strict=True))


def test_the_signature_is_that_of_the_standard() -> None:
    """The example of its specification, at standardwebhooks.com."""
    found = signature(
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        1614265330,
        b'{"test": 2432232314}',
    )
    assert found == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    with pytest.raises(InvalidInput, match="go on in base64"):
        Deliveries(["whsec_this is none"])


def test_a_message_is_taken_once() -> None:
    clock = Clock()
    deliveries = Deliveries([SECRET], clock)
    assert deliveries.take(signed(), BODY) == "one"
    with pytest.raises(Refused, match="came before") as caught:
        deliveries.take(signed(), BODY)
    assert caught.value.status == 409
    assert deliveries.take(signed("two"), BODY) == "two"
    clock.now += TOLERANCE + 1  # it is forgotten when it is too old to be taken again
    with pytest.raises(Refused, match="too long ago"):
        deliveries.take(signed(), BODY)
    assert deliveries.take(signed("three", int(clock.now)), BODY) == "three"
    assert set(deliveries._seen) == {"three"}


@pytest.mark.parametrize(
    ("headers", "body", "status", "why"),
    [
        ({}, BODY, 401, "not signed"),
        ({"webhook-signature": "v1,aaaa"}, BODY, 401, "not signed"),
        (signed(secret=NEW), BODY, 401, "signature is wrong"),
        (signed(), BODY + b" ", 401, "signature is wrong"),
        ({**signed(), "webhook-id": "other"}, BODY, 401, "signature is wrong"),
        ({**signed(), "webhook-timestamp": str(NOW + 1)}, BODY, 401, "signature is wrong"),
        ({**signed(), "webhook-signature": signed()["webhook-signature"][3:]}, BODY, 401, "signature is wrong"),
        ({**signed(), "webhook-signature": "v1,ä v1"}, BODY, 401, "signature is wrong"),
        ({**signed(), "webhook-timestamp": "soon"}, BODY, 401, "is none"),
        (signed("x" * 300), BODY, 401, "is none"),
        (signed(moment=NOW - TOLERANCE - 1), BODY, 401, "too long ago"),
        (signed(moment=NOW + TOLERANCE + 1), BODY, 401, "too long ago"),
        (signed(moment=NOW - 1), BODY, 409, "before this process began"),
    ],
)
def test_what_is_refused(headers: dict[str, str], body: bytes, status: int, why: str) -> None:
    with pytest.raises(Refused, match=why) as caught:
        Deliveries([SECRET], Clock()).take(headers, body)
    assert caught.value.status == status


def test_a_secret_is_changed_without_a_gap(tmp_path: Path) -> None:
    """The file has both for a while, and so may a header."""
    file = tmp_path / "webhook.secret"
    file.write_text(f"{NEW}\n\n{SECRET}\n")
    deliveries = Deliveries(secrets_of(str(file), None), Clock())
    assert deliveries.take(signed("old"), BODY) == "old"
    assert deliveries.take(signed("new", secret=NEW), BODY) == "new"
    both = {**signed("both"), "webhook-signature": f"v1,AAAA v2,AAAA {signed('both')['webhook-signature']}"}
    assert deliveries.take(both, BODY) == "both"


def test_mlflow_writes_its_own_headers() -> None:
    """As MLflow's own code signs."""
    from mlflow.webhooks.delivery import _generate_hmac_signature

    headers = {
        "x-mlflow-delivery-id": "d-1",
        "x-mlflow-timestamp": str(NOW),
        "x-mlflow-signature": _generate_hmac_signature(SECRET, "d-1", str(NOW), BODY.decode()),
    }
    assert Deliveries([SECRET], Clock()).take(headers, BODY) == "d-1"


def test_secrets_that_are_none(tmp_path: Path) -> None:
    for text in ("", "\n", "short\n", f"{SECRET}\nshort"):
        with pytest.raises(InvalidInput, match="at least 16 characters"):
            read_secrets(text, "the file")
    with pytest.raises(InvalidInput, match="no secret"):
        secrets_of(None, None)
    with pytest.raises(InvalidInput, match="cannot be read"):
        secrets_of(str(tmp_path / "none"), None)
