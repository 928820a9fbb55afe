"""Takes the columns of a spike data set out of its HDF5 file: `python hdf5.py SET SPLIT FILE OUT LIMIT`.

Run in a process of its own by `data.sets.cochlea`, because the HDF5 library may crash or never end on a damaged file.
Imports nothing of Spikeloom, so that it starts at once.

Writes an .npz file: `labels`, an array; `times` and `units`, the spikes of all recordings end to end; `ends`, where
they end in `times`, and `unit_ends` in `units`.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import numpy as np


def extract(kind: str, split: str, path: str, out: str) -> None:
    """Reads one part of SHD or N-TIDIGITS, of the latter the recordings of one digit with their names as labels."""
    import h5py

    with h5py.File(path, "r") as file:
        opened: Any = file
        if kind == "shd":
            labels = np.asarray(opened["labels"][()])
            times, units = opened["spikes/times"][:], opened["spikes/units"][:]
        else:
            names = [name.decode() for name in opened[f"{split}_labels"][()]]
            names = [name for name in names if len(name.split("-")[-1]) == 1]
            labels = np.array(names)
            times = [opened[f"{split}_timestamps"][name][()] for name in names]
            units = [opened[f"{split}_addresses"][name][()] for name in names]
    with open(out, "wb") as stream:
        np.savez(
            stream, labels=labels, times=_joined(times), units=_joined(units), ends=_ends(times), unit_ends=_ends(units)
        )


def _joined(rows: Any) -> Any:
    return np.concatenate([*rows]) if len(rows) else np.zeros(0)


def _ends(rows: Any) -> Any:
    return np.cumsum([len(row) for row in rows], dtype=np.int64)


def main() -> None:
    """The process: its memory limited, and what fails said in one line."""
    kind, split, path, out, limit = sys.argv[1:]
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (int(limit), int(limit)))
    try:
        extract(kind, split, path, out)
    except Exception as error:  # h5py raises OSError, KeyError, ValueError, RuntimeError, ... on damaged files
        sys.exit(" ".join(f"{type(error).__name__}: {error}".split()))


if __name__ == "__main__":
    main()
