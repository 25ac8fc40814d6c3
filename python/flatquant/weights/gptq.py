"""GPTQ (arXiv 2210.17323): round column by column, move each error onto the columns to come."""

from __future__ import annotations

import torch
from torch import Tensor

from flatquant.weights.base import QuantizedWeight, WeightTask
from flatquant.weights.rtn import round_to_nearest, weight_scale

DAMPING = 0.01
BLOCK = 128


def inverse_factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor of (H + λI)^-1 with λ = 1% of the mean diagonal, float64.

    Channels that were never active get a unit diagonal; damping grows tenfold until the
    factorisation succeeds, because a Hessian from few tokens may be singular.
    """
    h = hessian.clone()
    dead = torch.diagonal(h) == 0
    h[dead, dead] = 1.0
    damping = DAMPING * torch.diagonal(h).mean()
    eye = torch.eye(h.shape[0], dtype=h.dtype, device=h.device)
    for _ in range(6):
        lower, info = torch.linalg.cholesky_ex(h + damping * eye)
        if int(info) == 0:
            return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
        damping = damping * 10
    raise ValueError("gptq: the Hessian is not positive definite even with damping; is it finite?")


def gptq(task: WeightTask) -> QuantizedWeight:
    """Codes that minimise ‖(W − Ŵ)·X‖ greedily; scales are those of round-to-nearest.

    Raises:
        ValueError: no Hessian, or one that cannot be factorised.
    """
    if task.hessian is None:
        raise ValueError(f"gptq: {task.name} needs the Hessian of its inputs (calibration text)")
    scale = weight_scale(task).double()
    wide = scale if scale.dim() == 2 else scale.unsqueeze(-1)
    qmax = 2 ** (task.bits - 1) - 1
    weight = task.weight.double().clone()
    columns = weight.shape[1]
    per_scale = columns // wide.shape[1]
    factor = inverse_factor(task.hessian)
    codes = torch.empty_like(weight)
    for begin in range(0, columns, BLOCK):
        end = min(begin + BLOCK, columns)
        errors = weight.new_empty(weight.shape[0], end - begin)
        for column in range(begin, end):
            s = wide[:, column // per_scale]
            code = (weight[:, column] / s).round().clamp(-qmax - 1, qmax)
            codes[:, column] = code
            error = (weight[:, column] - code * s) / factor[column, column]
            weight[:, column:end] -= torch.outer(error, factor[column, column:end])
            errors[:, column - begin] = error
        weight[:, end:] -= errors @ factor[begin:end, end:]
    result = QuantizedWeight(codes.to(torch.int8), scale.float())
    plain = round_to_nearest(task)
    ours, theirs = (layer_error(task.weight, c, task.hessian) for c in (result, plain))
    return result if ours <= theirs else plain


def layer_error(weight: Tensor, candidate: QuantizedWeight, hessian: Tensor) -> float:
    """tr(Δ·H·Δᵀ) of the rounding error Δ."""
    delta = weight.double() - candidate.dequantize().double()
    return float(((delta @ hessian) * delta).sum())
