"""`spikeloom bench events`: how fast recordings are read and cut into frames, beside tonic and SpikingJelly."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from spikeloom.bench.timing import medians
from spikeloom.data import Events, event_frames, read_events
from spikeloom.data.frames import Slicing
from spikeloom.errors import UsageError
from spikeloom.files import PathLike

Json = dict[str, Any]

ENDINGS = (".bin", ".aedat", ".aedat4", ".raw", ".dat", ".es")
_FRAMES = 10
_AT_MOST = 20  # recordings of one folder


def made(n: int = 1_000_000, side: int = 128) -> Events:
    """A recording that is not in any folder: uniform in place and time, one second long."""
    rng = np.random.default_rng(0)
    x, y = (rng.integers(0, side, n, np.int16) for _ in range(2))
    return Events(np.sort(rng.integers(0, 10**6, n)), x, y, rng.integers(0, 2, n, np.uint8), side, side)


def recordings(root: PathLike | None) -> dict[str, list[Path]]:
    """Event files under a folder, by the folder that they lie in; of each the first 20."""
    found: dict[str, list[Path]] = {}
    if root is None:
        return found
    root = Path(root)
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in ENDINGS and path.is_file():
            of = found.setdefault(str(path.parent.relative_to(root)), [])
            if len(of) < _AT_MOST:
                of.append(path)
    if not found:
        raise UsageError(f"no event files ({', '.join(ENDINGS)}) under {root}; give another folder with --data FOLDER")
    return found


def frame_rows(root: PathLike | None, repeats: int) -> Iterator[Json]:
    """Ten frames of every recording, by count and by time: millions of events a second, one thread."""
    groups = {name: [read_events(path) for path in paths] for name, paths in recordings(root).items()}
    for name, group in {"made, 128x128": [made()], **groups}.items():
        group = [events for events in group if len(events) >= _FRAMES]
        if not group:
            continue
        count = sum(map(len, group))
        for frames in ("count", "time"):
            found = medians(_contenders(group, frames), repeats)
            row: Json = {"recordings": name, "frames": frames, "events": count}
            row |= {f"{key}_Mev_per_s": round(count / ms / 1e3, 2) for key, ms in found.items()}
            for rival in ("tonic", "spikingjelly"):
                row[f"times_{rival}"] = round(found[rival] / found["ours"], 1) if rival in found else None
            yield row


def read_rows(root: PathLike | None, repeats: int) -> Iterator[Json]:
    """The first file of every folder, from disk (in the system's cache) to checked arrays."""
    for name, paths in recordings(root).items():
        events = read_events(paths[0])
        ms = medians({"ours": lambda path=paths[0]: read_events(path)}, repeats)["ours"]
        yield {
            "file": f"{name}/{paths[0].name}",
            "events": len(events),
            "MB": round(paths[0].stat().st_size / 1e6, 2),
            "ms": round(ms, 2),
            "Mev_per_s": round(len(events) / ms / 1e3, 2),
        }


def _contenders(group: list[Events], frames: Slicing) -> dict[str, Callable[[], object]]:
    """Each cuts all recordings of a group; what a rival wants as its input is made beforehand."""
    found: dict[str, Callable[[], object]] = {"ours": lambda: [event_frames(e, frames, _FRAMES) for e in group]}
    try:
        # By name: optional rivals, which type checkers need not have.
        transforms: Any = importlib.import_module("tonic.transforms")
        rows = [_structured(e) for e in group]
        key = "n_event_bins" if frames == "count" else "n_time_bins"
        cutters = [transforms.ToFrame(sensor_size=(e.width, e.height, 2), **{key: _FRAMES}) for e in group]
        found["tonic"] = lambda: [cut(row) for cut, row in zip(cutters, rows, strict=True)]
    except ImportError:
        pass
    try:
        utils: Any = importlib.import_module("spikingjelly.datasets.utils")
        by = "number" if frames == "count" else "time"
        columns = [{"t": e.t, "x": e.x, "y": e.y, "p": e.p} for e in group]
        found["spikingjelly"] = lambda: [
            utils.integrate_events_by_fixed_frames_number(c, by, _FRAMES, e.height, e.width)
            for c, e in zip(columns, group, strict=True)
        ]
    except ImportError:
        pass
    return found


def _structured(e: Events) -> np.ndarray[Any, Any]:
    row = np.empty(len(e), [("x", np.int16), ("y", np.int16), ("t", np.int64), ("p", np.int8)])
    row["x"], row["y"], row["t"], row["p"] = e.x, e.y, e.t, e.p
    return row
