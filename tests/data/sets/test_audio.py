"""Spoken digits as spikes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.made_sets import write_wav

from spikeloom.data import create_dataset
from spikeloom.data.sets.audio import mel_bank, mel_spikes
from spikeloom.errors import DataFileError, UsageError


def write(root: Path, **changes: np.ndarray) -> Path:
    """A root with three recordings of tones, for both splits."""
    waves = [np.sin(np.arange(n) * 0.3) * 9000 for n in (2000, 4000, 9000)]
    arrays = {
        "samples": np.concatenate(waves).astype(np.int16),
        "offsets": np.array([0, 2000, 6000, 15000], np.int64),
        "labels": np.array([0, 5, 9], np.uint8),
    }
    (root / "FSDD").mkdir()
    for split in ("train", "test"):
        np.savez(root / "FSDD" / f"{split}.npz", **(arrays | changes))
    return root


def test_shapes_and_values(tmp_path: Path) -> None:
    data = create_dataset("fsdd", write(tmp_path), T=60, bands=10)
    assert len(data) == 3
    assert data.labels.tolist() == [0, 5, 9]
    x, y = data.batch([0, 2])
    assert x.shape == (2, 60, 20)
    assert set(x.unique().tolist()) == {0.0, 1.0}
    assert data.encode(x).shape == (60, 2, 20)
    assert torch.equal(data.encode(x)[7, 1], x[1, 7])
    assert y.tolist() == [0, 9]
    assert data.input_shape == (20,)
    assert data[1][1] == 5
    assert torch.equal(data[2][0], x[1])
    # The first recording ends after 2000 samples, 40 steps: silence follows.
    assert x[0, 42:, :10].sum() == 0
    assert torch.equal(create_dataset("fsdd", tmp_path, T=60, bands=10).spikes, data.spikes)


def test_a_loud_band_fires_most() -> None:
    tone = torch.sin(2 * torch.pi * 1000 * torch.arange(8000) / 8000)[None]
    spikes = mel_spikes(tone, 100, 40)[0].float()
    centre = mel_bank(40).argmax(1) * 4000 / 128
    loudest = spikes[:, :40].sum(0).argmax()
    assert abs(centre[loudest] - 1000) < 100
    # A level of 1 fires at every step; the rise fires at the onset only.
    assert spikes[:, loudest].mean() > 0.9
    assert spikes[:20, 40:].sum() > spikes[20:, 40:].sum()


def test_mel_bank() -> None:
    bank = mel_bank(20)
    assert bank.shape == (20, 129)
    assert (bank >= 0).all()
    assert (bank.sum(1) > 0).all()
    assert (torch.diff(bank.argmax(1)) >= 0).all()


def test_silence_is_silent() -> None:
    assert mel_spikes(torch.zeros(2, 100), 10, 8).shape == (2, 10, 16)
    assert mel_spikes(torch.zeros(2, 3000), 10, 8).sum() == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"labels": np.array([0, 5, 10], np.uint8)}, "label 10, expected 0 to 9"),
        ({"labels": np.array([0, 5], np.uint8)}, "offsets do not fit 2 labels"),
        ({"offsets": np.array([0, 2000, 1000, 15000], np.int64)}, "offsets must ascend"),
        ({"offsets": np.array([0, 2000, 6000, 16000], np.int64)}, "offsets do not fit"),
        ({"samples": np.zeros(15000, np.float32)}, "'samples' is float32"),
        ({"samples": np.array([{}], object)}, "not a readable .npz"),
    ],
)
def test_wrong_contents(tmp_path: Path, changes: dict[str, np.ndarray], reason: str) -> None:
    root = write(tmp_path, **changes)
    with pytest.raises(DataFileError, match=reason) as caught:
        create_dataset("fsdd", root)
    assert "\n" not in str(caught.value)
    assert "train.npz" in str(caught.value)


def test_truncated(tmp_path: Path) -> None:
    path = write(tmp_path) / "FSDD" / "train.npz"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataFileError, match=r"not a readable \.npz"):
        create_dataset("fsdd", tmp_path)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match=r"FSDD is not in .*free-spoken-digit-dataset"):
        create_dataset("fsdd", tmp_path)
    with pytest.raises(UsageError, match="subset must be an integer from 1 to 3"):
        create_dataset("fsdd", write(tmp_path), subset=4)


def test_the_real_recordings(real_data: Callable[[str], Path]) -> None:
    root = real_data("FSDD")
    train, test = create_dataset("fsdd", root, "train", subset=200), create_dataset("fsdd", root, "test")
    assert test.title == "FSDD"
    assert test.spikes.shape == (300, 100, 80)
    assert torch.bincount(test.labels).tolist() == [30] * 10
    assert train.title == "FSDD, first 200 recordings"
    assert 0.05 < test.spikes.float().mean() < 0.3


def test_wav_files_are_the_container(tmp_path: Path) -> None:
    container, originals = tmp_path / "a", tmp_path / "b"
    container.mkdir()
    folder = originals / "FSDD" / "recordings"
    folder.mkdir(parents=True)
    with np.load(write(container) / "FSDD" / "train.npz") as file:
        samples, offsets = file["samples"], file["offsets"]
    for name, i in (("0_theo_5", 0), ("5_george_6", 1), ("9_theo_44", 2), ("3_theo_4", 1)):
        write_wav(folder / f"{name}.wav", samples[offsets[i] : offsets[i + 1]])
    data, same = create_dataset("fsdd", originals), create_dataset("fsdd", container)
    assert torch.equal(data.spikes, same.spikes)
    assert data.labels.tolist() == [0, 5, 9]
    assert data.title == "FSDD, 3 WAV files"
    test = create_dataset("fsdd", originals, "test")
    assert test.labels.tolist() == [3]
    assert torch.equal(test.spikes[0], data.spikes[1])
    wrong = folder / "7_theo_9.wav"
    for samples, rate, reason in (
        (np.zeros(99, np.int16), 16000, "16000 Hz, 1 channels, 16 bits; expected 8000 Hz"),
        (np.zeros(99, np.uint8), 8000, "8000 Hz, 1 channels, 8 bits"),
        (np.zeros(0, np.int16), 8000, "truncated: holds 0 of 0 bytes"),
    ):
        write_wav(wrong, samples, rate)
        with pytest.raises(DataFileError, match=rf"7_theo_9\.wav: {reason}"):
            create_dataset("fsdd", originals)
    for data, reason in ((b"", "truncated"), (b"\x89PNG" + bytes(80), "does not start with RIFF")):
        wrong.write_bytes(data)
        with pytest.raises(DataFileError, match=f"not a readable WAV file: .*{reason}"):
            create_dataset("fsdd", originals)
    wrong.rename(folder / "seven.wav")
    with pytest.raises(DataFileError, match=r"seven\.wav: expected a name such as 7_jackson_32\.wav"):
        create_dataset("fsdd", originals)


def test_wav_files_whose_chunks_claim_what_is_not_there(tmp_path: Path) -> None:
    """The wave module answers a cut chunk with a bare RuntimeError, and allocates what one claims."""
    path = tmp_path / "FSDD" / "recordings" / "7_theo_9.wav"
    path.parent.mkdir(parents=True)
    write_wav(path, np.zeros(900, np.int16))
    whole = path.read_bytes()
    assert whole[36:40] == b"data"
    for data in (
        whole[:36] + b"LIST" + (2**30).to_bytes(4, "little") + whole[36:],  # a chunk before the sound
        whole[:40] + (2**31 - 2).to_bytes(4, "little") + whole[44:],  # the sound itself
    ):
        path.write_bytes(data)
        tracemalloc.start()
        with pytest.raises(
            DataFileError, match=r"7_theo_9\.wav: (not a readable WAV file: damaged|truncated: holds 1800)"
        ):
            create_dataset("fsdd", tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**20
