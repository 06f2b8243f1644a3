"""Layer-wise relevance propagation through any network: zennit's rules, put in while the network runs (Bach et al. 2015).

zennit attaches its rules to modules. Residual sums, pooled means and attention are mostly not modules but plain calls, and batch norm must be
merged into the convolution before it; so the rules are attached here to every call of the forward pass, in the order of the data, and batch norm is
merged into the convolution whose output it gets.

    convolution                 z-plus, without bias (inside the network; what reaches the pixels is not refined)
    linear                      epsilon, 1e-6
    sums, means                 in proportion to the summands, epsilon 1e-6
    activations, layer norms    passed on unchanged
    attention, gates            the weights count as constants, and the values get all (Ali et al. 2022, arXiv 2202.07304)
    maximum                     to the largest
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from wellread.errors import BadInput, optional

CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d}
# names of torch's functions, without underscores at the ends
ELEMENTWISE = """relu relu6 gelu silu mish hardswish leaky_relu elu selu celu softplus tanh hardtanh
    layer_norm group_norm rms_norm instance_norm batch_norm""".split()  # noqa: SIM905
SUMS = ("mean", "sum", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d")
CONSTANTS = ("softmax", "sigmoid", "hardsigmoid", "rsqrt", "exp")
MOVES = """view reshape flatten unflatten permute transpose movedim t swapaxes contiguous clone to float type_as squeeze unsqueeze chunk split unbind
    narrow select cat concat stack pad roll repeat expand expand_as getitem get dropout dropout1d dropout2d alpha_dropout index_select index_fill
    pixel_unshuffle pixel_shuffle interpolate max_pool1d max_pool2d adaptive_max_pool2d amax identity masked_fill view_as reshape_as""".split()  # noqa: SIM905


class _Call(nn.Module):
    """A function as a module, so that a rule can be attached; a weight, where there is one, is a parameter, which rules change."""

    def __init__(self, function: Callable[..., Tensor], weight: Tensor | None = None) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(weight.detach(), requires_grad=False) if weight is not None else None

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) if self.weight is None else self.function(x, self.weight)


class Rules(TorchFunctionMode):
    """Inside it a forward pass is recorded in such a way that `torch.autograd.grad` gives relevance instead of gradients.

    The values are those of the network; parameters must not require gradients, the input must. Afterwards call `release`, or memory grows with
    every pass. Raises `BadInput` for a call that has no rule.
    """

    def __init__(self) -> None:
        super().__init__()
        self.zennit = optional("zennit.rules", "compress")
        self.hooks: list[Any] = []

    def release(self) -> None:
        """Let go of the recorded pass, after `torch.autograd.grad`: its hooks and tensors hold one another where no garbage collector looks."""
        for rule in self.hooks:
            rule.remove()
        self.hooks.clear()

    def ruled(self, rule: Any, x: Tensor, function: Callable[..., Tensor], weight: Tensor | None = None) -> Tensor:
        module = _Call(function, weight)
        rule.register(module)
        self.hooks.append(rule)  # zennit refers to it weakly
        return module(x)

    def __torch_function__(self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name, rules = getattr(function, "__name__", str(function)).strip("_"), self.zennit
        given = [each for each in args if isinstance(each, Tensor) and each.requires_grad]
        if not given:
            return function(*args, **kwargs)
        x = given[0]
        if function in CONVOLUTIONS:
            return self._convolution(function, *args, **kwargs)
        if function is F.linear:
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            return self.ruled(rules.Epsilon(), x, lambda x, weight: F.linear(x, weight, bias), args[1])
        if name == "batch_norm" and hasattr(x, "made_by"):
            return self._merged(*args, **kwargs)
        if name in ELEMENTWISE:
            kwargs.pop("inplace", None)
            plain = getattr(F, name) if name + "_" == function.__name__ else function
            return self.ruled(rules.Pass(), x, lambda x: plain(x, *args[1:], **kwargs))
        if name in SUMS:
            return self.ruled(rules.Norm(), x, lambda x: function(x, *args[1:], **kwargs))
        if name in ("add", "iadd", "radd"):
            return self._sum(args, kwargs)
        if name in ("mul", "imul", "rmul", "div", "truediv", "itruediv"):
            return self._product(name, args)
        if name in ("matmul", "bmm", "rmatmul"):
            left, right = (args[1], args[0]) if name == "rmatmul" else args[:2]
            if left.requires_grad and right.requires_grad:
                return torch.matmul(left, right).detach()  # queries and keys: what follows is a softmax, which is a constant
            return self.ruled(rules.Norm(), x, lambda x: torch.matmul(x, right) if left.requires_grad else torch.matmul(left, x))
        if name == "scaled_dot_product_attention":
            query, key, value = args[:3]
            eye = torch.eye(value.shape[-2], dtype=value.dtype, device=value.device).expand(*value.shape[:-2], -1, -1)
            weights = function(query, key, eye, *args[3:], **kwargs).detach()  # the attention paid to each place
            return self.ruled(rules.Norm(), value, lambda value: torch.matmul(weights, value))
        out = function(*args, **kwargs)
        if name in CONSTANTS:
            return out.detach()
        if isinstance(out, Tensor) and out.requires_grad and out.is_floating_point() and name not in MOVES:
            raise BadInput(f"relevance has no rule for the call {name!r} in this network: choose the criterion taylor")
        return out

    def _convolution(self, function: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **form: Any) -> Tensor:
        def run(x: Tensor, weight: Tensor) -> Tensor:
            return function(x, weight, None, *rest, **form)

        out = self.ruled(self.zennit.ZPlus(), x, run, weight)
        if bias is not None:
            shift = bias.view(-1, *[1] * (out.ndim - 2))
            out = self.ruled(self.zennit.Pass(), out, lambda out: out + shift)
        out.made_by = (run, x, weight, bias)  # type: ignore[attr-defined]
        return out

    def _merged(
        self, x: Any, mean: Any, variance: Any, weight: Any = None, bias: Any = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5
    ) -> Tensor:
        """Batch norm in evaluation mode after a convolution: one convolution with scaled weights."""
        run, before, kernel, shift = x.made_by
        scale = (1 if weight is None else weight) * torch.rsqrt(variance + eps)
        offset = (0 if bias is None else bias) - scale * (mean if shift is None else mean - shift)
        out = self.ruled(self.zennit.ZPlus(), before, run, kernel * scale.view(-1, *[1] * (kernel.ndim - 1)))
        offset = offset.view(-1, *[1] * (out.ndim - 2))
        return self.ruled(self.zennit.Pass(), out, lambda out: out + offset)

    def _sum(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        a, b = args[:2]
        if kwargs.get("alpha", 1) != 1:
            b = b * kwargs["alpha"]
        both = isinstance(a, Tensor) and isinstance(b, Tensor) and a.requires_grad and b.requires_grad
        if not both:  # something constant is added: it takes nothing
            x, other = (a, b) if isinstance(a, Tensor) and a.requires_grad else (b, a)
            if isinstance(other, Tensor):
                x = x.expand(torch.broadcast_shapes(x.shape, other.shape))
            return self.ruled(self.zennit.Pass(), x, lambda x: x + other)
        return self.ruled(self.zennit.Norm(), torch.stack(torch.broadcast_tensors(a, b)), lambda x: x.sum(0))

    def _product(self, name: str, args: Sequence[Any]) -> Tensor:
        """A signal times a gate or a number: the signal, the larger of the two, gets all."""
        a, b = args[:2]
        if "div" in name:  # div, truediv, itruediv
            b = 1 / (b.detach() if isinstance(b, Tensor) else b)
        signals = [each for each in (a, b) if isinstance(each, Tensor) and each.requires_grad]
        x = max(signals, key=lambda each: each.numel())
        other = b if x is a else a
        if isinstance(other, Tensor):
            other = other.detach()
            x = x.expand(torch.broadcast_shapes(x.shape, other.shape))
        return self.ruled(self.zennit.Pass(), x, lambda x: x * other)
