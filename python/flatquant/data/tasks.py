"""The downstream tasks of the papers as lists of lm-evaluation-harness tasks, as data.

Names and data sets are those of lm-eval 0.4.13. Every task reads its questions from the Hugging
Face hub, so on a machine without it only those run whose data set lies in the local cache;
`unavailable` says which do not, and why. MT-Bench is not here: another model scores it over a
network.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class EvalTask:
    """One task of a suite.

    Attributes:
        title: as the paper calls it.
        name: as lm-eval calls it.
        metric: what the papers report of it, as lm-eval calls it.
        data: its data set on the hub; "" for a task that reads a local file.
        code: whether it runs code that the model has written.
        needs: what else it needs.
    """

    title: str
    name: str
    metric: str
    data: str = ""
    code: bool = False
    needs: str = ""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Tasks that one table of a paper reports, zero-shot unless the task says otherwise.

    Attributes:
        paper: which table of which paper.
        tasks: in the paper's order.
    """

    paper: str
    tasks: tuple[EvalTask, ...]


ARC_CHALLENGE = EvalTask(
    title="ARC-Challenge", name="arc_challenge", metric="acc_norm", data="allenai/ai2_arc"
)
ARC_EASY = EvalTask(title="ARC-Easy", name="arc_easy", metric="acc_norm", data="allenai/ai2_arc")
BOOLQ = EvalTask(title="BoolQ", name="boolq", metric="acc", data="aps/super_glue")
GPQA = EvalTask(
    title="GPQA",
    name="gpqa_main_zeroshot",
    metric="acc_norm",
    data="Idavidrein/gpqa",
    needs="a hub account that has accepted the data set's terms",
)
HELLASWAG = EvalTask(title="HellaSwag", name="hellaswag", metric="acc_norm", data="Rowan/hellaswag")
HUMANEVAL = EvalTask(
    title="HumanEval",
    name="humaneval",
    metric="pass@1",
    data="openai/openai_humaneval",
    code=True,
)
LAMBADA = EvalTask(
    title="LAMBADA", name="lambada_openai", metric="acc", data="EleutherAI/lambada_openai"
)
LONGBENCH = EvalTask(
    title="LongBench",
    name="longbench",
    metric="score",
    data="Xnhyacinth/LongBench",
    needs="prompts of up to 32k tokens",
)
MBPP = EvalTask(
    title="MBPP",
    name="mbpp",
    metric="pass_at_1",
    data="google-research-datasets/mbpp",
    code=True,
)
MMLU = EvalTask(title="MMLU", name="mmlu", metric="acc", data="cais/mmlu")
PIQA = EvalTask(title="PIQA", name="piqa", metric="acc_norm", data="baber/piqa")
WINOGRANDE = EvalTask(
    title="WinoGrande", name="winogrande", metric="acc", data="allenai/winogrande"
)

SUITES: dict[str, Suite] = {
    "flatquant-qa": Suite(
        paper="FlatQuant (arXiv 2410.09426), zero-shot question answering",
        tasks=(ARC_CHALLENGE, ARC_EASY, HELLASWAG, LAMBADA, PIQA, WINOGRANDE),
    ),
    "llmc": Suite(
        paper="LLMC (arXiv 2405.06001), upstream and downstream tasks",
        tasks=(MMLU, ARC_EASY, BOOLQ, HELLASWAG, PIQA, GPQA, HUMANEVAL, MBPP, LONGBENCH),
    ),
}
"""Name -> the tasks of a paper's tables."""


def unavailable(
    suite: Suite, *, allow_code: bool = False, cache: Path | None = None
) -> dict[str, str]:
    """Tasks that cannot run on this machine without a network -> why.

    Args:
        suite: the tasks.
        allow_code: whether code that the model has written may run.
        cache: folder of downloaded data sets; None looks where `datasets` and the hub keep them.
    """
    if importlib.util.find_spec("lm_eval") is None:
        return {task.name: "lm-eval is not installed (pip install lm-eval)" for task in suite.tasks}
    folders = _caches() if cache is None else (cache,)
    found = {}
    for task in suite.tasks:
        reasons = []
        if task.data and not any(_cached(folder, task.data) for folder in folders):
            reasons.append(f"its data set {task.data} is not cached")
            reasons += [f"it needs {task.needs}"] if task.needs else []
        if task.code and not allow_code:
            reasons.append("it runs code that the model has written, which must be allowed")
        if reasons:
            found[task.name] = "; ".join(reasons)
    return found


def _caches() -> tuple[Path, ...]:
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    return (
        Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets")),
        Path(os.environ.get("HF_HUB_CACHE", home / "hub")),
    )


def _cached(folder: Path, name: str) -> bool:
    kept = (name.replace("/", "___"), f"datasets--{name.replace('/', '--')}")
    return any((folder / child).is_dir() for child in kept)
