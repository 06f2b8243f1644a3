"""The average of eight checkpoints beside mergekit's linear merge: time and peak memory, each in a process of its own, in turns.

    python3.11 -m venv /tmp/mergekit                                   # its pins need not be ours, so it gets an environment of its own,
    echo "$(python -c 'import torch, pathlib; print(pathlib.Path(torch.__file__).parents[1])')" \
        > /tmp/mergekit/lib/python3.11/site-packages/ours.pth          # which sees the packages of this one,
    /tmp/mergekit/bin/pip install --no-deps mergekit peft immutables sentencepiece
    python -m bench.peers.model_soup --mergekit /tmp/mergekit/bin/mergekit-yaml [--quick]

Eight small Llamas with random weights, in float32. mergekit reads and writes transformers folders; ours reads and writes folders of ours, with all
checks (every tensor finite and of the same shape, every file's fingerprint), and in a second arm the same transformers folders. Both averages must agree.
What is measured is the process from its start to its end: imports, reading, averaging, writing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import wellread
from bench.harness import Expect, record_peer, summary
from wellread.lineage import versions

COUNT = 8
EXPECTS = [
    Expect("the average of eight checkpoints takes no longer than mergekit's", "seconds / seconds_mergekit", 1.0, at_least=False),
    Expect("and needs no more memory", "peak_mb / peak_mb_mergekit", 1.0, at_least=False),
    Expect("beside the interpreter it needs at most 2.2 checkpoints", "peak_checkpoints", 2.2, at_least=False),
]
OURS = """
import sys, tempfile
from wellread.averages import fill, readable, same_structure
from wellread.network import Networks
given = Networks(sys.argv[2:])
place = tempfile.TemporaryDirectory(dir=sys.argv[1] + "/..")
networks = readable(given, place.name)
soup = networks[0]
same_structure(networks, soup.module, [given.name(i) for i in range(len(given))])
fill(soup.module, networks, range(len(networks)))
soup.save(sys.argv[1] + "/out")
"""
IMPORTS = {"ours": "import wellread.merge.model_soup, transformers", "mergekit": "import mergekit.scripts.run_yaml, transformers"}


def family(place: Path, layers: int) -> None:
    """place/hf/0...7 and the same networks as place/ours/0...7."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": layers, "num_attention_heads": 12, "num_key_value_heads": 12}
    tokenizer = wellread.load("minilm-l6").input.tokenizer  # type: ignore[union-attr]  # any: a folder of text weights has one
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8192, max_position_embeddings=512, **size))
    for number in range(COUNT):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
        model.save_pretrained(place / "hf" / str(number))
        tokenizer.save_pretrained(place / "hf" / str(number))
        wellread.load(place / "hf" / str(number)).save(place / "ours" / str(number))


def measured(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Seconds and peak memory in MB of a process."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)[:200]} failed:\n{said.read().decode()[-3000:]}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def largest_difference(ours: Path, theirs: Path) -> float:
    a = {name.removeprefix("model."): tensor for name, tensor in load_file(ours / "model.safetensors").items()}
    b = {name: tensor for file in theirs.glob("*.safetensors") for name, tensor in load_file(file).items()}
    if set(a) != set(b):
        raise SystemExit(f"the two wrote other tensors: {sorted(set(a) ^ set(b))[:5]}")
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--mergekit", default=shutil.which("mergekit-yaml"), help="the command mergekit-yaml")
    options.add_argument("--quick", action="store_true", help="small networks, one turn, nothing is recorded")
    given = options.parse_args()
    if given.mergekit is None:
        raise SystemExit("mergekit-yaml is not to be found: install it as the head of this file says, and name it with --mergekit")
    layers, turns = (1, 1) if given.quick else (6, 5)
    began = time.perf_counter()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    pythons = {"ours": sys.executable, "mergekit": str(Path(given.mergekit).with_name("python"))}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        family(place, layers)
        size = (place / "ours" / "0" / "model.safetensors").stat().st_size / 2**20
        hf, ours = ([str(place / kind / str(number)) for number in range(COUNT)] for kind in ("hf", "ours"))
        config: dict[str, Any] = {"merge_method": "linear", "dtype": "float32", "models": [{"model": each, "parameters": {"weight": 1.0}} for each in hf]}
        (place / "merge.yaml").write_text(json.dumps(config))  # JSON is YAML
        arms = {
            "": [sys.executable, "-c", OURS, "OUT", *ours],
            "_transformers_folders": [sys.executable, "-c", OURS, "OUT", *hf],
            "_mergekit": [given.mergekit, str(place / "merge.yaml"), "OUT/out", "--quiet"],
        }
        imports = {name: measured([pythons[name], "-c", code], environment)[1] for name, code in IMPORTS.items()}
        figures: dict[str, list[float]] = {f"{kind}{arm}": [] for arm in arms for kind in ("seconds", "peak_mb")}
        for turn in range(-1, turns):  # the first brings the files into the disk cache
            for arm in list(arms) if turn % 2 else list(arms)[::-1]:
                out = Path(tempfile.mkdtemp(dir=place))
                seconds, peak = measured([word.replace("OUT", str(out), 1) for word in arms[arm]], environment)
                print(f"turn {turn}: {arm or 'ours':22} {seconds:6.1f} s, {peak:6.0f} MB", flush=True)
                if turn >= 0:
                    figures[f"seconds{arm}"].append(seconds)
                    figures[f"peak_mb{arm}"].append(peak)
                if turn == -1:
                    out.rename(place / f"out{arm}")
                else:
                    shutil.rmtree(out)
        difference = max(largest_difference(place / f"out{arm}" / "out", place / "out_mergekit" / "out") for arm in ("", "_transformers_folders"))
    if not difference < 1e-6:
        raise SystemExit(f"the averages differ by {difference}: the times cannot be compared")
    values = {name: statistics.median(each) for name, each in figures.items()} | {"largest_difference": difference}
    values |= {f"peak_checkpoints{arm}": (values[f"peak_mb{arm}"] - imports["mergekit" if "merge" in arm else "ours"]) / size for arm in arms}
    for kind in ("seconds", "peak_mb"):
        for arm in ("", "_transformers_folders"):
            values[f"{kind}{arm}_to_mergekit"] = values[f"{kind}{arm}"] / values[f"{kind}_mergekit"]
    for name, value in values.items():
        print(f"{name:40} {value:.4g}")
    if given.quick:
        return
    record_peer(
        "model_soup",
        "mergekit, merge_method linear",
        figures=values,
        expects=EXPECTS,
        sizes={"checkpoints": COUNT, "checkpoint_mb": round(size, 1), "turns": turns},
        seconds=time.perf_counter() - began,
        versions=versions() | {"mergekit": subprocess.check_output([pythons["mergekit"], "-c", VERSION], text=True).strip()},
        per_turn={name: summary(each) for name, each in figures.items()},
        notes=[
            "medians over the turns; peak memory is the largest resident set, pages of mapped files included",
            "peak_checkpoints: peak memory beyond that of the imports, in checkpoints",
            "transformers_folders: ours on mergekit's input, which it first writes anew in a form that can be read tensor by tensor",
        ],
    )


VERSION = "import importlib.metadata; print(importlib.metadata.version('mergekit'))"

if __name__ == "__main__":
    main()
