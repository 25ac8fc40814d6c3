"""The papers' downstream tasks, run by lm-evaluation-harness on a model in memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatquant.data.tasks import EvalTask, Suite, unavailable


@dataclass(frozen=True, kw_only=True)
class Score:
    """Result of a task, or why there is none.

    Attributes:
        task: which.
        value: of its metric; None where it did not run.
        error: standard error of the value, if lm-eval has one.
        metrics: everything that lm-eval says of it.
        obstacle: why it did not run.
    """

    task: EvalTask
    value: float | None = None
    error: float | None = None
    metrics: dict[str, float] | None = None
    obstacle: str | None = None


def run_suite(
    model: Any,
    tokenizer: Any,
    suite: Suite,
    *,
    limit: int | None = None,
    batch_size: int = 1,
    allow_code: bool = False,
    include: Path | None = None,
) -> list[Score]:
    """Score a model on the tasks that can run on this machine; the others say why they cannot.

    Args:
        model: a causal language model, quantized or not.
        tokenizer: its tokenizer.
        suite: the tasks.
        limit: only so many questions of each task.
        batch_size: questions in one forward pass.
        allow_code: run code that the model has written, on this machine, unprotected.
        include: folder with tasks of one's own (lm-eval's YAML).
    """
    missing = unavailable(suite, allow_code=allow_code)
    ready = [task for task in suite.tasks if task.name not in missing]
    found: dict[str, Any] = {}
    if ready:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        if allow_code:
            os.environ["HF_ALLOW_CODE_EVAL"] = "1"
        answer = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=[task.name for task in ready],
            task_manager=TaskManager(include_path=None if include is None else str(include)),
            limit=limit,
            bootstrap_iters=0,
            confirm_run_unsafe_code=allow_code,
        )
        found = {**answer["results"], **answer.get("groups", {})}
    return [
        Score(task=task, obstacle=missing[task.name])
        if task.name in missing
        else _score(task, found.get(task.name, {}))
        for task in suite.tasks
    ]


def _score(task: EvalTask, line: dict[str, Any]) -> Score:
    metrics = {
        key.split(",")[0]: float(value)
        for key, value in line.items()
        if isinstance(value, int | float) and "," in key
    }
    return Score(
        task=task,
        value=metrics.get(task.metric),
        error=metrics.get(f"{task.metric}_stderr"),
        metrics=metrics,
    )


def as_text(scores: list[Score]) -> str:
    """A line a task, and the mean if all have run."""
    width = max(len(score.task.title) for score in scores)
    lines = []
    for score in scores:
        title = score.task.title.ljust(width)
        if score.obstacle is not None:
            lines.append(f"{title}  not run: {score.obstacle}")
        elif score.value is None:
            lines.append(f"{title}  {score.metrics}")
        else:
            lines.append(f"{title}  {score.task.metric} {score.value:.4f}")
    values = [score.value for score in scores if score.value is not None]
    if len(values) == len(scores):
        lines.append(f"{'mean'.ljust(width)}  {sum(values) / len(values):.4f}")
    return "\n".join(lines)
