"""Images: what the suites and servers share that are given images: the checkpoint's image processor, and what it makes
of files and pictures."""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from storage.artifacts import Artifact
from storage.errors import InvalidInput
from tasks.checkpoints import CONFIG, assets_folder

PROCESSOR = "preprocessor_config.json"


class ImageReader:
    """Images as the pixel values that a checkpoint takes. `base`: whose image processor makes them; it is read when the
    first image comes."""

    def __init__(self, base: Artifact) -> None:
        self._base = base
        self._processor: Any = None

    @property
    def has_processor(self) -> bool:
        return PROCESSOR in self._base.manifest.assets

    def processed(self, image: Any) -> Tensor:
        """[C, H, W] of an image: PIL, the bytes of a file, or {"bytes": ...} as Parquet files of images hold them."""
        from PIL import Image

        if isinstance(image, Mapping):
            image = image["bytes"]
        if isinstance(image, bytes):
            image = Image.open(io.BytesIO(image))
        pixels: Tensor = self._load()(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        return pixels

    def read(self, given: Sequence[Any]) -> Tensor:
        """[B, C, H, W] of what a server was given as rows: pixel values [C, H, W] as the model takes them, or images:
        PIL, the bytes of a file, or these in base64, as JSON has them. Raises InvalidInput for what is neither."""
        found = [self._read(one, number) for number, one in enumerate(given)]
        for number, one in enumerate(found):
            if one.shape != found[0].shape:
                raise InvalidInput(f"row {number}: expected {list(found[0].shape)} as row 0, found {list(one.shape)}")
        return torch.stack(found)

    def _read(self, one: Any, number: int) -> Tensor:
        if isinstance(one, str):
            one = _decoded(one, number)
        if hasattr(one, "convert") or isinstance(one, bytes):
            try:
                return self.processed(one)
            except (OSError, SyntaxError) as error:  # how PIL refuses what is no image, or a broken one
                raise InvalidInput(f"row {number}: the bytes are no image that can be read: {error}") from error
        try:
            pixels = torch.as_tensor(one, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidInput(f"row {number}: expected pixel values [C, H, W] or an image: {error}") from error
        if pixels.ndim != 3:
            raise InvalidInput(f"row {number}: expected pixel values [C, H, W], found {list(pixels.shape)}")
        return pixels

    def _load(self) -> Any:
        if self._processor is None:
            with assets_folder(self._base) as folder:
                try:
                    from transformers import AutoImageProcessor

                    self._processor = AutoImageProcessor.from_pretrained(folder)
                except (OSError, ValueError) as error:
                    raise InvalidInput(
                        f"the base has no image processor ({PROCESSOR}), but images were given",
                        remedy="Ingest the base from a folder that has one, or give pixels as lists of numbers",
                    ) from error
        return self._processor


def pixels_of(checkpoint: Artifact) -> tuple[int, int, int]:
    """[C, H, W] that its config names, -1 for what it does not say."""
    config = json.loads(checkpoint.asset(CONFIG))
    config = {**config, **config.get("vision_config", {})}
    size = config.get("image_size")
    height, width = size if isinstance(size, list) and len(size) == 2 else (size, size)
    channels, height, width = (
        one if isinstance(one, int) and one > 0 else -1 for one in (config.get("num_channels"), height, width)
    )
    return channels, height, width


def _decoded(text: str, number: int) -> bytes:
    """The bytes behind base64, as they are or as a data URL."""
    try:
        return base64.b64decode(text.rpartition("base64,")[2], validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidInput(
            f"row {number}: expected an image, found a text that is no base64: {error}",
            remedy="Send the bytes of a PNG or JPEG file in base64, or pixel values",
        ) from error
