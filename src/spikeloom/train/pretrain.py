"""Pre-training: starting a run from another's weights, and pictures of what a masked autoencoder draws."""

from __future__ import annotations

from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from spikeloom.errors import DataFileError
from spikeloom.files import PathLike, atomic, load_tensors
from spikeloom.train.run import Run


@runtime_checkable
class Reconstructs(Protocol):
    """A model that gives its input back instead of a class."""

    def pictures(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to the images, what is seen of them, and what is made of that: [N, 3, C, H, W]."""
        ...


def start_from(model: nn.Module, folder: PathLike) -> list[str]:
    """Puts the weights of a finished run into a model, where names and shapes agree.

    Returns:
        The names of the model's parameters that are left as they were drawn: a classifier after masked pre-training.

    Raises:
        DataFileError: no finished run, or one of whose weights none fits.
    """
    run = Run.open(folder)
    tensors, _ = load_tensors(run.weights)
    own = model.state_dict()
    fitting = {name: tensors[name] for name in own if name in tensors and tensors[name].shape == own[name].shape}
    if not fitting:
        raise DataFileError(
            f"none of the weights of {folder} fits: it trained {run.settings.model.name}, with other names or shapes"
        )
    model.load_state_dict({**own, **fitting})
    return [name for name, _ in model.named_parameters() if name not in fitting]


def write_pictures(model: nn.Module, dataset: Any, path: PathLike, count: int = 8, zoom: int = 4) -> None:
    """Writes a PNG of the first images of a data set, a row each: original, masked, reconstructed.

    Args:
        model: one that `Reconstructs`; it is left in eval mode.
        dataset: of images.
        path: of the PNG.
        count: images.
        zoom: pixels a pixel.
    """
    from PIL import Image

    x, _ = dataset.batch(list(range(min(count, len(dataset)))))
    device, drawing = next(model.parameters()).device, cast("Reconstructs", model.eval())
    shown = drawing.pictures(dataset.encode(x).to(device)).float().cpu()
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (dataset.mean, dataset.std))
    pixels = ((shown * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)  # [N, 3, C, H, W]
    sheet = torch.nn.functional.pad(pixels, (1, 1, 1, 1), value=255).permute(0, 3, 1, 4, 2)
    array: Any = sheet.flatten(2, 3).flatten(0, 1).numpy()  # [N H, 3 W, C]
    image = Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[-1] == 1 else array[..., :3]))
    with atomic(path) as temporary:
        image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(temporary, "PNG")
