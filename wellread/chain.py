"""The chain view of a network: stem, blocks one after the other, head, whose composition computes what the network computes.

    view = chain(network)                                  # BadInput when the network is not such a chain, or not of a known family
    state = view.stem(network.module, batch)
    for path in view.blocks:
        state = view.block(network.module, path, state)
    output = view.head(network.module, state)

A chain is data: steps are dotted paths of layers, or of methods of the network with the tensors and layers that they use. So a part of a network
can be kept with what its steps name and nothing else, and be built again from its record. `Stitched` is the front of one network, a stitching
layer and the rest of another, as one network that is saved, exported and stitched again like any other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wellread import families
from wellread.errors import BadInput
from wellread.features import example_batch, trunk
from wellread.inputs import ImageInput, TextInput
from wellread.lineage import merged
from wellread.network import Network, build
from wellread.structure import class_name, layer_of

Batch = Tensor | Mapping[str, Tensor]
Steps = Sequence[str | Sequence[str]]


class State(NamedTuple):
    """What goes from block to block: maps [B, C, h, w] or tokens [B, T, C], and for text which tokens are words, [B, T]."""

    hidden: Tensor
    mask: Tensor | None = None


def _tokens(transformer: nn.Module, batch: Mapping[str, Tensor]) -> State:
    """Embeddings of a BERT-like encoder."""
    used = {name: batch[name] for name in ("input_ids", "token_type_ids") if name in batch}
    return State(transformer.model.embeddings(**used), batch.get("attention_mask"))  # type: ignore[operator, union-attr]


# what forward methods do between their layers
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "@relu": lambda _, state: F.relu(state.hidden),
    "@places": lambda _, state: state.hidden.mean((2, 3)),
    "@flatten": lambda _, state: state.hidden.flatten(1),
    "@tokens": _tokens,
    "@sentence": lambda transformer, state: transformer.pool(state.hidden, state.mask),
}


@dataclass(frozen=True)
class Chain:
    """Stem, stages of blocks, head, of a module that is given to each call.

    stem_steps, head_steps: each a dotted path of a layer ("conv1"), of a method followed by what it uses (["pool", "attn_pool"]), or of a function
    ("@relu"). stages: dotted paths of the blocks; within a stage they keep resolution and width, as a rule.
    """

    stem_steps: tuple[tuple[str, ...], ...]
    stages: tuple[tuple[str, ...], ...]
    head_steps: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, stem: Steps, stages: Iterable[Iterable[str]], head: Steps) -> Chain:
        def steps(given: Steps) -> tuple[tuple[str, ...], ...]:
            return tuple((step,) if isinstance(step, str) else tuple(step) for step in given)

        return cls(steps(stem), tuple(tuple(stage) for stage in stages), steps(head))

    @property
    def blocks(self) -> tuple[str, ...]:
        return tuple(block for stage in self.stages for block in stage)

    @property
    def record(self) -> dict[str, Any]:
        """As JSON values; `Chain.of(**record)` is the chain again."""
        return {"stem": [list(s) for s in self.stem_steps], "stages": [list(s) for s in self.stages], "head": [list(s) for s in self.head_steps]}

    def stem(self, module: nn.Module, batch: Batch) -> State:
        """Images [B, C, H, W] or a dict of token tensors to what the first block takes."""
        state: Any = batch if isinstance(batch, Mapping) else State(batch)
        for step in self.stem_steps:
            state = _stepped(module, step[0], state)
        return state

    def block(self, module: nn.Module, path: str, state: State) -> State:
        layer = layer_of(module, path)
        if state.mask is None or isinstance(layer, Stitch):
            found = layer(state.hidden)
        else:
            found = layer(state.hidden, _additive(state.mask, state.hidden.dtype))
        return State(found[0] if isinstance(found, tuple) else found, state.mask)

    def head(self, module: nn.Module, state: State) -> Tensor:
        for step in self.head_steps:
            state = _stepped(module, step[0], state)
        return state.hidden

    def run(self, module: nn.Module, batch: Batch) -> Tensor:
        """Stem, all blocks, head."""
        state = self.stem(module, batch)
        for path in self.blocks:
            state = self.block(module, path, state)
        return self.head(module, state)

    def under(self, path: str) -> Chain:
        """The same chain of a module that lies at `path` of another."""

        def moved(steps: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
            return tuple(tuple(f"{path}.{name}" for name in step) for step in steps)

        return Chain(moved(self.stem_steps), moved(self.stages), moved(self.head_steps))

    def names(self, *, stem: bool = False, blocks: Iterable[str] = (), head: bool = False) -> list[str]:
        """What these parts use of the module, dotted."""
        steps = [*(self.stem_steps if stem else ()), *(self.head_steps if head else ())]
        return [*blocks, *(name if not name.rpartition(".")[2].startswith("@") else _owned(name) for step in steps for name in step)]


def _owned(function: str) -> str:
    """Of the functions, those of text use layers."""
    owner, _, name = function.rpartition(".")
    used = {"@tokens": "model.embeddings", "@sentence": "head"}.get(name, "")
    return f"{owner}.{used}" if owner and used else used


def _stepped(module: nn.Module, name: str, state: Any) -> Any:
    owner, _, last = name.rpartition(".")
    if last.startswith("@"):
        found = FUNCTIONS[last](module.get_submodule(owner), state)
        return found if isinstance(found, State) else State(found, state.mask)
    return State(getattr(module.get_submodule(owner), last)(state.hidden), state.mask)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, 1, T]: zero for words, the lowest number for padding, as attention adds it."""
    return (1 - mask[:, None, None, :].to(dtype)) * torch.finfo(dtype).min


# --- which networks are known


def recognise(module: nn.Module) -> Chain | None:
    """The chain of a known family, by its layers' names alone: timm EfficientNet, ResNet, ConvNeXt and ViT, torchvision ResNet, BERT-like encoders
    with one vector out, networks of conv1, bn1, layer1..., linear (the CIFAR ResNets), and what `Stitched` made of them. None for others."""
    if isinstance(module, Stitched):
        front, back = module.front_chain.under("front"), module.back_chain.under("back")
        return Chain(front.stem_steps, _joined(front, module.until, back, module.since), back.head_steps)
    has = dict(module.named_children())
    if isinstance(module, families.Transformer):
        layers = getattr(getattr(module.model, "encoder", None), "layer", None)
        if "head" in has and hasattr(module.model, "embeddings") and isinstance(layers, nn.ModuleList):
            return Chain.of(["@tokens"], [_children(layers, "model.encoder.layer")], ["@sentence"])
        return None
    if {"patch_embed", "blocks", "norm", "head"} <= set(has) and hasattr(module, "_pos_embed") and hasattr(module, "pool"):
        embed = ["_pos_embed", "cls_token", "reg_token", "pos_embed", "pos_drop"]
        head = ["norm", ["pool", "attn_pool"], "fc_norm", "head_drop", "head"]
        return Chain.of(["patch_embed", embed, "patch_drop", "norm_pre"], [_children(has["blocks"], "blocks")], head)
    if {"conv_stem", "bn1", "blocks", "conv_head", "bn2", "classifier"} <= set(has):
        stages = [_children(stage, f"blocks.{name}") for name, stage in has["blocks"].named_children()]
        return Chain.of(["conv_stem", "bn1"], stages, ["conv_head", "bn2", ["forward_head", "global_pool", "classifier"]])
    if {"stem", "stages", "norm_pre", "head"} <= set(has):
        stages = []
        for name, stage in has["stages"].named_children():
            first = [] if isinstance(stage.downsample, nn.Identity) else [f"stages.{name}.downsample"]
            stages.append(first + _children(stage.get_submodule("blocks"), f"stages.{name}.blocks"))
        return Chain.of(["stem"], stages, ["norm_pre", "head"])
    layers = [name for name in has if name.startswith("layer") and name[5:].isdigit() and isinstance(has[name], nn.Sequential)]
    stages = [_children(has[name], name) for name in layers]
    if layers and {"conv1", "bn1", "act1", "maxpool", "global_pool", "fc"} <= set(has):
        return Chain.of(["conv1", "bn1", "act1", "maxpool"], stages, [["forward_head", "global_pool", "fc"]])
    if layers and {"conv1", "bn1", "relu", "maxpool", "avgpool", "fc"} <= set(has):
        return Chain.of(["conv1", "bn1", "relu", "maxpool"], stages, ["avgpool", "@flatten", "fc"])
    if layers and {"conv1", "bn1", "linear"} <= set(has):
        return Chain.of(["conv1", "bn1", "@relu"], stages, ["@places", "linear"])
    return None


def _children(parent: nn.Module, path: str) -> list[str]:
    return [f"{path}.{name}" for name, _ in parent.named_children()]


def _joined(front: Chain, until: int, back: Chain, since: int) -> tuple[tuple[str, ...], ...]:
    """The stages of a stitched network; the stitch counts as a block of the front's last stage."""
    kept, rest = set(front.blocks[:until]), set(back.blocks[since:])
    ahead = [tuple(block for block in stage if block in kept) for stage in front.stages]
    behind = [tuple(block for block in stage if block in rest) for stage in back.stages]
    ahead, behind = [stage for stage in ahead if stage], [stage for stage in behind if stage]
    middle = (*ahead[-1], "stitch")
    same_stage = len(front.stages) == len(back.stages) and len(ahead) + len(behind) > len(back.stages)
    return (*ahead[:-1], (*middle, *behind[0]), *behind[1:]) if same_stage else (*ahead[:-1], middle, *behind)


def chain(network: Network, *, stem: Steps | None = None, blocks: Sequence[Any] | None = None, head: Steps | None = None) -> Chain:
    """The chain of a network, checked by running both on one batch.

    stem, blocks, head: for a family that is not known, the dotted paths of its layers in the order in which they run; blocks may be a list, or a
        list of such lists, one for each stage.
    Raises `BadInput` when the family is not known, when a path is not there, or when the composition computes something else.
    """
    module = network.module
    if blocks is not None:
        stages = blocks if blocks and not isinstance(blocks[0], str) else [blocks]
        view: Chain | None = Chain.of(stem or [], stages, head or [])
    elif stem is not None or head is not None:
        raise BadInput("stem and head name what lies around the blocks: give blocks as well")
    else:
        view = recognise(module)
    if view is None or not view.blocks:
        some = ", ".join(trunk(module)[:6])
        raise BadInput(
            f"the blocks of a {type(module).__name__} are not known: name them with chain(network, stem=[...], blocks=[...], head=[...]), "
            f"dotted paths of layers in the order in which they run (here: {some}, ...)"
        )
    for path in view.blocks:
        layer_of(module, path)
    given = _example(network)
    with torch.no_grad():
        expected = network(given)
        try:
            found = view.run(module, given)
        except (RuntimeError, TypeError, AttributeError, ValueError, IndexError) as wrong:
            raise BadInput(f"stem, blocks and head of this {type(module).__name__} do not run one after the other: {_short(wrong)}") from None
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())):
        raise BadInput(
            f"stem, blocks and head of this {type(module).__name__} do not compute what it computes: name all layers with "
            "chain(network, stem=[...], blocks=[...], head=[...]), or it is no chain (something skips over blocks)"
        )
    return view


def _example(network: Network) -> Any:
    """Noise, or sentences of different lengths: on a grey picture a wrong layer may go unnoticed."""
    if isinstance(network.input, TextInput):
        return {key: value.to(network.device) for key, value in network.input(["a sentence", "one that is a little longer than the other"]).items()}
    batch = example_batch(network, 2)
    assert isinstance(network.input, ImageInput) and isinstance(batch, Tensor)
    return torch.randn(batch.shape, generator=torch.Generator().manual_seed(0)).to(batch)


def _short(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


# --- parts of networks


def keep_only(module: nn.Module, names: Iterable[str]) -> nn.Module:
    """Take everything out of a module, in place, that is not at one of the dotted names, in it or around it; what is taken out becomes None."""
    wanted = [name for name in names if name]
    around = {".".join(name.split(".")[: i + 1]) for name in wanted for i in range(len(name.split(".")) - 1)}

    def clean(parent: nn.Module, path: str) -> None:
        for kind in (parent._modules, parent._parameters, parent._buffers):
            for name in list(kind):
                here = f"{path}{name}"
                if here in wanted:
                    continue
                if here in around:
                    clean(parent._modules[name], f"{here}.")  # type: ignore[arg-type]
                else:
                    kind[name] = None  # type: ignore[index]

    clean(module, "")
    return module


class Stitch(nn.Module):
    """A linear map with bias over the channels: 1 x 1 on maps [B, C, h, w] when `places`, else on the last axis (tokens [B, T, C])."""

    def __init__(self, width_in: int, width_out: int, places: bool) -> None:
        super().__init__()
        self.arguments = {"width_in": width_in, "width_out": width_out, "places": places}
        self.map: nn.Conv2d | nn.Linear = nn.Conv2d(width_in, width_out, 1) if places else nn.Linear(width_in, width_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x)

    def set(self, weight: Tensor, bias: Tensor) -> None:
        """weight: [out, in], bias: [out]."""
        with torch.no_grad():
            self.map.weight.copy_(weight.reshape(self.map.weight.shape))
            self.map.bias.copy_(bias)  # type: ignore[union-attr]


class Stitched(nn.Module):
    """The stem and the first `until` blocks of `network`, a stitching layer, and the blocks from `since` on and the head of another network.

    chain, other_chain: `Chain.record` of the two. other: `Network.structure` of the other, which is built with fresh weights: `stitch` fills them in.
    stitch: the arguments of `Stitch`. Only what these parts use is kept.
    """

    def __init__(
        self, network: nn.Module, chain: dict[str, Any], until: int, other: dict[str, Any], other_chain: dict[str, Any], since: int, stitch: dict[str, Any]
    ) -> None:
        super().__init__()
        like = next(network.parameters(), torch.empty(0))
        self.front_chain, self.back_chain, self.until, self.since = Chain.of(**chain), Chain.of(**other_chain), until, since
        self.front = keep_only(network, self.front_chain.names(stem=True, blocks=self.front_chain.blocks[:until]))
        rest = keep_only(build(other), self.back_chain.names(blocks=self.back_chain.blocks[since:], head=True))
        self.stitch = Stitch(**stitch).to(like)
        self.back = rest.to(like)

    def forward(self, x: Tensor | None = None, **tokens: Tensor) -> Tensor:
        state = self.front_chain.stem(self.front, tokens if x is None else x)
        for path in self.front_chain.blocks[: self.until]:
            state = self.front_chain.block(self.front, path, state)
        state = state._replace(hidden=self.stitch(state.hidden))
        for path in self.back_chain.blocks[self.since :]:
            state = self.back_chain.block(self.back, path, state)
        return self.back_chain.head(self.back, state)


def stitch(front: Network, until: int, back: Network, since: int, layer: Stitch, *, chains: tuple[Chain, Chain] | None = None) -> Network:
    """A network of the stem and first `until` blocks of `front`, `layer`, and the blocks of `back` from number `since` on and its head.

    chains: of the two, when they are known; else `chain` finds them.
    Raises `BadInput` when the two are not fed alike, when a part would be empty, or when the layer does not fit between them.
    """
    ahead, behind = chains or (chain(front), chain(back))
    if why := fed_differently(front, back):
        raise BadInput(why)
    if not 1 <= until <= len(ahead.blocks) or not 0 <= since < len(behind.blocks):
        raise BadInput(
            f"cannot stitch after {until} of {len(ahead.blocks)} blocks to block {since} of {len(behind.blocks)}: give 1 to {len(ahead.blocks)} and 0 to {len(behind.blocks) - 1}"
        )
    if back.architecture is None:
        raise BadInput(f"a {type(back.module).__name__} cannot be built by another process: make it with Network(module, architecture={{...}})")
    arguments = {
        "chain": ahead.record, "until": until, "other": copy.deepcopy(back.structure), "other_chain": behind.record, "since": since,
        "stitch": layer.arguments,
    }  # fmt: skip
    record = {"edit": "wrap", "part": class_name(Stitched), "arguments": arguments}
    head = f"back.{back.head}" if back.head else None
    made = front.edited(record, head=head, labels=back.labels, output=back.output)
    module: Any = made.module
    theirs = back.module.state_dict()
    module.back.load_state_dict({name: theirs[name] for name in module.back.state_dict()})
    module.stitch.load_state_dict(layer.state_dict())
    with torch.no_grad():
        try:
            made(_example(made))
        except RuntimeError as wrong:
            raise BadInput(f"the stitching layer does not fit between the two: {_short(wrong)}") from None
    made.lineage = merged([front.lineage, back.lineage])
    return made


def fed_differently(front: Network, back: Network) -> str | None:
    """Why two networks cannot be stitched: what goes into them differs. None when it is the same."""
    mine, theirs = front.input, back.input
    if type(mine) is not type(theirs):
        return f"one network takes {_kind(mine)} and the other {_kind(theirs)}: only networks that are fed alike can be stitched"
    if isinstance(mine, ImageInput) and isinstance(theirs, ImageInput):
        for name in ("size", "channels", "mean", "std"):
            if getattr(mine, name) != getattr(theirs, name):
                return (
                    f"the networks are fed differently, {name} {getattr(mine, name)} and {getattr(theirs, name)}: "
                    "give both one input with network.edited(input=other.input), if they bear it"
                )
    if isinstance(mine, TextInput) and isinstance(theirs, TextInput) and mine.tokenizer.get_vocab() != theirs.tokenizer.get_vocab():
        return "the networks have different tokenizers: their tokens do not correspond, and they cannot be stitched"
    return None


def _kind(source: Any) -> str:
    return {ImageInput: "pictures", TextInput: "text"}.get(type(source), "unknown input")
