"""Time whole models against what a user would pick instead: SmolLM2-135M, on this machine.

    python bench/bench_models.py [--quick] [--only TEXT ...] [--resume] [--dry-run]

Ours (W4A4KV4 and W4A8KV4, with the bfloat16 head and with the 8-bit one), transformers in float32
and bfloat16 and compiled bfloat16, and llama.cpp with Q4_0 and Q8_0 files. Each lives in a process
of its own; they take turns in rounds (A B C A B C ...), so that whatever disturbs the machine hits
all. Figures are medians; ratios are medians of the ratios within a round. Prompts: 512 and 2048
tokens. Decoding: a bare step (forward and greedy choice) and inside `generate`. Load: from nothing
to the first token after a prompt of 32, imports excluded, and the most memory above the imports'.

llama.cpp is there if `pip install llama-cpp-python==0.3.36` is. Where its flash attention is the
slower choice it goes without. Q4_0 and Q8_0 files keep the embedding, which is the head too, in
Q8_0: the like of ours with the 8-bit head. With g++ 12 on processors with AMX, build it with
CMAKE_ARGS="-DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse'": that compiler drops the stores of the tile
configuration otherwise, and llama.cpp ends with an illegal instruction.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import selectors
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from entrants import ENTRIES, PEERS, SCHEMES, Entry, Task, tasks
from harness import Timing, timing
from record import ROOT, append, rows_on_record

TOPIC = "model-speed"
MODEL = "SmolLM2-135M"
WORK = ROOT / "out" / "bench"
HERE = Path(__file__).resolve().parent
#: Seconds that an answer may take: the first one of a compiled model takes long.
PATIENCE = 600


class Worker:
    """A contestant in its process."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "contestant.py"), entry.kind, str(WORK / entry.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(WORK / f"{entry.name}.log").open("w"),
            text=True,
        )
        self._answer()  # that it is ready

    def ask(self, order: dict[str, Any]) -> Any:
        """Send an order and wait for the answer.

        Raises:
            RuntimeError: the contestant ended, or takes too long; the message says how.
        """
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the answer says why
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            line = self.process.stdout.readline() if selector.select(PATIENCE) else None
        if line:
            return json.loads(line)
        if line is None:
            self.process.kill()
        log = (WORK / f"{self.entry.name}.log").read_text(errors="replace").strip().splitlines()
        last = log[-1] if log else "no message"
        raise RuntimeError(
            f"no answer in {PATIENCE} s" if line is None else f"exit {self.process.wait()}: {last}"
        )

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Bench:
    """The contestants that are still in the game, and what is known of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.left_out: list[str] = []
        self.workers: dict[str, Worker] = {}
        self.rates: dict[tuple[int, str], dict[int, float]] = {}
        self.entries = list(self._entries())

    def _entries(self) -> Iterable[Entry]:
        have_llama = importlib.util.find_spec("llama_cpp") is not None
        if not have_llama:
            self.left_out.append(
                "llama.cpp: not installed (pip install 'flatquant[bench]', see this file's text)"
            )
        for entry in ENTRIES:
            if self.options.quick and not entry.quick:
                self.left_out.append(f"{entry.name}: --quick")
            elif have_llama or not entry.kind.startswith("llama.cpp"):
                yield entry

    def race(self, task: Task) -> dict[str, list[float]]:
        """Seconds a sample of everybody, round by round."""
        running = [e for e in self.entries if not any(s in f"{task.name}," for s in e.skips)]
        rounds: dict[str, list[float]] = {entry.name: [] for entry in running}
        for turn in range(1 + (2 if self.options.quick else task.rounds)):
            for entry in list(running):
                try:
                    if entry.name not in self.workers:
                        self.workers[entry.name] = Worker(entry)
                    answer = self.workers[entry.name].ask(task.order)
                except RuntimeError as error:
                    self._drop(entry, f"{task.name}: {error}")
                    running.remove(entry)
                    del rounds[entry.name]
                    continue
                if turn:  # the first one only warms up, and tells the better of two ways
                    sample = answer if isinstance(answer, float) else statistics.median(answer)
                    rounds[entry.name].append(sample)
                else:
                    rounds[entry.name] = answer if isinstance(answer, list) else [answer]
            if turn == 0:
                self._choose(running, rounds)
        return rounds

    def _choose(self, running: list[Entry], rounds: dict[str, list[float]]) -> None:
        """Keep the better of llama.cpp's two attentions, under the name without either."""
        first = {name: statistics.median(samples) for name, samples in rounds.items()}
        for entry in list(running):
            plain = entry.name.removesuffix(" flash")
            both = [name for name in (plain, f"{plain} flash") if name in first]
            if len(both) == 2 and entry.name != min(both, key=lambda name: first[name]):
                running.remove(entry)
                del rounds[entry.name]
        for name in rounds:
            rounds[name].clear()

    def _drop(self, entry: Entry, why: str) -> None:
        print(f"  {entry.name} is out: {why}", flush=True)
        self.left_out.append(f"{entry.name}: {why}")
        self.entries.remove(entry)
        worker = self.workers.pop(entry.name, None)
        if worker is not None:
            worker.close()

    def speed(self, task: Task) -> None:
        """Race, print and record one task."""
        start = time.monotonic()
        rounds = self.race(task)
        print(f"\n{task.name} ({time.monotonic() - start:.0f} s)")
        figures: dict[str, tuple[float, str]] = {}
        spreads = []
        for name, samples in rounds.items():
            taken = timing(samples)
            spreads.append(taken.spread)
            shown = name.removesuffix(" flash")
            rate = task.tokens / taken.median
            figures[shown] = (_rounded(rate), "tok/s")
            if task.order["do"] == "step":
                curve = self.rates.setdefault((task.order["context"], shown), {})
                curve[task.order["batch"]] = rate
            flash = "  with flash attention" if shown != name else ""
            print(f"  {shown:<32}{rate:10.1f} tok/s  {_milliseconds(taken)}{flash}")
        for ours in SCHEMES:
            for peer in PEERS:
                theirs = rounds.get(peer) or rounds.get(f"{peer} flash")
                if ours in rounds and theirs:
                    ratios = [b / a for a, b in zip(rounds[ours], theirs, strict=True)]
                    figures[f"{ours} over {peer}"] = (
                        round(statistics.median(ratios), 3),
                        "x",
                    )
                    print(
                        f"  {ours} over {peer}: {statistics.median(ratios):.2f} "
                        f"({min(ratios):.2f} to {max(ratios):.2f})"
                    )
        figures["spread"] = (round(50 * max(spreads, default=0.0), 1), "%")
        self._record(task.name, figures)

    def cliffs(self) -> None:
        """Print where tokens a second fall as the batch grows, which they should not."""
        for (context, name), curve in self.rates.items():
            batches = sorted(curve)
            falls = [
                f"falls to {curve[after] / curve[before]:.0%} from {before} to {after}"
                for before, after in itertools.pairwise(batches)
                if curve[after] < curve[before]
            ]
            if len(batches) > 1 and name in SCHEMES:
                shown = ", ".join(f"{batch}: {curve[batch]:.0f}" for batch in batches)
                print(
                    f"{name} at {context}, tok/s by batch: {shown}; "
                    + "; ".join(falls or ["rises"])
                )

    def footprint(self) -> None:
        """Load time and peak memory, in fresh processes, in rounds."""
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()
        seconds: dict[str, list[float]] = {}
        peaks: dict[str, list[float]] = {}
        for turn in range(2 if self.options.quick else 4):
            for entry in list(self.entries):
                if "load" in entry.skips or entry.kind.endswith("flash"):
                    continue
                try:
                    worker = Worker(entry)
                    answer = worker.ask({"do": "footprint"})
                    worker.close()
                except RuntimeError as error:
                    self._drop(entry, f"load: {error}")
                    continue
                if turn:  # the first one brings the files into the page cache
                    seconds.setdefault(entry.name, []).append(answer["seconds"])
                    peaks.setdefault(entry.name, []).append(answer["bytes"])
        print("\nload to first token, most memory above the imports', size on disk")
        for name in seconds:
            folder = WORK / next(entry.folder for entry in ENTRIES if entry.name == name)
            size = sum(f.stat().st_size for f in [folder, *folder.rglob("*")] if f.is_file())
            taken, peak = timing(seconds[name]), timing(peaks[name])
            print(
                f"  {name:<32}{taken.median:7.2f} s (±{taken.spread / 2:.0%})"
                f"{peak.median / 2**20:9.0f} MiB{size / 2**20:9.0f} MiB"
                f"   memory is {peak.median / size:.2f} x the size"
            )
            for what, value, unit in (
                ("load to first token", _rounded(taken.median), "s"),
                ("peak memory", round(peak.median / 2**20), "MiB"),
                ("size on disk", round(size / 2**20), "MiB"),
                ("peak memory over size", round(peak.median / size, 2), "of size"),
            ):
                self._record(what, {name: (value, unit)})

    def _record(self, task: str, figures: dict[str, tuple[float, str]]) -> None:
        if self.options.dry_run:
            return
        for name, (value, unit) in figures.items():
            append(TOPIC, f"{MODEL}/{task}/{name}", value, unit, quiet=True)

    def close(self) -> None:
        """End all processes."""
        for worker in self.workers.values():
            worker.close()


def main() -> int:
    """Measure everything that was asked for."""
    options = _options()
    WORK.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    schemes = [entry.name for entry in ENTRIES if entry.kind == "flatquant"]
    command = [sys.executable, str(HERE / "prepare_models.py"), str(WORK), *schemes]
    if subprocess.run(command).returncode != 0:
        print("bench_models: the models could not be made", file=sys.stderr)
        return 1
    done = rows_on_record(TOPIC) if options.resume else set()
    bench = Bench(options)
    try:
        for task in tasks():
            wanted = not options.only or any(text in task.name for text in options.only)
            if not wanted or (options.quick and not task.quick) or f"{MODEL}/{task.name}" in done:
                continue
            bench.speed(task)
        if (
            not options.only or "load" in options.only
        ) and f"{MODEL}/load to first token" not in done:
            bench.footprint()
        print()
        bench.cliffs()
    finally:
        bench.close()
    for entry in bench.entries:
        if entry.skips:
            bench.left_out.append(f"{entry.name}: {', '.join(entry.skips)} (time)")
    if options.quick:
        bench.left_out.append("prompts of 2048, batches: --quick")
    print("\nleft out:", *bench.left_out, sep="\n  ")
    print(f"{time.monotonic() - started:.0f} s")
    return 0


def _rounded(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def _milliseconds(taken: Timing) -> str:
    return f"{taken.median * 1e3:9.2f} ms (±{taken.spread / 2:.0%}, {taken.samples} rounds)"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="the main figures, two minutes")
    parser.add_argument("--only", nargs="+", help="tasks whose name contains one of these; load")
    parser.add_argument("--resume", action="store_true", help="not what this commit has recorded")
    parser.add_argument("--dry-run", action="store_true", help="print only, record nothing")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
