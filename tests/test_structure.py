"""Edits: what they compute, what they refuse, and that a structure is rebuilt from its record."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from wellread import structure
from wellread.errors import BadInput
from wellread.families import Transformer


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


@pytest.mark.parametrize("stride,padding,dilation,kernel,mode", [
    (1, 1, 1, 3, "zeros"), ((2, 1), (0, 2), (1, 2), (3, 2), "zeros"), (2, (2, 1), 1, (5, 3), "reflect"), (1, 0, 1, (1, 3), "zeros"),
])  # fmt: skip
def test_a_convolution_factorised_in_space_computes_the_same_at_full_rank(stride, padding, dilation, kernel, mode) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, kernel, stride, padding, dilation, padding_mode=mode).double()
    x = torch.randn(2, 4, 11, 9, dtype=torch.float64)
    rank = min(4 * conv.kernel_size[0], 6 * conv.kernel_size[1])
    net = structure.apply(nn.Sequential(conv), {"edit": "factorise", "layer": "0", "rank": rank, "scheme": "spatial"})
    torch.testing.assert_close(net(x), conv(x), rtol=0, atol=1e-12)
    assert net[0][0].kernel_size == (conv.kernel_size[0], 1) and net[0][1].kernel_size == (1, conv.kernel_size[1])
    low = structure.apply(nn.Sequential(conv), {"edit": "factorise", "layer": "0", "rank": 2, "scheme": "spatial"}, fill=False)
    assert low[0][0].weight.shape[0] == 2 and low(x).shape == conv(x).shape


def test_rank_one_in_space_is_exact_for_a_separable_filter() -> None:
    conv = nn.Conv2d(1, 1, 3, bias=False).double()
    row, column = torch.tensor([1.0, 2, 1]).double(), torch.tensor([-1.0, 0, 1]).double()
    conv.weight.data = torch.outer(row, column)[None, None]  # Sobel's filter
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    net = structure.apply(nn.Sequential(conv), {"edit": "factorise", "layer": "0", "rank": 1, "scheme": "spatial"})
    torch.testing.assert_close(net(x), conv(x), rtol=0, atol=1e-12)


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
        ({"edit": "factorise", "layer": "0", "rank": 1, "scheme": "spatial"}, "only Conv2d"),
        ({"edit": "factorise", "layer": "0", "rank": 1, "scheme": "diagonal"}, "channel or spatial"),
        ({"edit": "keep_blocks", "blocks": "0", "keep": [0]}, "Sequential or ModuleList"),
        ({"edit": "keep_blocks", "blocks": "", "keep": [0, 2]}, "no block 2: choose from 0 to 1"),
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


def test_blocks_are_dropped_repeated_and_renumbered() -> None:
    net = nn.Sequential(*[nn.Linear(3, 3) for _ in range(4)])
    layers = list(net)
    net = structure.apply(net, {"edit": "keep_blocks", "blocks": "", "keep": [3, 0, 0]})
    assert [name for name, _ in net.named_children()] == ["0", "1", "2"]
    assert net[0] is layers[3] and net[1] is layers[0]
    assert torch.equal(net[2].weight, net[1].weight) and net[2].weight.data_ptr() != net[1].weight.data_ptr()


def test_named_blocks_keep_their_names() -> None:
    from collections import OrderedDict

    net = nn.Sequential(OrderedDict(stem=nn.Linear(3, 3), end=nn.Linear(3, 3)))
    structure.apply(net, {"edit": "keep_blocks", "blocks": "", "keep": [1, 1, 0]})
    assert [name for name, _ in net.named_children()] == ["end", "end_2", "stem"]


def test_a_language_model_runs_all_its_repeated_blocks() -> None:
    small = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 20}
    net = Transformer("AutoModelForCausalLM", small).eval()
    seen: list[int] = []
    net = structure.apply(net, {"edit": "keep_blocks", "blocks": "model.model.layers", "keep": [0, 1, 1, 2]})
    for i, block in enumerate(net.model.model.layers):
        block.register_forward_hook(lambda *_, i=i: seen.append(i))
    net(input_ids=torch.arange(5)[None])
    assert seen == [0, 1, 2, 3]
