"""Edits: what they compute, what they refuse, and that a structure is rebuilt from its record."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from wellread import structure
from wellread.errors import BadInput


def test_factorised_linear_at_full_rank_computes_the_same() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3, bias=False)).double()
    x = torch.randn(4, 7, dtype=torch.float64)
    before = net(x)
    for layer, rank in (("0", 5), ("2", 3)):
        net = structure.apply(net, {"edit": "factorise", "layer": layer, "rank": rank})
    torch.testing.assert_close(net(x), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("stride,padding,dilation,kernel", [(1, 1, 1, 3), (2, 0, 1, 3), (1, 2, 2, 3), (2, (1, 0), 1, (3, 1))])
def test_factorised_convolution_at_full_rank_computes_the_same(stride, padding, dilation, kernel) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, kernel, stride, padding, dilation).double()
    net = nn.Sequential(conv)
    x = torch.randn(2, 4, 11, 9, dtype=torch.float64)
    before = net(x)
    net = structure.apply(net, {"edit": "factorise", "layer": "0", "rank": min(6, conv.weight[0].numel())})
    torch.testing.assert_close(net(x), before, rtol=0, atol=1e-12)


def test_low_rank_error_is_that_of_the_singular_values_left_out() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(20, 12, dtype=torch.float64)
    into, out = structure.low_rank(matrix, 5)
    left_out = torch.linalg.svdvals(matrix)[5:].square().sum().sqrt()
    torch.testing.assert_close((matrix - out @ into).norm(), left_out, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    "record,words",
    [
        ({"edit": "factorise", "layer": "0", "rank": 0}, "choose 1 to 5"),
        ({"edit": "factorise", "layer": "0", "rank": 6}, "choose 1 to 5"),
        ({"edit": "factorise", "layer": "1", "rank": 1}, "only Linear and Conv2d"),
        ({"edit": "factorise", "layer": "9", "rank": 1}, "no layer '9'"),
        ({"edit": "melt"}, "'melt' is not known"),
        ({"edit": "factorise", "layer": "0", "rank": 1, "colour": 3}, "does not fit"),
        ({"edit": "new_head", "layer": "0", "part": "os:getcwd", "arguments": {}}, "not an nn.Module class"),
        ({"edit": "new_head", "layer": "0", "part": "no.such:Thing", "arguments": {}}, "cannot be imported"),
    ],
)
def test_an_impossible_edit_is_refused_in_one_sentence(record, words) -> None:
    net = nn.Sequential(nn.Linear(7, 5), nn.ReLU())
    with pytest.raises(BadInput, match=words) as refused:
        structure.apply(net, record)
    assert "\n" not in str(refused.value)


def test_grouped_convolutions_are_refused() -> None:
    with pytest.raises(BadInput, match="groups"):
        structure.apply(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), {"edit": "factorise", "layer": "0", "rank": 1})


def test_a_new_head_takes_the_dtype_of_the_old_one() -> None:
    net = nn.Sequential(nn.Linear(7, 5)).bfloat16()
    net = structure.apply(net, {"edit": "new_head", "layer": "0", "part": "torch.nn:Linear", "arguments": {"in_features": 7, "out_features": 2}})
    assert net[0].weight.shape == (2, 7) and net[0].weight.dtype == torch.bfloat16
