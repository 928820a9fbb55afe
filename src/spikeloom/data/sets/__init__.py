"""The data sets; importing this package registers them in `spikeloom.data.registry.DATASETS`."""

from spikeloom.data.sets import audio as audio
from spikeloom.data.sets import cochlea as cochlea
from spikeloom.data.sets import colored_mnist as colored_mnist
from spikeloom.data.sets import dvs as dvs
from spikeloom.data.sets import dvs_gesture as dvs_gesture
from spikeloom.data.sets import imagenet as imagenet
from spikeloom.data.sets import own as own
from spikeloom.data.sets import vision as vision
