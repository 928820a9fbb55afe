"""`spikeloom doctor`: what this installation and machine can do."""

from __future__ import annotations

import json

from spikeloom.cli.arguments import AsJson


def doctor(as_json: AsJson = False) -> None:
    """Show versions, the processor's kernels, threads, and which data sets are found."""
    from spikeloom.doctor import examine

    found = examine()
    if as_json:
        print(json.dumps(found))
        return
    width = max(map(len, found))
    for key, value in found.items():
        print(f"{key:{width}}  {value}")
