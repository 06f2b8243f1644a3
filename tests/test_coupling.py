"""Coupled channels: the groups are the right ones, a cut network is the masked one, and what cannot be cut is left out or refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import wellread
from bench import cifar_resnet
from wellread import ImageInput, Network, TextInput, structure
from wellread.coupling import Group, channel_groups, keep, masked
from wellread.errors import BadInput
from wellread.families import Transformer

pytest.importorskip("torch_pruning")


class Joined(nn.Module):
    """Two branches end to end in one convolution (concatenation)."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 5, 3, padding=1)
        self.after = nn.Conv2d(11, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.after(torch.cat([self.left(x).relu(), self.right(x).relu()], 1)).relu().mean((2, 3)))


class Cut(nn.Module):
    """A part of it hides from the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.hidden, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.hidden(self.first(x.mean((2, 3))))
        return self.head(y)


def network_of(name: str) -> Network:
    torch.manual_seed(0)
    if name == "joined":
        net = Network(Joined(), ImageInput((16, 16)))
    elif name == "cifar":
        net = cifar_resnet.network(8, pretrained=False)
    else:
        net = wellread.load(name, pretrained=False)
    for layer in net.module.modules():  # fresh batch norm does nothing: give it means, variances and shifts
        if isinstance(layer, nn.BatchNorm2d):
            for tensor, low, high in ((layer.running_mean, -0.3, 0.3), (layer.running_var, 0.5, 2), (layer.weight, 0.5, 1.5), (layer.bias, -0.3, 0.3)):
                nn.init.uniform_(tensor, low, high)
        if isinstance(gamma := getattr(layer, "gamma", None), nn.Parameter):
            nn.init.ones_(gamma)  # ConvNeXt starts with 1e-6, which hides its blocks
    return net


def some_kept(groups: list[Group], seed: int = 0) -> dict[Group, list[int]]:
    """About two thirds of each group, at random."""
    order = torch.Generator().manual_seed(seed)
    return {group: sorted(torch.randperm(group.units, generator=order)[: max(1, group.units * 2 // 3)].tolist()) for group in groups}


NETWORKS = ["joined", "cifar", "timm/test_resnet", "timm/test_efficientnet", "timm/test_vit", "timm/test_convnext", "torchvision/resnet18"]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_cut_network_is_the_masked_one(name) -> None:
    net = network_of(name)
    groups = [group for group in channel_groups(net) if not group.norms_over]
    kept = some_kept(groups)
    small = net.edited(keep(net, kept))
    x = torch.randn(2, 3, *net.input.size)
    with torch.inference_mode():
        before = net(x)
        with masked(net.module, kept):
            expected = net(x)
        torch.testing.assert_close(small(x), expected, rtol=1e-5, atol=1e-5)
        assert (expected - before).abs().max() > 1e-3  # the mask does something
        assert torch.equal(net(x), before)  # and is gone again
    assert sum(p.numel() for p in small.module.parameters()) < sum(p.numel() for p in net.module.parameters())


@pytest.mark.parametrize("name,count", [("timm/test_vit", 13), ("timm/test_convnext", 13)])
def test_groups_across_layer_norms_run_after_the_cut(name, count) -> None:
    net = network_of(name)
    groups = channel_groups(net)
    assert len(groups) == count and any(group.norms_over for group in groups)
    small = net.edited(keep(net, some_kept(groups)))
    assert small(torch.randn(1, 3, *net.input.size)).shape == (1, 1000)


def test_inner_channels_are_free_and_those_at_a_shortcut_are_one_group() -> None:
    groups = {group.name: group for group in channel_groups(network_of("torchvision/resnet18"))}
    assert [m.path for m in groups["layer1.0.conv1"].producers] == ["layer1.0.conv1"]
    assert [m.path for m in groups["conv1"].producers] == ["conv1", "layer1.0.conv2", "layer1.1.conv2"]
    assert "fc" not in groups and len(groups) == 12


def test_padded_shortcuts_leave_only_the_inner_channels() -> None:
    assert [group.name for group in channel_groups(network_of("cifar"))] == ["layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1"]


def test_expansion_depthwise_and_squeeze_are_cut_together() -> None:
    groups = {group.name: group for group in channel_groups(network_of("timm/test_efficientnet"))}
    touched = {member.path for member in groups["blocks.4.0.conv_pw"].members}
    assert {f"blocks.4.0.{name}" for name in ("conv_pw", "bn1", "conv_dw", "bn2", "se.conv_reduce", "se.conv_expand", "conv_pwl")} == touched


def test_attention_heads_are_units() -> None:
    net = network_of("timm/test_vit")
    heads = next(group for group in channel_groups(net) if group.heads)
    small = net.edited(keep(net, {heads: [1]}))
    attention = small.module.blocks[0].attn
    size = attention.head_dim
    assert heads.units == net.module.blocks[0].attn.num_heads and attention.num_heads == 1
    assert torch.equal(attention.proj.weight, net.module.blocks[0].attn.proj.weight[:, size : 2 * size])
    width = heads.units * size
    assert torch.equal(attention.qkv.weight[size : 2 * size], net.module.blocks[0].attn.qkv.weight[width + size : width + 2 * size])  # its keys


def test_heads_and_neurons_of_a_text_encoder() -> None:
    import transformers

    torch.manual_seed(0)
    config = {"model_type": "bert", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 20}
    module = Transformer("AutoModel", config).eval()
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "sentence"])}
    from tokenizers import Tokenizer, models, pre_tokenizers

    plain = Tokenizer(models.WordLevel(words, "[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    source = TextInput(transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]"), 16)
    net = Network(module, source, "head", output="embedding", architecture={"family": "transformers", "auto": "AutoModel", "config": config})
    groups = channel_groups(net)
    assert [(group.units, group.heads) for group in groups] == [(4, True), (24, False)] * 2  # the width is the embedding: never cut
    kept = some_kept(groups)
    small = net.edited(keep(net, kept))
    tokens = {"input_ids": torch.tensor([[5, 6, 3, 2]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with torch.inference_mode(), masked(net.module, kept):
        torch.testing.assert_close(small(tokens), net(tokens), rtol=1e-5, atol=1e-5)


def test_keeping_all_changes_nothing_and_impossible_units_are_refused() -> None:
    net = network_of("joined")
    first = channel_groups(net)[0]
    assert keep(net, {first: range(first.units)}) == {"edit": "keep_channels"}
    for units in ([], [6], [-1, 0]):
        with pytest.raises(BadInput, match="give at least one of 0 to 5"):
            keep(net, {first: units})


def test_the_network_is_left_as_it_is() -> None:
    net = network_of("cifar")
    net.module.requires_grad_(False)
    before = net.fingerprint
    channel_groups(net)
    assert net.fingerprint == before and not any(p.requires_grad for p in net.module.parameters())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in net.module.modules())


def test_what_cannot_be_traced_is_named() -> None:
    with pytest.raises(BadInput, match="'first' cannot be traced .no gradient"):
        channel_groups(Network(Cut(), ImageInput((8, 8))))
    with pytest.raises(BadInput, match="the module 'after' cannot be traced"):
        broken = Joined()
        broken.after = nn.Conv2d(9, 4, 1)
        channel_groups(Network(broken, ImageInput((8, 8))))
    sparse = network_of("joined").edited({"edit": "sparsify", "layers": {"left": 3}})
    with pytest.raises(BadInput, match="densify"):
        channel_groups(sparse)
    assert "densify" in structure.EDITS
