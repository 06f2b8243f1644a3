"""What a network computes on the way: embeddings and the maps of its stages, for any family; frozen features are computed once and kept.

The cache is keyed by the network's fingerprint, the content of the data, how the network is fed, and the layer.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from wellread import runtime
from wellread.batches import network_batches
from wellread.data import name_of, row_hashes
from wellread.errors import BadInput
from wellread.inputs import ImageInput, input_config
from wellread.structure import layer_of

if TYPE_CHECKING:
    from datasets import Dataset

    from wellread.network import Network


@contextmanager
def capture(module: nn.Module, layers: Sequence[str], *, inputs: bool = False) -> Iterator[dict[str, Tensor]]:
    """Fills a dict with the output (or, with `inputs`, the first input) of each layer at every call inside the body; the graph is kept."""
    caught: dict[str, Tensor] = {}
    hooks = []
    for name in layers:

        def keep(_: nn.Module, given: tuple[Any, ...], out: Any = None, name: str = name) -> None:
            value = given[0] if inputs else out
            caught[name] = value[0] if isinstance(value, tuple) else value

        layer = layer_of(module, name)
        hooks.append(layer.register_forward_pre_hook(keep) if inputs else layer.register_forward_hook(keep))
    try:
        yield caught
    finally:
        for hook in hooks:
            hook.remove()


def example_batch(network: Network, rows: int = 1) -> Tensor | dict[str, Tensor]:
    """A batch of the right form without data: grey pictures or a short sentence."""
    source = network.input
    if source is None:
        raise BadInput("this network does not say how it is fed: make it with Network(module, input=ImageInput(...)) or TextInput(...)")
    if isinstance(source, ImageInput):
        batch = source.normalise(torch.full((rows, source.channels, *source.size), 127, dtype=torch.uint8))
        return batch.to(network.device)
    return {key: value.to(network.device) for key, value in source(["a sentence"] * rows).items()}


def probe(network: Network, layers: Sequence[str], *, inputs: bool = False) -> dict[str, Tensor]:
    """Outputs (or inputs) of layers for `example_batch`: for their shapes."""
    with torch.inference_mode(), capture(network.module, layers, inputs=inputs) as caught:
        network(example_batch(network))
    return caught


def trunk(module: nn.Module) -> list[str]:
    """The layers of a network one after the other, blocks counted as one: top-level layers, with Sequentials and ModuleLists opened.

    Holds for timm, torchvision and transformers networks and for most others; what is not on the way from input to output does no harm here.
    """
    names: list[str] = []

    def visit(parent: nn.Module, path: str, is_list: bool) -> None:
        for name, child in parent.named_children():
            here = f"{path}.{name}" if path else name
            opens = isinstance(child, nn.Sequential | nn.ModuleList) and len(child) > 0
            if opens or (not is_list and any(isinstance(each, nn.Sequential | nn.ModuleList) for each in child.modules())):
                visit(child, here, opens)
            else:
                names.append(here)

    visit(module, "", isinstance(module, nn.Sequential))
    return names


def stages(network: Network) -> list[str]:
    """Names of the layers after which resolution or width changes, in the order in which they run, ending before the pooling.

    A transformer keeps one shape throughout: then the blocks at a quarter, a half, three quarters and the end.
    Raises `BadInput` when no layer gives a map [B, C, h, w] or tokens [B, T, C].
    """
    seen: list[tuple[str, tuple[int, ...]]] = []
    hooks = []
    for name in trunk(network.module):

        def note(_: nn.Module, __: Any, out: Any, name: str = name) -> None:
            value = out[0] if isinstance(out, tuple) else getattr(out, "last_hidden_state", out)
            if isinstance(value, Tensor) and value.ndim in (3, 4) and not (seen and _is_pooling(seen[-1][1], value.shape)):
                seen.append((name, tuple(value.shape)))

        hooks.append(layer_of(network.module, name).register_forward_hook(note))
    try:
        with torch.inference_mode():
            network(example_batch(network))
    finally:
        for hook in hooks:
            hook.remove()
    groups: list[list[str]] = []
    last = None
    for name, shape in seen:
        if shape != last:
            groups.append([])
        groups[-1].append(name)
        last = shape
    if not groups:
        raise BadInput("this network has no layer that gives a map [B, C, h, w] or tokens [B, T, C]: it has no stages to look into")
    longest = max(groups, key=len)
    tokens = len(dict(seen)[longest[-1]]) == 3
    if tokens and len(longest) >= 4:
        blocks = [name for name in longest if name.rpartition(".")[2].isdigit()] or longest
        return [blocks[len(blocks) * quarter // 4 - 1] for quarter in (1, 2, 3, 4)]
    return [group[-1] for group in groups]


def _is_pooling(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """From a map of more than 2 x 2 to a single position: the global pooling, and not a stage that halves the resolution."""
    return len(before) == len(after) == 4 and tuple(after[2:]) == (1, 1) and max(before[2:]) > 2


def as_map(output: Tensor, network: Network) -> Tensor:
    """[B, C, h, w] from a stage's output: a map as it is, channels-last maps turned, tokens [B, T, C] laid out as a square without prefix tokens."""
    if output.ndim == 4:
        return output.permute(0, 3, 1, 2) if getattr(network.module, "output_fmt", "NCHW") == "NHWC" else output
    if output.ndim != 3:
        raise BadInput(f"a layer with output {list(output.shape)} has no map: choose one of wellread.features.stages(network)")
    grid = getattr(getattr(network.module, "patch_embed", None), "grid_size", None)
    side = int(output.shape[1] ** 0.5)
    height, width = grid if grid and grid[0] * grid[1] <= output.shape[1] else (side, side)
    return output[:, output.shape[1] - height * width :].transpose(1, 2).unflatten(2, (height, width))


def embed(network: Network, data: Dataset, *, batch_size: int = 64, cache: bool = True) -> np.ndarray:
    """float32 [N, d]: what goes into the head (the output, for a network without one). Cached on disk."""
    layer = network.head
    return _features(network, data, [layer] if layer else [], True, batch_size, cache)[layer or ""]


def stage_features(network: Network, data: Dataset, layers: Sequence[str] | None = None, *, batch_size: int = 64) -> dict[str, np.ndarray]:
    """{layer: float32 [N, C]}: the spatial or token mean of each stage's output. Cached on disk."""
    return _features(network, data, list(layers if layers is not None else stages(network)), False, batch_size, True)


def _features(network: Network, data: Dataset, layers: list[str], inputs: bool, batch_size: int, cache: bool) -> dict[str, np.ndarray]:
    source = network.input
    if source is None:
        raise BadInput("this network does not say how it is fed: make it with Network(module, input=ImageInput(...)) or TextInput(...)")
    folder = runtime.cache_folder() / "features"
    files = {}
    if cache:
        content = hashlib.sha256("\n".join(row_hashes(data, (source.column,))).encode()).hexdigest()
        how = [network.fingerprint, content, input_config(source), inputs, runtime.current().precision]
        files = {name: folder / f"{hashlib.sha256(json.dumps([*how, name]).encode()).hexdigest()[:32]}.npy" for name in layers or [""]}
        if all(file.is_file() for file in files.values()):
            try:
                return {name: np.load(file) for name, file in files.items()}
            except ValueError:
                pass  # cut off by a full disk: made again below
    batches = network_batches(network, data, batch_size=batch_size, label=False)
    device = runtime.device()
    found: dict[str, list[np.ndarray]] = {name: [] for name in layers or [""]}
    with running(network, device), torch.inference_mode(), runtime.autocast(device), capture(network.module, layers, inputs=inputs) as caught:
        for batch in runtime.track(batches.epoch(0), f"features of {name_of(data)}", total=len(batches)):
            given = to_device(batch["inputs"], device)
            out = network(given)
            for name, parts in found.items():
                value = caught[name] if name else out
                parts.append(pooled(value, given, network).float().cpu().numpy())
    result = {name: np.concatenate(parts) for name, parts in found.items()}
    for name, file in files.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            partial = file.with_name(f"{file.stem}.{os.getpid()}.npy")
            np.save(partial, result[name])
            os.replace(partial, file)
        except OSError:
            break  # the cache is a convenience: a full disk must not end the run
    return result


def pooled(value: Tensor, given: Tensor | dict[str, Tensor], network: Network) -> Tensor:
    """[B, d] from an output of any form: the mean over space, over tokens, or over the tokens that are not padding."""
    if value.ndim == 2:
        return value
    if value.ndim == 4:
        return as_map(value, network).mean((2, 3))
    if value.ndim == 3 and isinstance(given, dict) and "attention_mask" in given:
        mask = given["attention_mask"].unsqueeze(-1).to(value.dtype)
        return (value * mask).sum(1) / mask.sum(1).clamp(min=1)
    if value.ndim == 3:
        return value.mean(1)
    return value.flatten(1) if value.ndim > 1 else value[:, None]


def to_device(inputs: Any, device: torch.device) -> Any:
    if isinstance(inputs, dict):
        return {key: value.to(device, non_blocking=True) for key, value in inputs.items()}
    return inputs.to(device, non_blocking=True)


@contextmanager
def running(network: Network, device: torch.device) -> Iterator[None]:
    """The network in eval mode on `device`, convolutions in channels-last memory; put back afterwards."""
    module, before = network.module, network.device
    modes = {name: layer.training for name, layer in module.named_modules()}
    kernels = [layer.weight for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    plain = all(kernel.is_contiguous() for kernel in kernels)
    module.eval()
    if device != before:  # asking every layer takes a millisecond
        module.to(device)
    if kernels:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        yield
    finally:
        if device != before:
            module.to(before)
        if kernels and plain:
            module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # another layout rounds differently
        for name, layer in module.named_modules():
            layer.training = modes[name]
