"""The one training loop: `fit(module, batches, step, ...)`, on Hugging Face Accelerate.

A method says what one step is (a batch to a loss); the loop owns device, precision, accumulation, clipping, schedule, progress,
checkpoints, validation and several processes. Three decisions carry the rest:

- What is random in a step depends on (seed, batch number, process) alone: the generators are seeded anew before each batch. So a
  checkpoint holds no generator states, and a resumed run repeats an unbroken one bit for bit (on a GPU as far as its kernels do).
- The step is wrapped for several processes and for autocast, not the module: `step` always sees the caller's own module, with its
  attributes and hooks, and nothing has to be unwrapped at the end.
- The loss travels to the host while the backward pass runs, and is looked at before the weights change. No GPU waits for it.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import pickle
import random
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, GradientAccumulationPlugin, broadcast, send_to_device
from torch import Tensor, nn
from tqdm import tqdm

from wellread.batches import Batches
from wellread.errors import BadInput, Diverged
from wellread.runtime import Runtime, current, device

Step = Callable[[nn.Module, dict[str, Any]], Tensor | tuple[Tensor, dict[str, float | Tensor]]]


@dataclass
class History:
    """What happened. `loss`, `learning_rate` and `logs` have one entry per optimiser step, `validation` one per epoch."""

    loss: list[float] = field(default_factory=list)  # over all rows of the step, before its update
    learning_rate: list[float] = field(default_factory=list)  # of the first parameter group
    logs: dict[str, list[float]] = field(default_factory=dict)
    validation: list[float] = field(default_factory=list)
    best_epoch: int | None = None  # counted from 0; the module holds its weights; None without validation
    steps: int = 0
    seconds: float = 0.0  # all attempts together
    resumed_at: int | None = None  # the step after which this call went on; equals `steps` when there was nothing left to do

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def fit(
    module: nn.Module,
    batches: Batches,
    step: Step,
    *,
    epochs: int,
    learning_rate: float = 1e-3,
    parameters: Iterable[Tensor] | Iterable[dict[str, Any]] | None = None,
    optimizer: Literal["adamw", "sgd"] | Callable[..., torch.optim.Optimizer] = "adamw",
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    schedule: Literal["cosine", "constant", "step"] = "cosine",
    warmup: float = 0.0,
    accumulate: int = 1,
    clip: float | None = None,
    validate: Callable[[nn.Module], float] | None = None,
    patience: int | None = None,
    checkpoint_minutes: float = 10.0,
    seed: int = 0,
    name: str = "training",
) -> History:
    """Train `module` in place.

    step: (module, batch on the device) to a scalar mean loss, or to (loss, {name: number}) with the same names at every step. The module
        is in training mode; a step that wants parts of it otherwise sets them itself. What a step remembers from one call to the next
        belongs in the module (as buffers), or a resumed run lacks it.
    parameters: what is trained, tensors of `module` or torch parameter groups; by default all that require a gradient. Nothing else gets one.
    optimizer: "adamw", "sgd", or a callable of (parameter groups, lr=...) such as `functools.partial(torch.optim.Adam, betas=(0.5, 0.9))`.
    schedule: the learning rate over all steps: see `schedule_factor`.
    warmup: fraction of all steps in which the learning rate first rises in a straight line.
    accumulate: batches per optimiser step, weighted by their rows: a mean loss then has the gradient of one large batch.
    clip: largest Euclidean norm of the whole gradient.
    validate: module in evaluation mode to a score (higher is better), after every epoch. The module ends with its best weights.
    patience: stop after this many epochs without a better score.
    checkpoint_minutes: with a `folder` in the runtime, the time between checkpoints inside an epoch. An epoch also ends with one, unless
        epochs are so short that more than 2 % of the time would go into writing.
    name: what the progress bar, the checkpoint and the errors call this training.

    Device, precision, progress and checkpoint folder come from `wellread.runtime`. A fit that had finished in that folder, from the same
    weights, first batch and settings (the plain values and modules that `step` closes over included), is not run again. Under `accelerate launch`
    each process takes its share of every batch, and the result is that of one process, except where a module looks across the rows of
    a batch (batch norm in training mode). On return the module is on the device it came from, modes and `requires_grad` are as before,
    `grad` is None, and the random generators are untouched.
    Raises `BadInput` for unusable settings and `Diverged` at a loss that is not finite; the module then holds the last good weights.
    """
    runtime = current()
    _check(epochs, learning_rate, schedule, warmup, accumulate, clip, validate, patience, checkpoint_minutes, seed)
    groups, trained = _groups(module, parameters)
    accelerator, on = _accelerator(runtime)
    per_epoch = -(-len(batches) // accumulate)
    with _borrowed(module, trained, on), _generators_kept(on), torch.enable_grad():
        inner = _optimizer(optimizer, groups, learning_rate, weight_decay, momentum)
        rates = [float(group["lr"]) for group in inner.param_groups]
        settings = [epochs, schedule, warmup, accumulate, clip, patience, validate is None, seed, runtime.precision]
        path = _path(runtime, name)
        key = _key(module, batches, step, inner, settings) if path else ""
        saved = _read(path, key) if path else None
        accelerator.wait_for_everyone()  # everyone has read before anyone writes
        history, best = History(), None
        if saved is not None:
            _put(module, saved["module"])
            history, best = History(**saved["history"]), saved["best"]
            history.resumed_at = history.steps
            if saved["finished"]:
                return history
            inner.load_state_dict(saved["optimizer"])
            if accelerator.scaler is not None:
                accelerator.scaler.load_state_dict(saved["scaler"])

        whole, scaling = accelerator.prepare(_Whole(module), inner, device_placement=[False, False])
        seeds = np.random.default_rng((seed, accelerator.process_index)).integers(2**63 - 1, size=(epochs, len(batches)))
        statistics = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        before = [buffer.clone() for buffer in statistics]
        safe, safe_step = _take(module), history.steps
        secured, cost = time.perf_counter(), 0.0
        began = secured - history.seconds

        def stop(what: str, step_number: int) -> Diverged:
            nonlocal safe_step
            if _finite(trained):
                for buffer, good in zip(statistics, before, strict=True):
                    buffer.copy_(good)  # the bad step's forward pass may have spoilt running statistics
                safe_step = step_number - 1
            else:
                _put(module, safe)  # a loss that was finite had a gradient that was not
            kept = f"the weights of step {safe_step} were kept" if safe_step else "the starting weights were kept"
            return Diverged(f"{what} step {step_number} of {name!r} (lr {history.learning_rate[-1]:.3g}); {kept}; lower learning_rate")

        def secure(finished: bool = False) -> None:
            nonlocal safe, safe_step, secured, cost
            started = time.perf_counter()
            if not _finite(trained):
                raise stop("weights became nan or infinite at", history.steps)
            safe, safe_step, history.seconds = _take(module), history.steps, started - began
            if path and accelerator.is_main_process:
                state = {"key": key, "finished": finished, "module": safe, "history": history.to_dict(), "best": best}
                if finished:
                    state |= {"module": best or safe, "best": None}
                else:
                    scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
                    state |= {"optimizer": inner.state_dict(), "scaler": scaler}
                _write(path, state)
            secured = time.perf_counter()
            cost = secured - started

        with _bar(runtime, accelerator, name, epochs * per_epoch, history.steps) as bar:
            for epoch in range(history.steps // per_epoch, epochs):
                if patience is not None and len(history.validation) - 1 - (history.best_epoch or 0) >= patience:
                    break
                first = history.steps % per_epoch
                stream = batches.epoch(epoch, start=first * accumulate, process=accelerator.process_index, processes=accelerator.num_processes)
                for update in range(first, per_epoch):
                    factor = schedule_factor(history.steps, epochs * per_epoch, schedule, warmup)
                    for group, rate in zip(inner.param_groups, rates, strict=True):
                        group["lr"] = rate * factor
                    if statistics:
                        torch._foreach_copy_(before, statistics)
                    numbers = range(update * accumulate, min((update + 1) * accumulate, len(batches)))
                    names, values = _gradient(accelerator, whole, step, stream, _row_weights(batches, numbers), seeds[epoch, numbers], on)
                    history.learning_rate.append(float(inner.param_groups[0]["lr"]))
                    if not math.isfinite(values[0]):
                        raise stop(f"loss became {values[0]} at", history.steps + 1)
                    if clip is not None:
                        accelerator.clip_grad_norm_(trained, clip)
                    (inner if accelerator.scaler is None else scaling).step()  # the wrapper around `inner` costs 0.3 ms a call
                    inner.zero_grad()
                    _record(history, names, values)
                    bar.set_postfix_str(f"loss {values[0]:.4g}", refresh=False)
                    bar.update()
                    if path and update + 1 < per_epoch and time.perf_counter() - secured >= 60 * checkpoint_minutes:
                        secure()
                if accelerator.use_distributed:
                    broadcast([buffer.data for buffer in module.buffers()])  # running statistics: those of the main process
                if not _finite(trained):
                    raise stop("weights became nan or infinite at", history.steps)
                if validate is not None:
                    score = _validated(module, validate, accelerator, on)
                    history.validation.append(score)
                    if history.best_epoch is None or score > history.validation[history.best_epoch]:
                        history.best_epoch, best = epoch, _take(module)
                if time.perf_counter() - secured >= min(50 * cost, 60 * checkpoint_minutes):  # at most 2 % of the time
                    secure()
        secure(finished=True)
        if best is not None:
            _put(module, best)
        accelerator.wait_for_everyone()
        return history


def schedule_factor(step: int, steps: int, schedule: str, warmup: float = 0.0) -> float:
    """What the learning rate is multiplied by at `step` (from 0) of `steps`.

    The first warmup * steps rise to 1 in a straight line. Then "cosine" falls to 0 (Loshchilov & Hutter 2017, one cycle), "constant"
    stays, "step" divides by 10 after 50 % and after 75 % of all steps (He et al. 2016, section 4.2).
    """
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))
    if schedule == "step":
        return 0.1 ** ((step >= 0.5 * steps) + (step >= 0.75 * steps))
    return 1.0


# One step


class _Whole(nn.Module):
    """A step as a forward pass, so that gradient exchange and autocast cover all of it and `step` may use any part of the module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, step: Step, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        result = step(self.module, batch)
        loss, logs = result if isinstance(result, tuple) else (result, {})
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise BadInput("step must return one number that depends on the trained parameters: check its loss")
        return loss.reshape(()), {name: _scalar(value, loss.device) for name, value in logs.items()}


def _gradient(
    accelerator: Accelerator,
    whole: nn.Module,
    step: Step,
    stream: Iterator[dict[str, Any]],
    weights: list[float],
    seeds: np.ndarray,
    on: torch.device,
) -> tuple[list[str], list[float]]:
    """Add up the gradient over the next len(weights) batches. Names and values of what was logged, over all processes; the loss is first."""
    total = torch.zeros((), device=on)
    for number, weight in enumerate(weights):
        last = number == len(weights) - 1
        batch = next(stream)
        weight *= batch["share"]
        if on.type != "cpu":
            batch = send_to_device(batch, on, non_blocking=True)
        _seed(int(seeds[number]), on)
        with nullcontext() if last else accelerator.no_sync(whole):  # the processes exchange gradients once per update
            loss, logs = whole(step, batch)
            total = total + weight * torch.stack([_scalar(loss, on), *logs.values()])
            if last:
                read = _on_its_way(accelerator.reduce(total, "mean") if accelerator.use_distributed else total)
            accelerator.backward(loss if weight == 1.0 else loss * weight)
    return list(logs), read()


def _scalar(figure: float | Tensor, on: torch.device) -> Tensor:
    if isinstance(figure, Tensor):
        return figure.detach().to(on, torch.float32).reshape(())
    return torch.full((), figure, dtype=torch.float32, device=on)  # unlike torch.tensor(), does not wait for a GPU


def _on_its_way(values: Tensor) -> Callable[[], list[float]]:
    """Start copying `values` to the host. The result waits for that copy only, not for work given to the GPU after it."""
    if values.device.type != "cuda":
        return values.tolist
    host = torch.empty(values.shape, pin_memory=True)
    host.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(values.device))

    def read() -> list[float]:
        arrived.synchronize()
        return host.tolist()

    return read


def _row_weights(batches: Batches, numbers: range) -> list[float]:
    """The share of each batch in the rows of one update; only the last batch of an epoch can be smaller."""
    rows = [min(batches.batch_size, batches.rows - number * batches.batch_size) for number in numbers]
    return [count / sum(rows) for count in rows]


def _record(history: History, names: list[str], values: list[float]) -> None:
    if history.steps and names != list(history.logs):
        raise BadInput(f"step logged {names} after {list(history.logs)}: log the same names at every step")
    history.loss.append(values[0])
    for name, value in zip(names, values[1:], strict=True):
        history.logs.setdefault(name, []).append(value)
    history.steps += 1


def _validated(module: nn.Module, validate: Callable[[nn.Module], float], accelerator: Accelerator, on: torch.device) -> float:
    modes = {part: part.training for part in module.modules()}
    module.eval()
    with torch.no_grad():
        score = float(validate(module))
    if math.isnan(score):
        raise BadInput("validate returned nan: return a number, higher for better")
    for part, mode in modes.items():
        part.training = mode
    # every process must come to the same decision
    return float(accelerator.reduce(torch.tensor(score, device=on), "mean")) if accelerator.use_distributed else score


def _seed(seed: int, on: torch.device) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 0.1 ms to look for devices
    if on.type == "cuda":
        with torch.cuda.device(on):
            torch.cuda.manual_seed(seed)
    elif on.type == "mps":
        torch.mps.manual_seed(seed)


# What is set up before and put back after


def _check(
    epochs: int,
    learning_rate: float,
    schedule: str,
    warmup: float,
    accumulate: int,
    clip: float | None,
    validate: object,
    patience: int | None,
    checkpoint_minutes: float,
    seed: int,
) -> None:
    for right, sentence in (
        (epochs >= 1, f"epochs is {epochs}: give at least 1"),
        (0 < learning_rate < math.inf, f"learning_rate is {learning_rate}: give a number above 0"),
        (schedule in ("cosine", "constant", "step"), f"schedule {schedule!r} is not known: choose cosine, constant or step"),
        (0 <= warmup < 1, f"warmup is {warmup}: give the fraction of all steps, at least 0 and below 1"),
        (accumulate >= 1, f"accumulate is {accumulate}: give at least 1 batch"),
        (clip is None or clip > 0, f"clip is {clip}: give the largest gradient norm, above 0, or None"),
        (patience is None or patience >= 1, f"patience is {patience}: give at least 1 epoch, or None"),
        (patience is None or validate is not None, "patience needs a score to wait for: give validate as well"),
        (checkpoint_minutes >= 0, f"checkpoint_minutes is {checkpoint_minutes}: give at least 0"),
        (seed >= 0, f"seed is {seed}: give at least 0"),
    ):
        if not right:
            raise BadInput(sentence)


def _groups(module: nn.Module, parameters: Any) -> tuple[list[dict[str, Any]], list[nn.Parameter]]:
    """Torch parameter groups, copied, and all their parameters."""
    listed: list[Any] = [parameter for parameter in module.parameters() if parameter.requires_grad] if parameters is None else list(parameters)
    groups = listed if listed and isinstance(listed[0], dict) else [{"params": listed}]
    groups = [{**group, "params": list(group["params"])} for group in groups]
    trained = [parameter for group in groups for parameter in group["params"]]
    own = {id(parameter) for parameter in module.parameters()}
    if not trained:
        raise BadInput("there is nothing to train: no parameter was given, or none of the module requires a gradient")
    if not all(id(parameter) in own for parameter in trained):
        raise BadInput("parameters has tensors that are not parameters of the module: put them in it, for example in an nn.ModuleDict")
    return groups, trained


def _optimizer(kind: Any, groups: list[dict[str, Any]], learning_rate: float, weight_decay: float, momentum: float) -> torch.optim.Optimizer:
    if callable(kind):
        if weight_decay or momentum:
            raise BadInput("weight_decay and momentum go into the optimizer callable: use functools.partial")
        return kind(groups, lr=learning_rate)
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, weight_decay=weight_decay)
    if kind != "adamw":
        raise BadInput(f"optimizer {kind!r} is not known: choose adamw or sgd, or give a callable of (parameter groups, lr=...)")
    if momentum:
        raise BadInput("momentum is a setting of optimizer='sgd': leave it out with adamw")
    return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=weight_decay)


def _accelerator(runtime: Runtime) -> tuple[Accelerator, torch.device]:
    """An Accelerator of this runtime's precision and device, and the device. Accelerate keeps one state per process: it is reset on conflict."""
    wanted = device()
    if runtime.precision == "float16" and wanted.type == "cpu":
        raise BadInput("float16 training needs a GPU: choose precision bfloat16 or float32 on the CPU")
    mixed = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[runtime.precision]
    if PartialState._shared_state:
        conflict = PartialState().device.type != wanted.type or AcceleratorState._shared_state.get("_mixed_precision", mixed) != mixed
        if conflict:
            AcceleratorState._reset_state(reset_partial_state=not PartialState().use_distributed)
    accelerator = Accelerator(
        mixed_precision=mixed,
        cpu=wanted.type == "cpu",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # `_gradient` weights by rows instead
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],  # a step may use a part of the network
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise BadInput("the loop keeps whole copies of a network: launch without FSDP, DeepSpeed and Megatron")
    alone = not accelerator.use_distributed and accelerator.device.type == wanted.type
    return accelerator, wanted if alone else accelerator.device


@contextmanager
def _borrowed(module: nn.Module, trained: list[nn.Parameter], on: torch.device) -> Iterator[None]:
    """The module on the device, in training mode, with gradients for `trained` alone; all put back afterwards."""
    home = trained[0].device
    modes = {part: part.training for part in module.modules()}
    required = {parameter: parameter.requires_grad for parameter in module.parameters()}
    chosen = set(trained)
    try:
        for parameter in required:
            parameter.requires_grad_(parameter in chosen)
            parameter.grad = None
        module.to(on).train()
        yield
    finally:
        for parameter in trained:
            parameter.grad = None
        for parameter, was in required.items():
            parameter.requires_grad_(was)
        for part, mode in modes.items():
            part.training = mode
        module.to(home)


@contextmanager
def _generators_kept(on: torch.device) -> Iterator[None]:
    """Whether a fit runs, resumes or is skipped, what the caller draws afterwards is the same."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[on] if on.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _bar(runtime: Runtime, accelerator: Accelerator, name: str, steps: int, done: int) -> tqdm:
    return tqdm(
        total=steps,
        initial=done,
        desc=name,
        unit="step",
        disable=not (runtime.progress and accelerator.is_main_process),
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
        leave=False,
        dynamic_ncols=True,
    )


# Checkpoints: one file per fit, replaced whole, read without unpickling anything but tensors and plain values


def _path(runtime: Runtime, name: str) -> Path | None:
    """folder/<how many fits came before in this runtime>-<name>/state.pt"""
    if runtime.folder is None:
        return None
    return Path(runtime.folder) / f"{next(runtime.trainings)}-{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}" / "state.pt"


def _key(module: nn.Module, batches: Batches, step: Step, optimizer: torch.optim.Optimizer, settings: list[Any]) -> str:
    """SHA-256 of what decides the outcome: starting weights, settings, the first batch, the plain values and modules that `step` closes over."""
    options = [{**group, "params": len(group["params"])} for group in optimizer.param_groups]
    closed = inspect.getclosurevars(step).nonlocals if inspect.isfunction(step) else {}
    plain = {name: value for name, value in closed.items() if _is_plain(value)}
    said = [*settings, type(optimizer).__name__, options, plain, len(batches), batches.rows, batches.batch_size]
    _seed(0, torch.device("cpu"))
    parts = {name: value if isinstance(value, dict) else {"": value} for name, value in next(batches.epoch(0)).items()}
    tensors = {f"batch {name} {key}": leaf for name, part in parts.items() for key, leaf in part.items() if isinstance(leaf, Tensor)}
    digest = hashlib.sha256(json.dumps(said, default=str).encode())
    for name, value in closed.items():
        other = getattr(value, "module", value)  # a teacher, as a Network or a bare module
        if isinstance(other, nn.Module) and other is not module:
            tensors |= {f"{name} {key}": tensor for key, tensor in _state(other).items()}
    for name, tensor in {**_state(module), **tensors}.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):  # a list is where a step may collect things
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str | None)


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and every buffer, also those that state_dict() leaves out."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _take(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in _state(module).items()}


def _put(module: nn.Module, saved: dict[str, Tensor]) -> None:
    for name, tensor in _state(module).items():
        tensor.detach().copy_(saved[name])


def _finite(parameters: list[nn.Parameter]) -> bool:
    return bool(torch.stack([parameter.detach().isfinite().all() for parameter in parameters]).all())


def _write(path: Path, state: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _read(path: Path, key: str) -> dict[str, Any] | None:
    """The state of the same fit, or None."""
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise BadInput(f"the checkpoint {path} cannot be read: delete it to start anew") from error
    if state["key"] != key:
        warnings.warn(f"the checkpoint {path} is of other weights, data or settings: starting anew", stacklevel=3)
        return None
    return state
