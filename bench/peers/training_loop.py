"""What `fit` costs beside the loop one would write by hand: the same network, batches, optimiser and schedule, in turns, in one process.

    python -m bench.peers.training_loop

Three loops are compared with the leanest one (rows picked from a tensor, no progress, no checks): `fit`, `fit` with checkpoints, and
the usual torch loop over a DataLoader. A turn times all of them, in an order that changes from turn to turn, set-up included; a figure
is the median over the turns of the ratio to the leanest loop of the same turn. The weights must come out equal bit for bit, or
the loops did not do the same work. The small network shows the cost of a step in itself: hardly a network is faster to train than that.
The C library's allocator is told to keep freed memory: otherwise it depends on chance which loop gets its pages anew at every step, and
that is worth up to 10 % in either direction.
"""

from __future__ import annotations

import io
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from bench.harness import Expect, record_peer
from wellread.batches import tensor_batches
from wellread.runtime import using
from wellread.train import fit

EXPECTS = [
    Expect("on a small ResNet, fit takes at most 3 % longer than a hand-written torch loop", "conv_fit", 1.03, at_least=False),
    Expect("also when it writes checkpoints", "conv_fit_with_checkpoints", 1.03, at_least=False),
]
BATCH, RATE = 32, 0.05


class Block(nn.Module):
    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.skip = nn.Conv2d(width, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def conv() -> nn.Module:
    """A residual network of 8 layers for 32 x 32 images, 16 to 64 channels."""
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def optimiser_and_schedule(module: nn.Module, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + np.cos(np.pi * step / steps)))


def lean(module: nn.Module, inputs: Tensor, label: Tensor, epochs: int) -> None:
    steps = epochs * -(-len(inputs) // BATCH)
    optimizer, schedule = optimiser_and_schedule(module, steps)
    losses = []
    module.train()
    for epoch in range(epochs):
        order = torch.from_numpy(np.random.default_rng((0, epoch)).permutation(len(inputs)))
        for rows in order.split(BATCH):
            loss = cross_entropy(module(inputs[rows]), label[rows])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())


def with_loader(module: nn.Module, inputs: Tensor, label: Tensor, epochs: int) -> None:
    steps = epochs * -(-len(inputs) // BATCH)
    optimizer, schedule = optimiser_and_schedule(module, steps)
    losses = []
    module.train()
    for _ in range(epochs):
        for chosen, target in DataLoader(TensorDataset(inputs, label), batch_size=BATCH, shuffle=True):
            loss = cross_entropy(module(chosen), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())


def ours(module: nn.Module, inputs: Tensor, label: Tensor, epochs: int, folder: Path | None = None) -> None:
    def step(module: nn.Module, batch: dict[str, Any]) -> Tensor:
        return cross_entropy(module(batch["inputs"]), batch["label"])

    batches = tensor_batches({"inputs": inputs, "label": label}, batch_size=BATCH, shuffle=True)
    with using(device="cpu", folder=folder):
        fit(module, batches, step, epochs=epochs, learning_rate=RATE, optimizer="sgd", momentum=0.9)


def with_checkpoints(module: nn.Module, inputs: Tensor, label: Tensor, epochs: int) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        ours(module, inputs, label, epochs, folder)
    finally:
        shutil.rmtree(folder)


LOOPS: dict[str, Callable[..., None]] = {"lean": lean, "fit": ours, "fit_with_checkpoints": with_checkpoints, "data_loader": with_loader}


def measured(make: Callable[[], nn.Module], shape: tuple[int, ...], rows: int, epochs: int, turns: int) -> dict[str, list[float]]:
    """Seconds of every loop in every turn; under NAME_cpu those of the processor, which other work on the machine disturbs less."""
    generator = torch.Generator().manual_seed(0)
    inputs, label = torch.randn(rows, *shape, generator=generator), torch.randint(10, (rows,), generator=generator)
    seconds: dict[str, list[float]] = {name + kind: [] for name in LOOPS for kind in ("", "_cpu")}
    for turn in range(-1, turns):  # the first warms up
        names = list(LOOPS)[turn % len(LOOPS) :] + list(LOOPS)[: turn % len(LOOPS)]
        modules = {name: make() for name in names}
        for name in names if turn % 2 else names[::-1]:
            started, started_cpu = time.perf_counter(), time.process_time()
            with redirect_stderr(io.StringIO()):  # the progress bar is drawn, but not here
                LOOPS[name](modules[name], inputs, label, epochs)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - started)
                seconds[f"{name}_cpu"].append(time.process_time() - started_cpu)
        for name in ("fit", "fit_with_checkpoints"):
            pairs = zip(modules["lean"].state_dict().values(), modules[name].state_dict().values(), strict=True)
            if not all(torch.equal(a, b) for a, b in pairs):
                raise SystemExit(f"{name} ended with other weights than the hand-written loop: the times cannot be compared")
    return seconds


def main() -> None:
    if "MALLOC_TRIM_THRESHOLD_" not in os.environ:  # read when a process starts
        keep = {"MALLOC_TRIM_THRESHOLD_": str(2**31), "MALLOC_MMAP_THRESHOLD_": str(2**31)}
        os.execvpe(sys.executable, [sys.executable, "-m", "bench.peers.training_loop"], {**os.environ, **keep})
    began = time.perf_counter()
    sizes = {"conv": {"rows": 960, "epochs": 1, "turns": 12}, "mlp": {"rows": 6400, "epochs": 2, "turns": 12}}
    figures: dict[str, float] = {}
    for name, make, shape in (("conv", conv, (3, 32, 32)), ("mlp", mlp, (64,))):
        seconds = measured(make, shape, **sizes[name])
        steps = sizes[name]["epochs"] * -(-sizes[name]["rows"] // BATCH)
        lean_ms = [1000 * value / steps for value in seconds["lean"]]
        figures[f"{name}_lean_ms_per_step"] = statistics.median(lean_ms)
        for loop in list(LOOPS)[1:]:
            ratios = [a / b for a, b in zip(seconds[loop], seconds["lean"], strict=True)]
            cpu = statistics.median(a / b for a, b in zip(seconds[f"{loop}_cpu"], seconds["lean_cpu"], strict=True))
            low, middle, high = statistics.quantiles(ratios, n=4)
            figures |= {f"{name}_{loop}": middle, f"{name}_{loop}_quartile_1": low, f"{name}_{loop}_quartile_3": high, f"{name}_{loop}_cpu": cpu}
            print(f"{name:5} {loop:20} {middle:.3f} of the hand-written loop (quartiles {low:.3f} and {high:.3f}; processor time {cpu:.3f})")
    figures["fit_added_ms_per_step"] = figures["mlp_lean_ms_per_step"] * (figures["mlp_fit"] - 1)
    print(f"one step of fit adds {figures['fit_added_ms_per_step']:.3f} ms")
    record_peer(
        "training_loop",
        "a hand-written torch loop",
        figures=figures,
        expects=EXPECTS,
        sizes={**sizes, "batch": BATCH},
        seconds=time.perf_counter() - began,
        notes=["figures without a unit are ratios of wall time to the hand-written loop in the same turn, medians over the turns"],
    )


if __name__ == "__main__":
    main()
