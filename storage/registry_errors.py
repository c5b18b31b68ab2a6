"""Errors of the registry, as ours: what a handler may do about them, and no password in what they say."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from mlflow.exceptions import MlflowException
from requests.exceptions import RequestException

from storage.errors import DeltaworksError, InvalidInput, Unavailable

_USER = "MLFLOW_TRACKING_USERNAME"
_REACH = "Check MLFLOW_TRACKING_URI and that the server runs"
_NAME = f"Set {_USER} and MLFLOW_TRACKING_PASSWORD to those of a user who may"
_PASSING = ("TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR", "REQUEST_LIMIT_EXCEEDED")


@contextmanager
def mapped(tracking: str) -> Iterator[None]:
    """Foreign errors as ours: a registry that does not answer is worth a retry, anything else is not."""
    try:
        yield
    except DeltaworksError:
        raise
    except MlflowException as error:
        raise _ours(error, public(tracking)) from None
    except (RequestException, OSError) as error:
        raise Unavailable(
            f"MLflow at {public(tracking)} does not answer: {type(error).__name__}",
            remedy=_REACH,
        ) from None


def _ours(error: MlflowException, address: str) -> DeltaworksError:
    said = public(str(error.message))
    if "failed with exception" in said:  # no answer came: the client tells it as an internal error
        cause = re.search(r"Caused by (\w+)", said)
        return Unavailable(f"MLflow at {address} does not answer{f': {cause[1]}' if cause else ''}", remedy=_REACH)
    if "error code 401" in said:
        return InvalidInput(f"MLflow at {address} wants to know who asks", remedy=_NAME)
    if "error code 403" in said:
        return InvalidInput(
            f"MLflow at {address} does not allow this to {os.environ.get(_USER, 'nobody')!r}", remedy=_NAME
        )
    return (Unavailable if error.error_code in _PASSING else InvalidInput)(f"MLflow at {address} refused: {said}")


def public(address: str) -> str:
    """A text without the users and passwords of the addresses in it."""
    return re.sub(r"//[^/@\s]*@", "//", address)
