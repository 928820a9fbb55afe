"""A test set run by the event engine, beside the model itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

Json = dict[str, Any]


def _joined(logits: Tensor) -> Tensor:
    """The mean over all steps, [N, classes], where the network has not joined them itself."""
    return logits.mean(0) if logits.dim() == 3 else logits


def evaluate_engine(
    engine: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    model: nn.Module | None,
    advance: Callable[[int], None],
) -> Json:
    """Runs inputs through an engine, and through the model for comparison.

    Args:
        engine: made from the model, or another way to run it.
        batches: inputs and labels.
        model: the network itself; None to leave the comparison out.
        advance: told how many images of a batch are done.

    Returns:
        `images`, `accuracy` (percent, of the mean logits over time), `ms` (an image, engine); with a model also
        `model_accuracy`, `model_ms`, `same` (percent of images with the same prediction), `difference` (the largest
        of mean logits) and `close` (percent of images whose mean logits differ by at most 1e-4).
    """
    images = right = model_right = same = close = 0
    seconds = model_seconds = difference = 0.0
    if model is not None:
        model = model.eval()
    with torch.no_grad():
        for x, y in batches:
            if images == 0:  # a first run of both makes buffers
                engine(x)
                if model is not None:
                    model(x)
            start = time.perf_counter()
            logits = _joined(engine(x))
            seconds += time.perf_counter() - start
            predicted = logits.argmax(1)
            images += len(y)
            right += int((predicted == y).sum())
            if model is not None:
                start = time.perf_counter()
                expected = _joined(model(x))
                model_seconds += time.perf_counter() - start
                model_right += int((expected.argmax(1) == y).sum())
                same += int((expected.argmax(1) == predicted).sum())
                gaps = (logits - expected).abs().amax(1)
                difference = max(difference, gaps.max().item())
                close += int((gaps <= 1e-4).sum())
            advance(len(y))
    result: Json = {"images": images, "accuracy": 100 * right / images, "ms": 1e3 * seconds / images}
    if model is not None:
        result |= {
            "model_accuracy": 100 * model_right / images,
            "model_ms": 1e3 * model_seconds / images,
            "same": 100 * same / images,
            "difference": difference,
            "close": 100 * close / images,
        }
    return result
