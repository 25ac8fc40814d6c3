"""From a model to its quantized self, in place: calibration, then surgery."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flatquant.checkpoint import attach
from flatquant.pipeline import calibrate
from flatquant.recipe import Recipe
from flatquant.report import report
from flatquant.result import CalibrationResult
from flatquant.scheme import Scheme
from flatquant.weights import WeightQuantizer

_log = logging.getLogger("flatquant")

DATA_FREE = {"identity": "rtn", "hadamard": "hadamard", "random": "random"}
"""Transforms that `replace_linear` can make without calibration text -> method."""


def replace_linear(
    model: PreTrainedModel,
    scheme: str | Scheme = "W4A4",
    *,
    transform: str | CalibrationResult = "hadamard",
    ignore: str | tuple[str, ...] = ("lm_head",),
    seed: int = 0,
) -> PreTrainedModel:
    """Replace the decoder's linears by integer ones, in place; returns the model.

    What was replaced, what was left alone and why is logged (logger "flatquant", level INFO);
    `flatquant.report` says it at any time.

    Args:
        model: a Hugging Face causal LM of a known family.
        scheme: what to quantize; ignored in favour of the result's own where one is given.
        transform: "identity", "hadamard" or "random" (orthogonal) for round-to-nearest without
            calibration text, or the `CalibrationResult` to install.
        ignore: linears to leave alone, by full name, or "re:pattern".
        seed: of random transforms.

    Raises:
        ValueError: unknown transform or family, a model that is quantized already, a result
            that was made from another model.
    """
    if isinstance(transform, CalibrationResult):
        result = transform
    elif transform in DATA_FREE:
        result = calibrate(
            model, DATA_FREE[transform], scheme, seed=seed, ignore=ignore, progress=False
        )
    else:
        raise ValueError(
            f"replace_linear: transform={transform!r} must be one of {list(DATA_FREE)} or a "
            "CalibrationResult"
        )
    result.apply(model)
    attach(model)
    _log.info("%s", report(model))
    return model


def quantize(
    model: PreTrainedModel,
    method: str | Recipe = "flatquant",
    scheme: str | Scheme = "W4A4KV4",
    calibration: Tensor | None = None,
    *,
    epochs: int | None = None,
    weights: str | WeightQuantizer | None = None,
    seed: int = 0,
    ignore: str | tuple[str, ...] = ("lm_head",),
    device: str | torch.device | None = None,
    work_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> PreTrainedModel:
    """`calibrate`, then `replace_linear` with its result: in place, returns the model.

    Arguments and errors are those of `calibrate`.
    """
    result = calibrate(
        model,
        method,
        scheme,
        calibration,
        epochs=epochs,
        weights=weights,
        seed=seed,
        ignore=ignore,
        device=device,
        work_dir=work_dir,
        resume=resume,
        progress=progress,
    )
    return replace_linear(model, transform=result)
