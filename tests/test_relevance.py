"""Relevance: conserved where it must be, equal to zennit's and captum's on networks that these can take, and the network's outputs unchanged."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

import wellread
from bench.cifar_resnet import ResNet
from wellread.errors import BadInput
from wellread.features import capture

pytest.importorskip("zennit")
from wellread.relevance import Rules


def relevance(module: nn.Module, x: Tensor, layers: list[str], column: int = 1) -> dict[str, Tensor]:
    """At the inputs of layers, for the output `column`; "" is the input itself."""
    x = x.detach().requires_grad_()
    with capture(module, [name for name in layers if name], inputs=True) as caught, Rules():
        out = module(x)
    start = torch.zeros_like(out)
    start[:, column] = 1
    return dict(zip(layers, torch.autograd.grad(out, [caught[name] if name else x for name in layers], start), strict=True))


@pytest.mark.parametrize("released", [True, False])
def test_a_released_pass_leaves_nothing_behind(released: bool) -> None:
    module, x = randomised(small(), shift=True), torch.randn(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    rules = Rules()
    with rules:
        out = module(x)
    torch.autograd.grad(out.sum(), x)
    rule = weakref.ref(rules.hooks[0])
    if released:
        rules.release()
    del rules, out
    gc.collect()
    assert (rule() is None) == released  # were it gone either way, release would not be needed


def randomised(module: nn.Module, shift: bool) -> nn.Module:
    torch.manual_seed(0)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_var, 0.5, 2)
            nn.init.uniform_(layer.weight, -1.5, 1.5)  # signs change the positive part of a merged weight
            if shift:
                nn.init.uniform_(layer.running_mean, -0.3, 0.3)
                nn.init.uniform_(layer.bias, -0.3, 0.3)
        elif getattr(layer, "bias", None) is not None and not shift:
            nn.init.zeros_(layer.bias)
    return module.double().eval().requires_grad_(False)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def test_relevance_is_conserved_through_residuals_strides_batch_norm_and_pooling() -> None:
    net = randomised(ResNet(1), shift=False)
    trunk = ["linear", "layer3.0.conv1", "layer2.0.conv1", "layer1.0.conv1", ""]
    found = relevance(net, torch.rand(3, 3, 16, 16, dtype=torch.float64), trunk)
    for name in trunk:
        torch.testing.assert_close(found[name].flatten(1).sum(1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-4)


def test_it_is_what_zennit_gives_after_merging_batch_norm() -> None:
    from zennit.canonizers import SequentialMergeBatchNorm
    from zennit.composites import LayerMapComposite
    from zennit.rules import Epsilon, Norm, Pass, ZPlus
    from zennit.types import Activation, AvgPool, Convolution

    net = randomised(small(), shift=True)
    x = torch.randn(2, 3, 17, 17, dtype=torch.float64)
    rules = [(Activation, Pass()), (AvgPool, Norm()), (Convolution, ZPlus(zero_params="bias")), (nn.Linear, Epsilon())]
    given = x.clone().requires_grad_()
    start = torch.zeros(2, 4, dtype=torch.float64)
    start[:, 1] = 1
    with LayerMapComposite(rules, canonizers=[SequentialMergeBatchNorm()]).context(copy.deepcopy(net)) as theirs:
        for layer in theirs.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eps = 0.0  # it leaves 1e-5 in the merged layers, which are to do nothing
        (expected,) = torch.autograd.grad(theirs(given), given, start)
    torch.testing.assert_close(relevance(net, x, [""])[""], expected, rtol=0, atol=1e-5 * expected.abs().max())


def test_it_is_what_captum_gives() -> None:
    from captum.attr import LRP
    from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3, stride=2), nn.ReLU())
            self.head = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.front(x).flatten(1))

    net = randomised(Net(), shift=False)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.rule = Alpha1_Beta0_Rule(set_bias_to_zero=True) if isinstance(layer, nn.Conv2d) else EpsilonRule(1e-6)
    x = torch.rand(2, 2, 7, 7, dtype=torch.float64)
    out = net(x)
    ours = relevance(net, x, [""])[""] * out[:, 1].view(-1, 1, 1, 1)  # captum starts with the logit
    theirs = LRP(net.requires_grad_(True)).attribute(x.clone().requires_grad_(), target=1)
    torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=1e-5)


def test_without_bias_and_convolution_it_is_gradient_times_input() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9, bias=False), nn.ReLU(), nn.Linear(9, 7, bias=False), nn.ReLU(), nn.Linear(7, 3, bias=False)).double()
    net.requires_grad_(False)
    x = torch.randn(4, 6, dtype=torch.float64)
    given = x.clone().requires_grad_()
    out = net(given)[:, 1]
    (gradient,) = torch.autograd.grad(out.sum(), given)
    torch.testing.assert_close(relevance(net, x, [""])[""] * out[:, None], x * gradient, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["timm/test_resnet", "timm/test_efficientnet", "timm/test_vit", "timm/test_convnext", "torchvision/mobilenet_v3_small"])
def test_the_outputs_stay_those_of_the_network(name) -> None:
    net = wellread.load(name, pretrained=False, num_classes=5)
    module = randomised(net.module, shift=True).float()
    x = torch.randn(1, 3, *net.input.size)
    with Rules():
        out = module(x.requires_grad_())
    torch.testing.assert_close(out.detach(), module(x.detach()), rtol=1e-4, atol=1e-4)
    assert not any(layer._forward_hooks for layer in module.modules())


def test_a_call_without_a_rule_is_named() -> None:
    class Sine(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sin()

    with pytest.raises(BadInput, match="no rule for the call 'sin'"), Rules():
        Sine()(torch.randn(2, 3).requires_grad_())
