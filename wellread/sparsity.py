"""Sparse training: masks on linear layers, what they save on paper, and language-model batches to train with.

A masked weight is original * keep (structure.Mask), so dead entries get a gradient of exactly zero; under Adam their moments stay zero, and
weight decay moves only what the mask hides. `dense` makes them plain zeros that can be trained again.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from wellread import families, runtime
from wellread.batches import Batches, tensor_batches
from wellread.data import name_of
from wellread.errors import BadInput
from wellread.features import running, to_device
from wellread.inputs import TextInput
from wellread.network import Network
from wellread.structure import layer_of, masks

if TYPE_CHECKING:
    from datasets import Dataset

# --- masks


def linear_layers(network: Network, only: list[str] | None = None) -> dict[str, nn.Parameter]:
    """The weights that are made sparse, by layer: of all linear layers but the head and those tied to an embedding, masked or not.

    only: names of layers, or of blocks that hold them. The GPT-2 family's Conv1D [in, out] counts as linear; the joint input projection of
    nn.MultiheadAttention is a bare parameter and stays dense.
    Raises `BadInput` when nothing is left, for a name that matches nothing, quantised weights, and one weight in two layers.
    """
    from transformers.pytorch_utils import Conv1D

    embedded = {id(layer.weight) for layer in network.module.modules() if isinstance(layer, nn.Embedding)}
    head = getattr(getattr(network.module, "model", network.module), "get_output_embeddings", lambda: None)()
    found: dict[str, nn.Parameter] = {}
    owner: dict[int, str] = {}
    for path, module in network.module.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or path == network.head or module is head:
            continue
        layer: Any = module
        weight = layer.parametrizations["weight"].original if parametrize.is_parametrized(layer, "weight") else layer.weight
        if id(weight) in embedded:
            continue
        if not weight.is_floating_point():
            raise BadInput(f"layer {path!r} is quantised ({weight.dtype}): give the network in floating point")
        if id(weight) in owner:
            raise BadInput(f"layers {owner[id(weight)]!r} and {path!r} share one weight, and a mask belongs to one layer: untie them first")
        found[path], owner[id(weight)] = weight, path
    for name in only or []:
        if not any(f"{path}.".startswith(f"{name}.") for path in found):
            raise BadInput(f"no linear layer is called {name!r} or lies in it: choose from {', '.join(list(found)[:6])} ...")
    chosen = {path: weight for path, weight in found.items() if only is None or any(f"{path}.".startswith(f"{name}.") for name in only)}
    if not chosen:
        raise BadInput("this network has no linear layer that could be made sparse (the head and embeddings stay dense)")
    return chosen


def zeros_for(size: int, sparsity: float) -> int:
    """Exactly how many of `size` weights are zero."""
    return round(sparsity * size)


def random_keep(shape: torch.Size, zeros: int, seed: int, number: int) -> Tensor:
    """A mask with so many zeros in random places, the same on every device. number: which layer, so that layers differ."""
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence((seed, number)).generate_state(1)[0]))
    keep = torch.ones(shape, dtype=torch.bool)
    keep.view(-1)[torch.randperm(keep.numel(), generator=generator)[:zeros]] = False
    return keep


def sparse(
    network: Network,
    sparsity: float,
    *,
    criterion: Literal["random", "magnitude"] = "random",
    layers: list[str] | None = None,
    rescale: bool = False,
    seed: int = 0,
) -> Network:
    """A copy with masks on its linear layers, `sparsity` of each layer's weights zero.

    rescale: multiply the weights by 1 / sqrt(1 - sparsity), which keeps the variance of the outputs under a random mask.
    Raises `BadInput` for a sparsity outside [0, 1) and for a network that has masks already.
    """
    if not 0 <= sparsity < 1:
        raise BadInput(f"sparsity is {sparsity}: give the share of weights that are zero, at least 0 and below 1")
    if masked := next(iter(masks(network.module)), None):
        raise BadInput(f"layer {masked!r} has a mask already: densify the network first")
    weights = linear_layers(network, layers)
    made = network.edited({"edit": "sparsify", "layers": {path: zeros_for(weight.numel(), sparsity) for path, weight in weights.items()}})
    found = masks(made.module)
    for number, (path, weight) in enumerate(linear_layers(made, layers).items()):
        if criterion == "random":
            found[path].keep = random_keep(weight.shape, zeros_for(weight.numel(), sparsity), seed, number).to(weight.device)
        if rescale:
            weight.data.mul_((1 - sparsity) ** -0.5)
    return made


def dense(network: Network) -> Network:
    """A copy without masks: the same outputs, and all weights can be trained. A network without masks is copied, with a warning."""
    if not masks(network.module):
        warnings.warn("the network has no masks: nothing was changed", stacklevel=2)
        return network.copy()
    return network.edited({"edit": "densify"})


def prune_to(module: nn.Module, sparsity: float, *, across: bool = False) -> None:
    """Let the masks grow, in place, to this share of zeros: the live weights smallest in magnitude go, the dead stay dead.

    across: one threshold for all layers, of which each keeps at least one weight; otherwise each layer has the same share.
    """
    found = masks(module)
    strength: dict[str, Tensor] = {}
    layer: Any
    for path, mask in found.items():
        layer = layer_of(module, path)
        strength[path] = torch.where(mask.keep, layer.parametrizations["weight"].original.detach().abs(), -1.0).flatten()
    if across and strength:
        for values in strength.values():
            values[values.argmax()] = torch.inf  # no layer runs empty
        whole = torch.cat(list(strength.values()))
        dead = torch.zeros(len(whole), dtype=torch.bool, device=whole.device)
        dead[whole.argsort(stable=True)[: zeros_for(len(whole), sparsity)]] = True
        for mask, part in zip(found.values(), dead.split([len(values) for values in strength.values()]), strict=True):
            mask.keep.logical_and_(~part.view_as(mask.keep))
        return
    for path, mask in found.items():
        values = strength[path]
        mask.keep.view(-1)[values.argsort(stable=True)[: zeros_for(len(values), sparsity)]] = False


def active(network: Network, layers: list[str] | None = None) -> int:
    """Weights of the linear layers that no mask holds at zero."""
    found = masks(network.module)
    return sum(int(found[path].keep.sum()) if path in found else weight.numel() for path, weight in linear_layers(network, layers).items())


def starved(network: Network) -> list[str]:
    """Masked layers with fewer live weights than outputs: some of their outputs are constants."""
    from transformers.pytorch_utils import Conv1D

    thin = []
    for path, mask in masks(network.module).items():
        outputs = mask.keep.shape[1 if isinstance(layer_of(network.module, path), Conv1D) else 0]
        if int(mask.keep.sum()) < outputs:
            thin.append(path)
    return thin


# --- operations, on paper


def forward_flops(linear: float, *, layers: int, width: int, context: int, vocabulary: int) -> float:
    """Operations per token of a transformer: 2 for each live linear weight, the two products of attention in each layer, and the head."""
    return 2.0 * linear + 4.0 * context * width * layers + 2.0 * vocabulary * width


def training_flops(network: Network, context: int) -> float:
    """Operations per token of one training step (three times the forward pass) if zeros cost nothing, for a transformers language model."""
    model: Any = getattr(network.module, "model", network.module)
    config: Any = getattr(model, "config", None)
    if any(getattr(config, name, None) is None for name in ("num_hidden_layers", "hidden_size", "vocab_size")):
        raise BadInput("the operations of this network cannot be counted: its config does not say layers, width and vocabulary")
    shape = {"layers": config.num_hidden_layers, "width": config.hidden_size, "vocabulary": config.vocab_size}
    return 3 * forward_flops(active(network), context=context, **shape)


# --- language models


def byte_tokenizer() -> Any:
    """A tokenizer without a vocabulary to learn: one token for each byte of UTF-8, and one for the end of a text (257 in all)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", pad_token="<|end|>")


def language_model(
    width: int, depth: int, *, heads: int = 2, context: int = 128, kind: Literal["gpt2", "llama"] = "gpt2", tokenizer: Any = None, seed: int = 0
) -> Network:
    """A small language model with fresh weights, without dropout; over bytes unless a tokenizer is given."""
    tokenizer = tokenizer or byte_tokenizer()
    common = {"model_type": kind, "vocab_size": len(tokenizer), "use_cache": False, "tie_word_embeddings": True}
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if kind == "gpt2":
        form: dict[str, Any] = {"n_embd": width, "n_layer": depth, "n_head": heads, "n_positions": context}
        form |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        form = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "max_position_embeddings": context}
        form |= {"intermediate_size": 3 * width}
    record = {"auto": "AutoModelForCausalLM", "config": {**common, **ends, **form}, "pooling": "mean", "normalize": False}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = families.Transformer(**record)  # type: ignore[arg-type]
    return Network(module, TextInput(tokenizer, context), output="token_logits", architecture={"family": "transformers", **record})


def language_input(network: Network) -> TextInput:
    """Its tokenizer. Raises `BadInput` for a network that does not give logits for tokens."""
    if network.output != "token_logits" or not isinstance(network.input, TextInput):
        raise BadInput(f"a language model is needed, and this network gives {network.output.replace('_', ' ')}: load one with a tokenizer")
    return network.input


def stream_batches(network: Network, data: Dataset, *, length: int, batch_size: int = 16, shuffle: bool = True, seed: int = 0) -> Batches:
    """Pre-training batches {"input_ids": int64 [B, length]}: all texts one after the other, ends marked, cut into windows.

    Raises `BadInput` when the texts do not fill one window.
    """
    source = language_input(network)
    end = source.tokenizer.eos_token_id
    rows = source.tokenizer(list(data[source.column]), add_special_tokens=False)["input_ids"]
    stream = torch.tensor([token for row in rows for token in (row if end is None else [*row, end])])
    windows = len(stream) // length
    if windows < 1:
        raise BadInput(f"{name_of(data)} has {len(stream)} tokens, less than one window of {length}: give more text or a smaller context")
    return tensor_batches({"input_ids": stream[: windows * length].view(windows, length)}, batch_size=batch_size, shuffle=shuffle, seed=seed)


def example_batches(network: Network, data: Dataset, *, length: int, batch_size: int = 16, shuffle: bool = True, seed: int = 0) -> Batches:
    """Fine-tuning batches, one text a row, filled up at the end: {"input_ids": [B, T], "scored": bool [B, T]}, T at most `length`.

    A column `prompt` is put before the text and not scored; the end of the text is. Raises `BadInput` when a prompt leaves no room.
    """
    source = language_input(network)
    end = source.tokenizer.eos_token_id
    read = {"add_special_tokens": False}
    texts = source.tokenizer(list(data[source.column]), **read)["input_ids"]
    prompts = source.tokenizer(list(data["prompt"]), **read)["input_ids"] if "prompt" in data.column_names else [[]] * len(texts)
    if (full := next((row for row, prompt in enumerate(prompts) if len(prompt) >= length), None)) is not None:
        raise BadInput(f"the prompt in row {full} of {name_of(data)} has {len(prompts[full])} tokens and the context is {length}: raise context")
    whole = [[*prompt, *text, *([] if end is None else [end])][:length] for prompt, text in zip(prompts, texts, strict=True)]
    longest = max(2, *map(len, whole))
    ids = torch.tensor([row + [end or 0] * (longest - len(row)) for row in whole])
    place = torch.arange(longest)
    bounds = torch.tensor([[len(prompt), len(row)] for prompt, row in zip(prompts, whole, strict=True)])
    scored = (place >= bounds[:, :1]) & (place < bounds[:, 1:])
    return tensor_batches({"input_ids": ids, "scored": scored}, batch_size=batch_size, shuffle=shuffle, seed=seed)


def next_token_loss(logits: Tensor, ids: Tensor, scored: Tensor | None = None) -> Tensor:
    """Mean cross-entropy in nats of each next token: logits [B, T, V], ids [B, T]; of the tokens `scored` [B, T], where given."""
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
    if scored is None:
        return losses.mean()
    return (losses * scored[:, 1:]).sum() / scored[:, 1:].sum().clamp(min=1)


def language_step(module: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The step of `train.fit` for stream_batches and example_batches."""
    out = module(input_ids=batch["input_ids"])
    return next_token_loss(getattr(out, "logits", out), batch["input_ids"], batch.get("scored"))


def language_loss(network: Network, batches: Batches) -> float:
    """Mean nats per scored token over all batches."""
    device = runtime.device()
    total, count = 0.0, 0
    with running(network, device), torch.inference_mode(), runtime.autocast(device):
        for batch in batches.epoch(0):
            batch = {name: to_device(batch[name], device) for name in ("input_ids", "scored") if name in batch}
            scored = batch.get("scored", torch.ones_like(batch["input_ids"], dtype=torch.bool))[:, 1:]
            total += float(language_step(network.module, batch)) * int(scored.sum())
            count += int(scored.sum())
    return total / count
