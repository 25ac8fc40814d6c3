"""The output head of a model in bfloat16, for a few tokens: bound by the memory its weight fills.

On a small model the head is most of what a token reads, and torch reads it at half the bandwidth
of a CPU. As in :mod:`flatquant_cuda.decoder` there is no reference: :func:`fits` says whether the
op takes a call; if not, ``torch.nn.functional.linear`` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import library

#: Rows up to which the op is faster than torch.
MOST_ROWS = 4


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`head` takes these, and is worth it.

    Args:
        x: input ``[..., K]``.
        weight: ``[N, K]``.
    """
    return (
        available()
        and x.dtype == weight.dtype == torch.bfloat16
        and x.device.type == weight.device.type == "cpu"
        and 0 < x.numel() <= MOST_ROWS * x.shape[-1]
        and weight.is_contiguous()
    )


def head(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·Wᵀ + b with float32 sums in one order for any batch, number of threads and processor.

    Args:
        x: bfloat16 ``[..., K]``.
        weight: bfloat16 ``[N, K]``, contiguous.
        bias: bfloat16 ``[N]``.

    Returns:
        bfloat16 ``[..., N]``.

    Raises:
        RuntimeError: an argument is wrong; the message names it, its value and the rule.
    """
    result: Tensor = torch.ops.flatquant_cuda.head.default(x.contiguous(), weight, bias)
    return result


def available() -> bool:
    """Whether the native library is loaded and has the op."""
    return _AVAILABLE


def _fake_head(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_AVAILABLE = library.loaded and torch._C._dispatch_has_kernel_for_dispatch_key(
    "flatquant_cuda::head", "CPU"
)

if _AVAILABLE:
    torch.library.register_fake("flatquant_cuda::head")(_fake_head)
