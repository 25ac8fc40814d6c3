"""The commands `analyze`, `analyze-calib` and `eval-tasks`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Analyze:
    """What quantization has done to a model, layer by layer, as CSV and JSON."""

    model: Path = field(metadata={"help": "the floating-point model: a folder, or a .gguf file"})
    quantized: Path = field(metadata={"help": "folder of a quantized model made from it"})
    text: Path = field(metadata={"help": "UTF-8 text file; it is read, not fitted", "option": True})
    output: Path = field(metadata={"help": "folder for the tables", "option": True})
    window: int = field(default=512, metadata={"help": "tokens in a window"})
    windows: int = field(default=32, metadata={"help": "windows from the start of the text"})
    batch_size: int = field(default=4, metadata={"help": "windows in one forward pass"})
    calibration: Path | None = field(
        default=None, metadata={"help": "work folder or saved result of the calibration"}
    )
    no_rtn: bool = field(default=False, metadata={"help": "leave out rounding to nearest"})
    speed: bool = field(default=False, metadata={"help": "time both models, too"})
    sensitivity: bool = field(
        default=False, metadata={"help": "round single groups of linears and see what it costs"}
    )
    sensitivity_bits: tuple[int, ...] = field(
        default=(2, 3, 4, 8), metadata={"help": "bit widths for --sensitivity"}
    )
    stream: bool = field(
        default=False,
        metadata={"help": "read the floating-point blocks from disk, one at a time"},
    )
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16 or auto"})

    def run(self) -> int:
        """Write the tables."""
        import torch

        from flatquant.analysis import Settings, analyze
        from flatquant.analysis.inputs import calibration_log, file_hashes
        from flatquant.offload import open_model
        from flatquant.sources import DTYPES, load_model
        from flatquant.text import tokenize_file

        settings = Settings(
            window=self.window,
            windows=self.windows,
            batch_size=self.batch_size,
            rtn=not self.no_rtn,
            speed=self.speed,
            sensitivity=self.sensitivity_bits if self.sensitivity else (),
        )
        log = () if self.calibration is None else calibration_log(self.calibration)
        quantized, tokenizer = load_model(self.quantized, self.dtype)
        if self.stream:
            kind = DTYPES.get(self.dtype)
            fp = open_model(self.model, kind if isinstance(kind, torch.dtype) else None)
        else:
            fp, _ = load_model(self.model, self.dtype)
        ids = tokenize_file(tokenizer, self.text)
        data = file_hashes(self.model, self.quantized, self.text)
        found = analyze(fp, quantized, ids, settings, data=data, log=log)
        found.write(self.output)
        for name, line in found.facts["headline"].items():
            if line is not None:
                shown = ", ".join(f"{key} {value:.4g}" for key, value in line.items())
                print(f"{name}: {shown}")
        print(f"written to {self.output}")
        return 0


@dataclass(frozen=True, kw_only=True)
class AnalyzeCalibration:
    """Which of several texts is best to calibrate on, and which are a bad idea."""

    sets: tuple[str, ...] = field(
        metadata={"help": "files, folders, or name[:config[:split]] of the hub"}
    )
    model: Path = field(
        metadata={"help": "the model's folder, or a .gguf file: its tokenizer", "option": True}
    )
    eval: str = field(
        metadata={"help": "what the model will be measured on: as the sets", "option": True}
    )
    text_field: str | None = field(
        default=None, metadata={"help": "of records: where the text is; default: found by name"}
    )
    preprocessing: str = field(default="general", metadata={"help": "how samples are made"})
    samples: int = field(default=128, metadata={"help": "how many"})
    seqlen: int = field(default=512, metadata={"help": "tokens in a sample"})
    seed: int = field(default=0, metadata={"help": "of the samples"})
    windows: int = field(default=8, metadata={"help": "samples that the model itself reads"})
    tokens_only: bool = field(
        default=False, metadata={"help": "do not run the model: no shuffled control"}
    )
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16 or auto"})
    csv: Path | None = field(default=None, metadata={"help": "write the rows here too"})
    json: Path | None = field(default=None, metadata={"help": "rows and provenance"})

    def run(self) -> int:
        """Print the ranking; 1 if no set is without a warning."""
        from dataclasses import asdict

        from flatquant.analysis.inputs import file_hashes
        from flatquant.analysis.ranking import as_csv, as_json, as_text
        from flatquant.analysis.texts import rank_texts
        from flatquant.compare.provenance import provenance
        from flatquant.data import read_documents
        from flatquant.sources import load_model

        if not self.sets:
            raise ValueError("analyze-calib: no set to look at: name at least one")
        candidates = [read_documents(source, self.text_field) for source in self.sets]
        target = read_documents(self.eval, self.text_field)
        model, tokenizer = load_model(self.model, self.dtype)
        ranking = rank_texts(
            candidates,
            target,
            tokenizer,
            preprocessing=self.preprocessing,
            samples=self.samples,
            seqlen=self.seqlen,
            seed=self.seed,
            model=None if self.tokens_only else model,
            windows=self.windows,
        )
        print(as_text(ranking))
        if self.csv is not None:
            self.csv.write_text(as_csv(ranking), encoding="utf-8")
        if self.json is not None:
            files = [file for documents in (*candidates, target) for file in documents.files]
            origin = provenance(asdict(self), file_hashes(*files))
            self.json.write_text(as_json(ranking, origin), encoding="utf-8")
        return 0 if any(not facts.warnings for facts in ranking.candidates) else 1


@dataclass(frozen=True, kw_only=True)
class EvaluateTasks:
    """The downstream tasks of a paper's tables, through lm-eval."""

    model: Path = field(metadata={"help": "checkpoint folder, or a .gguf file"})
    suite: str = field(metadata={"help": "flatquant-qa or llmc", "option": True})
    limit: int | None = field(default=None, metadata={"help": "only so many questions a task"})
    batch_size: int = field(default=1, metadata={"help": "questions in one forward pass"})
    allow_code: bool = field(
        default=False, metadata={"help": "run code that the model has written, unprotected"}
    )
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16 or auto"})
    json: Path | None = field(default=None, metadata={"help": "scores and provenance"})

    def run(self) -> int:
        """Print the scores, and what cannot run and why; 1 if nothing can."""
        import json
        from dataclasses import asdict

        from flatquant.analysis.inputs import file_hashes
        from flatquant.analysis.suites import Score, as_text, run_suite
        from flatquant.compare.provenance import provenance
        from flatquant.data import SUITES
        from flatquant.data.tasks import unavailable
        from flatquant.sources import load_model

        if self.suite not in SUITES:
            raise ValueError(f"suite {self.suite!r} is unknown; known: {', '.join(SUITES)}")
        suite = SUITES[self.suite]
        missing = unavailable(suite, allow_code=self.allow_code)
        if len(missing) == len(suite.tasks):
            print(as_text([Score(task=t, obstacle=missing[t.name]) for t in suite.tasks]))
            return 1
        model, tokenizer = load_model(self.model, self.dtype)
        scores = run_suite(
            model,
            tokenizer,
            suite,
            limit=self.limit,
            batch_size=self.batch_size,
            allow_code=self.allow_code,
        )
        print(as_text(scores))
        if self.json is not None:
            origin = provenance(asdict(self), file_hashes(self.model))
            content = {"provenance": origin, "scores": [asdict(score) for score in scores]}
            self.json.write_text(json.dumps(content, indent=1), encoding="utf-8")
        return 0
