"""Matrix products of the calibration loop: float32 in and out, bfloat16 inside where it pays.

Codes of at most 8 bits are exact in bfloat16 and products are accumulated in float32, so what
is lost is only the rounding of scale times code. Transforms are never computed this way: an
inverse that is off by 2^-8 would not cancel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flatquant.transforms.base import FrozenTransform, left_product


def amp_pays(mode: str, device: torch.device) -> bool:
    """Whether to use bfloat16 products: `mode` is "on", "off", or "auto" (ask the machine)."""
    if mode != "auto":
        return mode == "on"
    if device.type == "cpu":
        probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return device.type == "cuda"


@contextmanager
def _reduced(enabled: bool) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    if enabled:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _Linear(torch.autograd.Function):
    """x·wᵀ, forward and backward in the same precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, amp: bool) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.amp = amp
        with _reduced(amp):
            return x.reshape(-1, x.shape[-1]).mm(w.t()).reshape(*x.shape[:-1], w.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        grad = grads[0].reshape(-1, w.shape[0])
        with _reduced(ctx.amp):
            grad_x = grad.mm(w).reshape(x.shape)
            grad_w = grad.t().mm(x.reshape(-1, w.shape[1])) if ctx.needs_input_grad[1] else None
        return grad_x, grad_w, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, amp: bool) -> Tensor:
    """x·weightᵀ + bias. x: [..., k], weight: [n, k]."""
    y: Tensor = _Linear.apply(x, weight, amp)
    return y if bias is None else y + bias


_CHUNK = 512  # rows whose outer products are held at once; they should fit in cache


class _Kronecker(torch.autograd.Function):
    """P1ᵀ·X·P2 for every row, with a backward that keeps only X and P1ᵀ·X."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        n1, n2 = left.shape[0], right.shape[0]
        rows = x.reshape(-1, n1, n2)
        half = left_product(left.t(), rows)
        ctx.save_for_backward(rows, half, left, right)
        return half.reshape(-1, n2).mm(right).reshape(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, half, left, right = ctx.saved_tensors
        n1, n2 = left.shape[0], right.shape[0]
        grad = grads[0].reshape(-1, n2)
        grad_right = half.reshape(-1, n2).t().mm(grad)
        grad_half = grad.mm(right.t()).reshape(-1, n1, n2)
        grad_left = torch.zeros_like(left)
        for part, grad_part in zip(rows.split(_CHUNK), grad_half.split(_CHUNK), strict=True):
            grad_left += torch.bmm(part, grad_part.mT).sum(0)
        grad_x = left_product(left, grad_half).reshape(grads[0].shape)
        return grad_x, grad_left, grad_right


def transform_rows(x: Tensor, matrices: FrozenTransform, *, inverse: bool = False) -> Tensor:
    """x·(P1 ⊗ P2), or x·(P1^-T ⊗ P2^-T): `FrozenTransform.apply` with a quicker backward."""
    left = matrices.left_inv_t if inverse else matrices.left
    right = matrices.right_inv_t if inverse else matrices.right
    if left is not None and right is not None and x.dtype == left.dtype:
        result: Tensor = _Kronecker.apply(x, left, right)
        return result
    return matrices.apply_inverse_t(x) if inverse else matrices.apply(x)
