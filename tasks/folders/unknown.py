"""Unknown numbers: stand-ins for facts that are there only after a pass over the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn


class UnknownError(Exception):
    """Somebody asked for a number that is not there yet. Caught by the passes, which come back when it is."""


class Unknown(Mapping[str, Any]):
    """Facts or sums that are not there yet."""

    def _refuse(self, *_: object) -> NoReturn:
        raise UnknownError

    __getitem__ = __iter__ = __len__ = __contains__ = get = keys = items = values = _refuse
