"""The ops: one typed function each, and beside it the shape function that ``torch.compile`` needs.

A function calls the native kernel if one is built for the device of its first tensor, else
``flatquant_cuda.reference``; :func:`flatquant_cuda.backend` says which. Inputs are made contiguous;
``torch.ops.flatquant_cuda.*`` themselves take contiguous tensors only. No op is differentiable.

``T`` is the dtype of ``x``: float32, bfloat16 or float16. Bits are 2 to 8. All arithmetic is fixed
by csrc/contract.h; formulas are in docs/numerics.md. A row with a NaN or an Inf gets scale NaN and
codes 0. Wrong arguments raise RuntimeError (ValueError from the reference) naming op, argument,
value and rule.

Inputs may overlap each other, but nothing may overlap the cache that :func:`kv_quantize_append`
writes. Any number of threads may call at once. A process may fork after use: a thread that forks
ends its OpenMP threads first and starts new ones when it needs them, so that neither these ops nor
torch's own, which would otherwise, hang in the child.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import library, reference
from .packing import PACKED

Quantized = tuple[Tensor, Tensor, Tensor]


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _inverse_root(x: Tensor) -> float:
    """``1/sqrt`` of the columns of ``x``; anything if it has none, which the op refuses."""
    return 1 / math.sqrt(max(x.shape[-1], 1)) if x.dim() else 1.0


def _capacity(codes: Tensor, block_table: Tensor | None = None) -> int:
    """Positions of a sequence; 0 for a cache of not four dimensions, which the op refuses."""
    if codes.dim() != 4 or (block_table is not None and block_table.dim() != 2):
        return 0
    return codes.shape[-2] * (1 if block_table is None else block_table.shape[1])


_register_fake = library.register_fake


def _fake(function: Callable[..., object]) -> Callable[..., object]:
    """Register ``_fake_<op>`` as the shape function of ``<op>``."""
    _register_fake(function.__name__.removeprefix("_fake_"), function)
    return function


def _empty_codes(x: Tensor, bits: int, symmetric: bool, layout: int) -> Quantized:
    rows, k = x.shape[:-1], x.shape[-1]
    wide = torch.int8 if symmetric else torch.uint8
    codes = (
        x.new_empty((*rows, (k + 1) // 2), dtype=torch.uint8)
        if bits <= 4 and layout == PACKED
        else x.new_empty((*rows, k), dtype=wide)
    )
    zero = x.new_empty((0,) if symmetric else rows, dtype=torch.int32)
    return codes, x.new_empty(rows, dtype=torch.float32), zero


def quantize_activation(
    x: Tensor,
    *,
    clip: Tensor | None = None,
    bits: int = 4,
    symmetric: bool = True,
    narrow: bool = False,
    layout: int = PACKED,
) -> Quantized:
    """Quantize each row of ``x``: T ``[..., k]``, on a grid that spans its range.

    Args:
        x: the values; leading dimensions are rows.
        clip: float32 ``[2]``, ratios of the row's maximum and minimum that the grid reaches; 1, 1.
        bits: width of a code.
        symmetric: two's complement around 0, otherwise unsigned with a zero point.
        narrow: symmetric only: leave out the most negative code.
        layout: ``packing.PACKED``, or ``packing.BYTES`` for one byte a code at every width.

    Returns:
        codes: uint8 ``[..., ceil(k/2)]`` nibbles up to 4 bits (even index low, an odd ``k`` leaves
        a 0), else, and in layout BYTES, int8 (symmetric) or uint8 ``[..., k]``;
        scale: float32 ``[...]``; zero: int32 ``[...]``, or an empty ``[0]`` if symmetric.
    """
    if not library.is_native("quantize_activation", x):
        return reference.quantize_activation(
            x, clip=clip, bits=bits, symmetric=symmetric, narrow=narrow, layout=layout
        )
    result: Quantized = torch.ops.flatquant_cuda.quantize_activation(
        x.contiguous(), _dense(clip), bits, symmetric, narrow, layout
    )
    return result


@_fake
def _fake_quantize_activation(
    x: Tensor, clip: Tensor | None, bits: int, symmetric: bool, narrow: bool, layout: int
) -> Quantized:
    return _empty_codes(x, bits, symmetric, layout)


def kronecker(
    x: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    *,
    channel_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Transform rows of ``x``: T ``[..., n1*n2]`` to ``vec(P1^T X P2)`` (FlatQuant, eq. 3).

    Args:
        x: the values; each row is a matrix X ``[n1, n2]``.
        left: P1 transposed ``[n1, n1]``, any float dtype, rounded to T; None is the identity.
        right: P2 ``[n2, n2]``, likewise.
        channel_scale: float32 ``[n1*n2]``, multiplied into ``x`` first (and rounded to T).
        out_dtype: dtype of the result; None is T.

    Returns:
        out_dtype ``[..., n1*n2]``.
    """
    out_dtype = out_dtype or x.dtype
    if not library.is_native("kronecker", x):
        return reference.kronecker(x, left, right, channel_scale=channel_scale, out_dtype=out_dtype)
    result: Tensor = torch.ops.flatquant_cuda.kronecker(
        x.contiguous(), _dense(left), _dense(right), _dense(channel_scale), out_dtype
    )
    return result


@_fake
def _fake_kronecker(
    x: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    channel_scale: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return torch.empty_like(x, dtype=out_dtype)


def kronecker_quantize(
    x: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    *,
    gate: Tensor | None = None,
    channel_scale: Tensor | None = None,
    rms_eps: float | None = None,
    clip: Tensor | None = None,
    bits: int = 4,
    symmetric: bool = True,
    narrow: bool = False,
    layout: int = PACKED,
) -> Quantized:
    """Transform rows of ``x`` and quantize them in one pass.

    The order is: ``silu(gate) * x`` rounded to T, times ``channel_scale`` rounded to T,
    ``P1^T X P2`` (kept in float32), codes.

    Args:
        x: T ``[..., n1*n2]``.
        left: P1 transposed ``[n1, n1]``, see :func:`kronecker`.
        right: P2 ``[n2, n2]``.
        gate: T, the shape of ``x``.
        channel_scale: float32 ``[n1*n2]``.
        rms_eps: fold an RMSNorm in: the codes are those of the row as it is, and the scale is
            multiplied by ``1/sqrt(mean(x^2) + rms_eps)``, taken after the gate and before
            ``channel_scale``. The norm's weight belongs into ``channel_scale`` or the factors.
        clip: as in :func:`quantize_activation`, and so are all that follow.
        bits: width of a code.
        symmetric: two's complement around 0, otherwise unsigned with a zero point.
        narrow: symmetric only: leave out the most negative code.
        layout: ``packing.PACKED`` or ``packing.BYTES``.

    Returns:
        codes, scale, zero as :func:`quantize_activation`.
    """
    if not library.is_native("kronecker_quantize", x):
        return reference.kronecker_quantize(
            x,
            left,
            right,
            gate=gate,
            channel_scale=channel_scale,
            rms_eps=rms_eps,
            clip=clip,
            bits=bits,
            symmetric=symmetric,
            narrow=narrow,
            layout=layout,
        )
    result: Quantized = torch.ops.flatquant_cuda.kronecker_quantize(
        x.contiguous(),
        _dense(gate),
        _dense(channel_scale),
        rms_eps,
        _dense(left),
        _dense(right),
        _dense(clip),
        bits,
        symmetric,
        narrow,
        layout,
    )
    return result


@_fake
def _fake_kronecker_quantize(
    x: Tensor,
    gate: Tensor | None,
    channel_scale: Tensor | None,
    rms_eps: float | None,
    left: Tensor | None,
    right: Tensor | None,
    clip: Tensor | None,
    bits: int,
    symmetric: bool,
    narrow: bool,
    layout: int,
) -> Quantized:
    return _empty_codes(x, bits, symmetric, layout)


def fake_quantize(x: Tensor, clip: Tensor, *, bits: int = 4, symmetric: bool = True) -> Tensor:
    """Quantize and dequantize rows of ``x`` ``[rows, k]``, for calibration: (q - z)*s.

    Args:
        x: the values, float32 (other dtypes are answered by the reference).
        clip: ratios of maximum and minimum, float32 ``[2]``, or ``[2, rows]``.
        bits: width of a code.
        symmetric: the grid, as in :func:`quantize_activation`.

    Returns:
        ``[rows, k]`` of the dtype of ``x``.
    """
    if x.dtype != torch.float32 or not library.is_native("fake_quantize", x):
        return reference.fake_quantize(x, clip, bits=bits, symmetric=symmetric)
    result: Tensor = torch.ops.flatquant_cuda.fake_quantize(
        x.contiguous(), clip.contiguous(), bits, symmetric
    )
    return result


@_fake
def _fake_fake_quantize(x: Tensor, clip: Tensor, bits: int, symmetric: bool) -> Tensor:
    return torch.empty_like(x)


def fake_quantize_backward(
    grad: Tensor, x: Tensor, clip: Tensor, *, bits: int = 4, symmetric: bool = True
) -> tuple[Tensor, Tensor]:
    """Straight-through gradient of :func:`fake_quantize` (FlatQuant, section 3.3).

    Rounding passes the gradient on, clamping stops it; the scale passes it to the clip ratios and
    to the largest and the smallest element of the row (a symmetric grid: the one that sets it).

    Args:
        grad: of the result, ``[rows, k]``.
        x: as given to :func:`fake_quantize`.
        clip: likewise.
        bits: likewise.
        symmetric: likewise.

    Returns:
        Gradient of ``x`` ``[rows, k]``, and of the clip ratios row by row, ``[2, rows]``.
    """
    if x.dtype != torch.float32 or not library.is_native("fake_quantize_backward", x):
        return reference.fake_quantize_backward(grad, x, clip, bits=bits, symmetric=symmetric)
    result: tuple[Tensor, Tensor] = torch.ops.flatquant_cuda.fake_quantize_backward(
        grad.contiguous(), x.contiguous(), clip.contiguous(), bits, symmetric
    )
    return result


@_fake
def _fake_fake_quantize_backward(
    grad: Tensor, x: Tensor, clip: Tensor, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((2, x.shape[0]))


def hadamard(x: Tensor, base: Tensor | None = None, *, scale: float | None = None) -> Tensor:
    """Multiply rows of ``x``: T ``[..., m * 2^j]`` by ``(base (x) H_2^j) * scale``.

    Args:
        x: the values.
        base: a Hadamard matrix ``[m, m]`` of +-1, any float dtype; None is ``m = 1``.
        scale: None is ``1/sqrt(m * 2^j)``, which makes the transform orthogonal.

    Returns:
        T, the shape of ``x``; float32 inside, rounded once.
    """
    scale = _inverse_root(x) if scale is None else scale
    if not library.is_native("hadamard", x):
        return reference.hadamard(x, base, scale=scale)
    result: Tensor = torch.ops.flatquant_cuda.hadamard(x.contiguous(), _dense(base), scale)
    return result


@_fake
def _fake_hadamard(x: Tensor, base: Tensor | None, scale: float) -> Tensor:
    return torch.empty_like(x)


def _integer_gemm(
    op: str,
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor | None,
    w: Tensor,
    w_scale: Tensor,
    w_colsum: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    if not library.is_native(op, a):
        return reference.integer_gemm(
            op, a, a_scale, a_zero, w, w_scale, w_colsum, bias, residual, out_dtype
        )
    result: Tensor = getattr(torch.ops.flatquant_cuda, op)(
        a.contiguous(),
        a_scale.contiguous(),
        _dense(a_zero),
        w.contiguous(),
        w_scale.contiguous(),
        _dense(w_colsum),
        _dense(bias),
        _dense(residual),
        out_dtype,
    )
    return result


def _fake_integer_gemm(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor | None,
    w: Tensor,
    w_scale: Tensor,
    w_colsum: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return a.new_empty((*a.shape[:-1], w.shape[0]), dtype=out_dtype)


def gemm_w4a4(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    *,
    a_zero: Tensor | None = None,
    w_colsum: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Multiply 4-bit activations by 4-bit weights, exactly, and scale the int32 sums.

    ``out = round(float(acc) * (a_scale * w_scale) + bias)``, then ``round(residual + out)``, where
    ``acc = sum_k a w`` minus ``a_zero * w_colsum``.

    Args:
        a: uint8 ``[..., kp]`` nibbles from a quantize op with at most 4 bits.
        a_scale: float32 ``[...]``.
        w: uint8 ``[N, kp]`` nibbles, symmetric, ``K = 2 kp`` at most 2^20.
        w_scale: float32 ``[N]``.
        a_zero: int32 ``[...]`` of asymmetric activations; needs ``w_colsum``.
        w_colsum: int32 ``[N]``, the sums of the codes of each row of ``w``.
        bias: ``[N]``, any float dtype.
        residual: out_dtype ``[..., N]``.
        out_dtype: float32, bfloat16 or float16.

    Returns:
        out_dtype ``[..., N]``; the same bits on every backend, batch size and split.
    """
    return _integer_gemm(
        "gemm_w4a4", a, a_scale, a_zero, w, w_scale, w_colsum, bias, residual, out_dtype
    )


def gemm_w4a8(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    *,
    a_zero: Tensor | None = None,
    w_colsum: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Multiply activation codes of a byte each by 4-bit weights; otherwise as :func:`gemm_w4a4`.

    Args:
        a: int8 ``[..., K]``, or uint8 if and only if ``a_zero`` is given; any width in layout
            BYTES.
        a_scale: float32 ``[...]``.
        w: uint8 ``[N, ceil(K/2)]`` nibbles.
        w_scale: float32 ``[N]``.
        a_zero: int32 ``[...]`` of asymmetric activations; needs ``w_colsum``.
        w_colsum: int32 ``[N]``, the sums of the codes of each row of ``w``.
        bias: ``[N]``, any float dtype.
        residual: out_dtype ``[..., N]``.
        out_dtype: float32, bfloat16 or float16.

    Returns:
        out_dtype ``[..., N]``; the same bits on every backend, batch size and split.
    """
    return _integer_gemm(
        "gemm_w4a8", a, a_scale, a_zero, w, w_scale, w_colsum, bias, residual, out_dtype
    )


def gemm_w8a8(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    *,
    a_zero: Tensor | None = None,
    w_colsum: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Multiply activation codes by weight codes, a byte each; otherwise as :func:`gemm_w4a8`.

    Args:
        a: int8 ``[..., K]``, or uint8 if and only if ``a_zero`` is given; ``K`` at most 2^16.
        a_scale: float32 ``[...]``.
        w: int8 ``[N, K]``.
        w_scale: float32 ``[N]``.
        a_zero: int32 ``[...]`` of asymmetric activations; needs ``w_colsum``.
        w_colsum: int32 ``[N]``, the sums of the codes of each row of ``w``.
        bias: ``[N]``, any float dtype.
        residual: out_dtype ``[..., N]``.
        out_dtype: float32, bfloat16 or float16.

    Returns:
        out_dtype ``[..., N]``; the same bits on every backend, batch size and split.
    """
    return _integer_gemm(
        "gemm_w8a8", a, a_scale, a_zero, w, w_scale, w_colsum, bias, residual, out_dtype
    )


_register_fake("gemm_w4a4", _fake_integer_gemm)
_register_fake("gemm_w4a8", _fake_integer_gemm)
_register_fake("gemm_w8a8", _fake_integer_gemm)


def gemm_w4a16(
    x: Tensor, w: Tensor, w_scale: Tensor, *, bias: Tensor | None = None, bits: int = 4
) -> Tensor:
    """Multiply float activations by weights of at most 4 bits, in float32.

    Args:
        x: T ``[..., K]``.
        w: uint8 ``[N, ceil(K/2)]`` nibbles (3, 4 bits) or ``[N, ceil(K/4)]`` (2 bits), symmetric.
        w_scale: float32 ``[N, G]``; group g covers columns ``g*K/G`` to ``(g+1)*K/G``.
        bias: ``[N]``, any float dtype.
        bits: 2, 3 or 4.

    Returns:
        T ``[..., N]``.
    """
    if not library.is_native("gemm_w4a16", x):
        return reference.gemm_w4a16(x, w, w_scale, bias=bias, bits=bits)
    result: Tensor = torch.ops.flatquant_cuda.gemm_w4a16(
        x.contiguous(), w.contiguous(), w_scale.contiguous(), _dense(bias), bits
    )
    return result


@_fake
def _fake_gemm_w4a16(
    x: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, bits: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], w.shape[0]))


def _in_pages(x: Tensor, *pages: Tensor | None) -> bool:
    """Whether a call is one that the CPU kernels do not know: the reference answers it."""
    return x.device.type == "cpu" and any(tensor is not None for tensor in pages)


def kv_quantize_append(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    *,
    transform: Tensor | None = None,
    clip: Tensor | None = None,
    bits: int = 4,
    start: int = 0,
    slots: Tensor | None = None,
) -> None:
    """Quantize ``x @ transform`` per token and head into a cache, in place, asymmetrically.

    Args:
        x: T ``[batch, kv_heads, t, d]``.
        codes: uint8 ``[batch, kv_heads, capacity, bytes]``: four codes a byte for 2 bits, two for
            3 and 4, one for 5 to 8. Written at positions ``start`` to ``start + t``.
        scale: float32 ``[batch, kv_heads, capacity]``, likewise.
        zero: uint8 ``[batch, kv_heads, capacity]``, likewise. These three must be contiguous.
        transform: ``[d, d]``, any float dtype, rounded to T.
        clip: float32 ``[2]``, as in :func:`quantize_activation`.
        bits: width of a code.
        start: first position.
        slots: int64 ``[batch, t]``, for a paged cache: codes ``[blocks, kv_heads, block_size,
            bytes]``, scale and zero ``[blocks, kv_heads, block_size]``. Token i of sequence b goes
            to offset ``slots[b, i] % block_size`` of block ``slots[b, i] // block_size``; one whose
            slot is outside of the cache (-1) is left out. ``start`` must be 0. A contiguous cache
            is one block per sequence. On a CPU the reference answers.
    """
    if not library.is_native("kv_quantize_append", x) or _in_pages(x, slots):
        reference.kv_quantize_append(
            x, codes, scale, zero, transform=transform, clip=clip, bits=bits, start=start,
            slots=slots,
        )  # fmt: skip
        return
    torch.ops.flatquant_cuda.kv_quantize_append(
        x.contiguous(),
        _dense(transform),
        _dense(clip),
        bits,
        codes,
        scale,
        zero,
        start,
        _dense(slots),
    )


@_fake
def _fake_kv_quantize_append(
    x: Tensor,
    transform: Tensor | None,
    clip: Tensor | None,
    bits: int,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    start: int,
    slots: Tensor | None,
) -> None:
    return None


def kv_dequantize(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    *,
    bits: int = 4,
    head_dim: int,
    length: int | None = None,
    out_dtype: torch.dtype = torch.float32,
    block_table: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Read the first ``length`` positions of a cache back as floats: ``(q - z) * s``.

    Args:
        codes: uint8 ``[batch, kv_heads, capacity, bytes]``, see :func:`kv_quantize_append`.
        scale: float32 ``[batch, kv_heads, capacity]``.
        zero: uint8 ``[batch, kv_heads, capacity]``.
        bits: width of a code.
        head_dim: codes in a row.
        length: positions to read; None is the capacity.
        out_dtype: float32, bfloat16 or float16.
        block_table: int32 ``[batch, max_blocks]``, for a paged cache, see
            :func:`attention_decode`. On a CPU the reference answers this, and ``lengths``.
        lengths: int32 ``[batch]``: positions from there on give 0, whatever the cache holds.

    Returns:
        out_dtype ``[batch, kv_heads, length, head_dim]``.
    """
    length = _capacity(codes, block_table) if length is None else length
    if not library.is_native("kv_dequantize", codes) or _in_pages(codes, block_table, lengths):
        return reference.kv_dequantize(
            codes,
            scale,
            zero,
            bits=bits,
            head_dim=head_dim,
            length=length,
            out_dtype=out_dtype,
            block_table=block_table,
            lengths=lengths,
        )
    result: Tensor = torch.ops.flatquant_cuda.kv_dequantize(
        codes.contiguous(),
        scale.contiguous(),
        zero.contiguous(),
        bits,
        head_dim,
        length,
        out_dtype,
        _dense(block_table),
        _dense(lengths),
    )
    return result


@_fake
def _fake_kv_dequantize(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    head_dim: int,
    length: int,
    out_dtype: torch.dtype,
    block_table: Tensor | None,
    lengths: Tensor | None,
) -> Tensor:
    batch = (codes if block_table is None else block_table).shape[0]
    return codes.new_empty((batch, codes.shape[1], length, head_dim), dtype=out_dtype)


def attention_decode(
    q: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    k_zero: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    v_zero: Tensor,
    *,
    mask: Tensor | None = None,
    k_bits: int = 4,
    v_bits: int = 4,
    length: int | None = None,
    scaling: float | None = None,
    block_table: Tensor | None = None,
    lengths: Tensor | None = None,
    window: int = 0,
) -> Tensor:
    """Attend to the first ``length`` positions of a quantized cache, in float32.

    Args:
        q: T ``[batch, heads, tq, d]``, in the basis of the keys; ``heads`` is a multiple of
            ``kv_heads`` and head h reads cache head ``h // (heads // kv_heads)``.
        k_codes: uint8 ``[batch, kv_heads, capacity, bytes]``, see :func:`kv_quantize_append`.
        k_scale: float32 ``[batch, kv_heads, capacity]``.
        k_zero: uint8 ``[batch, kv_heads, capacity]``.
        v_codes: as ``k_codes``, with ``v_bits``.
        v_scale: as ``k_scale``.
        v_zero: as ``k_zero``.
        mask: bool (True: attend) or float (added; -Inf: do not attend), broadcastable to
            ``[batch, heads, tq, length]``.
        k_bits: width of a key code.
        v_bits: width of a value code.
        length: positions in use; None is the capacity. With ``lengths`` only an upper bound.
        scaling: None is ``1/sqrt(d)``.
        block_table: int32 ``[batch, max_blocks]``, for a paged cache: codes ``[blocks, kv_heads,
            block_size, bytes]``, scales and zero points ``[blocks, kv_heads, block_size]``.
            Position j of sequence b is in block ``block_table[b, j // block_size]``; a block that
            does not exist counts as one whose scales are NaN. The capacity is ``max_blocks *
            block_size``. On a CPU the reference answers this, and ``lengths``.
        lengths: int32 ``[batch]``: query i of tq may attend to positions below
            ``lengths[b] - tq + 1 + i``. They stay on the device, so that a CUDA graph that was
            captured with the largest ``length`` replays with any, and gives the same bits.
        window: with ``lengths``: only to the last ``window`` of those; 0 is all.

    Returns:
        T ``[batch, heads, tq, d]``. A query that may attend to nothing gives 0; one that may attend
        to a position whose scale is NaN gives NaN.
    """
    length = _capacity(k_codes, block_table) if length is None else length
    scaling = _inverse_root(q) if scaling is None else scaling
    if not library.is_native("attention_decode", q) or _in_pages(q, block_table, lengths):
        return reference.attention_decode(
            q,
            k_codes,
            k_scale,
            k_zero,
            v_codes,
            v_scale,
            v_zero,
            mask=mask,
            k_bits=k_bits,
            v_bits=v_bits,
            length=length,
            scaling=scaling,
            block_table=block_table,
            lengths=lengths,
            window=window,
        )
    result: Tensor = torch.ops.flatquant_cuda.attention_decode(
        q.contiguous(),
        k_codes.contiguous(),
        k_scale.contiguous(),
        k_zero.contiguous(),
        v_codes.contiguous(),
        v_scale.contiguous(),
        v_zero.contiguous(),
        mask,
        k_bits,
        v_bits,
        length,
        scaling,
        _dense(block_table),
        _dense(lengths),
        window,
    )
    return result


@_fake
def _fake_attention_decode(
    q: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    k_zero: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    v_zero: Tensor,
    mask: Tensor | None,
    k_bits: int,
    v_bits: int,
    length: int,
    scaling: float,
    block_table: Tensor | None,
    lengths: Tensor | None,
    window: int,
) -> Tensor:
    return torch.empty_like(q)


library.find_kernels()
