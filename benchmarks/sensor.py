"""Recordings played through a trained network as they came: right decisions, latency and speed by length of window.

    python benchmarks/sensor.py weights:nmnist DATA/NMNIST/Test          # windows of 5, 10, 20, 30 and 50 ms
    python benchmarks/sensor.py RUN FOLDER --windows 10 --last 20

FOLDER holds a folder for each class, named as the class, with recordings inside. All share one engine, made for the
first. "wall" and "cpu" are how many times real time: the lengths of all recordings by wall-clock and by processor time.
Latencies are of all windows, in wall-clock milliseconds. OMP_NUM_THREADS=1 keeps it on one core.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from spikeloom.data import RecordingFrames
from spikeloom.deploy import Engine
from spikeloom.memory import keep_memory
from spikeloom.play import engine_of, play
from spikeloom.train.evaluate import load_classifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--windows", type=float, nargs="+", default=[5, 10, 20, 30, 50], metavar="MS")
    parser.add_argument("--last", type=int)
    options = parser.parse_args()
    keep_memory()
    files = sorted(options.folder.glob("*/*"))
    trained = load_classifier(options.run)
    frames = RecordingFrames(trained.run.settings.data.name, trained.run.settings.data.options)
    events = frames.read(files[0])
    network, why = engine_of(trained.model, frames, events, options.windows[0])
    if not isinstance(network, Engine):
        parser.error(f"the engine cannot run this network: {why}")
    with tempfile.TemporaryDirectory() as folder:
        engine = Path(folder) / "engine.safetensors"
        network.save(engine)
        print(f"{trained.run.title}, {len(files)} recordings, {torch.get_num_threads()} threads")
        print("window_ms  right    wall     cpu  p50_ms  p99_ms    events/s")
        for window_ms in options.windows:
            found = [play(options.run, file, window_ms, options.last, engine) for file in files]
            seconds, computing = sum(each.seconds for each in found), sum(each.computing_s for each in found)
            processor = sum(each.cpu_s for each in found)
            right = sum(each.changes()[-1][1] == Path(each.file).parent.name for each in found)
            p50, p99 = np.percentile([d.latency_ms for each in found for d in each.decisions], [50, 99])
            print(
                f"{window_ms:9g} {right:6} {seconds / computing:7.1f} {seconds / processor:7.1f} "
                f"{p50:7.3f} {p99:7.3f} {sum(each.events for each in found) / computing:11,.0f}"
            )


if __name__ == "__main__":
    main()
