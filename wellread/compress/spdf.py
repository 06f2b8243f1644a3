"""SPDF: pre-train a language model sparse, fine-tune it dense (Thangarasa et al. 2023, arXiv 2303.10464)."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from wellread import sparsity as sp
from wellread.batches import Batches
from wellread.charts import line_chart
from wellread.data import Unlabelled, name_of
from wellread.errors import BadInput
from wellread.method import method
from wellread.network import Network
from wellread.results import Report
from wellread.structure import masks
from wellread.train import History, fit

SLOW = (
    "The savings are counted, not measured: a product with a masked weight takes as long as a dense one on this and on most hardware, "
    "and a mask costs a little on top. They become time where the hardware skips unstructured zeros."
)


def gpt_flops(sparsity: float, *, layers: int, width: int, context: int, vocabulary: int) -> float:
    """Training operations per token of a GPT with 12 * width^2 linear weights in each layer, of which `sparsity` cost nothing."""
    linear = (1 - sparsity) * 12 * layers * width**2
    return 3 * sp.forward_flops(linear, layers=layers, width=width, context=context, vocabulary=vocabulary)


def zero_counts(module: nn.Module) -> dict[str, int]:
    """Zeros in each mask, by layer."""
    return {path: mask.keep.numel() - int(mask.keep.sum()) for path, mask in masks(module).items()}


def train(network: Network, batches: Batches, *, epochs: int, learning_rate: float, seed: int, name: str, **options: Any) -> History:
    """Train a language model in place with AdamW, warm-up and a cosine schedule, whatever masks it carries."""
    options = {"weight_decay": 0.1, "warmup": 0.05, "clip": 1.0, **options}
    history = fit(network.module, batches, sp.language_step, epochs=epochs, learning_rate=learning_rate, seed=seed, name=name, **options)
    network.module.eval()
    return history


def phase(name: str, network: Network, batches: Batches, epochs: int, history: History | None) -> dict[str, Any]:
    """One row of the ledger: tokens, and operations with zeros for nothing and as if the network had no masks."""
    length = next(batches.epoch(0))["input_ids"].shape[1]
    tokens = length * batches.rows * epochs
    per_token = sp.training_flops(network, length)
    instead = per_token + 3 * 2 * sum(zero_counts(network.module).values())
    return {
        "phase": name,
        "live linear weights": sp.active(network),
        "tokens": tokens,
        "training FLOPs": per_token * tokens,
        "dense training FLOPs": instead * tokens,
        "fewer by": instead / per_token,
        "seconds": history.seconds if history else 0.0,
    }


@method
def spdf(
    network: Network,
    pretraining: Unlabelled,
    finetuning: Unlabelled,
    held_out: Unlabelled | None = None,
    *,
    sparsity: float = 0.75,
    mask: Literal["random", "magnitude"] = "random",
    layers: list[str] | None = None,
    rescale: bool = False,
    context: int = 128,
    pretrain_epochs: int = 1,
    finetune_epochs: int = 1,
    learning_rate: float = 3e-3,
    finetune_learning_rate: float = 1e-3,
    weight_decay: float = 0.1,
    batch_size: int = 16,
    seed: int = 0,
) -> Network:
    """A language model whose pre-training needs a fraction of the operations, fine-tuned as a dense one.

    network: a language model with fresh weights, or a checkpoint whose pre-training goes on; it is only read.
    pretraining: texts; read as one stream, cut into windows of `context` tokens.
    finetuning: the texts of the task, one a row; a column `prompt`, where there is one, is read before the text and not learnt.
    held_out: texts of the task on which the report measures the loss, in the same form.
    sparsity: share of the weights of each linear layer that are zero during pre-training, at least 0 and below 1; the paper takes 0.5 and 0.75.
    mask: random, fixed by `seed`, for fresh weights as in the paper; magnitude, which spares the largest, for a checkpoint.
    layers: names of layers, or of blocks that hold them; by default all linear ones but the head. Embeddings, norms and biases stay dense.
    rescale: start from weights multiplied by 1 / sqrt(1 - sparsity).
    context: tokens in a window, and the longest example.
    pretrain_epochs, finetune_epochs: passes over the texts; 0 leaves the phase out.
    learning_rate, finetune_learning_rate: of AdamW in the two phases, with warm-up of 5 % of the steps and a cosine schedule.
    weight_decay, batch_size: of both phases.
    seed: of the masks and the order of the texts.

    The report "spdf" has the ledger (live weights, tokens, operations as counted and as they would be dense, seconds), and the losses.
    Zeros cost nothing in the ledger and as much as anything else in seconds. The result carries no masks.
    Raises BadInput for a network that is no language model or has masks, a sparsity outside [0, 1), names that match nothing,
    quantised or shared weights, a context that the network cannot read, and texts shorter than one window.
    Source: Thangarasa et al. 2023, arXiv 2303.10464.
    """
    source = sp.language_input(network)
    for right, sentence in (
        (2 <= context <= source.max_length, f"context is {context}: this network reads 2 to {source.max_length} tokens"),
        (min(pretrain_epochs, finetune_epochs) >= 0, "pretrain_epochs and finetune_epochs must be at least 0"),
        (min(learning_rate, finetune_learning_rate) > 0, "learning_rate and finetune_learning_rate must be above 0"),
        (seed >= 0, f"seed is {seed}: give at least 0"),
    ):
        if not right:
            raise BadInput(sentence)
    thin = sp.sparse(network, sparsity, criterion=mask, layers=layers, rescale=rescale, seed=seed)
    sp.training_flops(thin, context)  # refuses what it cannot count, before anything is trained
    form: dict[str, Any] = {"length": context, "batch_size": batch_size, "seed": seed}
    stream = sp.stream_batches(thin, pretraining, **form)
    examples = sp.example_batches(thin, finetuning, **form)
    judged = sp.example_batches(thin, held_out, shuffle=False, **form) if held_out is not None else None
    starved = sp.starved(thin)
    counted = zero_counts(thin.module)
    figures: dict[str, Any] = {}
    losses: dict[str, list[float]] = {}

    def measure(when: str, of: Network) -> None:
        if judged is not None:
            figures[f"nats per token {when}"] = sp.language_loss(of, judged)

    def trained(name: str, of: Network, batches: Batches, epochs: int, rate: float) -> dict[str, Any]:
        history = None
        if epochs:
            history = train(of, batches, epochs=epochs, learning_rate=rate, seed=seed, name=name, weight_decay=weight_decay)
            losses[name] = history.loss
        return phase(name, of, batches, epochs, history)

    ledger = [trained("sparse pre-training", thin, stream, pretrain_epochs, learning_rate)]
    measure("before fine-tuning", thin)
    made = sp.dense(thin)
    ledger.append(trained("dense fine-tuning", made, examples, finetune_epochs, finetune_learning_rate))
    measure("after fine-tuning", made)
    made.measured = []
    if held_out is not None:
        made.measured = [{"data": name_of(held_out), "rows": len(held_out), "metrics": {"nats_per_token": figures["nats per token after fine-tuning"]}}]
    spent, instead = (sum(row[column] for row in ledger) for column in ("training FLOPs", "dense training FLOPs"))
    made.reports["spdf"] = Report(
        f"pre-trained with {sparsity:.0%} of the weights at zero, then dense",
        {
            "zeros during pre-training": sum(counted.values()),
            "fewer operations in pre-training": ledger[0]["fewer by"],
            "fewer operations in all": instead / spent if spent else 1.0,
            "live weights at the end": sp.active(made),
            **figures,
        },
        tables={"ledger": ledger, "masks": [{"layer": path, "zeros": count} for path, count in counted.items()]},
        text=SLOW + (f" The loss is that of {name_of(held_out)}, in nats per token of the text." if held_out is not None else ""),
        pictures={name: line_chart({name: values}, x="step", y="nats per token", smooth=9) for name, values in losses.items()},
        warnings=[f"{len(starved)} layers had fewer live weights than outputs (first: {starved[0]}): take less sparsity"] if starved else [],
    )
    return made
