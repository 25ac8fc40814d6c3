"""Figures as JSON lines in docs/results, and the pages that quote them.

`append` adds one figure to docs/results/<topic>.jsonl. Run as a script, this module writes
docs/results.md from all of them, with pictures, and fills in the README, where a figure stands as

    <!-- result: WHAT -->29.19<!-- end -->

A figure that was measured again is quoted in its newest version; the older lines stay.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import plots
import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
MISSING = "not measured"
#: Topics of many figures, shown as tables: the last part of `what` is the column.
_CROSSED = ("op-speed", "model-speed", "methods")
#: Those whose columns have units of their own; the others get a table for every unit.
_MIXED = ("methods",)
_QUOTE = re.compile(r"(<!-- result: (?P<what>.+?) -->)(.*?)(<!-- end -->)")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number and how it came about.

    Attributes:
        what: what was measured, unique to the quantity: "topic/model/setting/metric".
        value: the number.
        unit: its unit; "" for a pure number.
        machine: processor, cores and memory, torch version.
        device: "cpu", or the GPU with its driver and CUDA version.
        commit: of the code, with "+" after it where files had been changed since.
        command: what to type to measure it again.
        date: day, ISO 8601.
    """

    what: str
    value: float
    unit: str
    machine: str
    device: str
    commit: str
    command: str
    date: str

    def __post_init__(self) -> None:
        if not self.what or "-->" in self.what or "\n" in self.what:
            raise ValueError(f"Figure: what is {self.what!r}: it must be one line of text")
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise ValueError(f"Figure: value of {self.what} is {self.value!r}: it must be a number")

    def __str__(self) -> str:
        return f"{_digits(self.value)} {self.unit}".strip()


def append(
    topic: str,
    what: str,
    value: float,
    unit: str = "",
    *,
    device: str = "cpu",
    command: str | None = None,
    folder: Path | None = None,
    quiet: bool = False,
) -> Figure:
    """Add one figure to <folder>/<topic>.jsonl and print it.

    Args:
        topic: the file's name, and the heading in docs/results.md.
        what: see `Figure`.
        value: see `Figure`.
        unit: see `Figure`.
        device: see `Figure`; `device_name` names a GPU.
        command: how it was measured; None takes the process's own command line.
        folder: None is $OUT where that is set (a measuring script on another machine), else
            docs/results.
        quiet: print nothing.
    """
    figure = Figure(
        what=what,
        value=value,
        unit=unit,
        machine=machine_name(),
        device=device,
        commit=commit(),
        command=command or _command(),
        date=datetime.date.today().isoformat(),
    )
    folder = folder or Path(os.environ.get("OUT") or RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{topic}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(figure)) + "\n")
    if not quiet:
        print(f"{figure.what}: {figure}", flush=True)
    return figure


def read(folder: Path = RESULTS) -> dict[str, list[Figure]]:
    """All figures: topic -> figures in the order they were measured.

    Raises:
        ValueError: a line is not a figure; the message names file and line.
    """
    topics: dict[str, list[Figure]] = {}
    names = {field.name for field in fields(Figure)}
    for file in sorted(folder.glob("*.jsonl")):
        figures = topics.setdefault(file.stem, [])
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                entry = json.loads(line)
                if not isinstance(entry, dict) or set(entry) != names:
                    raise ValueError(f"its keys must be {sorted(names)}")
                figures.append(Figure(**entry))
            except ValueError as error:
                raise ValueError(f"{file.name}:{number} is not a figure: {error}") from error
    return topics


def newest(figures: list[Figure]) -> list[Figure]:
    """The last figure of every (what, machine, device), in the order of their first ones."""
    latest = {(figure.what, figure.machine, figure.device): figure for figure in figures}
    return list(latest.values())


def rows_on_record(topic: str) -> set[str]:
    """All but the last part of `what`, of figures of this very code on this machine."""
    return {
        figure.what.rpartition("/")[0]
        for figure in read().get(topic, [])
        if (figure.commit, figure.machine) == (commit(), machine_name())
    }


def page(topics: Mapping[str, list[Figure]]) -> str:
    """The text of docs/results.md."""
    lines = [
        "# Results",
        "",
        "Written by `make docs` from `docs/results/*.jsonl`; every number elsewhere in the project",
        "is quoted from here. Where a figure was measured again, its newest value stands here and",
        "the older lines stay in the file.",
    ]
    for topic, figures in topics.items():
        lines += ["", f"## {topic.replace('-', ' ').replace('_', ' ').capitalize()}"]
        note = RESULTS / f"{topic}.md"  # what a reader must know of these figures
        lines += ["", note.read_text(encoding="utf-8").strip()] if note.exists() else []
        groups: dict[tuple[str, str], list[Figure]] = {}
        for figure in newest(figures):
            groups.setdefault((figure.machine, figure.device), []).append(figure)
        for (machine, device), group in groups.items():
            lines += ["", f"On {machine}; device: {device}.", ""]
            lines += _crossed(group, topic in _MIXED) if topic in _CROSSED else _listed(group)
        lines += [f"\n![{name}](results/{name})" for name in plots.draw(topic, figures)]
    if not topics:
        lines += ["", "Nothing has been measured yet."]
    unproved = never_run(topics)
    if unproved:
        lines += ["", "## CUDA kernels that have never run on a GPU", ""]
        lines += [
            "They compile for every architecture; nothing is known of their results or speed."
        ]
        lines += ["", *(f"- `csrc/cuda/{name}`" for name in unproved)]
    return "\n".join(lines) + "\n"


def _listed(figures: list[Figure]) -> list[str]:
    """A table with a line for each figure."""
    lines = ["| what | value | command | commit | date |", "|---|---:|---|---|---|"]
    return lines + [
        f"| {f.what} | {f} | `{f.command}` | {f.commit} | {f.date} |".replace("||", "\\|\\|")
        for f in figures
    ]


def _crossed(figures: list[Figure], mixed: bool) -> list[str]:
    """Tables whose rows are all but the last part of `what`, its columns that part.

    One for every unit, or, where they are mixed, one table with the units in its head.
    """
    lines = []
    origins = dict.fromkeys(f"`{f.command}`, commit {f.commit}, {f.date}" for f in figures)
    lines += [f"- {origin}" for origin in origins]
    tables: dict[str, list[Figure]] = {}
    for figure in figures:
        tables.setdefault("" if mixed else figure.unit, []).append(figure)
    for corner, group in tables.items():
        rows: dict[str, dict[str, float]] = {}
        units: dict[str, str] = {}
        for figure in group:
            name, _, column = figure.what.rpartition("/")
            rows.setdefault(name, {})[column] = figure.value
            units[column] = f"{column} ({figure.unit})" if mixed and figure.unit else column
        lines += ["", f"| {corner} | " + " | ".join(units.values()) + " |"]
        lines += ["|---|" + "---:|" * len(units)]
        for name, values in rows.items():
            cells = [_digits(values[column]) if column in values else "" for column in units]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _digits(value: float) -> str:
    """Four significant digits, and separated thousands."""
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def never_run(topics: Mapping[str, list[Figure]]) -> list[str]:
    """CUDA sources without a "has run" line of bench/gpu_cases.py."""
    ran = {figure.what for figures in topics.values() for figure in figures}
    sources = sorted(path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    return [name for name in sources if f"csrc/cuda/{name}/has run" not in ran]


def fill_in(text: str, topics: Mapping[str, list[Figure]]) -> str:
    """A text with every quoted figure replaced by its newest value."""
    values = {figure.what: str(figure) for figures in topics.values() for figure in figures}

    def quote(match: re.Match[str]) -> str:
        return f"{match[1]}{values.get(match['what'], MISSING)}{match[4]}"

    return _QUOTE.sub(quote, text)


def machine_name() -> str:
    """Processor, cores this process may use, memory, torch version."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        processor = names[0].strip() if names else processor
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{processor}, {cores} cores, {memory:.0f} GiB, torch {torch.__version__}"


def device_name() -> str:
    """The current GPU with driver and CUDA version; "cpu" where there is none."""
    if not torch.cuda.is_available():
        return "cpu"
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    name = torch.cuda.get_device_name()
    return f"{name}, driver {driver.splitlines()[0] if driver else '?'}, CUDA {torch.version.cuda}"


def _command() -> str:
    """The process's command line, as one would type it in the project's folder."""
    words = [Path(sys.executable).name.rstrip("0123456789."), *sys.orig_argv[1:]]
    home = str(ROOT) + os.sep
    return shlex.join(word.removeprefix(home) for word in words)


@functools.cache
def commit() -> str:
    """The commit of the code, with "+" after it where files had been changed since."""
    name = _output("git", "rev-parse", "--short=10", "HEAD") or "unknown"
    changed = _output("git", "status", "--porcelain", "-uno", "--", ".", ":!docs", ":!*.md")
    return name + ("+" if changed else "")


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def main() -> None:
    """Write docs/results.md and the README's figures."""
    topics = read()
    (ROOT / "docs" / "results.md").write_text(page(topics), encoding="utf-8")
    for topic, figures in topics.items():
        for name, text in plots.draw(topic, figures).items():
            (RESULTS / name).write_text(text, encoding="utf-8")
    readme = ROOT / "README.md"
    readme.write_text(fill_in(readme.read_text(encoding="utf-8"), topics), encoding="utf-8")
    print(f"docs/results.md: {sum(map(len, topics.values()))} figures of {len(topics)} topics")


if __name__ == "__main__":
    main()
