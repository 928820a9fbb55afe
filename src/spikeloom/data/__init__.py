"""Data sets and augmentations, chosen by name."""

from spikeloom.data.audio import SpikeDataset
from spikeloom.data.colored_mnist import colored_mnist
from spikeloom.data.images import ImageDataset, collate
from spikeloom.data.transforms import TRANSFORMS, RandomTemporalDelete, Transform, augmentation
from spikeloom.data.vision import DATASETS, create_dataset

__all__ = [
    "DATASETS",
    "TRANSFORMS",
    "ImageDataset",
    "RandomTemporalDelete",
    "SpikeDataset",
    "Transform",
    "augmentation",
    "collate",
    "colored_mnist",
    "create_dataset",
]
