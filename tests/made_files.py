"""Files in the formats of the image sets, made from arrays."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 2048 + array.ndim, *array.shape) + array.tobytes()


def jpeg_bytes(image: np.ndarray, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).convert(mode).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def pack(files: list[bytes]) -> dict[str, np.ndarray]:
    """The arrays of a container of JPEG files; image i is of class i modulo 10."""
    offsets = np.cumsum([0, *map(len, files)]).astype(np.int64)
    labels = (np.arange(len(files)) % 10).astype(np.uint8)
    return {"jpeg": np.frombuffer(b"".join(files), np.uint8), "offsets": offsets, "labels": labels}
