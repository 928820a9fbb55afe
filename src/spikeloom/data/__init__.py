"""Data sets and augmentations, chosen by name."""

from spikeloom.data.audio import SpikeDataset
from spikeloom.data.colored_mnist import colored_mnist
from spikeloom.data.events import EventFileError, Events, read_events
from spikeloom.data.frame_sets import FrameDataset
from spikeloom.data.frames import event_frames
from spikeloom.data.images import ImageDataset
from spikeloom.data.labelled import LabelledDataset, batches, collate
from spikeloom.data.transforms import TRANSFORMS, RandomTemporalDelete, Transform, augmentation
from spikeloom.data.vision import DATASETS, create_dataset

__all__ = [
    "DATASETS",
    "TRANSFORMS",
    "EventFileError",
    "Events",
    "FrameDataset",
    "ImageDataset",
    "LabelledDataset",
    "RandomTemporalDelete",
    "SpikeDataset",
    "Transform",
    "augmentation",
    "batches",
    "collate",
    "colored_mnist",
    "create_dataset",
    "event_frames",
    "read_events",
]
