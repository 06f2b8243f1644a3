"""What the tests of trained encoders share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import wellread

LOAD = """
import sys, torch, wellread
folder, report, name, value, *texts = sys.argv[1:]
network = wellread.load(folder + "/out")
assert torch.equal(network(network.input(texts)), torch.load(folder + "/output.pt", weights_only=True))
assert network.reports[report].figures[name] == int(value)
"""


@pytest.fixture
def same_in_another_process(tmp_path: Path) -> Callable[..., None]:
    """Checks that the network in tmp_path / "out" gives `texts` the same embeddings, bit for bit, in a new process, and a figure of its report."""

    def check(texts: list[str], report: str, figure: str, value: int) -> None:
        network = wellread.load(tmp_path / "out")
        torch.save(network(network.input(texts)).detach(), tmp_path / "output.pt")
        done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path), report, figure, str(value), *texts], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    return check
