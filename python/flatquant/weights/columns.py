"""Rounding a weight of which some columns stay as they are, by any weight quantizer."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from flatquant.weights.base import QuantizedWeight, WeightQuantizer, WeightTask

_DAMP = 1e-6


def quantize_around(
    quantizer: WeightQuantizer, task: WeightTask, columns: Tensor
) -> tuple[QuantizedWeight, Tensor]:
    """Codes of all other columns, and the kept ones.

    With a Hessian the kept columns K take up what rounding the others D costs. For any rounding
    of D the best of them is W_K + (W_D − Ŵ_D)·H_DK·H_KK⁻¹, and what then remains of the error is
    tr(Δ·S·Δᵀ) with S = H_DD − H_DK·H_KK⁻¹·H_KD: the quantizer is given S. For GPTQ that is its
    loop with K in the end and nothing rounded there, as QUIK (arXiv 2310.09259) and OWQ (arXiv
    2306.02272) have it.

    Args:
        quantizer: of the other columns; it sees 0 in the kept ones.
        task: the whole weight.
        columns: indices of the kept columns, int64 [kept].

    Returns:
        Codes [out, in], and the kept columns [out, kept] in the weight's dtype. Where codes of
        kept columns do not stand for 0 (a fractional zero point), they do not count either.
    """
    dense = task.weight.clone()
    dense[:, columns] = 0
    part = replace(task, weight=dense)
    kept = task.weight[:, columns]
    if task.hessian is None or len(columns) == 0:
        return quantizer.quantize(part), kept
    hessian = task.hessian.double()
    own = hessian[columns][:, columns]
    own = own + _DAMP * own.diagonal().mean().clamp_min(1e-30) * torch.eye(
        len(columns), dtype=own.dtype, device=own.device
    )
    share = torch.linalg.solve(own, hessian[columns])  # H_KK⁻¹·H_K·, [kept, in]
    rest = hessian - hessian[:, columns] @ share
    rest = (rest + rest.T) / 2
    rest[columns] = 0
    rest[:, columns] = 0
    rest.diagonal().clamp_min_(0)
    quantized = quantizer.quantize(replace(part, hessian=rest.to(task.hessian.dtype)))
    error = dense.double() - quantized.dequantize().double()
    error[:, columns] = 0
    return quantized, (kept.double() + error @ share.T).to(kept.dtype)
