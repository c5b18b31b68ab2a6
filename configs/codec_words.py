"""A codec in the words of a command line: its name, and settings as `key=value`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import yaml
from pydantic import TypeAdapter

from configs.chain import ChainConfig
from configs.validation import validated
from storage.errors import InvalidInput
from tasks.choice import choices
from tasks.codecs import AnyCodec

_CODEC: TypeAdapter[AnyCodec] = TypeAdapter(AnyCodec)


def codec_from_words(name: str, settings: Sequence[str] = ()) -> AnyCodec:
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


def with_codec(config: ChainConfig, words: str) -> ChainConfig:
    """The chain with the codec of these words (`rtn bits=2`) in place of its own.

    Its lines are others then, with the words at the end of their names: a line cannot have two histories.
    """
    name, *settings = words.split() or [""]
    codec = codec_from_words(name, settings)
    tail = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
    lines = tuple(replace(line, name=f"{line.name}-{tail}") for line in config.lines)
    return replace(config, codec=codec, lines=lines)
