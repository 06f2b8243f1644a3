"""How well something learned on: figures for any method that learns in pieces.

"accuracy" is of a single head: all classes compete, no task is named at prediction.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from wellread.charts import line_chart
from wellread.errors import BadInput
from wellread.results import Report


def task_accuracies(predicted: Sequence[Hashable], truth: Sequence[Hashable], tasks: Sequence[Sequence[Hashable]]) -> list[float]:
    """Fraction predicted right among the examples of each task, a task being the names of its classes; all names compete (a single head)."""
    task_of = {name: number for number, names in enumerate(tasks) for name in names}
    where = np.array([task_of.get(name, -1) for name in truth])
    right = np.asarray(predicted) == np.asarray(truth)
    if missing := [number for number in range(len(tasks)) if not (where == number).any()]:
        raise BadInput(f"there are no test examples of task {missing[0] + 1} ({', '.join(map(str, tasks[missing[0]]))})")
    return [float(right[where == number].mean()) for number in range(len(tasks))]


def continual_report(accuracy: Sequence[Sequence[float]], rows: Sequence[int], *, stored: int | None = None, title: str = "learning on") -> Report:
    """How well something learned on: figures of the field from the accuracy on each task after each task.

    accuracy: accuracy[i][j], 0...1, on the test examples of task j after learning tasks 0...i; row i has i + 1 entries.
    rows: test examples of each task. stored: bytes kept of the data that were learned from.
    Accuracy after task i is over all examples of tasks 0...i. "average incremental accuracy" is the mean of these over i, "last accuracy" the
    one at the end; papers quote either. Forgetting of a task: the best accuracy it had before the end minus that at the end (Chaudhry et al.
    2018), so not for the last task.
    """
    tasks = len(rows)
    if not tasks or [len(each) for each in accuracy] != list(range(1, tasks + 1)):
        raise BadInput(f"accuracy needs a row with one more entry after each of the {tasks} tasks: accuracy[i][j] for j = 0...i")
    after = [float(np.average(each, weights=rows[: len(each)])) for each in accuracy]
    forgetting = [max(accuracy[i][j] for i in range(j, tasks - 1)) - accuracy[-1][j] for j in range(tasks - 1)]
    figures: dict[str, Any] = {"average incremental accuracy": float(np.mean(after)), "last accuracy": after[-1]}
    figures |= {"mean forgetting": float(np.mean(forgetting))} if forgetting else {}
    figures |= {"bytes stored": stored} if stored is not None else {}
    table = [
        {"task": j + 1, "accuracy so far": after[j], "when learned": accuracy[j][j], "at the end": accuracy[-1][j], "forgetting": lost}
        for j, lost in enumerate([*forgetting, None])
    ]
    lines = {"all classes so far": after, "task 1": [each[0] for each in accuracy]}
    return Report(title, figures, {"tasks": table}, pictures={"accuracy": line_chart(lines, x="tasks learned", y="accuracy")})
