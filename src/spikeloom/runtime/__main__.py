"""`python -m spikeloom.runtime FILE image.npy`: the class and the logits that a network gives."""

from __future__ import annotations

import argparse
import sys

import numpy as np
from numpy.typing import NDArray

from spikeloom.runtime import NetworkError, load


def _read(path: str) -> NDArray[np.float32]:
    try:
        return np.load(path, allow_pickle=False)
    except OSError as error:
        raise NetworkError(f"{path}: {error.strerror or 'it cannot be read'}") from None
    except (ValueError, EOFError):
        raise NetworkError(f"{path}: no array that `numpy.save` wrote") from None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m spikeloom.runtime", description=__doc__)
    parser.add_argument("file", help="of `spikeloom run RUN --save FILE`")
    parser.add_argument("image", help="an array of numpy.save: [C, H, W] or [N, C, H, W]; a sequence [T, N, C, H, W]")
    given = parser.parse_args()
    try:
        network = load(given.file)
        x = _read(given.image)
        logits = network(x[None] if network.info["is_static"] and x.ndim == 3 else x)
    except NetworkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for image, row in enumerate(logits.mean(0) if logits.ndim == 3 else logits):
        print(f"{image}: class {row.argmax()}, logits {' '.join(f'{value:.4f}' for value in row)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
