"""The meter: counts against formulas, times that follow the work, and nothing left behind."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

import wellread
from wellread import ImageInput, Network
from wellread.errors import BadInput
from wellread.meter import macs, meter, milliseconds, parameters, row


class Sleeps(nn.Module):
    """Takes a millisecond per picture, and `extra` seconds more at some calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, stride=2, padding=1, groups=1)
        self.head = nn.Linear(5, 2)
        self.calls = 0
        self.extra: dict[int, float] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        time.sleep(len(x) / 1000 + self.extra.get(self.calls, 0.0))
        return self.head(self.conv(x).mean((2, 3)))


@pytest.fixture
def sleeps() -> Network:
    return Network(Sleeps(), ImageInput((16, 12)))


def test_counts_are_those_of_the_formula(sleeps: Network) -> None:
    assert parameters(sleeps) == 3 * 5 * 9 + 5 + 5 * 2 + 2
    assert macs(sleeps) == 8 * 6 * 5 * 3 * 9 + 5 * 2


def test_attention_is_counted() -> None:
    vit = wellread.load("timm/test_vit", pretrained=False)
    block = vit.module.blocks[0]
    tokens, width, hidden = vit.module.patch_embed.num_patches + 1, vit.module.embed_dim, block.mlp.fc1.out_features
    patches = (tokens - 1) * width * 3 * vit.module.patch_embed.patch_size[0] ** 2
    each = tokens * (4 * width * width + 2 * width * hidden) + 2 * tokens * tokens * width
    assert macs(vit) == patches + len(vit.module.blocks) * each + width * vit.module.num_classes


def test_parameters_that_are_looked_at_through_a_view_are_no_trouble() -> None:
    vit = wellread.load("timm/test_vit3", pretrained=False)  # pools by attention with a learned query
    vit.module.head.bias.requires_grad_(False)
    assert macs(vit) > 0 and vit.module.head.weight.requires_grad and not vit.module.head.bias.requires_grad


def test_times_follow_the_batch_and_the_threads_are_put_back(sleeps: Network) -> None:
    before = torch.get_num_threads()
    found = meter(sleeps, (1, 8), threads=before + 1, repeats=3)
    assert torch.get_num_threads() == before and found["threads"] == before + 1
    assert found["ms_1"] >= 1 and found["ms_8"] >= 8
    assert sleeps.module.calls == 1  # the count of the MACs; times are taken of copies


def test_warming_up_and_a_disturbance_do_not_count(sleeps: Network) -> None:
    sleeps.module.extra = {1: 0.5, 2: 0.5, 5: 0.5}
    assert milliseconds(sleeps, repeats=5) < 400


def test_the_time_ends_with_the_budget(sleeps: Network) -> None:
    started = time.perf_counter()
    milliseconds(sleeps, 20, repeats=10**6, seconds=0.1)
    assert time.perf_counter() - started < 2.0


def test_modes_and_layout_stay(sleeps: Network) -> None:
    sleeps.module.train()
    sleeps.module.head.eval()
    meter(sleeps, (1,), repeats=3)
    assert sleeps.module.training and sleeps.module.conv.training and not sleeps.module.head.training
    assert sleeps.module.conv.weight.is_contiguous()


def test_text_is_timed_on_a_sentence_of_some_length() -> None:
    minilm = wellread.load("minilm-l6")
    length, width = 66, 384
    each = length * (4 * width * width + 2 * width * 1536) + 2 * length * length * width
    assert macs(minilm) == pytest.approx(6 * each + width * width, rel=1e-3)


def test_a_row_has_readable_names(sleeps: Network) -> None:
    found = row("mine", sleeps, repeats=3)
    assert list(found) == ["network", "parameters, M", "MACs, M", "ms, batch 1", "ms, batch 32"] and found["network"] == "mine"


def test_bad_input(sleeps: Network) -> None:
    with pytest.raises(BadInput, match="repeats 2"):
        milliseconds(sleeps, repeats=2)
    with pytest.raises(BadInput, match="does not say how it is fed"):
        macs(Network(nn.Linear(2, 2)))
