"""Files in the formats of the image sets, made from arrays."""

from __future__ import annotations

import io
import struct
from pathlib import Path

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


def write_cifar10(root: Path, images: int) -> None:
    """Random smooth images in the JPEG containers of CIFAR-10, the same for both parts."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (images, 4, 4, 3), np.uint8)
    files = [jpeg_bytes(np.kron(image, np.ones((8, 8, 1), np.uint8))) for image in small]
    (root / "CIFAR10").mkdir(parents=True)
    for split in ("train", "test"):
        np.savez(root / "CIFAR10" / f"{split}.npz", **pack(files))


def write_fsdd(root: Path, recordings: int) -> None:
    """Half a second of noise each, in the containers of FSDD, the same for both parts."""
    rng = np.random.default_rng(0)
    (root / "FSDD").mkdir(parents=True)
    arrays = {
        "samples": rng.integers(-1000, 1000, recordings * 4000, np.int16),
        "offsets": np.arange(recordings + 1) * 4000,
        "labels": (np.arange(recordings) % 10).astype(np.uint8),
    }
    for split in ("train", "test"):
        np.savez(root / "FSDD" / f"{split}.npz", **arrays)
