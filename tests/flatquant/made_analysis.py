"""A folder as `flatquant analyze` writes it, with plausible numbers made up from a seed."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

LINEARS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
SITES = ("attn_in", "attn_out", "mlp_in", "mlp_out")
_HEADS = {
    "kurtosis": "layer linear of when kurtosis",
    "similarity": "layer linear cosine sqnr_db",
    "surface": "layer token mse mse_alone power",
    "magnitudes": "layer site of when quantile magnitude",
    "heatmap": "layer site when token_bin channel_bin magnitude",
    "columns": "layer linear column_bin relative_error",
    "clips": "layer where side ratio",
    "ranges": "layer linear grid low high relative_error",
    "conditions": "layer site factor condition",
    "sensitivity": "layer group bits kl",
    "fit": "block start end seconds notes",
}
TABLES = tuple(_HEADS)

Row = tuple[Any, ...]


def write_analysis(folder: Path, layers: int = 4, seed: int = 0, drop: Iterable[str] = ()) -> Path:
    """Write analysis.json and every table but those in `drop`; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    made = _tables(layers, np.random.default_rng(seed))
    listed = {}
    for name, head in _HEADS.items():
        if name in drop:
            continue
        path = folder / f"{name}.csv"
        with path.open("w", encoding="utf-8", newline="") as out:
            writer = csv.writer(out, lineterminator="\n")
            writer.writerow(head.split())
            for row in made[name]:
                writer.writerow([f"{c:.6g}" if isinstance(c, float) else c for c in row])
        about = f"What {name} tells, in a sentence."
        listed[name] = {"file": path.name, "rows": len(made[name]), "about": about}
    header = {
        "format": 1,
        "provenance": {
            "versions": {"python": "3.11.7", "flatquant": "0.1.0", "torch": "2.13.0"},
            "commit": "0123456789",
            "machine": {"processor": "A processor", "threads": 2, "cores": 2, "gpu": None},
            "settings": {"text": "wiki.test.txt", "window": 512, "max_windows": 32},
            "data": {"wiki.test.txt": "8f5e" * 16},
        },
        "model": {"name": "Made-Up-135M", "params": 134_515_008, "layers": layers},
        "plan": {
            "scheme": "W4A4KV4",
            "sites": ["attn_in", "attn_out", "mlp_in", "mlp_out", "qk_head", "v_head"],
            "ignore": ["lm_head"],
            "method": "flatquant",
        },
        "headline": {
            "fp": {"perplexity": 29.19},
            "quantized": {"perplexity": 42.17, "kl_mean": 0.412, "kl_p99": 2.31, "top1": 0.671},
            "rtn": {"perplexity": 11544.0},
        },
        "size": {
            **{"fp_bytes": 269_060_552, "quantized_bytes": 121_000_000},
            "bits_per_weight": 4.31,
        },
        "speed": {
            "fp": {"prefill": 2999.0, "decode": 27.95},
            "quantized": {"prefill": 4791.0, "decode": 201.8},
        },
        "tables": listed,
    }
    (folder / "analysis.json").write_text(json.dumps(header, indent=1), encoding="utf-8")
    return folder


def _tables(layers: int, random: np.random.Generator) -> dict[str, list[Row]]:
    made: dict[str, list[Row]] = {name: [] for name in _HEADS}
    for layer in range(layers):
        depth = layer / max(layers - 1, 1)
        _outliers(made, layer, random)
        for i, linear in enumerate(LINEARS):
            sqnr = float(22 - 6 * depth - 1.2 * i + random.normal(0, 1))
            cosine = float(1 / np.sqrt(1 + 10 ** (-sqnr / 10)))
            made["similarity"].append((layer, linear, cosine, sqnr))
            for column in range(64):
                error = float(0.11 + 0.01 * i + random.normal(0, 0.006))
                made["columns"].append((layer, linear, column, error))
            for grid, low, error in (
                *(("stored", -0.92, 0.115), ("symmetric", -0.9, 0.113)),
                ("asymmetric", -0.86, 0.107),
            ):
                noise = float(random.normal(0, 0.004))
                made["ranges"].append((layer, linear, grid, low, 0.9, error + 0.01 * i + noise))
        for token in range(32):
            alone = float(0.004 * (1 + 8 * np.exp(-token / 2)) * (1 + 0.2 * random.normal() ** 2))
            made["surface"].append(
                (layer, 16 * token, alone * (1 + 4 * layer), alone, 1.0 + 3 * depth)
            )
        for where in (*SITES, "keys", "values"):
            for side in ("max", "min"):
                made["clips"].append((layer, where, side, float(random.uniform(0.8, 0.98))))
        for site in SITES:
            left, right = random.uniform(1.5, 6, 2)
            for factor, value in (("left", left), ("right", right), ("whole", left * right)):
                made["conditions"].append((layer, site, factor, float(value)))
        made["conditions"].append((layer, "qk_head", "whole", float(random.uniform(2, 9))))
        for group in ("attn_in", "mlp_in", "block"):
            for bits in (3, 4):
                kl = float(0.02 / bits * random.lognormal(0, 0.6))
                made["sensitivity"].append((layer, group, bits, kl))
        start = float(0.02 * (1 + 3 * depth) * random.lognormal(0, 0.2))
        seconds = float(random.uniform(20, 30))
        made["fit"].append((f"model.layers.{layer}", start, 0.3 * start, seconds, ""))
    return made


def _outliers(made: dict[str, list[Row]], layer: int, random: np.random.Generator) -> None:
    """Magnitudes, kurtosis and one map: heavy tails before, flat after."""
    quantiles = np.linspace(0, 1, 129)
    for i, site in enumerate(SITES):
        peak = float(8 + 30 * i * random.uniform(0.5, 1.5))
        for of, height in (("input", peak), ("weight", 1 + peak / 20)):
            for when, top in (("before", height), ("after", 1 + height / 30)):
                level = 1.2 if when == "after" else 1.0
                curve = level * (0.6 + 0.7 * quantiles + (top - 0.3) * quantiles**60)
                made["magnitudes"] += [
                    (layer, site, of, when, float(q), float(v))
                    for q, v in zip(quantiles, curve, strict=True)
                ]
    for i, linear in enumerate(LINEARS):
        for of, heavy in (("input", 30.0 * (1 + i)), ("weight", 4.0 + i)):
            made["kurtosis"].append((layer, linear, of, "before", heavy * random.lognormal(0, 0.2)))
            made["kurtosis"].append((layer, linear, of, "after", 2.9 + 0.4 * random.random()))
    if layer == 0:
        loud = np.ones(96)
        loud[[7, 40, 41, 77]] = 40, 12, 60, 25
        for when, gain in (("before", loud), ("after", np.full(96, 1.5))):
            grid = np.abs(random.normal(1, 0.3, (64, 96))) * gain
            if when == "before":
                grid[0] *= 5
            made["heatmap"] += [
                (layer, "attn_in", when, token, channel, float(grid[token, channel]))
                for token in range(64)
                for channel in range(96)
            ]
