"""The console script ``flatquant``: each command is a dataclass, its options are the fields.

argparse stops here; nothing below sees a namespace. A wrong value ends in one line that names it
and the rule, and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import sys
import types
import typing
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

from flatquant.analysis.command import Analyze, AnalyzeCalibration, EvaluateTasks
from flatquant.demo import Demo


class Command(Protocol):
    """A dataclass whose fields are the options and whose ``run`` returns the exit code."""

    def run(self) -> int:
        """Do it."""
        ...


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Quantize a model folder and save the result as another."""

    model: Path = field(metadata={"help": "checkpoint folder, or a .gguf file"})
    output: Path = field(metadata={"help": "folder for the quantized model", "option": True})
    method: str = field(default="flatquant", metadata={"help": "name of a recipe"})
    scheme: str = field(
        default="W4A4KV4", metadata={"help": "bit widths, e.g. W4A8KV4, W3A16-g128"}
    )
    calibration: Path | None = field(
        default=None,
        metadata={"help": "text to calibrate on: a file, a folder, or a name on the hub"},
    )
    preprocessing: str = field(
        default="crops", metadata={"help": "how samples are made of it: crops, general, gptq, ..."}
    )
    samples: int = field(default=128, metadata={"help": "samples of the calibration text"})
    seqlen: int = field(default=2048, metadata={"help": "tokens in a sample"})
    epochs: int | None = field(default=None, metadata={"help": "default: the recipe's"})
    seed: int = field(default=0, metadata={"help": "of the crops and the transforms"})
    weights: str | None = field(
        default=None,
        metadata={"help": "weight quantizer: rtn, rtn-mse, gptq, ...; default: the recipe's"},
    )
    ignore: tuple[str, ...] = field(
        default=("lm_head",),
        metadata={"help": "linears to leave alone; re:... is a regular expression"},
    )
    work_dir: Path | None = field(
        default=None, metadata={"help": "keep every calibrated block here, for --resume"}
    )
    resume: bool = field(default=False, metadata={"help": "go on from the blocks in --work-dir"})
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16 or auto"})

    def run(self) -> int:
        """Calibrate, replace the linears, save, and print the report."""
        import flatquant
        from flatquant.data import Task, calibration_tokens, read_documents
        from flatquant.methods import resolve
        from flatquant.sources import load_model

        _check_output(self.output, self.model)
        recipe = resolve(self.method, self.scheme)
        if self.weights is not None:
            recipe = replace(recipe, weights=self.weights)
        if recipe.needs_data and self.calibration is None:
            raise ValueError(
                f"method {self.method!r} with weights {recipe.weights!r} needs data: "
                "--calibration must name a text file"
            )
        model, tokenizer = load_model(self.model, self.dtype)
        samples = None
        if recipe.needs_data and self.calibration is not None:
            task = Task(
                documents=read_documents(self.calibration),
                tokenizer=tokenizer,
                samples=self.samples,
                seqlen=self.seqlen,
                seed=self.seed,
            )
            samples = calibration_tokens(task, self.preprocessing)
        flatquant.quantize(
            model,
            recipe,
            self.scheme,
            samples,
            epochs=self.epochs,
            seed=self.seed,
            ignore=self.ignore,
            work_dir=self.work_dir,
            resume=self.resume,
        )
        model.save_pretrained(self.output)
        tokenizer.save_pretrained(self.output)
        print(flatquant.report(model))
        print(f"saved to {self.output}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Perplexity of a model folder, quantized or not, on a text file."""

    model: Path = field(metadata={"help": "checkpoint folder, or a .gguf file"})
    text: Path = field(metadata={"help": "UTF-8 text file"})
    window: int = field(default=2048, metadata={"help": "tokens in a window"})
    max_windows: int | None = field(default=None, metadata={"help": "score only the first windows"})
    batch_size: int = field(default=1, metadata={"help": "windows in one forward pass"})
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16 or auto"})

    def run(self) -> int:
        """Print the perplexity."""
        from flatquant.evaluate import perplexity
        from flatquant.sources import load_model
        from flatquant.text import tokenize_file

        model, tokenizer = load_model(self.model, self.dtype)
        ids = tokenize_file(tokenizer, self.text)
        value = perplexity(model, ids, self.window, self.max_windows, self.batch_size)
        print(f"perplexity {value:.4f}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue a prompt with a model folder, quantized or not."""

    model: Path = field(metadata={"help": "checkpoint folder, or a .gguf file"})
    prompt: str = field(metadata={"help": "the text to continue", "option": True})
    max_new_tokens: int = field(default=64, metadata={"help": "tokens to generate at most"})
    chat: bool = field(default=False, metadata={"help": "use the tokenizer's chat template"})
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16 or auto"})

    def run(self) -> int:
        """Print the generated text."""
        from flatquant.evaluate import generate_text
        from flatquant.sources import load_model

        model, tokenizer = load_model(self.model, self.dtype)
        text = generate_text(
            model, tokenizer, self.prompt, max_new_tokens=self.max_new_tokens, chat=self.chat
        )
        print(text)
        return 0


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Several methods on the same model and texts, in one table."""

    model: Path = field(metadata={"help": "checkpoint folder, or a .gguf file"})
    methods: tuple[str, ...] = field(
        metadata={"help": "recipes; name+gptq puts another weight quantizer in", "option": True}
    )
    eval: tuple[Path, ...] = field(metadata={"help": "texts to score", "option": True})
    scheme: tuple[str, ...] = field(default=("W4A4KV4",), metadata={"help": "bit widths"})
    calib: Path | None = field(default=None, metadata={"help": "text file to calibrate on"})
    seeds: int = field(default=1, metadata={"help": "how many, for a spread"})
    samples: int = field(default=128, metadata={"help": "random crops of the calibration text"})
    seqlen: int = field(default=2048, metadata={"help": "tokens in a crop"})
    epochs: int | None = field(default=None, metadata={"help": "default: the recipes'"})
    window: int = field(default=2048, metadata={"help": "tokens in a window of --eval"})
    max_windows: int | None = field(default=None, metadata={"help": "score only the first windows"})
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16 or auto"})
    no_speed: bool = field(default=False, metadata={"help": "leave out tokens a second"})
    work_dir: Path = field(
        default=Path("out/compare"), metadata={"help": "keeps what is finished; a rerun goes on"}
    )
    paper: str | None = field(
        default=None, metadata={"help": "lay a published table beside, e.g. flatquant-table1"}
    )
    csv: Path | None = field(default=None, metadata={"help": "write the rows here too"})
    json: Path | None = field(default=None, metadata={"help": "rows and provenance"})

    def run(self) -> int:
        """Print the table; 1 if a method failed."""
        from flatquant.compare import (
            Comparison,
            as_csv,
            as_json,
            as_text,
            beside,
            compare,
            paper,
        )

        published = None if self.paper is None else paper(self.paper)
        if len({path.stem for path in self.eval}) < len(self.eval):
            raise ValueError(f"eval has two files of one name: {[str(path) for path in self.eval]}")
        what = Comparison(
            model=self.model,
            methods=self.methods,
            schemes=self.scheme,
            seeds=self.seeds,
            calibration=self.calib,
            texts={path.stem: path for path in self.eval},
            samples=self.samples,
            seqlen=self.seqlen,
            epochs=self.epochs,
            window=self.window,
            max_windows=self.max_windows,
            dtype=self.dtype,
            speed=not self.no_speed,
        )
        rows, origin = compare(what, self.work_dir)
        texts = list(what.texts)
        print(as_text(rows, texts))
        if published is not None:
            print("\n" + beside(published, rows, what))
        if self.csv is not None:
            self.csv.write_text(as_csv(rows, texts), encoding="utf-8")
        if self.json is not None:
            self.json.write_text(as_json(rows, origin), encoding="utf-8")
        return 1 if any(row.error for row in rows) else 0


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a quantized model in another program's format."""

    model: Path = field(metadata={"help": "folder of a quantized model"})
    format: str = field(
        metadata={"help": "compressed-tensors, float (merged) or ascend", "option": True}
    )
    output: Path = field(metadata={"help": "folder to write", "option": True})
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16 or auto"})

    def run(self) -> int:
        """Write the folder and say what its reader must know."""
        from flatquant.export import export
        from flatquant.sources import load_model

        _check_output(self.output, self.model)
        model, tokenizer = load_model(self.model, self.dtype)
        for note in export(model, self.format, self.output, tokenizer):
            print(f"note: {note}")
        print(f"saved to {self.output}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Report:
    """One HTML page with figures, from the folder that an analysis has written."""

    folder: Path = field(metadata={"help": "folder with analysis.json and its tables"})
    output: Path | None = field(
        default=None, metadata={"help": "file to write; default: report.html in the folder"}
    )
    pictures: Path | None = field(
        default=None, metadata={"help": "folder for the figures as SVG files"}
    )

    def run(self) -> int:
        """Write the page, and the pictures if they are wanted."""
        from flatquant.report.html import write_page, write_pictures

        path = write_page(self.folder, self.output)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
        if self.pictures is not None:
            made = write_pictures(self.folder, self.pictures)
            print(f"{self.pictures}: {len(made)} SVG files")
        return 0


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Which kernels are built, for what, and which scheme each processor runs fastest, and why."""

    json: bool = field(default=False, metadata={"help": "as JSON"})
    device: tuple[str, ...] = field(
        default=(),
        metadata={"help": 'advice for these: cpu, avx512, sm_90, "RTX 4090", ...; all: for all'},
    )

    def run(self) -> int:
        """Print the build information and the advice, or only the advice on some devices."""
        from flatquant.kernels import advise, as_text, here, targets
        from flatquant_cuda import build_info
        from flatquant_cuda.__main__ import describe

        if self.device:
            names = targets() if self.device == ("all",) else self.device
            print(as_text([advise(name) for name in names]))
            return 0
        info = build_info()
        if self.json:
            print(json.dumps(info, indent=2))
            return 0
        print(describe(info), end="\n\n")
        found, others = here()
        print("\n".join([as_text([advise(name) for name in found]), *others]))
        return 0


COMMANDS: dict[str, type[Command]] = {
    "quantize": Quantize,
    "eval": Evaluate,
    "generate": Generate,
    "compare": Compare,
    "analyze": Analyze,
    "analyze-calib": AnalyzeCalibration,
    "eval-tasks": EvaluateTasks,
    "report": Report,
    "export": Export,
    "kernels": Kernels,
    "demo": Demo,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after ``flatquant``; None takes them from the process.

    Returns:
        The exit code: 0, 2 after bad input, or what the command says.
    """
    parser = argparse.ArgumentParser(prog="flatquant", description="4-bit language models.")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        text = (command.__doc__ or "").splitlines()[0]
        sub = commands.add_parser(name, help=text, description=text)
        types_of = typing.get_type_hints(command)
        for entry in fields(command):  # type: ignore[arg-type]
            _add_option(sub, entry, types_of[entry.name])
    values = vars(parser.parse_args(arguments))
    name, traceback = values.pop("command"), values.pop("traceback")
    try:
        return COMMANDS[name](**values).run()
    except (ValueError, OSError, ImportError, RuntimeError, ArithmeticError, LookupError) as error:
        if traceback:
            raise
        print(f"flatquant {name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


class _Tuple(argparse.Action):
    """Keeps several words as the tuple that the field wants."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, tuple(values))


def _add_option(parser: argparse.ArgumentParser, entry: Field[Any], hint: Any) -> None:
    """One field as an option; a field without a default is positional, or required."""
    options: dict[str, Any] = {"help": entry.metadata.get("help", "").replace("%", "%%")}
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        options.update(nargs="*", type=typing.get_args(hint)[0], action=_Tuple)
    elif hint is bool:
        options["action"] = "store_true"
    else:
        options["type"] = hint
    flag = "--" + entry.name.replace("_", "-")
    if entry.default is MISSING:
        if not entry.metadata.get("option"):
            parser.add_argument(entry.name, **options)
            return
        options["required"] = True
    else:
        options["default"] = entry.default
        many = isinstance(entry.default, tuple)
        shown = " ".join(map(str, entry.default)) if many else entry.default
        if shown is not None and shown is not False:
            options["help"] += f" (default: {shown})"
    parser.add_argument(flag, **options)


def _check_output(output: Path, model: Path) -> None:
    """Fail before hours of calibration, not after."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"output is {str(output)!r}: it must be a folder, not a file")
    if output.resolve() == model.resolve():
        raise ValueError(f"output is {str(output)!r}: it must not be the model's own folder")
