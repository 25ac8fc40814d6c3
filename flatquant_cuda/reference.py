"""The specification of every op in plain PyTorch: what the native kernels are compared with.

It makes exactly the roundings of the numeric contract (csrc/contract.h, docs/numerics.md) and
accumulates in float64. Functions have the names and signatures of ``flatquant_cuda.ops``. ``T`` is
the floating dtype of ``x``; ``round_T`` is a cast to it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .packing import PACKED, pack, pack_activation, packed_size, unpack, unpack_nibbles

SMALLEST_NORMAL = torch.finfo(torch.float32).tiny

# ---- the quantizer -------------------------------------------------------------------------------


def scale_and_zero(
    y: Tensor, clip: Tensor | None, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Scale float32 ``[...]`` and zero point float32 ``[...]`` of the rows of float32 ``[..., k]``.

    A scale that would be 0 or subnormal is 1; a row that holds a NaN or an Inf has scale NaN and
    zero point 0. ``clip`` is float32 ``[2]``: ratios of the maximum and the minimum.
    """
    highest, lowest = y.amax(-1), y.amin(-1)
    finite = torch.isfinite(highest) & torch.isfinite(lowest)
    hi, lo = highest.clamp(min=0.0), lowest.clamp(max=0.0)
    if clip is not None:
        hi, lo = clip[0] * hi, clip[1] * lo
    span = torch.maximum(hi, -lo) if symmetric else hi - lo
    steps = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    # A tensor, because CUDA multiplies by the reciprocal of a Python number.
    scale = span / span.new_full((), steps)
    scale = torch.where(scale < SMALLEST_NORMAL, 1.0, scale)
    scale = torch.where(finite & torch.isfinite(scale), scale, math.nan)
    if symmetric:
        return scale, torch.zeros_like(scale)
    zero = torch.round(-lo / scale).clamp(0, steps) + 0.0
    return scale, torch.where(torch.isfinite(scale), zero, 0.0)


def codes_of(
    y: Tensor, scale: Tensor, zero: Tensor, bits: int, symmetric: bool, narrow: bool = False
) -> Tensor:
    """Codes, as float32 integers ``[..., k]``, of float32 ``y`` on grids given per row."""
    if symmetric:
        top = 2 ** (bits - 1) - 1
        bottom = -top if narrow else -top - 1
    else:
        top, bottom = 2**bits - 1, 0
    codes = (torch.round(y / scale[..., None]) + zero[..., None]).clamp(bottom, top)
    return torch.where(torch.isfinite(scale)[..., None], codes, 0.0)


def _quantize_rows(
    y: Tensor,
    clip: Tensor | None,
    bits: int,
    symmetric: bool,
    narrow: bool,
    layout: int,
    op: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_bits(op, bits)
    _check(y.shape[-1] > 0, f"{op}: x has 0 columns: it must have at least one")
    scale, zero = scale_and_zero(y, clip, bits, symmetric)
    codes = codes_of(y, scale, zero, bits, symmetric, narrow).to(torch.int16)
    stored = pack_activation(codes, bits, layout, symmetric)
    zero = zero.new_empty(0) if symmetric else zero
    return stored, scale, zero.to(torch.int32)


def quantize_activation(
    x: Tensor,
    *,
    clip: Tensor | None = None,
    bits: int = 4,
    symmetric: bool = True,
    narrow: bool = False,
    layout: int = PACKED,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`flatquant_cuda.ops.quantize_activation`."""
    return _quantize_rows(x.float(), clip, bits, symmetric, narrow, layout, "quantize_activation")


# ---- transforms ----------------------------------------------------------------------------------


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to ``dtype`` by way of float32, as a float32 accumulator would be, and widen again."""
    return x.float().to(dtype).double()


def factor_sizes(k: int, left: Tensor | None, right: Tensor | None, op: str) -> tuple[int, int]:
    """Sizes (n1, n2) of the factors of a row of ``k``; an absent one takes what is left."""
    for name, factor in (("left", left), ("right", right)):
        if factor is not None:
            _check(
                factor.dim() == 2 and factor.shape[0] == factor.shape[1],
                f"{op}: {name} has shape {tuple(factor.shape)}: it must be square",
            )
    n1 = left.shape[0] if left is not None else k // right.shape[0] if right is not None else 1
    n2 = right.shape[0] if right is not None else k // n1
    _check(
        n1 * n2 == k,
        f"{op}: x has {k} columns, left and right are {n1} and {n2}: their product must equal it",
    )
    return n1, n2


def _transformed(
    x: Tensor, left: Tensor | None, right: Tensor | None, channel_scale: Tensor | None, op: str
) -> Tensor:
    if channel_scale is not None:
        x = (x.float() * channel_scale).to(x.dtype)
    n1, n2 = factor_sizes(x.shape[-1], left, right, op)
    y = x.double().reshape(*x.shape[:-1], n1, n2)
    if left is not None:
        y = _rounded(left.to(x.dtype).double() @ y, x.dtype)
    if right is not None:
        y = y @ right.to(x.dtype).double()
    return y.flatten(-2).float()


def kronecker(
    x: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    *,
    channel_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """See :func:`flatquant_cuda.ops.kronecker`."""
    return _transformed(x, left, right, channel_scale, "kronecker").to(out_dtype or x.dtype)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`flatquant_cuda.ops.kronecker_quantize`."""
    op = "kronecker_quantize"
    if gate is not None:
        g = gate.double()
        x = ((g / (1 + torch.exp(-g))).float() * x.float()).to(x.dtype)
    y = _transformed(x, left, right, channel_scale, op)
    codes, scale, zero = _quantize_rows(y, clip, bits, symmetric, narrow, layout, op)
    if rms_eps is not None:
        scale = scale * torch.rsqrt(x.double().square().mean(-1) + rms_eps).float()
    return codes, scale, zero


def fake_quantize(x: Tensor, clip: Tensor, *, bits: int = 4, symmetric: bool = True) -> Tensor:
    """See :func:`flatquant_cuda.ops.fake_quantize`."""
    _check_bits("fake_quantize", bits)
    scale, zero = scale_and_zero(x, clip, bits, symmetric)
    return (codes_of(x, scale, zero, bits, symmetric) - zero[:, None]) * scale[:, None]


def fake_quantize_backward(
    grad: Tensor, x: Tensor, clip: Tensor, *, bits: int = 4, symmetric: bool = True
) -> tuple[Tensor, Tensor]:
    """See :func:`flatquant_cuda.ops.fake_quantize_backward`."""
    _check_bits("fake_quantize_backward", bits)
    scale, zero = scale_and_zero(x, clip, bits, symmetric)
    ratio = x / scale[:, None]
    rounded = ratio.round()
    code = codes_of(x, scale, zero, bits, symmetric) - zero[:, None]
    inside = code == rounded
    step = torch.where(inside, code - ratio, code)
    steps = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    slope = (grad * step).sum(-1) / steps
    high, low = x.amax(-1).clamp(min=0.0), x.amin(-1).clamp(max=0.0)
    use_high = (
        clip[0] * high >= clip[1] * -low if symmetric else torch.ones_like(high, dtype=torch.bool)
    )
    use_low = ~use_high if symmetric else use_high
    grad_x = torch.where(inside, grad, 0.0)
    for use, end, ratio_of_end, first in (
        (use_high & (high > 0), slope, clip[0], x.argmax(-1, keepdim=True)),
        (use_low & (low < 0), -slope, clip[1], x.argmin(-1, keepdim=True)),
    ):
        grad_x.scatter_add_(-1, first, torch.where(use, end * ratio_of_end, 0.0)[:, None])
    return grad_x, torch.stack((slope * use_high * high, -slope * use_low * low))


def hadamard(x: Tensor, base: Tensor | None = None, *, scale: float | None = None) -> Tensor:
    """See :func:`flatquant_cuda.ops.hadamard`."""
    n = x.shape[-1]
    m = 1 if base is None else base.shape[0]
    power = n // m
    _check(
        power * m == n and power > 0 and power & (power - 1) == 0,
        f"hadamard: x has {n} columns, base is {m}: their quotient must be a power of two",
    )
    y = x.double().reshape(-1, m, power)
    span = 1
    while span < power:
        pair = y.reshape(*y.shape[:-1], power // (2 * span), 2, span)
        a, b = pair[..., 0, :], pair[..., 1, :]
        y = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        span *= 2
    if base is not None:
        y = base.double().T @ y
    factor = 1 / math.sqrt(n) if scale is None else scale
    return _rounded(y * factor, x.dtype).to(x.dtype).reshape(x.shape)


# ---- matrix products -----------------------------------------------------------------------------


def _codes_of_gemm(op: str, a: Tensor, w: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """The plain codes ``[..., K]`` and ``[N, K]`` of an integer GEMM's operands."""
    k, columns = a.shape[-1], w.shape[-1]
    if op == "gemm_w4a4":
        _check(
            k == columns,
            f"{op}: a has {k} packed columns, w has {columns}: they must be equal",
        )
        return unpack_nibbles(a, 2 * k, signed=signed), unpack_nibbles(w, 2 * k)
    if op == "gemm_w4a8":
        _check(
            columns == (k + 1) // 2,
            f"{op}: a has {k} columns, w has {columns} packed columns: w must have half as many, "
            "rounded up",
        )
        return a, unpack_nibbles(w, k)
    _check(k == columns, f"{op}: a has {k} columns, w has {columns}: they must be equal")
    return a, w


def integer_gemm(
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
    """Answer ``gemm_w4a4``, ``gemm_w4a8`` or ``gemm_w8a8``; see ``flatquant_cuda.ops``."""
    _check(
        (a_zero is None) == (w_colsum is None), f"{op}: a_zero and w_colsum must be given together"
    )
    left, right = _codes_of_gemm(op, a, w, signed=a_zero is None)
    # Products of codes and their sums are integers far below 2^53: float64 is exact.
    accumulator = left.double() @ right.double().T
    if a_zero is not None and w_colsum is not None:
        accumulator = accumulator - a_zero.double()[..., None] * w_colsum.double()
    out = accumulator.float() * (a_scale[..., None] * w_scale)
    if bias is not None:
        out = out + bias.float()
    out = out.to(out_dtype)
    return out if residual is None else (residual.float() + out.float()).to(out_dtype)


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
    """See :func:`flatquant_cuda.ops.gemm_w4a4`."""
    return integer_gemm(
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
    """See :func:`flatquant_cuda.ops.gemm_w4a8`."""
    return integer_gemm(
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
    """See :func:`flatquant_cuda.ops.gemm_w8a8`."""
    return integer_gemm(
        "gemm_w8a8", a, a_scale, a_zero, w, w_scale, w_colsum, bias, residual, out_dtype
    )


def gemm_w4a16(
    x: Tensor, w: Tensor, w_scale: Tensor, *, bias: Tensor | None = None, bits: int = 4
) -> Tensor:
    """See :func:`flatquant_cuda.ops.gemm_w4a16`."""
    _check(2 <= bits <= 4, f"gemm_w4a16: bits is {bits}: it must be 2, 3 or 4")
    weight = dequantize(unpack(w, bits, x.shape[-1]), w_scale, dtype=torch.float64)
    out = x.double() @ weight.T
    if bias is not None:
        out = out + bias.double()
    return _rounded(out, x.dtype).to(x.dtype)


def quantize_weight(
    w: Tensor, bits: int, group_size: int | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Round weights ``[N, K]`` to the nearest symmetric code, per output channel or per group of K.

    Returns codes int8 ``[N, K]`` and scale float32 ``[N]``, or ``[N, K / group_size]``. A ``scale``
    of that shape replaces the one from the largest magnitude.
    """
    _check_bits("quantize_weight", bits)
    n, k = w.shape
    size = group_size or k
    _check(k % size == 0, f"quantize_weight: w has {k} columns, group_size is {size}: no multiple")
    groups = w.float().reshape(n, k // size, size)
    if scale is None:
        grid, zero = scale_and_zero(groups, None, bits, symmetric=True)
    else:
        grid = scale.float().reshape(n, k // size)
        zero = torch.zeros_like(grid)
    codes = codes_of(groups, grid, zero, bits, symmetric=True).to(torch.int8)
    return codes.reshape(n, k), grid if group_size else grid[:, 0]


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``(codes - zero) * scale``, computed in ``dtype``.

    codes: ``[..., K]``; scale: ``[...]`` or, with groups, ``[..., G]``: group g covers columns
    ``g*K/G`` to ``(g+1)*K/G``.
    """
    grouped = scale.dim() == codes.dim()
    values = codes.to(dtype)
    if grouped:
        groups = scale.shape[-1]
        values = values.reshape(*codes.shape[:-1], groups, codes.shape[-1] // groups)
    if zero is not None:
        values = values - zero.to(dtype)[..., None]
    values = values * scale.to(dtype)[..., None]
    return values.flatten(-2) if grouped else values


# ---- the KV cache --------------------------------------------------------------------------------


def kv_quantize(
    x: Tensor, transform: Tensor | None, clip: Tensor | None, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric codes of ``x @ transform`` per row: x ``[..., d]``, transform ``[d, d]`` or None.

    Returns codes uint8 ``[..., d]`` (not packed), scale float32 ``[...]``, zero uint8 ``[...]``.
    """
    _check_bits("kv_quantize_append", bits)
    y = x.float()
    if transform is not None:
        y = (x.double() @ transform.to(x.dtype).double()).float()
    scale, zero = scale_and_zero(y, clip, bits, symmetric=False)
    codes = codes_of(y, scale, zero, bits, symmetric=False)
    return codes.to(torch.uint8), scale, zero.to(torch.uint8)


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
    """See :func:`flatquant_cuda.ops.kv_quantize_append`."""
    if slots is not None:
        _append_to_slots(x, (codes, scale, zero), transform, clip, bits, start, slots)
        return
    stop, capacity = start + x.shape[-2], codes.shape[-2]
    _check(
        start >= 0 and stop <= capacity,
        f"kv_quantize_append: positions {start}..{stop} do not fit: the capacity is {capacity}",
    )
    new_codes, new_scale, new_zero = kv_quantize(x, transform, clip, bits)
    codes[..., start:stop, :] = pack(new_codes, bits)
    scale[..., start:stop] = new_scale
    zero[..., start:stop] = new_zero


def _append_to_slots(
    x: Tensor,
    cache: tuple[Tensor, Tensor, Tensor],
    transform: Tensor | None,
    clip: Tensor | None,
    bits: int,
    start: int,
    slots: Tensor,
) -> None:
    _check(start == 0, f"kv_quantize_append: start is {start}: with slots it must be 0")
    _check(
        slots.dtype == torch.int64 and slots.shape == (x.shape[0], x.shape[2]),
        f"kv_quantize_append: slots is {slots.dtype} {list(slots.shape)}: it must be int64 "
        f"{[x.shape[0], x.shape[2]]}",
    )
    codes, scale, zero = cache
    new_codes, new_scale, new_zero = kv_quantize(x, transform, clip, bits)
    size = max(codes.shape[2], 1)
    batch, token = torch.where((slots >= 0) & (slots < codes.shape[0] * codes.shape[2]))
    block, offset = slots[batch, token] // size, slots[batch, token] % size
    codes[block, :, offset] = pack(new_codes, bits)[batch, :, token]
    scale[block, :, offset] = new_scale[batch, :, token]
    zero[block, :, offset] = new_zero[batch, :, token]


def capacity_of(codes: Tensor, block_table: Tensor | None = None) -> int:
    """Positions a sequence may have in a cache, contiguous or paged."""
    return codes.shape[-2] * (1 if block_table is None else block_table.shape[-1])


def _gathered(op: str, cache: tuple[Tensor, ...], block_table: Tensor | None) -> tuple[Tensor, ...]:
    """A paged cache as a contiguous one; blocks that do not exist have scale NaN."""
    if block_table is None:
        return cache
    _check(
        block_table.dtype == torch.int32 and block_table.dim() == 2,
        f"{op}: block_table is {block_table.dtype} {list(block_table.shape)}: it must be int32 "
        "[batch, any]",
    )
    blocks, heads = cache[0].shape[:2]
    missing = (block_table < 0) | (block_table >= blocks)
    if blocks == 0:
        cache = tuple(t.new_zeros((1, *t.shape[1:])) for t in cache)
    index = torch.where(missing, 0, block_table).long()
    codes, scale, zero = (t[index].transpose(1, 2) for t in cache)
    scale = torch.where(missing[:, None, :, None], math.nan, scale)
    batch, size = block_table.shape[0], capacity_of(cache[0], block_table)
    return (
        codes.reshape(batch, heads, size, codes.shape[-1]),
        scale.reshape(batch, heads, size),
        zero.reshape(batch, heads, size),
    )


def _check_lengths(op: str, lengths: Tensor, batch: int) -> None:
    _check(
        lengths.dtype == torch.int32 and lengths.shape == (batch,),
        f"{op}: lengths is {lengths.dtype} {list(lengths.shape)}: it must be int32 [{batch}]",
    )


def _kv_values(
    codes: Tensor, scale: Tensor, zero: Tensor, bits: int, d: int, length: int
) -> Tensor:
    _check_bits("kv_dequantize", bits)
    _check(
        codes.shape[-1] == packed_size(d, bits),
        f"kv_dequantize: codes have {codes.shape[-1]} bytes a row: {d} codes of {bits} bits take "
        f"{packed_size(d, bits)}",
    )
    plain = unpack(codes[..., :length, :], bits, d, signed=False)
    return dequantize(plain, scale[..., :length], zero[..., :length])


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
    """See :func:`flatquant_cuda.ops.kv_dequantize`."""
    codes, scale, zero = _gathered("kv_dequantize", (codes, scale, zero), block_table)
    length = codes.shape[-2] if length is None else length
    values = _kv_values(codes, scale, zero, bits, head_dim, length).to(out_dtype)
    if lengths is None:
        return values
    _check_lengths("kv_dequantize", lengths, codes.shape[0])
    used = torch.arange(length, device=codes.device) < lengths[:, None]
    return torch.where(used[:, None, :, None], values, 0.0)


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
    """See :func:`flatquant_cuda.ops.attention_decode`."""
    batch, heads, tq, d = q.shape
    _check(window >= 0, f"attention_decode: window is {window}: it must not be negative")
    _check(
        window == 0 or lengths is not None,
        f"attention_decode: window is {window}: it needs lengths",
    )
    k_codes, k_scale, k_zero = _gathered(
        "attention_decode", (k_codes, k_scale, k_zero), block_table
    )
    v_codes, v_scale, v_zero = _gathered(
        "attention_decode", (v_codes, v_scale, v_zero), block_table
    )
    kv_heads = k_codes.shape[1]
    _check(
        heads % kv_heads == 0,
        f"attention_decode: q has {heads} heads, the cache {kv_heads}: no multiple",
    )
    length = k_codes.shape[-2] if length is None else length
    scaling = 1 / math.sqrt(d) if scaling is None else scaling
    k = _kv_values(k_codes, k_scale, k_zero, k_bits, d, length).double()
    v = _kv_values(v_codes, v_scale, v_zero, v_bits, d, length).double()
    broken = torch.isnan(k_scale[..., :length]) | torch.isnan(v_scale[..., :length])
    k, v = (torch.where(broken[..., None], 0.0, values) for values in (k, v))

    group = heads // kv_heads
    scores = (q.double().reshape(batch, kv_heads, group * tq, d) @ k.transpose(-1, -2)) * scaling
    scores = scores.reshape(batch, heads, tq, length)
    allowed = torch.ones_like(scores, dtype=torch.bool)
    if mask is not None and mask.dtype == torch.bool:
        allowed = mask.expand_as(scores)
    elif mask is not None:
        allowed = (mask != -math.inf).expand_as(scores)
        scores = scores + mask.double()
    if lengths is not None:
        _check_lengths("attention_decode", lengths, batch)
        position = torch.arange(length, device=q.device)
        first = lengths.clamp(max=length)[:, None, None] - tq + 1
        end = first + torch.arange(tq, device=q.device)[:, None]  # [batch, tq, 1]
        seen = (position < end) & ((position >= end - window) | (window == 0))
        allowed = allowed & seen[:, None]
    scores = scores.masked_fill(~allowed, -math.inf)
    weights = torch.softmax(scores, -1) if length else scores
    weights = torch.where(allowed.any(-1, keepdim=True), weights, 0.0)
    out = (weights.reshape(batch, kv_heads, group * tq, length) @ v).reshape(batch, heads, tq, d)
    touched = (allowed & broken.repeat_interleave(group, 1)[:, :, None]).any(-1, keepdim=True)
    return torch.where(touched, math.nan, out).float().to(q.dtype)


# ---- checks --------------------------------------------------------------------------------------


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_bits(op: str, bits: int) -> None:
    _check(2 <= bits <= 8, f"{op}: bits is {bits}: it must be 2..8")
