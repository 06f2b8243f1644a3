"""Batch norm after a network was changed: its means and variances belong to the old weights and must be estimated anew."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import nn

from wellread import runtime
from wellread.averages import plain_name, state_of
from wellread.batches import network_batches
from wellread.features import running, to_device
from wellread.network import Network, Networks


def norm_layers(module: nn.Module) -> list[Any]:
    """The batch-norm layers that keep running statistics."""
    return [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None]


def statistics_differ(networks: Networks, module: nn.Module) -> bool:
    """Whether the running statistics of batch norm are not those of `module` in all networks.

    Fine-tunings that kept their statistics share them, and need them: re-estimated ones would be none that any of their weights were trained with.
    """
    found = {id(part) for layer in norm_layers(module) for part in (layer.running_mean, layer.running_var)}
    shared = {name: tensor for name, tensor in state_of(module).items() if id(tensor) in found}
    return any(
        (name := plain_name(key, shared)) in shared and not torch.equal(tensor.to(shared[name].device), shared[name])
        for i in range(len(networks) if shared else 0)
        for key, tensor in networks.weights(i)
    )


def reestimate_norm(network: Network, data: Dataset, *, batch_size: int = 128) -> None:
    """Give the batch-norm layers the means and variances that they see on `data`, in place; labels are not read.

    As torch.optim.swa_utils.update_bn, but all other layers stay in evaluation mode, so dropout does not widen the variances.
    """
    layers = norm_layers(network.module)
    momenta = [layer.momentum for layer in layers]
    device = runtime.device()
    with running(network, device), torch.no_grad(), runtime.autocast(device):
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # the plain mean over the batches
            layer.train()
        for batch in network_batches(network, data, batch_size=batch_size, label=False, drop_last=True).epoch(0):
            network(to_device(batch["inputs"], device))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
