"""A codec in the words of a command line: its name, and settings as `key=value`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import TypeAdapter

from configs.validation import validated
from storage.errors import InvalidInput
from tasks.choice import choices
from tasks.codecs import AnyCodec, Codec

_CODEC: TypeAdapter[Codec] = TypeAdapter(AnyCodec)


def codec_from_words(name: str, settings: Sequence[str] = ()) -> Codec:
    """The codec of this name. Values are written as in a config: `density=0.1`, `alpha=norm`.

    Raises InvalidInput for whatever does not exist or is out of range.
    """
    values: dict[str, Any] = {"name": name}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise InvalidInput(f"{setting!r} is no setting", remedy="Write it like density=0.1")
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InvalidInput(f"{setting!r} cannot be read: {error}", remedy="Write it like density=0.1") from error
    kinds = choices(AnyCodec)
    return validated(_CODEC, values, "the codec is not valid", lambda loc: kinds.get(name, type(None)))
