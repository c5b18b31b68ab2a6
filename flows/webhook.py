"""The webhook: an HTTP endpoint that is told of new checkpoints, and lets the watchers of their inboxes look at once.

    POST /s3       an event notification of a bucket, as AWS, MinIO, Ceph and others write it
    POST /mlflow   an event of MLflow's model registry
    GET  /health   200 while it runs

What a message says decides only which inbox is looked at; what is there is found by looking, on the same path as
without a webhook. So the worst that a message can do is a look.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote_plus

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from flows.deliveries import Deliveries, Refused
from flows.watch import MODELS, Say

LARGEST = 256 * 2**10  # bytes of a message; notifications have a few hundred


class Ringing:
    """A bell that another thread rings."""

    def __init__(self) -> None:
        self._rung = threading.Event()

    def ring(self) -> None:
        self._rung.set()

    def wait(self, seconds: float) -> None:
        if self._rung.wait(seconds):
            self._rung.clear()  # before the look: whoever rings during it causes another one

    def answered(self) -> None:
        pass


def endpoint(bells: Mapping[str, Ringing], deliveries: Deliveries, say: Say) -> Starlette:
    """The application. `bells`: the address of an inbox -> what lets its watcher look."""

    def answering(addresses: Any) -> Any:
        async def answer(request: Request) -> JSONResponse:
            try:
                body = await _body(request)
                found = await run_in_threadpool(deliveries.take, dict(request.headers), body)
                told = [address for address in addresses(_parsed(body)) if address in bells]
            except Refused as error:
                say(f"refused a message from {request.client.host if request.client else '?'}: {error.why}")
                return JSONResponse({"refused": error.why}, error.status)
            for address in told:
                bells[address].ring()
            say(f"message {found[:64]!r} is about {', '.join(told) or 'nothing that is watched'}")
            return JSONResponse({"looking": told}, 202 if told else 200)

        return answer

    inboxes = tuple(bells)
    routes = [
        Route("/s3", answering(lambda said: _of_bucket(said, inboxes)), methods=["POST"]),
        Route("/mlflow", answering(_of_registry), methods=["POST"]),
        Route("/health", _healthy, methods=["GET"]),
    ]
    return Starlette(routes=routes)


async def _healthy(request: Request) -> JSONResponse:
    return JSONResponse({"status": "ok"})


async def _body(request: Request) -> bytes:
    """The body, of which no more is read than is allowed."""
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal() or int(announced) > LARGEST:
        raise Refused(413, f"it has more than {LARGEST} bytes")
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > LARGEST:
            raise Refused(413, f"it has more than {LARGEST} bytes")
    return bytes(data)


def _parsed(body: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Refused(400, "it is not a JSON object")
    return found


def _of_bucket(said: Mapping[str, Any], inboxes: tuple[str, ...]) -> list[str]:
    """The inboxes that hold an object which came; keys are written as in a form. A test message has no records."""
    places = []
    try:
        for record in said.get("Records") or []:
            if str(record["eventName"]).removeprefix("s3:").startswith("ObjectCreated"):
                places.append(f"s3://{record['s3']['bucket']['name']}/{unquote_plus(record['s3']['object']['key'])}")
    except (TypeError, KeyError, AttributeError) as error:
        raise Refused(400, "it is not a notification of a bucket") from error
    return [one for one in inboxes if any(place.startswith(f"{one.rstrip('/')}/") for place in places)]


def _of_registry(said: Mapping[str, Any]) -> list[str]:
    """The registered model that has a new version."""
    data = said.get("data")
    if not isinstance(data, dict) or not isinstance(data.get("name"), str):
        raise Refused(400, "it is not an event of MLflow's model registry")
    return (
        [f"{MODELS}{data['name']}"] if (said.get("entity"), said.get("action")) == ("model_version", "created") else []
    )
