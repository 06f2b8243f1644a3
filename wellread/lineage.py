"""What was done to a network: from what, by what, with what. And the model card that says so.

A step is a plain dict: method, settings, parents (fingerprints of networks), data ([{argument, name, rows, fingerprint}]), versions, when,
result (fingerprint). A network's lineage is the list of all steps that led to it, oldest first; the `parents` make it a graph.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wellread.network import Network

Step = dict[str, Any]

PACKAGES = ("wellread", "torch", "torchvision", "timm", "transformers", "datasets", "accelerate", "scikit-learn", "numpy")


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def step(
    method: str,
    settings: dict[str, Any],
    *,
    parents: Iterable[str] = (),
    data: Iterable[dict[str, Any]] = (),
    result: str | None = None,
) -> Step:
    return {
        "method": method,
        "settings": settings,
        "parents": list(parents),
        "data": list(data),
        "versions": versions(),
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "result": result,
    }


def merged(lineages: Iterable[list[Step]]) -> list[Step]:
    """The steps of several lineages, each once, parents before children."""
    seen: dict[str, Step] = {}
    for lineage in lineages:
        for each in lineage:
            seen.setdefault(json.dumps(each, sort_keys=True, default=str), each)
    return list(seen.values())


def describe(each: Step) -> str:
    """One line: transfer(mode=probe) on elpv:train (1574 rows)."""
    settings = ", ".join(f"{key}={value}" for key, value in each["settings"].items())
    data = " and ".join(f"{d['name']} ({d['rows']} rows)" for d in each["data"])
    return f"{each['method']}({settings})" + (f" on {data}" if data else "")


def model_card(network: Network) -> str:
    """A Hugging Face model card: what it takes and gives, lineage, measured results (also as model-index)."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    task = {
        "logits": "image-classification" if network.input is None or network.input.column == "image" else "text-classification",
        "embedding": "image-feature-extraction" if network.input is not None and network.input.column == "image" else "feature-extraction",
        "score": "text-ranking",
        "anomaly_score": "image-classification",
        "token_logits": "text-generation",
    }[network.output]
    name = network.lineage[-1]["method"] if network.lineage else "network"
    results = [
        EvalResult(
            task_type=task,
            dataset_type=str(found["data"]).split(":")[0],
            dataset_name=str(found["data"]),
            metric_type=metric,
            metric_value=value,
            metric_name=metric.replace("_", " "),
        )
        for found in network.measured
        for metric, value in found["metrics"].items()
    ]
    data = ModelCardData(
        library_name="wellread",
        pipeline_tag=task,
        tags=sorted({"wellread", *(each["method"] for each in network.lineage)}),
        model_name=name if results else None,
        eval_results=results or None,
    )
    lines = [
        f"# {name}",
        "",
        f"Made with wellread. Gives {network.output.replace('_', ' ')}" + (f" for {len(network.labels)} classes." if network.labels else "."),
    ]
    if network.labels and len(network.labels) <= 50:
        lines += ["", "Classes: " + ", ".join(network.labels) + "."]
    lines += ["", "```python", "import wellread", "", 'network = wellread.load("THIS FOLDER")', "```", "", "## Lineage", ""]
    lines += [f"{number}. {describe(each)}" for number, each in enumerate(network.lineage, 1)]
    if network.measured:
        lines += ["", "## Measured", "", "| data | rows | metric | value |", "| --- | --- | --- | --- |"]
        lines += [f"| {m['data']} | {m['rows']} | {k} | {v:.4g} |" for m in network.measured for k, v in m["metrics"].items()]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"))


def drawing(lineage: list[Step]) -> str:
    """The lineage as an SVG graph for a page: one box a step, oldest on the left, arrows from parents to children."""
    from html import escape
    from textwrap import wrap

    by_result = {each["result"]: number for number, each in enumerate(lineage) if each["result"]}
    parents = [[by_result[p] for p in each["parents"] if by_result.get(p, number) != number] for number, each in enumerate(lineage)]
    depth = [0] * len(lineage)
    for number in range(len(lineage)):  # parents come before children
        depth[number] = 1 + max((depth[p] for p in parents[number]), default=-1)
    columns = [[n for n, d in enumerate(depth) if d == column] for column in range(max(depth, default=-1) + 1)]
    width, height, gap_x, gap_y = 200, 92, 50, 18
    place = {
        number: (column * (width + gap_x), row * (height + gap_y)) for column, members in enumerate(columns) for row, number in enumerate(members)
    }
    total_w = len(columns) * (width + gap_x)
    total_h = max((len(members) for members in columns), default=0) * (height + gap_y)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total_w} {total_h}" width="{total_w}" style="max-width:100%" font-family="sans-serif">'
    ]
    for number, (x, y) in place.items():
        for parent in parents[number]:
            px, py = place[parent]
            ax, ay, bx, by = px + width, py + height / 2, x, y + height / 2
            parts.append(
                f'<path d="M{ax},{ay} C{ax + gap_x / 2},{ay} {bx - gap_x / 2},{by} {bx},{by}" fill="none" stroke="#868e96" stroke-width="1.5"/>'
            )
    for number, (x, y) in place.items():
        each = lineage[number]
        changed = ", ".join(
            f"{k}={v}"
            for k, v in each["settings"].items()
            if v is not None and k in ("name", "mode", "recipe", "epochs", "learning_rate", "seed", "size")
        )
        lines = [*wrap(changed, 32)[:2], *(f"{d['name']}, {d['rows']} rows" for d in each["data"][:2])][:4]
        parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="#f1f3f5" stroke="#495057"/>')
        parts.append(f'<text x="{x + 10}" y="{y + 20}" font-size="14" font-weight="bold">{escape(each["method"])}</text>')
        parts += [f'<text x="{x + 10}" y="{y + 38 + 15 * i}" font-size="11">{escape(line[:36])}</text>' for i, line in enumerate(lines)]
    return "".join(parts) + "</svg>"
