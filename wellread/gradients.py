"""The norm of each example's own gradient, over all trained parameters, from one pass forward and one back for the whole batch.

The gradient of a weight that is used once is a product of what went into its layer and the error that came back, so its norm follows from
these two (Goodfellow 2015, arXiv 1510.01799; Rochette et al. 2019, arXiv 1912.06015) and no gradient per example is ever written down.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

ELEMENTS = 2**24  # numbers in a temporary tensor; batches that would need more are taken in pieces

Inputs = Tensor | Mapping[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """[B] in float32, from logits [B, C] and classes int64 [B]."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


def gradient_norms(module: nn.Module, inputs: Inputs, targets: Tensor, loss: Loss = cross_entropy) -> Tensor:
    """|| d loss_i / d w || for each example i: float32 [B]. w: all parameters that require a gradient.

    inputs: Tensor [B, ...] or a dict of them, as the module takes them. targets: [B, ...].
    loss: (outputs, targets) to one number for each example [B].
    The module is evaluated in evaluation mode, so that no example sees another, and is left as it was; `grad` is not touched.
    Exact for any module: a parameter that is used more than once, or otherwise than in a linear layer, convolution, norm or embedding, gets its
    gradient written down, for some examples at a time. The example with the largest loss is compared with a plain backward pass.
    """
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.enable_grad():
            return _squares(module, inputs, targets, loss).clamp(min=0).sqrt()
    finally:
        for part, mode in modes.items():
            part.training = mode


def _squares(module: nn.Module, inputs: Inputs, targets: Tensor, loss: Loss) -> Tensor:
    """Squared norms, float32 [B]."""
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    rows = len(targets)
    with _Uses(parameters.values(), rows) as uses:
        losses = loss(_outputs(module, inputs), targets)
    errors = torch.autograd.grad(losses.sum(), [use[-1] for use in uses.known], allow_unused=True) if uses.known else ()
    total, done = torch.zeros(rows, device=losses.device), set()
    for (names, function, given, _), error in zip(uses.known, errors, strict=True):
        if all(uses.count[id(given[name])] == 1 for name in names):
            done |= {id(given[name]) for name in names}
            if error is not None:
                total += NORMS[function](function, given, error, names)
    left = [name for name, p in parameters.items() if id(p) not in done]
    if left:
        total = total + _written_down(module, inputs, targets, loss, left)
    if not uses.known:
        return total
    row = int(losses.argmax())  # a batch that lies elsewhere than in the first dimension of a layer would show here
    [plain] = _one_by_one(module, _rows(inputs, row), targets[row : row + 1], loss, list(parameters))
    if not torch.isclose(total[row], plain, rtol=1e-3, atol=1e-12):
        return _written_down(module, inputs, targets, loss, list(parameters))
    return total


def _outputs(module: nn.Module, inputs: Inputs) -> Tensor:
    out = module(**inputs) if isinstance(inputs, Mapping) else module(inputs)
    return out.logits if hasattr(out, "logits") else out


def _rows(inputs: Inputs, row: int) -> Any:
    return tree_map(lambda each: each[row : row + 1], inputs)


# --- what each layer does with its parameters


class _Uses(TorchFunctionMode):
    """Notes every call that takes a parameter: those whose gradient norm has a closed form in `known`, and how often each parameter was used."""

    def __init__(self, parameters: Iterable[Tensor], rows: int) -> None:
        super().__init__()
        self.tracked = {id(p) for p in parameters}
        self.rows = rows
        self.count: Counter[int] = Counter()
        self.known: list[tuple[list[str], Callable[..., Tensor], dict[str, Any], GradientEdge]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.embedding and len(args) and len(args[0]) == 1:
            args = (args[0].expand(self.rows, *args[0].shape[1:]), *args[1:])  # positions, which a text encoder looks up once for the whole batch
        out = function(*args, **kwargs)
        used = [id(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor) and id(each) in self.tracked]
        if used and any(isinstance(each, Tensor) and each.requires_grad for each in tree_leaves(out)):  # not the shape of a weight, and such
            self.count.update(used)
            given = dict(zip(ARGUMENTS.get(function, ()), args, strict=False)) | kwargs
            names = [name for name in ("weight", "bias") if id(given.get(name)) in self.tracked]
            if function in NORMS and len(names) == len(used) and self._by_example(given, out):
                self.known.append((names, function, given, get_gradient_edge(out)))
        return out

    def _by_example(self, given: dict[str, Any], out: Tensor) -> bool:
        simple = not isinstance(given.get("padding"), str) and not given.get("scale_grad_by_freq") and not given.get("training")
        return simple and len(given["input"]) == len(out) == self.rows


def _product(a: Tensor, d: Tensor) -> Tensor:
    """Squared norm of sum over L of d x a, summed over groups: [B], from a [B, G, i, L] and d [B, G, o, L]."""
    (i, length), o = a.shape[2:], d.shape[2]
    if length == 1:
        return (a.square().sum((2, 3)) * d.square().sum((2, 3))).sum(1)
    if length * (i + o) < i * o:
        return ((a.mT @ a) * (d.mT @ d)).sum((1, 2, 3))
    return (d @ a.mT).square().sum((1, 2, 3))


def _linear(_: Any, given: dict[str, Any], d: Tensor, names: list[str]) -> Tensor:
    a, d = (each.reshape(len(each), -1, each.shape[-1]).mT for each in (given["input"].detach(), d))  # [B, features, positions]
    total = _product(a[:, None], d[:, None]) if "weight" in names else torch.zeros(len(d), device=d.device)
    return total + d.sum(2).square().sum(1) if "bias" in names else total


def _convolution(_: Any, given: dict[str, Any], d: Tensor, names: list[str]) -> Tensor:
    x, weight, groups = given["input"].detach(), given["weight"], given.get("groups", 1)
    d = d.flatten(2)
    total = d.sum(2).square().sum(1) if "bias" in names else torch.zeros(len(d), device=d.device)
    if "weight" in names:
        pairs = [given.get(name, default) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))]
        stride, padding, dilation = ((each, each) if isinstance(each, int) else each for each in pairs)
        x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
        inside = x.shape[1] * weight[0, 0].numel() * d.shape[2]
        for part in torch.arange(len(d)).split(max(1, ELEMENTS // max(inside, weight.numel()))):
            a = x[part]
            for axis in (0, 1):  # [B, channels, h, w, kernel, kernel]; a copy of such windows is faster than F.unfold
                a = a.unfold(2 + axis, dilation[axis] * (weight.shape[2 + axis] - 1) + 1, stride[axis])[..., :: dilation[axis]]
            a = a.permute(0, 1, 4, 5, 2, 3).flatten(4).flatten(1, 3)
            total[part] += _product(a.unflatten(1, (groups, -1)), d[part].unflatten(1, (groups, -1)))
    return total


def _norm(function: Any, given: dict[str, Any], d: Tensor, names: list[str]) -> Tensor:
    shape = given.get("normalized_shape")

    def summed(each: Tensor) -> Tensor:
        by_place = each.reshape(len(d), -1, *shape).sum(1) if shape is not None else each.reshape(*d.shape[:2], -1).sum(2)
        return by_place.flatten(1).square().sum(1)

    total = torch.zeros(len(d), device=d.device)
    if "weight" in names:
        with torch.no_grad():
            total += summed(d * function(**{**given, "weight": None, "bias": None}))
    return total + summed(d) if "bias" in names else total


def _embedding(_: Any, given: dict[str, Any], d: Tensor, names: list[str]) -> Tensor:
    tokens, padding = given["input"].flatten(1), given.get("padding_idx")
    d = d.reshape(*tokens.shape, -1)
    if padding is not None:
        d = d * (tokens != padding)[..., None]
    return ((d @ d.mT) * (tokens[:, :, None] == tokens[:, None, :])).sum((1, 2))


NORMS: dict[Any, Callable[[Any, dict[str, Any], Tensor, list[str]], Any]] = {
    F.linear: _linear, F.conv2d: _convolution, F.batch_norm: _norm, F.layer_norm: _norm, F.group_norm: _norm, F.embedding: _embedding,
}  # fmt: skip
ARGUMENTS: dict[Any, tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    F.conv2d: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    F.group_norm: ("input", "num_groups", "weight", "bias", "eps"),
    F.embedding: ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
}


# --- gradients written down


def _written_down(module: nn.Module, inputs: Inputs, targets: Tensor, loss: Loss, names: list[str]) -> Tensor:
    """Squared norms [B] over the parameters `names`, for some examples at a time; one at a time where the module cannot be vectorised."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    state = {name: tensor.detach() for name, tensor in state.items()}
    chosen = {name: state[name] for name in names}

    def one(weights: dict[str, Tensor], given: Any, target: Tensor) -> Tensor:
        given = tree_map(lambda each: each[None], given)
        args, kwargs = ((), dict(given)) if isinstance(given, Mapping) else ((given,), {})
        out = functional_call(module, {**state, **weights}, args, kwargs)
        return loss(out.logits if hasattr(out, "logits") else out, target[None]).sum()

    def square(given: Any, target: Tensor) -> Tensor:
        return torch.stack([g.float().square().sum() for g in grad(one)(chosen, given, target).values()]).sum()

    size = sum(tensor.numel() for tensor in chosen.values())
    try:
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():  # the other kernels of attention cannot be vectorised
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return vmap(square, chunk_size=min(len(targets), max(1, 4 * ELEMENTS // max(size, 1))))(inputs, targets)
    except (RuntimeError, TypeError, ValueError):  # what depends on values (an if, an item()) cannot be vectorised
        return _one_by_one(module, inputs, targets, loss, names)


def _one_by_one(module: nn.Module, inputs: Inputs, targets: Tensor, loss: Loss, names: list[str]) -> Tensor:
    """Squared norms [B]: one backward pass for each example."""
    chosen = [module.get_parameter(name) for name in names]
    found = []
    for row in range(len(targets)):
        value = loss(_outputs(module, _rows(inputs, row)), targets[row : row + 1]).sum()
        gradients = torch.autograd.grad(value, chosen, allow_unused=True)
        found.append(sum((g.float().square().sum() for g in gradients if g is not None), torch.zeros((), device=value.device)))
    return torch.stack(found)
