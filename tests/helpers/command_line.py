"""The command line in this process, and a run of a second."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import NamedTuple

import pytest

from spikeloom import cli

# A network without norms, on digits padded to 16x16: a second or less.
SMALL = [
    "quickstart/digits",
    "data.subset=64",
    "data.test_subset=50",
    "data.size=16",
    "model.name=colored_mnist_net",
    "model.image_size=16",
    "model.T=2",
    "train.batch_size=16",
    "train.epochs=2",
    "train.optimizer=adam",
    "train.lr=0.003",
]


class Result(NamedTuple):
    code: int
    out: str
    err: str


def spikeloom(*words: str) -> Result:
    """The command in this process; an exception that reaches the user is one of the test."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["spikeloom", *words]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as exit_:
            cli.main()
    finally:
        sys.argv = before
    assert isinstance(exit_.value.code, int)
    return Result(exit_.value.code, out.getvalue(), err.getvalue())
