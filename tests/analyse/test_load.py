"""What is measured of a model by its name alone: random inputs of the kind that it takes."""

from __future__ import annotations

import torch

from spikeloom.analyse import open_target


def test_random_inputs_are_what_the_network_takes() -> None:
    target = open_target("shd_net", {"input": "700", "images": 3, "batch": 2})
    batches = list(target.batches())
    assert target.sequence
    assert [tuple(x.shape) for x, _ in batches] == [(15, 2, 700), (15, 1, 700)]
    assert not torch.equal(batches[0][0][0], batches[0][0][1]), "a sequence, not one step again and again"
    assert target.model(batches[0][0]).shape == (15, 2, 20)
    # Made with a T, it is shown still inputs.
    target = open_target("shd_net", {"input": "700", "images": 3, "model": {"T": 4}})
    assert not target.sequence
    assert target.model(next(target.batches())[0]).shape == (4, 3, 20)
