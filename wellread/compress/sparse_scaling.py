"""Train while pruning, and know what it will give: the average number of parameters (Jin et al. 2025, arXiv 2501.12486)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from wellread import sparsity as sp
from wellread.batches import Batches
from wellread.charts import line_chart
from wellread.data import Unlabelled, name_of
from wellread.errors import BadInput
from wellread.method import method
from wellread.network import Network
from wellread.results import Report
from wellread.scaling_law import average_parameters
from wellread.structure import masks
from wellread.train import History, fit

Shape = Literal["geometric", "linear", "cubic"]

# --- the schedule


@dataclass(frozen=True)
class Plan:
    """When to prune: dense until step `start`, then to 1 - sparsity at step `end`, and on at that until `steps`. compute: in dense steps."""

    steps: int
    start: int
    end: int
    sparsity: float
    shape: Shape = "geometric"
    every: int = 1  # steps between two prunings

    def density(self, step: int) -> float:
        """The share of weights that are live in `step`, counted from 0; it changes at `start` + n * every, and at `end`."""
        if step >= self.end:
            return 1.0 - self.sparsity
        if step < self.start:
            return 1.0
        return density_at((step - self.start) // self.every * self.every / (self.end - self.start), self.sparsity, self.shape)

    def densities(self) -> np.ndarray:
        """[steps]"""
        return np.asarray([self.density(step) for step in range(self.steps)])

    @property
    def compute(self) -> float:
        return float(self.densities().sum())

    @property
    def average(self) -> float:
        """Mean density over the steps, and so over the tokens."""
        return self.compute / self.steps


def density_at(part: float, sparsity: float, shape: Shape = "geometric") -> float:
    """Density after this part (0...1) of the pruning. geometric: the same share of what is left goes at each event."""
    if shape == "geometric":
        return (1 - sparsity) ** part
    return 1 - sparsity * (part if shape == "linear" else 1 - (1 - part) ** 3)


def mean_density(sparsity: float, shape: Shape = "geometric") -> float:
    """Mean of `density_at` over the pruning: s / -ln(1 - s) for geometric, 1 - s / 2 for linear, 1 - 3 s / 4 for cubic."""
    if shape == "geometric":
        return sparsity / -math.log1p(-sparsity) if sparsity > 0 else 1.0
    return 1 - sparsity * (0.5 if shape == "linear" else 0.75)


def plan(
    sparsity: float, *, compute: float | None = None, steps: int | None = None, start: float = 0.25, end: float = 0.75, shape: Shape = "geometric",
    events: int = 200,
) -> Plan:  # fmt: skip
    """The schedule that prunes between two shares of the whole compute, from the compute (in dense steps) or from the number of steps.

    events: prunings if they went on over all steps. Raises `BadInput` for a sparsity outside [0, 1), start >= end, or too few steps for one event.
    """
    for right, sentence in (
        (0 <= sparsity < 1, f"sparsity is {sparsity}: give the share of weights that are zero at the end, at least 0 and below 1"),
        (0 <= start < end <= 1, f"start is {start} and end is {end}: give shares of the compute with start below end, from 0 to 1"),
        (events >= 1, f"events is {events}: give at least 1"),
        ((compute is None) != (steps is None), "give either compute or steps"),
    ):
        if not right:
            raise BadInput(sentence)
    parts = (start, (end - start) / mean_density(sparsity, shape), (1 - end) / (1 - sparsity))  # steps per unit of compute
    budget = compute if compute is not None else (steps or 0) / sum(parts)
    first, last = round(budget * parts[0]), round(budget * (parts[0] + parts[1]))
    total = steps if steps is not None else round(budget * sum(parts))
    last = min(last, total - 1)  # the last step already has the final density
    if last <= first:
        raise BadInput(f"{total} steps are too few for one pruning between {start:.0%} and {end:.0%} of the compute: train longer")
    return Plan(total, first, last, sparsity, shape, max(1, total // events))


# --- training


def train_sparse(
    network: Network, batches: Batches, schedule: Plan, *, across: bool = False, learning_rate: float, seed: int, **options: Any
) -> History:
    """Train a network with masks in place, letting them grow as the schedule says. Steps are counted in a buffer, so a resumed run knows where it is.

    Moments of weights that are cut fade behind their mask: their gradient is zero from then on.
    """
    module = network.module
    module.register_buffer("pruning_step", torch.zeros((), dtype=torch.int64), persistent=False)
    densities = tuple(schedule.densities().tolist())  # plain values: a checkpoint of another schedule is not taken up

    def step(module: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float | Tensor]]:
        count: Any = module.pruning_step
        now = min(int(count), len(densities) - 1)
        if densities[now] < (densities[now - 1] if now else 1.0):
            sp.prune_to(module, 1 - densities[now], across=across)
        count += 1
        return sp.language_step(module, batch), {"live weights": sum(mask.keep.sum() for mask in masks(module).values())}

    options = {"weight_decay": 0.1, "warmup": 0.05, "clip": 1.0, "name": "training while pruning", **options}
    try:
        epochs = schedule.steps // len(batches)
        return fit(module, batches, step, epochs=epochs, learning_rate=learning_rate, seed=seed, **options)
    finally:
        del module.pruning_step
        module.eval()


@method
def sparse_scaling(
    network: Network,
    data: Unlabelled,
    held_out: Unlabelled | None = None,
    *,
    sparsity: float = 0.6,
    start: float = 0.25,
    end: float = 0.75,
    shape: Literal["geometric", "linear", "cubic"] = "geometric",
    across: bool = False,
    layers: list[str] | None = None,
    context: int = 128,
    epochs: int = 1,
    learning_rate: float = 3e-3,
    weight_decay: float = 0.1,
    batch_size: int = 16,
    events: int = 200,
    seed: int = 0,
) -> Network:
    """A sparse language model from one training in which it is pruned, at the price of a dense one of its average size.

    network: a language model with fresh weights, or a checkpoint whose training goes on; it is only read.
    data: texts; read as one stream, cut into windows of `context` tokens.
    held_out: texts on which the report measures the loss.
    sparsity: share of the weights of the linear layers that are zero at the end, at least 0 and below 1.
    start, end: pruning begins and ends at these shares of the whole training compute (not of the steps).
    shape: of the density over the steps between; geometric, as the paper's published networks were made, takes the same share of what is left.
    across: one magnitude threshold for all layers; by default each layer gets the same share of zeros.
    layers: names of layers, or of blocks that hold them; by default all linear ones but the head.
    context: tokens in a window.
    epochs: passes over the texts.
    learning_rate, weight_decay, batch_size: of AdamW, with a warm-up of 5 % of the steps and a cosine schedule.
    events: prunings if they went on over the whole training; 200 is one every 0.5 % of the steps.
    seed: of the order of the texts.

    The report "sparse_scaling" has the plan, live weights over time, their average (the dense size with the same compute), operations, and the loss.
    N counts the linear layers' weights, without embeddings, head, norms and biases. The masks stay in the result and are saved with it.
    Raises BadInput for a network that is no language model or has masks, a sparsity outside [0, 1), start >= end, and too few steps for one pruning.
    Source: Jin et al. 2025, arXiv 2501.12486.
    """
    source = sp.language_input(network)
    if not 2 <= context <= source.max_length:
        raise BadInput(f"context is {context}: this network reads 2 to {source.max_length} tokens")
    if epochs < 1:
        raise BadInput(f"epochs is {epochs}: give at least 1")
    form: dict[str, Any] = {"length": context, "batch_size": batch_size, "seed": seed}
    batches = sp.stream_batches(network, data, **form)
    judged = sp.stream_batches(network, held_out, shuffle=False, **form) if held_out is not None else None
    schedule = plan(sparsity, steps=epochs * len(batches), start=start, end=end, shape=shape, events=events)
    made = sp.sparse(network, 0.0, layers=layers)
    whole = sp.active(made)
    fixed = sp.training_flops(made, context) - 6 * whole  # attention and head cost the same all along
    history = train_sparse(made, batches, schedule, across=across, learning_rate=learning_rate, seed=seed, weight_decay=weight_decay)
    for path, mask in masks(made.module).items():  # the record of the edit says what the masks hold at the end
        made.edits[-1]["layers"][path] = mask.keep.numel() - int(mask.keep.sum())
    masked = sum(mask.keep.numel() for mask in masks(made.module).values())
    live = [count + whole - masked for count in history.logs["live weights"]]
    tokens = batches.rows * context * epochs
    average = average_parameters(live)
    figures: dict[str, Any] = {
        "live weights at the end": sp.active(made),
        "average live weights": average,
        "tokens": tokens,
        "training FLOPs": (6 * average + fixed) * tokens,
        "dense training FLOPs": (6 * whole + fixed) * tokens,
        "loss of the last 1 % of the steps": float(np.mean(history.loss[-max(1, len(history.loss) // 100) :])),
        "seconds": history.seconds,
    }
    made.measured = []
    if judged is not None and held_out is not None:
        figures["held-out nats per token"] = loss = sp.language_loss(made, judged)
        made.measured = [{"data": name_of(held_out), "rows": len(held_out), "metrics": {"nats_per_token": loss}}]
    row = {"parameters": average, "tokens": tokens, "loss": figures.get("held-out nats per token", figures["loss of the last 1 % of the steps"])}
    starved = sp.starved(made)
    made.reports["sparse_scaling"] = Report(
        f"{sparsity:.0%} of {whole:,} weights pruned while training, {average / whole:.0%} live on average",
        figures,
        tables={
            "plan": [{"steps": schedule.steps, "first pruning": schedule.start, "last": schedule.end, "average density": schedule.average}],
            "run, a row for fit_law": [row],
            "trajectory": [{"step": at, "live weights": live[at]} for at in range(0, len(live), max(1, len(live) // 100))],
        },
        text="Operations are counted as if zeros cost nothing; here a masked product takes as long as a dense one. By the paper's rule the loss is that "
        f"of a dense network with {average:,.0f} such weights trained on as many tokens."
        + (f" It is measured on {name_of(held_out)}." if held_out is not None else ""),
        pictures={
            "live weights": line_chart({"live weights": live}, x="step", y="weights"),
            "loss": line_chart({"loss": history.loss}, x="step", y="nats per token", smooth=9),
        },
        warnings=[f"{len(starved)} layers have fewer live weights than outputs (first: {starved[0]}): take less sparsity"] if starved else [],
    )
    return made
