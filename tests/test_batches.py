"""Batches are a function of (seed, epoch, batch) alone."""

from __future__ import annotations

import pytest
import torch

from wellread.batches import Batches, tensor_batches
from wellread.errors import BadInput


def noisy(rows: int = 23, **settings) -> Batches:
    return Batches(
        rows, lambda index: {"x": torch.from_numpy(index).double() + torch.rand(len(index), dtype=torch.float64)}, batch_size=5, **settings
    )


def test_a_batch_depends_on_seed_epoch_and_number_only() -> None:
    whole = list(noisy(shuffle=True, seed=3).epoch(2))
    torch.rand(7)  # the caller's random numbers must not matter
    late = list(noisy(shuffle=True, seed=3).epoch(2, start=3))
    assert all(torch.equal(a["x"], b["x"]) for a, b in zip(whole[3:], late, strict=True))
    assert not torch.equal(whole[0]["x"], next(iter(noisy(shuffle=True, seed=4).epoch(2)))["x"])
    assert not torch.equal(whole[0]["index"], next(iter(noisy(shuffle=True, seed=3).epoch(1)))["index"])


def test_the_callers_random_numbers_are_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    list(noisy().epoch(0))
    assert torch.equal(torch.rand(2), expected)


def test_every_row_comes_once_and_the_last_batch_may_be_short() -> None:
    batches = list(noisy(shuffle=True).epoch(0))
    assert sorted(torch.cat([b["index"] for b in batches]).tolist()) == list(range(23)) and len(batches[-1]["index"]) == 3
    assert len(noisy(drop_last=True)) == 4


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_shares_make_the_mean_over_processes_the_mean_over_the_batch(processes: int) -> None:
    data = tensor_batches({"x": torch.arange(23.0)}, batch_size=5)
    for number, whole in enumerate(data.epoch(0)):
        parts = [list(data.epoch(0, process=p, processes=processes))[number] for p in range(processes)]
        mean = sum(part["x"].mean() * part["share"] for part in parts) / processes
        torch.testing.assert_close(mean, whole["x"].mean())


def test_columns_of_different_length_and_empty_data_are_refused() -> None:
    with pytest.raises(BadInput, match="different numbers of rows"):
        tensor_batches({"x": torch.zeros(3), "y": torch.zeros(4)})
    with pytest.raises(BadInput, match="no rows"):
        tensor_batches({"x": torch.zeros(0)})
