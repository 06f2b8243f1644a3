"""Edits: what they compute, what they refuse, and that a structure is rebuilt from its record."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import wellread
from wellread import Network, structure
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
        ({"edit": "keep_channels", "out": {"0": []}}, "at least one channel"),
        ({"edit": "keep_channels", "out": {"0": [[3, 6]]}}, "do not fit|cannot be kept"),
        ({"edit": "keep_channels", "out": {"0": [[2, 3], [0, 1]]}}, "ascending"),
        ({"edit": "keep_channels", "into": {"1": [[0, 1]]}}, "only Linear and Conv have inputs"),
        ({"edit": "keep_channels", "out": {"1": [[0, 1]]}}, "no channels of its own"),
        ({"edit": "keep_channels", "attributes": {"0": {"forward": 1}}}, "no number 'forward'"),
        ({"edit": "sparsify", "layers": {"1": 2}}, "without a weight matrix"),
        ({"edit": "sparsify", "layers": {"0": 36}}, "36 zeros do not fit the 35 weights"),
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


@pytest.mark.parametrize("groups", [1, 2, 4, 12])
def test_convolutions_in_groups_keep_the_same_channels_of_each(groups) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(12, 12, 3, groups=groups).double()
    x = torch.randn(2, 12, 5, 5, dtype=torch.float64)
    inside = range(12 // groups) if groups < 12 else range(1)
    kept = [g * len(inside) + i for g in range(groups) for i in inside if (i % 3 != 1 if groups < 12 else g % 3 != 1)]
    silent = x.clone()
    silent[:, [i for i in range(12) if i not in kept]] = 0
    expected = conv(silent)[:, kept]
    ranges = structure.to_ranges(kept)
    small = structure.apply(nn.Sequential(conv), {"edit": "keep_channels", "out": {"0": ranges}, "into": {"0": ranges}})
    torch.testing.assert_close(small(x[:, kept]), expected, rtol=0, atol=1e-12)
    assert structure.from_ranges(ranges) == kept and small[0].groups == (len(kept) if groups == 12 else groups)


def test_whole_groups_of_a_convolution_can_go_but_not_uneven_parts() -> None:
    conv = nn.Conv2d(6, 9, 1, groups=3)
    weight = conv.weight.detach().clone()
    small = structure.apply(nn.Sequential(conv), {"edit": "keep_channels", "out": {"0": [[0, 3], [6, 9]]}, "into": {"0": [[0, 2], [4, 6]]}})
    assert small[0].groups == 2 and torch.equal(small[0].weight, weight[[0, 1, 2, 6, 7, 8]])
    for cut in ({"out": {"0": [[0, 4]]}}, {"into": {"0": [[0, 3]]}}):
        with pytest.raises(BadInput, match="equally many"):
            structure.apply(nn.Sequential(nn.Conv2d(6, 9, 1, groups=3)), {"edit": "keep_channels", **cut})


def test_a_copy_without_masks_leaves_the_original_with_them() -> None:
    import copy

    net = structure.apply(nn.Sequential(nn.Linear(6, 4)), {"edit": "sparsify", "layers": {"0": 10}})
    x, before = torch.randn(3, 6), net[0].weight.detach().clone()
    dense = structure.apply(copy.deepcopy(net), {"edit": "densify"})
    assert torch.equal(dense(x), net(x)) and torch.equal(net[0].weight, before) and int((before == 0).sum()) == 10
    assert list(structure.masks(net)) == ["0"] and not structure.masks(dense)


def test_masks_are_of_the_smallest_weights_and_zeros_stay_through_training_and_densify() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    weight = net[0].weight.detach().clone()
    net = structure.apply(net, {"edit": "sparsify", "layers": {"0": 8}})
    assert set(structure.masks(net)) == {"0"}
    zero = net[0].weight == 0
    assert zero.sum() == 8 and weight[zero].abs().max() < weight[~zero].abs().min()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, weight_decay=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
    assert torch.equal(net[0].weight == 0, zero) and not torch.equal(net[0].weight[~zero], weight[~zero])
    trained = net[0].weight.detach().clone()
    net = structure.apply(net, {"edit": "sparsify", "layers": {"0": 12}})  # more zeros: those that were there are the smallest
    assert (net[0].weight == 0).sum() == 12 and (net[0].weight[zero] == 0).all()
    with pytest.raises(BadInput, match="densify"):
        structure.apply(net, {"edit": "keep_channels", "out": {"0": [[0, 2]]}})
    dense = structure.apply(net, {"edit": "densify"})
    assert not structure.masks(dense) and sorted(dense.state_dict()) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert (dense[0].weight == 0).sum() == 12 and torch.equal(dense[0].weight[dense[0].weight != 0], trained[dense[0].weight != 0])


def edited_networks() -> dict[str, Network]:
    """A CNN and a ViT after every kind of edit."""
    torch.manual_seed(0)
    cnn = wellread.load("timm/test_efficientnet", pretrained=False, num_classes=7)
    vit = wellread.load("timm/test_vit", pretrained=False, num_classes=7)
    part = [[0, 100], [120, 192]]
    block = {f"blocks.4.0.{name}": part for name in ("conv_pw", "bn1", "conv_dw", "bn2", "se.conv_expand")}
    into = {f"blocks.4.0.{name}": part for name in ("conv_dw", "conv_pwl", "se.conv_reduce")}
    return {
        "cnn": cnn.edited(
            {"edit": "factorise", "layer": "blocks.1.0.conv_exp", "rank": 9, "scheme": "spatial"},
            {"edit": "keep_channels", "out": block, "into": into},
            {"edit": "sparsify", "layers": {"blocks.4.0.conv_pwl": 1000, "conv_stem": 20}},
        ),
        "vit": vit.edited(
            {"edit": "keep_blocks", "blocks": "blocks", "keep": [0, 1, 1, 5]},
            {"edit": "keep_channels", "out": {"blocks.2.mlp.fc1": [[0, 64]], "blocks.0.attn.qkv": [[0, 32], [64, 96], [128, 160]]},
             "into": {"blocks.2.mlp.fc2": [[0, 64]], "blocks.0.attn.proj": [[0, 32]]}, "attributes": {"blocks.0.attn": {"num_heads": 1, "attn_dim": 32}}},
            {"edit": "factorise", "layer": "blocks.3.mlp.fc1", "rank": 10},
            {"edit": "sparsify", "layers": {"blocks.1.mlp.fc1": 500}},
            {"edit": "densify"},
            {"edit": "sparsify", "layers": {"blocks.3.mlp.fc2": 700}},
        ),
    }  # fmt: skip


def test_edited_networks_compute_the_same_bits_in_another_process(tmp_path: Path) -> None:
    for name, net in edited_networks().items():
        x = torch.randn(2, 3, *net.input.size)
        np.save(tmp_path / f"{name}-x.npy", x.numpy())
        with torch.inference_mode():
            np.save(tmp_path / f"{name}-y.npy", net(x).numpy())
        net.save(tmp_path / name)
    code = """
import sys, numpy as np, torch, wellread
torch.set_num_threads(int(sys.argv[2]))
for name in ("cnn", "vit"):
    net = wellread.load(f"{sys.argv[1]}/{name}")
    with torch.inference_mode():
        same = np.array_equal(net(torch.from_numpy(np.load(f"{sys.argv[1]}/{name}-x.npy"))).numpy(), np.load(f"{sys.argv[1]}/{name}-y.npy"))
    print(name, same, len(net.edits), [int((mask.keep == 0).sum()) for mask in wellread.structure.masks(net.module).values()])
"""
    command = [sys.executable, "-c", code, str(tmp_path), str(torch.get_num_threads())]
    done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["cnn True 3 [20, 1000]", "vit True 6 [700]"]


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_edited_networks_are_exported(name, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net = edited_networks()[name]
    x = torch.randn(2, 3, *net.input.size)
    with torch.inference_mode():
        expected = net(x)
    program = torch.export.export(net.module, (x,))
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-5)
    torch.onnx.export(program, (x,), str(tmp_path / "net.onnx"), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-4)
