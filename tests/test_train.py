"""The loop against hand-written torch, and what it promises about kills, spoilt losses, validation and several processes."""

from __future__ import annotations

import copy
import functools
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from wellread.batches import Batches, tensor_batches
from wellread.errors import BadInput, Diverged
from wellread.runtime import using
from wellread.train import fit, schedule_factor

ROWS, CLASSES = 22, 3


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Networks this small are slower on two, and much slower on two that others want."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def conv_net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, CLASSES))


def mlp(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, CLASSES))


def data(batch_size: int = 8, **settings: object) -> Batches:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(ROWS, 3, 6, 6, generator=generator)
    label = torch.randint(CLASSES, (ROWS,), generator=generator)
    return tensor_batches({"inputs": inputs, "label": label}, batch_size=batch_size, **{"shuffle": True, **settings})


def step(module: nn.Module, batch: dict) -> Tensor:
    return cross_entropy(module(batch["inputs"]), batch["label"])


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def by_hand(module: nn.Module, batches: Batches, optimizer: torch.optim.Optimizer, epochs: int, steps: int | None = None) -> list[float]:
    """The loop that everyone writes, with the cosine schedule of torch."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
    losses: list[float] = []
    module.train()
    for epoch in range(epochs):
        for batch in batches.epoch(epoch):
            if len(losses) == steps:
                return losses
            optimizer.zero_grad()
            loss = step(module, batch)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    return losses


# Agreement with hand-written torch


@pytest.mark.parametrize("network", [conv_net, mlp])
def test_constant_rate_equals_a_hand_written_loop_bit_for_bit(network):
    ours, theirs = network(), network()
    history = fit(ours, data(), step, epochs=3, learning_rate=0.1, optimizer="sgd", momentum=0.9, weight_decay=0.01, schedule="constant")
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    losses = []
    theirs.train()
    for epoch in range(3):
        for batch in data().epoch(epoch):
            optimizer.zero_grad()
            loss = step(theirs, batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert same(state(ours), state(theirs))
    assert history.loss == losses
    assert history.steps == 9 and history.learning_rate == [0.1] * 9 and history.resumed_at is None


def test_cosine_and_adamw_agree_with_torch():
    ours, theirs = conv_net(), conv_net()
    history = fit(ours, data(), step, epochs=4, learning_rate=0.01, weight_decay=0.1)
    losses = by_hand(theirs, data(), torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1), 4)
    assert history.loss == pytest.approx(losses, rel=1e-5)
    for name, tensor in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[name], tensor, atol=1e-5), name


def test_schedules_are_those_of_torch():
    def rates(scheduler_class: type, **settings: object) -> list[float]:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        scheduler = scheduler_class(optimizer, **settings)
        found = []
        for _ in range(20):
            found.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        return found

    library = torch.optim.lr_scheduler
    assert [schedule_factor(at, 20, "cosine") for at in range(20)] == pytest.approx(rates(library.CosineAnnealingLR, T_max=20))
    assert [schedule_factor(at, 20, "step") for at in range(20)] == pytest.approx(rates(library.MultiStepLR, milestones=[10, 15]))
    assert [schedule_factor(at, 20, "constant") for at in range(20)] == [1.0] * 20
    warmed = [schedule_factor(at, 20, "cosine", warmup=0.25) for at in range(20)]
    assert warmed[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert warmed[5:] == pytest.approx([schedule_factor(at, 15, "cosine") for at in range(15)])


def test_schedule_and_group_rates_reach_the_optimiser():
    module = mlp()
    start = state(module)
    groups = [{"params": module[1].parameters(), "lr": 0.0}, {"params": module[4].parameters()}]
    history = fit(module, data(), step, epochs=2, learning_rate=0.5, optimizer="sgd", parameters=groups[::-1], warmup=0.5)
    assert history.learning_rate == pytest.approx([0.5 * schedule_factor(at, 6, "cosine", 0.5) for at in range(6)])
    assert torch.equal(module[1].weight, start["1.weight"])
    assert not torch.equal(module[4].weight, start["4.weight"])


def test_optimizer_callable():
    ours, theirs = mlp(), mlp()
    fit(ours, data(), step, epochs=2, learning_rate=0.01, optimizer=functools.partial(torch.optim.RMSprop, alpha=0.5), schedule="cosine")
    by_hand(theirs, data(), torch.optim.RMSprop(theirs.parameters(), lr=0.01, alpha=0.5), 2)
    for name, tensor in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[name], tensor, atol=1e-6), name


@pytest.mark.parametrize("accumulate", [2, 3, 4])
def test_accumulation_equals_one_big_batch(accumulate):
    # 22 rows in batches of 4: six batches, the last of two rows; the groups of 4 leave a group of two
    small, big = mlp(), mlp()
    settings = {"epochs": 2, "learning_rate": 0.1, "optimizer": "sgd", "momentum": 0.9}
    one = fit(small, data(4, shuffle=False), step, accumulate=accumulate, **settings)
    other = fit(big, data(4 * accumulate, shuffle=False), step, **settings)
    assert one.steps == other.steps == 2 * math.ceil(22 / (4 * accumulate))
    assert one.loss == pytest.approx(other.loss, rel=1e-5)
    for name, tensor in big.state_dict().items():
        assert torch.allclose(small.state_dict()[name], tensor, atol=1e-6), name


def test_clip_bounds_the_gradient():
    moved = {}
    for clip in (None, 0.01, 1e6):
        module = mlp()
        start = nn.utils.parameters_to_vector(module.parameters()).detach()
        fit(module, data(ROWS), step, epochs=1, learning_rate=1.0, optimizer="sgd", schedule="constant", clip=clip)
        moved[clip] = (nn.utils.parameters_to_vector(module.parameters()).detach() - start).norm().item()
    assert moved[None] > 0.1
    assert moved[0.01] == pytest.approx(0.01, rel=1e-3)
    assert moved[1e6] == moved[None]


def test_logs_are_means_over_the_rows_of_a_step():
    def logging(module: nn.Module, batch: dict) -> tuple[Tensor, dict]:
        return step(module, batch), {"first": batch["index"].float().mean(), "rows": len(batch["index"])}

    history = fit(mlp(), data(16, shuffle=False), logging, epochs=2, accumulate=2)
    assert history.logs["first"] == pytest.approx([10.5, 10.5])
    assert history.logs["rows"] == pytest.approx([(16 * 16 + 6 * 6) / 22] * 2)
    assert history.to_dict()["logs"] == history.logs


# What is put back


def test_the_module_and_the_generators_are_left_as_they_were():
    module = conv_net().eval()
    module[2].train()
    module[0].bias.requires_grad_(False)
    frozen = module[0].bias.clone()
    modes = [part.training for part in module.modules()]
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    seen = []

    def watching(given: nn.Module, batch: dict) -> Tensor:
        seen.append((given is module, given.training, given[0].bias.requires_grad))
        random.random(), np.random.rand(), torch.rand(1)
        return step(given, batch)

    with torch.no_grad():
        fit(module, data(), watching, epochs=1, parameters=module[5].parameters())
    assert seen == [(True, True, False)] * 3
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    assert [part.training for part in module.modules()] == modes
    assert [p.requires_grad for p in module.parameters()] == [True, False, True, True, True, True]
    assert all(p.grad is None for p in module.parameters())
    assert torch.equal(module[0].bias, frozen)


def test_parameters_not_given_do_not_change():
    module = mlp()
    start = state(module)
    fit(module, data(), step, epochs=1, learning_rate=0.1, parameters=[module[4].weight])
    changed = [name for name, tensor in module.state_dict().items() if not torch.equal(tensor, start[name])]
    assert changed == ["4.weight"]


def test_same_seed_same_weights_other_seed_others():
    def trained(seed: int) -> dict[str, Tensor]:
        module = mlp(dropout=0.5)
        torch.manual_seed(random.randrange(1000))  # the caller's generator must not matter
        fit(module, data(), step, epochs=1, learning_rate=0.1, seed=seed)
        return state(module)

    assert same(trained(5), trained(5))
    assert not same(trained(5), trained(6))


# Kills and re-runs

KILLED = """
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import torch
    from test_train import long_run
    torch.set_num_threads(1)
    from wellread.runtime import using
    with using(progress=False, folder=Path(sys.argv[1])):
        long_run(kill_at=int(sys.argv[2]))
"""


def long_run(kill_at: int | None = None, stop: BaseException | None = None) -> tuple[nn.Module, object]:
    """Three epochs of three updates (the last of one batch) with everything that draws random numbers; batch norm, momenta, best weights."""
    torch.manual_seed(7)
    module = nn.Sequential(conv_net()[:5], nn.Dropout(0.3), nn.Linear(16, CLASSES))
    batches = data(5)
    plain = batches.get
    batches.get = lambda rows: {**plain(rows), "noise": torch.randn(())}
    calls, plan = [], [kill_at, stop]  # in a list: another plain value that the step closes over makes it another fit

    def noisy(given: nn.Module, batch: dict) -> Tensor:
        calls.append(1)
        if len(calls) == plan[0]:
            if plan[1]:
                raise plan[1]
            os.kill(os.getpid(), signal.SIGKILL)
        chance = random.random() + np.random.rand() + batch["noise"]
        return step(given, batch) + 0.1 * chance * given[2].weight.sum()

    history = fit(
        module,
        batches,
        noisy,
        epochs=3,
        learning_rate=0.01,
        accumulate=2,
        clip=1.0,
        warmup=0.2,
        validate=lambda given: given[2].weight.sum().item(),
        checkpoint_minutes=0,
        name="long run",
    )
    return module, history


def without_times(history: object) -> dict:
    return {key: value for key, value in history.to_dict().items() if key not in ("seconds", "resumed_at")}


def test_resume_after_kill_9_equals_an_unbroken_run(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED).format(tests=str(Path(__file__).parent)))
    child = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "run"), "9"], capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[1]
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert (tmp_path / "run" / "0-long-run" / "state.pt").exists()
    with using(folder=tmp_path / "run"):
        resumed, history = long_run()
    unbroken, expected = long_run()
    assert history.resumed_at == 4 and expected.resumed_at is None  # in an epoch: 2 + 2 + 1 batches, 2, and killed within the second 2
    assert same(state(resumed), state(unbroken))
    assert without_times(history) == without_times(expected)


@pytest.mark.parametrize("kill_at", [1, 2, 6, 7, 15])
def test_resume_from_any_step(tmp_path, kill_at):
    with pytest.raises(KeyboardInterrupt), using(folder=tmp_path):
        long_run(kill_at, KeyboardInterrupt())
    with using(folder=tmp_path):
        resumed, history = long_run()
    unbroken, expected = long_run()
    assert history.resumed_at == (None if kill_at <= 2 else {6: 3, 7: 3, 15: 8}[kill_at])
    assert same(state(resumed), state(unbroken))
    assert without_times(history) == without_times(expected)


def counted(folder: Path, *, module: nn.Module | None = None, batches: Batches | None = None, scale: float = 1.0, **settings: object):
    """A fit in `folder`: how many batches it computed, the module, the history."""
    module = module or mlp(0.5)
    calls = []

    def counting(given: nn.Module, batch: dict) -> Tensor:
        calls.append(1)
        return scale * step(given, batch)

    with using(folder=folder):
        history = fit(module, batches or data(), counting, **{"epochs": 2, "validate": lambda given: -given[4].bias[0].item(), **settings})
    return len(calls), module, history


def test_a_finished_fit_is_not_run_again(tmp_path):
    calls, first, history = counted(tmp_path)
    assert calls == 6
    calls, again, repeated = counted(tmp_path)
    assert calls == 0
    assert same(state(first), state(again)) and without_times(history) == without_times(repeated) and repeated.resumed_at == 6
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["state.pt"]


def other_weights() -> nn.Module:
    module = mlp(0.5)
    module[1].weight.data[0, 0] += 1
    return module


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 0.1},
        {"epochs": 3},
        {"seed": 1},
        {"weight_decay": 0.1},
        {"clip": 1.0},
        {"scale": 2.0},
        {"module": other_weights},
        {"batches": lambda: data(seed=1)},
        {"optimizer": functools.partial(torch.optim.AdamW, betas=(0.5, 0.9))},
        {"parameters": lambda: None},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_changed_setting_does_not_reuse_a_checkpoint(tmp_path, change):
    counted(tmp_path)
    if "parameters" in change:
        module = mlp(0.5)
        changed = {"module": module, "parameters": module[1].parameters()}
    else:
        changed = {key: value() if key in ("module", "batches") else value for key, value in change.items()}
    fresh = copy.deepcopy(changed) if "parameters" not in change else None
    with pytest.warns(UserWarning, match="starting anew"):
        calls, module, _ = counted(tmp_path, **changed)
    assert calls == 3 * changed.get("epochs", 2)
    if fresh is not None:
        _, expected, _ = counted(tmp_path / "fresh", **fresh)
        assert same(state(module), state(expected))


def test_fits_of_one_run_have_their_own_checkpoints(tmp_path):
    def both() -> list[int | None]:
        with using(folder=tmp_path):
            return [
                fit(mlp(), data(), step, epochs=1, learning_rate=rate, name=name).resumed_at for rate, name in ((0.1, "a"), (0.2, "a"), (0.2, "b/c"))
            ]

    assert both() == [None, None, None]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0-a", "1-a", "2-b-c"]
    assert both() == [3, 3, 3]


def test_a_nested_runtime_goes_on_counting(tmp_path):
    with using(folder=tmp_path):
        for progress in (True, False):
            with using(progress=progress):
                fit(mlp(), data(), step, epochs=1, name="a")
        with using(folder=tmp_path / "other"):
            fit(mlp(), data(), step, epochs=1, name="a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0-a", "1-a", "other"]
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["0-a"]


def test_another_teacher_does_not_reuse_a_checkpoint(tmp_path):
    def taught(teacher: nn.Module) -> int | None:
        def imitate(module: nn.Module, batch: dict) -> Tensor:
            return (module(batch["inputs"]) - teacher(batch["inputs"]).detach()).square().mean()

        with using(folder=tmp_path):
            return fit(mlp(), data(), imitate, epochs=1).resumed_at

    assert taught(mlp(0.5)) is None and taught(mlp(0.5)) == 3
    with pytest.warns(UserWarning, match="starting anew"):
        assert taught(other_weights()) is None


def test_a_checkpoint_is_never_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/owned",))

    (tmp_path / "0-training").mkdir()
    torch.save({"key": Evil()}, tmp_path / "0-training" / "state.pt")
    with pytest.raises(BadInput, match=r"state.pt cannot be read: delete it"):
        counted(tmp_path)
    assert not (tmp_path / "owned").exists()


# Losses that are not numbers


@pytest.mark.parametrize("network", [conv_net, mlp])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_weights(network):
    module, expected = network(), network()
    calls = []

    def poisoning(given: nn.Module, batch: dict) -> Tensor:
        calls.append(1)
        return step(given, {**batch, "inputs": batch["inputs"] * math.nan} if len(calls) == 5 else batch)

    module.eval()
    with pytest.raises(Diverged, match=r"loss became nan at step 5 of 'probe' \(lr 0.0587\); the weights of step 4 were kept; lower learning_rate"):
        fit(module, data(shuffle=False), poisoning, epochs=3, learning_rate=0.1, optimizer="sgd", name="probe")
    by_hand(expected, data(shuffle=False), torch.optim.SGD(expected.parameters(), lr=0.1), 3, steps=4)
    for name, tensor in expected.state_dict().items():  # batch norm's running statistics too
        if tensor.is_floating_point():
            assert torch.allclose(module.state_dict()[name], tensor, atol=1e-6), name
    assert not module.training


def test_a_gradient_that_is_not_finite_costs_at_most_an_epoch():
    module, expected = mlp(), mlp()
    calls = []

    def poisoning(given: nn.Module, batch: dict) -> Tensor:
        calls.append(1)
        return step(given, batch) + ((given[4].bias * 0).sum().sqrt() if len(calls) == 5 else 0.0)  # the slope of a root at 0

    with pytest.raises(Diverged, match=r"at step 6 of 'training' .*; the weights of step 3 were kept"):
        fit(module, data(), poisoning, epochs=3, learning_rate=0.1, optimizer="sgd", checkpoint_minutes=0)
    by_hand(expected, data(), torch.optim.SGD(expected.parameters(), lr=0.1), 3, steps=3)
    for name, tensor in expected.state_dict().items():
        assert torch.allclose(module.state_dict()[name], tensor, atol=1e-6), name


def test_a_gradient_that_is_not_finite_in_the_last_step_is_noticed():
    module = mlp()
    start = state(module)
    with pytest.raises(Diverged, match=r"weights became nan or infinite at step 1 .*the starting weights were kept"):
        fit(module, data(ROWS), lambda m, b: step(m, b) + (m[4].bias * 0).sum().sqrt(), epochs=1, validate=lambda m: math.nan)
    assert same(state(module), start)


# Validation


def test_the_best_weights_are_restored_and_patience_ends_the_run():
    module = mlp()
    scores = [0.5, 0.8, 0.8, 0.7, 0.9]
    seen: list[dict[str, Tensor]] = []

    def validate(given: nn.Module) -> float:
        assert given is module and not given.training and not torch.is_grad_enabled()
        seen.append(state(given))
        return scores[len(seen) - 1]

    trained_modes = []

    def watching(given: nn.Module, batch: dict) -> Tensor:
        trained_modes.append(given.training)
        return step(given, batch)

    history = fit(module, data(), watching, epochs=5, learning_rate=0.1, validate=validate, patience=2)
    assert history.validation == [0.5, 0.8, 0.8, 0.7] and history.best_epoch == 1 and history.steps == 12
    assert same(state(module), seen[1]) and not same(seen[1], seen[3])
    assert all(trained_modes)


def test_without_patience_all_epochs_are_run():
    module = mlp()
    scores = iter([0.5, 0.1, 0.2])
    history = fit(module, data(), step, epochs=3, validate=lambda given: next(scores))
    assert history.steps == 9 and history.best_epoch == 0


# Precision, devices, processes


def test_bfloat16_is_used_and_leaves_float32_weights():
    seen = []

    def watching(given: nn.Module, batch: dict) -> Tensor:
        out = given(batch["inputs"])
        seen.append(out.dtype)
        return cross_entropy(out.float(), batch["label"])

    module, wide = mlp(), mlp()
    with using(precision="bfloat16"):
        history = fit(module, data(), watching, epochs=5, learning_rate=0.01)
    assert set(seen) == {torch.bfloat16} and history.loss[-1] < history.loss[0]
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    expected = fit(wide, data(), watching, epochs=5, learning_rate=0.01)  # and the next fit is in float32 again
    assert seen[-1] == torch.float32
    assert history.loss != expected.loss and history.loss == pytest.approx(expected.loss, abs=0.03)
    assert module(data().get(np.arange(2))["inputs"]).dtype == torch.float32


def test_float16_on_the_cpu_is_refused():
    with pytest.raises(BadInput, match="float16 training needs a GPU"), using(device="cpu", precision="float16"):
        fit(mlp(), data(), step, epochs=1)


PROCESSES = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import torch
    import accelerate
    from test_train import conv_net, data, mlp, several, state, step
    from wellread.errors import Diverged
    from wellread.runtime import using
    from wellread.train import fit
    out = Path(sys.argv[1])
    with using(progress=False, folder=out / "run", device="cpu"):
        results = several()
    rank = accelerate.PartialState().process_index
    assert accelerate.PartialState().num_processes == 2
    with using(progress=False, folder=out / "run", device="cpu"):
        again = several(True)
    try:  # spoilt on one process only: all must stop
        fit(mlp(), data(), lambda m, b: step(m, b) * (float("nan") if rank == 1 else 1), epochs=1)
        stopped = ""
    except Diverged as error:
        stopped = str(error)
    statistics = conv_net()
    fit(statistics, data(), step, epochs=1)
    torch.save((results, again, stopped, state(statistics)), out / f"{{rank}}.pt")
"""


def several(finished: bool = False) -> list[tuple[dict[str, Tensor], list[float], list[float], list[float], int | None]]:
    """Two fits after each other, in batches of 8 rows; the last batch has 3, then 1: fewer for the second process, then none."""
    generator = torch.Generator().manual_seed(0)
    inputs, label = torch.randn(19, 3, 6, 6, generator=generator), torch.randint(CLASSES, (19,), generator=generator)
    results, done = [], [1] * finished
    for rows, settings in ((19, {}), (17, {"accumulate": 2, "clip": 0.5, "validate": lambda module: -module[4].weight.norm().item(), "patience": 1})):
        batches = tensor_batches({"inputs": inputs[:rows], "label": label[:rows]}, batch_size=8, shuffle=True)

        def partly(module: nn.Module, batch: dict) -> tuple[Tensor, dict]:
            assert not done
            out = module[4](module[2](module[1](module[0](batch["inputs"]))))  # parts of the module, not its forward
            return cross_entropy(out, batch["label"]), {"index": batch["index"].float().mean()}

        module = mlp().append(nn.Linear(1, 1))  # which takes no part
        history = fit(module, batches, partly, epochs=3, learning_rate=0.05, optimizer="sgd", momentum=0.9, **settings)
        results.append((state(module), history.loss, history.logs["index"], history.validation, history.best_epoch))
    return results


def test_two_processes_give_the_result_of_one(tmp_path):
    script = tmp_path / "processes.py"
    script.write_text(textwrap.dedent(PROCESSES).format(tests=str(Path(__file__).parent)))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    child = subprocess.run(
        [*command, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert child.returncode == 0, child.stderr[-3000:]
    expected = several()
    for rank in (0, 1):
        results, again, stopped, _ = torch.load(tmp_path / f"{rank}.pt")
        assert "loss became nan at step 1" in stopped
        for (weights, *figures), (repeated, *_), (wanted, *wanted_figures) in zip(results, again, expected, strict=True):
            assert same(weights, repeated)
            for name, tensor in wanted.items():
                assert torch.allclose(weights[name], tensor, atol=1e-6), name
            for found, right in zip(figures, wanted_figures, strict=True):
                assert found == (right if right is None else pytest.approx(right, rel=1e-4))
    (first, *_, with_statistics), (second, *_, with_same_statistics) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(same(a[0], b[0]) for a, b in zip(first, second, strict=True))
    assert same(with_statistics, with_same_statistics)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_on_a_gpu(precision, tmp_path):
    poisoned, calls = conv_net(), []

    def poisoning(module: nn.Module, batch: dict) -> Tensor:
        calls.append(1)
        assert batch["inputs"].is_cuda and batch["index"].is_cuda
        return step(module, batch) * (math.nan if len(calls) == 5 else 1.0)

    def logging(module: nn.Module, batch: dict) -> tuple[Tensor, dict]:
        loss = step(module, batch)
        return loss, {"twice": 2 * loss, "one": 1.0}

    with using(device="cuda", precision=precision, folder=tmp_path):
        module = conv_net()
        history = fit(module, data(), logging, epochs=8, learning_rate=0.02, clip=10.0)
        with pytest.raises(Diverged, match="loss became nan at step 5"):
            fit(poisoned, data(), poisoning, epochs=3, learning_rate=0.02)
    assert history.loss[-1] < history.loss[0]
    assert history.logs["twice"] == pytest.approx([2 * loss for loss in history.loss], rel=1e-3) and history.logs["one"] == [1.0] * 24
    assert {tensor.device.type for tensor in [*module.state_dict().values(), *poisoned.state_dict().values()]} == {"cpu"}
    assert all(tensor.isfinite().all() for tensor in poisoned.state_dict().values())
    on_cpu = conv_net()
    with using(device="cpu"):
        expected = fit(on_cpu, data(), step, epochs=8, learning_rate=0.02, clip=10.0)
    assert history.loss == pytest.approx(expected.loss, abs=0.001 if precision == "float32" else 0.1)


# Bad input


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"epochs": 0}, "epochs is 0: give at least 1"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"optimizer": "adam"}, "optimizer 'adam' is not known: choose adamw or sgd"),
        ({"momentum": 0.9}, "momentum is a setting of optimizer='sgd'"),
        ({"optimizer": torch.optim.Adam, "weight_decay": 0.1}, "go into the optimizer callable"),
        ({"schedule": "linear"}, "schedule 'linear' is not known: choose cosine, constant or step"),
        ({"warmup": 1.0}, "warmup is 1.0"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"patience": 3}, "give validate as well"),
        ({"patience": 0, "validate": lambda module: 0.0}, "patience is 0"),
        ({"validate": lambda module: math.nan}, "validate returned nan"),
        ({"checkpoint_minutes": -1}, "checkpoint_minutes is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"parameters": []}, "there is nothing to train"),
        ({"parameters": [torch.zeros(2, requires_grad=True)]}, "not parameters of the module"),
    ],
)
def test_bad_settings_are_named(settings, sentence):
    with pytest.raises(BadInput) as error:
        fit(mlp(), data(), step, **{"epochs": 1, **settings})
    assert sentence in str(error.value)


@pytest.mark.parametrize("loss", [lambda m, b: 1.0, lambda m, b: torch.zeros(()), lambda m, b: m(b["inputs"])])
def test_a_step_without_a_usable_loss_is_named(loss):
    with pytest.raises(BadInput, match="step must return one number that depends on the trained parameters"):
        fit(mlp(), data(), loss, epochs=1)


def test_a_step_must_log_the_same_names():
    calls = []

    def fickle(module: nn.Module, batch: dict) -> tuple[Tensor, dict]:
        calls.append(1)
        return step(module, batch), {f"figure {len(calls)}": 0.0}

    with pytest.raises(BadInput, match="log the same names at every step"):
        fit(mlp(), data(), fickle, epochs=1)


def test_progress_shows_the_loss(capsys):
    with using(progress=True):
        fit(mlp(), data(), step, epochs=1, name="fine-tune")
    shown = capsys.readouterr().err
    assert "fine-tune" in shown
    with using(progress=False):
        fit(mlp(), data(), step, epochs=1)
    assert capsys.readouterr().err == ""
