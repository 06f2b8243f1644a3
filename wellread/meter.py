"""What a network costs: parameters, multiply-accumulates, and the milliseconds that it really takes here. One row of figures for all methods.

Fewer multiplications are not always less time: a factorised or thinned layer may be slower than the one it replaces. So all three stand side by side.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from wellread import runtime
from wellread.errors import BadInput
from wellread.features import example_batch, to_device
from wellread.inputs import TextInput
from wellread.network import Network

WORDS = 64  # of the sentence that a text network is timed on: its cost grows with the length


def parameters(network: Network) -> int:
    """Numbers that are trained or could be; shared ones count once."""
    return sum(parameter.numel() for parameter in network.module.parameters())


def macs(network: Network) -> int:
    """Multiply-accumulates for one example: matrix products, convolutions and attention as torch's FLOP counter sees them, halved."""
    module = network.module
    with _evaluating(module), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _run(module, batch(network, 1))  # the fused attention kernels of a CPU are not in the counter's list
    return counter.get_total_flops() // 2


def milliseconds(network: Network, batch_size: int = 1, *, threads: int | None = None, repeats: int = 15, seconds: float = 3.0) -> float:
    """Median time of one batch, after warming up, on the device of this run and in the precision of this run.

    threads: of the processor, set for the measurement; None leaves them as they are.
    repeats, seconds: whichever ends first ends the measurement, but three repeats are the least.
    Convolutions lie in channels-last memory, as `predict` runs them. A copy is measured, the network stays untouched.
    """
    if batch_size < 1 or repeats < 3 or (threads is not None and threads < 1):
        raise BadInput(f"batch_size {batch_size}, threads {threads}, repeats {repeats}: give at least 1, 1 and 3")
    device = runtime.device()
    module = copy.deepcopy(network.module).eval().to(device)
    given = to_device(batch(network, batch_size), device)
    if any(isinstance(layer, nn.Conv2d) for layer in module.modules()):
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        given = given.contiguous(memory_format=torch.channels_last) if isinstance(given, Tensor) else given
    taken: list[float] = []
    with _threads(threads), torch.inference_mode(), runtime.autocast(device):
        for _ in range(2):
            _run(module, given)
        began = time.perf_counter()
        while len(taken) < 3 or (len(taken) < repeats and time.perf_counter() - began < seconds):
            _wait(device)
            started = time.perf_counter()
            _run(module, given)
            _wait(device)
            taken.append(1000 * (time.perf_counter() - started))
    return float(np.median(taken))


def meter(network: Network, batch_sizes: Sequence[int] = (1, 32), *, threads: int | None = None, repeats: int = 15, seconds: float = 3.0) -> dict[str, Any]:
    """{"parameters", "macs" (of one example), "ms_1", "ms_32" (of a whole batch), "threads", "device"}; the other arguments as for `milliseconds`."""
    device = runtime.device()
    found: dict[str, Any] = {"parameters": parameters(network), "macs": macs(network)}
    found |= {f"ms_{size}": milliseconds(network, size, threads=threads, repeats=repeats, seconds=seconds) for size in batch_sizes}
    return found | {"threads": threads or torch.get_num_threads(), "device": device.type}


def row(name: str, network: Network, batch_sizes: Sequence[int] = (1, 32), **settings: Any) -> dict[str, Any]:
    """The same as one row of a report's table, under readable names; settings go to `meter`."""
    found = meter(network, batch_sizes, **settings)
    return {
        "network": name,
        "parameters, M": found["parameters"] / 1e6,
        "MACs, M": found["macs"] / 1e6,
        **{f"ms, batch {size}": found[f"ms_{size}"] for size in batch_sizes},
    }


def batch(network: Network, rows: int) -> Tensor | dict[str, Tensor]:
    """What networks are timed on: grey pictures, or sentences of `WORDS` words, or of as many as the network takes."""
    if isinstance(network.input, TextInput):
        length = min(WORDS, network.input.max_length)
        return to_device(network.input(["word " * length] * rows), network.device)
    return example_batch(network, rows)


def _run(module: nn.Module, batch: Tensor | dict[str, Tensor]) -> None:
    module(**batch) if isinstance(batch, dict) else module(batch)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """In evaluation mode and without gradients, which the counter cannot follow through a view of a parameter; put back afterwards."""
    modes = {part: part.training for part in module.modules()}
    required = {parameter: parameter.requires_grad for parameter in module.parameters()}
    module.eval().requires_grad_(False)
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
        for parameter, was in required.items():
            parameter.requires_grad_(was)
