"""Data sets and augmentations, chosen by name."""

from spikeloom.data.base import LabelledDataset, batches, collate
from spikeloom.data.formats.events import EventFileError, Events
from spikeloom.data.formats.read import read_events
from spikeloom.data.frame_dataset import FrameDataset
from spikeloom.data.frames import event_frames
from spikeloom.data.image_dataset import ImageDataset
from spikeloom.data.mackey_glass import mackey_glass
from spikeloom.data.recording_frames import RecordingFrames
from spikeloom.data.registry import DATASETS, SOURCES, create_dataset
from spikeloom.data.sets.colored_mnist import colored_mnist
from spikeloom.data.spike_dataset import SpikeDataset
from spikeloom.data.transforms import TRANSFORMS, RandomTemporalDelete, Transform, augmentation

__all__ = [
    "DATASETS",
    "SOURCES",
    "TRANSFORMS",
    "EventFileError",
    "Events",
    "FrameDataset",
    "ImageDataset",
    "LabelledDataset",
    "RandomTemporalDelete",
    "RecordingFrames",
    "SpikeDataset",
    "Transform",
    "augmentation",
    "batches",
    "collate",
    "colored_mnist",
    "create_dataset",
    "event_frames",
    "mackey_glass",
    "read_events",
]
