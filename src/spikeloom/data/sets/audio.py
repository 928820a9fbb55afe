"""Spoken digits as spikes: a mel filter bank, then one integrate-and-fire neuron a band."""

from __future__ import annotations

import io
import os
import re
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spikeloom.data.locate import Source, data_root, missing
from spikeloom.data.options import check_integer
from spikeloom.data.registry import register
from spikeloom.data.spike_dataset import SpikeDataset
from spikeloom.errors import DataFileError

SOURCE = Source(
    "FSDD",
    "get the folder recordings from https://github.com/Jakobovski/free-spoken-digit-dataset and put it in FSDD there",
    (("FSDD/recordings/<digit>_<speaker>_<take>.wav",), ("FSDD/train.npz", "FSDD/test.npz")),
    {"train": 2_700, "test": 300},
    10,
)
RATE = 8000  # samples per second
_ARRAYS = {"samples": np.int16, "offsets": np.int64, "labels": np.uint8}


@register(SOURCE)
def fsdd(
    root: str | os.PathLike[str] | None, split: str, *, subset: int | None = None, T: int = 100, bands: int = 40
) -> SpikeDataset:
    """Free Spoken Digit Dataset (English digits, 6 speakers, 8 kHz), encoded to spikes [T, 2 x bands].

    Read from root/FSDD/{train,test}.npz: arrays `samples` int16 end to end, `offsets` int64, `labels` uint8; or else
    from the original's root/FSDD/recordings/<digit>_<speaker>_<take>.wav. Takes 0 to 4 of each speaker and digit are
    the official test part. A step is 6.25 ms; longer recordings are cut, shorter ones end in silence.

    Args:
        subset: take only the first n recordings.
        T: steps.
        bands: mel bands; each has one neuron for its level and one for its rise.
    """
    folder = data_root(root, SOURCE)
    path, wavs = folder / "FSDD" / f"{split}.npz", folder / "FSDD" / "recordings"
    if path.is_file():
        samples, offsets, labels = _read(path)
    elif wavs.is_dir():
        samples, offsets, labels = _read_wavs(wavs, split)
    else:
        raise missing(SOURCE, folder, path)
    count = len(labels)
    if subset is not None:
        check_integer("subset", subset, 1, count, ", the number of recordings")
    check_integer("T", T, 1)
    check_integer("bands", bands, 1, 128)
    title = "FSDD" if path.is_file() else f"FSDD, {count} WAV files"
    title = title if subset in (None, count) else f"{title}, first {subset} recordings"
    chosen = range(count if subset is None else subset)
    sounds = [samples[offsets[i] : offsets[i + 1]] for i in chosen]
    all_labels = torch.from_numpy(labels.astype(np.int64))
    return SpikeDataset(
        encoded(sounds, T, bands),
        all_labels[: len(chosen)],
        all_labels=all_labels,
        name="fsdd",
        title=title,
        classes=[str(digit) for digit in range(10)],
    )


_HOP, _WINDOW = 50, 200  # samples: 6.25 ms and 25 ms


def encoded(sounds: Sequence[npt.NDArray[Any]], T: int, bands: int) -> Tensor:
    """Spikes uint8 [N, T, 2 x bands] of int16 recordings, cut or followed by silence."""
    length = T * _HOP + _WINDOW
    waves = torch.zeros(len(sounds), length)
    for row, sound in zip(waves, sounds, strict=True):
        cut = sound[:length]
        row[: len(cut)] = torch.from_numpy(cut.astype(np.float32) / 32768)
    return mel_spikes(waves, T, bands)


def mel_spikes(waves: Tensor, T: int, bands: int) -> Tensor:
    """Spikes uint8 [N, T, 2 x bands] of recordings [N, samples] at 8 kHz.

    The log energy of each mel band, from 0 (50 dB below the recording's loudest) to 1, drives an integrate-and-fire
    neuron with threshold 1 and soft reset; its positive difference, times 4, drives a second one. Deterministic.
    """
    spectrum = (
        torch.stft(waves, 256, _HOP, _WINDOW, torch.hann_window(_WINDOW), center=False, return_complex=True)
        if waves.shape[1] >= 256
        else torch.zeros(len(waves), 129, 0, dtype=torch.complex64)
    )
    energy = torch.zeros(len(waves), bands, T)
    steps = min(T, spectrum.shape[2])
    energy[:, :, :steps] = torch.einsum("bf,nft->nbt", mel_bank(bands), spectrum[:, :, :steps].abs().square())
    decibel = 10 * torch.log10(energy + 1e-10)
    # At least -50: in a recording without sound nothing is loud.
    loudest = decibel.amax((1, 2), keepdim=True).clamp_min(-50)
    level = ((decibel - loudest) / 50 + 1).clamp(0, 1)
    rise = torch.diff(level, dim=2, prepend=torch.zeros_like(level[:, :, :1])).clamp_min(0) * 4
    # Integrate and fire with soft reset emits floor of the running sum, at most one spike a step for drives up to 1.
    total = torch.cat([level, rise.clamp_max(1)], 1).cumsum(2).floor()
    spikes = torch.diff(total, dim=2, prepend=torch.zeros_like(total[:, :, :1]))
    return spikes.permute(0, 2, 1).to(torch.uint8).contiguous()


def mel_bank(bands: int, low: float = 100.0, high: float = RATE / 2, bins: int = 129) -> Tensor:
    """Triangular filters [bands, bins] with centres equally spaced in mel (2595 log10(1 + f / 700))."""
    mel = torch.linspace(2595 * np.log10(1 + low / 700), 2595 * np.log10(1 + high / 700), bands + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    frequency = torch.linspace(0, RATE / 2, bins)
    rising = (frequency - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - frequency) / (edges[2:] - edges[1:-1])[:, None]
    return torch.minimum(rising, falling).clamp_min(0)


def _read_wavs(folder: Path, split: str) -> list[npt.NDArray[Any]]:
    """The arrays of a container, from WAV files by take, speaker and digit: the first ones are of all classes."""
    found: list[tuple[int, str, int, Path]] = []
    for path in folder.glob("*.wav"):
        name = re.fullmatch(r"([0-9])_(\w+)_(\d{1,9})", path.stem)
        if name is None:
            raise DataFileError(f"{path}: expected a name such as 7_jackson_32.wav: digit, speaker, take")
        if (int(name[3]) < 5) == (split == "test"):
            found.append((int(name[3]), name[2], int(name[1]), path))
    found.sort()
    waves = [read_wav(path) for *_, path in found]
    labels = [digit for _, _, digit, _ in found]
    if not labels:
        raise DataFileError(f"{folder}: holds no recordings of the {split} part (takes below 5 are for testing)")
    return [np.concatenate(waves), np.cumsum([0, *map(len, waves)]), np.array(labels, np.uint8)]


def read_wav(path: Path) -> npt.NDArray[np.int16]:
    """The samples of a WAV file of 8 kHz, one channel and 16 bits.

    Raises:
        DataFileError: it is of another kind, damaged or truncated.
    """
    try:
        # From memory, where no more is read than there is: from a file, as much is allocated as a chunk claims.
        with wave.open(io.BytesIO(path.read_bytes()), "rb") as file:
            kind = (file.getframerate(), file.getnchannels(), 8 * file.getsampwidth())
            wanted, data = 2 * file.getnframes(), file.readframes(file.getnframes())
    except Exception as error:  # OSError, EOFError, wave.Error, a bare RuntimeError for a chunk that is cut, ...
        raise DataFileError(f"{path}: not a readable WAV file: {str(error) or 'damaged or truncated'}") from None
    if kind != (RATE, 1, 16):
        raise DataFileError(f"{path}: {kind[0]} Hz, {kind[1]} channels, {kind[2]} bits; expected {RATE} Hz, 1, 16")
    if not data or len(data) != wanted:
        raise DataFileError(f"{path}: truncated: holds {len(data)} of {wanted} bytes of sound")
    return np.frombuffer(data, "<i2")


def _read(path: Path) -> list[npt.NDArray[Any]]:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = [file[name] for name in _ARRAYS]
    except Exception as error:  # what a damaged archive can raise has no common class
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataFileError(f"{path}: not a readable .npz file of recordings: {reason}") from None
    samples, offsets, labels = arrays
    for (name, dtype), array in zip(_ARRAYS.items(), arrays, strict=True):
        if array.dtype != dtype or array.ndim != 1:
            raise DataFileError(
                f"{path}: array {name!r} is {array.dtype} {array.shape}, expected {np.dtype(dtype)} with one axis"
            )
    if len(labels) == 0 or len(offsets) != len(labels) + 1 or offsets[0] != 0 or offsets[-1] != len(samples):
        raise DataFileError(f"{path}: offsets do not fit {len(labels)} labels and {len(samples)} samples")
    if (offsets[1:] <= offsets[:-1]).any():
        raise DataFileError(f"{path}: offsets must ascend")
    if labels.max() > 9:
        raise DataFileError(f"{path}: label {labels.max()}, expected 0 to 9")
    return arrays
