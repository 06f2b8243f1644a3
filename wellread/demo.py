"""`wellread demo`: an ImageNet network becomes a solar-cell inspector, on weights and photos that come with the packages.

Every step is one call of a method, on the result of the step before. Sizes are chosen for two processor cores and eight minutes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wellread import evaluate, load, load_data, predict
from wellread.adapt.gaussian_anomaly import gaussian_anomaly
from wellread.adapt.transfer import transfer
from wellread.charts import bar_chart, image_png, roc_chart
from wellread.data import class_names, labels, subset
from wellread.evaluate import probabilities, record
from wellread.explain.grad_cam import grad_cam
from wellread.folders import new_folder
from wellread.lineage import drawing
from wellread.merge.model_soup import model_soup
from wellread.pages import escape, figure_html, page, paragraphs, table_html
from wellread.results import Report
from wellread.select.data_diet import data_diet

if TYPE_CHECKING:
    from datasets import Dataset

    from wellread.network import Network
    from wellread.results import Heatmaps, Scores

SIZE = 128  # pixels: half of what the network was made for, enough to see a crack, four times as fast
RATES = (1e-4, 2e-4, 4e-4)  # of the three fine-tunings; they differ in their seed, too
EPOCHS = 3


def main(out: str | Path = "wellread-demo", force: bool = False) -> None:
    """Run everything and write networks, findings and report.html to the folder `out`. Raises `BadInput` when it exists, unless `force`."""
    began = time.monotonic()
    with new_folder(out, force) as folder:
        rows = build(folder)
        minutes = (time.monotonic() - began) / 60
        (folder / "summary.json").write_text(json.dumps({"rows": rows, "minutes": round(minutes, 2)}, indent=1))
    summary = Report(f"A solar-cell inspector in {minutes:.1f} minutes", tables={"on 525 test cells that no step had seen": rows})
    summary.show()
    print(f"Open {Path(out) / 'report.html'} for the pictures. Now with your own photos, one sub-folder for each class:\n")
    print("    wellread run transfer --networks efficientnet-lite0 --train folder:PHOTOS --out inspector\n")


def build(folder: Path) -> list[dict[str, Any]]:
    """All steps; returns the table of what came out."""
    with told(f"1/8  Loading efficientnet-lite0 (learned 1,000 everyday things) and 2,624 solar cells, read at {SIZE} pixels"):
        network = load("efficientnet-lite0")
        cells = load_data("elpv")
        train, validation, test = cells["train"], cells["validation"], cells["test"]
    names = class_names(train)

    with told("2/8  Frozen probe: the network stays as it is, only a new last layer is solved for"):
        probe = transfer([network], train, validation, mode="probe", size=SIZE, checks=False)

    tuned = []
    for number, rate in enumerate(RATES, 1):
        with told(f"3/8  Fine-tuning {number} of {len(RATES)}: all layers learn, from the probe's last layer on"):
            tuned.append(transfer([probe], train, validation, epochs=EPOCHS, size=SIZE, learning_rate=rate, checks=False, seed=number))

    with told("4/8  Model soup: the average of the fine-tuned networks that help one another on the validation cells"):
        soup = model_soup(tuned, validation, metric="auroc")

    with told("5/8  Anomaly detection: learns what intact cells look like and never sees a defect"):
        detector = gaussian_anomaly(network, train, normal_class=names[0], size=SIZE)

    with told("6/8  Grad-CAM: where the soup looks when it calls a cell defective"):
        p_soup = probabilities(predict(soup, test))[:, 1]
        worst = np.argsort(-p_soup)[:12]
        # the last map alone has 4 x 4 cells at this size; the stage before it makes four of each (measured: bench/grad_cam.py)
        maps = grad_cam(soup, subset(test, worst), target=names[1], variant="layer-cam", layers=["blocks.4.2", "bn2"])

    with told("7/8  Data diet: which training cells carry the learning, and whose labels to look at again"):
        diet = data_diet(probe, train, score="el2n")

    with told("8/8  Saving everything, loading it again in a new process and measuring it there"):
        measured = {}
        for name, each in {"probe": probe, **{f"fine-tuned {n}": t for n, t in enumerate(tuned, 1)}, "soup": soup, "detector": detector}.items():
            report = evaluate(each, test)
            record(each, test, report)
            measured[name] = (each, report)
            each.save(folder / name.replace(" ", "-"))
        maps.save(folder / "grad-cam")
        diet.save(folder / "data-diet")
        again = in_new_process(folder / "soup", "elpv:test")
        same = all(abs(again[key] - measured["soup"][1].figures[key]) < 1e-6 for key in ("accuracy", "auroc"))

    rows = [row(name, report) for name, (_, report) in measured.items()]
    rows.append(
        {
            "network": "soup, in a new process",
            "accuracy": again["accuracy"],
            "AUROC": again["auroc"],
            "note": "the same figures" if same else "DIFFERENT",
        }
    )
    (folder / "report.html").write_text(story(measured, rows, maps, diet, subset(test, worst), train, p_soup[worst], same, test))
    return rows


@contextmanager
def told(what: str) -> Iterator[None]:
    """Say what begins, and how long it took."""
    began = time.monotonic()
    print(what, file=sys.stderr, flush=True)
    yield
    print(f"     done in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def in_new_process(network: Path, data: str) -> dict[str, Any]:
    """The figures of `wellread eval` in a fresh interpreter."""
    command = [sys.executable, "-m", "wellread", "eval", str(network), data, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:])} failed: {done.stderr.strip()}")
    return json.loads(done.stdout)["figures"]


def row(name: str, report: Report) -> dict[str, Any]:
    found = report.figures
    if "accuracy" not in found:
        note = f"finds {found['detection_rate']:.0%} of the defects at {found['false_alarm_rate']:.0%} false alarms"
        return {"network": name, "accuracy": None, "95 % interval": "", "AUROC": found["auroc"], "note": note}
    return {
        "network": name,
        "accuracy": found["accuracy"],
        "95 % interval": f"{found['accuracy_low']:.3f} to {found['accuracy_high']:.3f}",
        "AUROC": found["auroc"],
        "note": {"probe": "only the last layer learned", "soup": "average of fine-tuned networks"}.get(name, ""),
    }


def verdict(measured: dict[str, tuple[Network, Report]]) -> str:
    """Whether the soup was at least as accurate as the frozen probe, in words that follow the figures."""
    soup, probe = measured["soup"][1].figures, measured["probe"][1].figures
    low, high = soup["accuracy_low"], soup["accuracy_high"]
    came_out = soup["accuracy"] >= probe["accuracy"]
    clear = "within" if low <= probe["accuracy"] <= high else "beyond"
    return (
        f"The soup is right on {soup['accuracy']:.1%} of the test cells (95 % interval {low:.1%} to {high:.1%}), the frozen probe on "
        f"{probe['accuracy']:.1%}. We expected the soup to be at least as accurate as the probe: this {'came out' if came_out else 'did not come out'}; "
        f"the difference is {clear} the soup's interval."
    )


def story(
    measured: dict[str, tuple[Network, Report]],
    rows: list[dict[str, Any]],
    maps: Heatmaps,
    diet: Scores,
    worst: Dataset,
    train: Dataset,
    p_worst: np.ndarray,
    same: bool,
    test: Dataset,
) -> str:
    """The report: one self-contained page for somebody who runs a factory."""
    from sklearn.metrics import roc_curve

    truth = labels(test) == 1
    curves: dict[str, Any] = {}
    for name in ("probe", "soup", "detector"):
        network, report = measured[name]
        out = predict(network, test)
        false, true, _ = roc_curve(truth, out if out.ndim == 1 else probabilities(out)[:, 1])
        curves[{"detector": "anomaly detector (saw no defect)"}.get(name, name)] = (false, true, float(report.figures["auroc"]))
    scored = {name: report.figures for name, (_, report) in measured.items() if "accuracy" in report.figures}
    bars = bar_chart(
        {name: float(f["accuracy"]) for name, f in scored.items()}, x="accuracy on 525 test cells, with 95 % interval", from_zero=False,
        intervals={name: (float(f["accuracy_low"]), float(f["accuracy_high"])) for name, f in scored.items()},
    )  # fmt: skip
    detector = measured["detector"][1].figures
    training = [
        (picture, f"{name}: {caption}")
        for name, (network, _) in measured.items()
        if name.startswith("fine-tuned")
        for found in network.reports.values()
        for caption, picture in found.pictures.items()
        if "training loss" in caption
    ]
    actual = labels(worst)
    names = class_names(worst)
    cells = [
        (image_png(np.hstack([maps.images[i], maps.overlay(i)]).repeat(2, 0).repeat(2, 1)), f"{p:.0%} sure of a defect; the inspectors said {names[actual[i]]}")
        for i, p in enumerate(p_worst)
    ]
    hardest = diet.highest(8)
    given = labels(train)
    look_again = [
        (image_png(np.asarray(train[int(i)]["image"].convert("RGB"))), f"cell {int(i)}, labelled {names[given[i]]}, score {diet.values[i]:.2f}")
        for i in hardest
    ]
    sections = [
        (
            "What came out",
            paragraphs(verdict(measured)) + table_html(rows) + figure_html(bars, "Accuracy of each network on cells that no step had seen"),
        ),
        (
            "Finding defects without having seen one",
            paragraphs(
                "A curve shows how many defects are found (up) for how many false alarms (right). The probe and the soup learned from labelled defects; "
                f"the anomaly detector only from intact cells. Its threshold was set for 5 % false alarms; on the test cells it raised {detector['false_alarm_rate']:.1%} "
                f"and found {detector['detection_rate']:.1%} of the defects."
            )
            + figure_html(roc_chart(curves, positive="defects"), "Found defects against false alarms on the test cells"),
        ),
        (
            "Where it looks",
            paragraphs(
                "The twelve test cells that the soup is most sure are defective, as they are and with a map: bright is where the evidence lies. A map is a hint, not a measurement."
            )
            + gallery(cells, width=320),
        ),
        (
            "Cells to look at again",
            paragraphs(
                "Training cells that networks get most wrong after a few passes, whatever their start: rare defects, or labels that deserve a second look. "
                f"Kept by the same scores, half of the cells would be rows {', '.join(map(str, diet.keep(0.5)[:5]))}, ... (data-diet/scores.csv has all)."
            )
            + gallery(look_again),
        ),
        ("How the fine-tunings went", "".join(figure_html(picture, caption) for picture, caption in training)),
        (
            "Where the soup comes from",
            paragraphs(
                "Each box is one call; the soup's folder carries this history with it. Saved, loaded in a new process and measured again, it gave "
                f"{'the same figures' if same else 'DIFFERENT FIGURES'}."
            )
            + drawing(measured["soup"][0].lineage),
        ),
        (
            "With your own photos",
            paragraphs("One sub-folder for each class, then:")
            + f"<pre>{escape('wellread run transfer --networks efficientnet-lite0 --train folder:PHOTOS --out inspector')}\n"
            + f"{escape('wellread eval inspector folder:OTHER_PHOTOS')}</pre>",
        ),
    ]
    lead = "A network that knew cats, cups and cars, taught to inspect photographs of solar cells on this computer, and what each step was worth."
    return page("A solar-cell inspector", sections, lead=lead)


def gallery(pictures: list[tuple[bytes, str]], width: int = 200) -> str:
    return '<div style="display:flex;flex-wrap:wrap;gap:12px">' + "".join(
        f'<div style="width:{width}px">{figure_html(picture, caption)}</div>' for picture, caption in pictures
    ) + "</div>"  # fmt: skip
