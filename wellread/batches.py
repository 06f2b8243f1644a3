"""Batches whose content depends on (seed, epoch, batch) alone, so that a resumed or a distributed run sees what an unbroken one saw."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from wellread.data import labels, pixels
from wellread.errors import BadInput
from wellread.inputs import ImageInput

if TYPE_CHECKING:
    from datasets import Dataset

    from wellread.network import Network


class Batches:
    """`rows` examples in batches of `batch_size`.

    get: row numbers (int64 array) to a batch, a dict of tensors (or of dicts of tensors) whose first axis is the rows. It runs with torch's
    random numbers seeded from (seed, epoch, batch), so augmentation inside it repeats exactly.
    """

    def __init__(
        self,
        rows: int,
        get: Callable[[np.ndarray], dict[str, Any]],
        *,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        if rows < 1:
            raise BadInput("the data have no rows: give at least one example")
        if batch_size < 1:
            raise BadInput(f"batch_size is {batch_size}: give at least 1")
        self.rows, self.get, self.batch_size, self.shuffle, self.seed = rows, get, batch_size, shuffle, seed
        self.drop_last = drop_last and rows >= batch_size

    def __len__(self) -> int:
        return self.rows // self.batch_size if self.drop_last else -(-self.rows // self.batch_size)

    def epoch(self, number: int, *, start: int = 0, process: int = 0, processes: int = 1) -> Iterator[dict[str, Any]]:
        """Batches `start`... of epoch `number`: of each, every `processes`-th row from `process` on.

        Each batch carries "index" (row numbers) and "share" (its rows * processes / rows of the whole batch): a mean loss times "share",
        averaged over the processes, is the mean over the whole batch, also when the last batch does not divide evenly.
        """
        order = np.random.default_rng((self.seed, number)).permutation(self.rows) if self.shuffle else np.arange(self.rows)
        for batch in range(start, len(self)):
            whole = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            mine = whole[process::processes]
            if len(mine) == 0:
                mine = whole[:1]  # every process must take part in every step; a share of zero makes it weightless
                share = 0.0
            else:
                share = len(mine) * processes / len(whole)
            generator = torch.default_generator  # by itself: fork_rng and manual_seed look for devices, at 0.4 ms a batch
            before = generator.get_state()
            generator.manual_seed(int(np.random.SeedSequence((self.seed, number, batch, process)).generate_state(1)[0]))
            try:
                content = self.get(mine)
            finally:
                generator.set_state(before)
            yield {**content, "index": torch.from_numpy(mine), "share": share}


def network_batches(
    network: Network,
    data: Dataset,
    *,
    batch_size: int = 64,
    shuffle: bool = False,
    seed: int = 0,
    augment: Callable[[Tensor], Tensor] | None = None,
    label: bool = True,
    drop_last: bool = False,
) -> Batches:
    """Batches of `data` as `network` wants them: {"inputs": Tensor [B, C, H, W] or dict of token tensors, "label": int64 [B]}.

    augment: uint8 images [B, C, H, W] to images of the same kind, before normalisation; images only.
    Images are decoded and resized once, into a memory-mapped file of the cache.
    """
    source = network.input
    if source is None:
        raise BadInput("this network does not say how it is fed: make it with Network(module, input=ImageInput(...)) or TextInput(...)")
    targets = torch.from_numpy(labels(data)) if label else None
    if isinstance(source, ImageInput):
        images = pixels(data, source)

        def inputs(rows: np.ndarray) -> Any:
            batch = torch.from_numpy(images[rows])
            return source.normalise(augment(batch) if augment else batch).contiguous(memory_format=torch.channels_last)
    else:
        texts = data[source.column]

        def inputs(rows: np.ndarray) -> Any:
            return source([texts[int(row)] for row in rows])

    def get(rows: np.ndarray) -> dict[str, Any]:
        batch = {"inputs": inputs(rows)}
        return batch if targets is None else {**batch, "label": targets[rows]}

    return Batches(len(data), get, batch_size=batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last)


def tensor_batches(columns: dict[str, Tensor], *, batch_size: int = 64, shuffle: bool = False, seed: int = 0, drop_last: bool = False) -> Batches:
    """Batches of tensors that fit in memory; all have the rows as their first axis."""
    rows = {len(column) for column in columns.values()}
    if len(rows) != 1:
        raise BadInput(f"the columns have different numbers of rows ({sorted(rows)}): give one row per example in each")
    return Batches(
        rows.pop(),
        lambda chosen: {name: column[torch.from_numpy(chosen)] for name, column in columns.items()},
        batch_size=batch_size,
        shuffle=shuffle,
        seed=seed,
        drop_last=drop_last,
    )
