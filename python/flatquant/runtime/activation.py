"""A quantized input on its way from the norm that made it to the linears that share it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import flatquant_cuda as fq
from flatquant.runtime.buffers import ExactBuffers
from flatquant.transforms.base import kronecker_product


@dataclass(frozen=True, kw_only=True)
class ActivationSpec:
    """How an input is transformed and quantized.

    Attributes:
        width: channels.
        bits: 2..8, or 16 for a floating-point input.
        symmetric: grid.
        left: n1 of the online factor P1, 0 if there is none.
        right: n2 of the online factor P2, 0 if there is none.
        wide_weights: the weights that read this input have 5 to 8 bits.
    """

    width: int
    bits: int
    symmetric: bool
    left: int
    right: int
    wide_weights: bool = False

    def layout(self, device: torch.device) -> int:
        """How the codes lie in memory, so that the linears' GEMM on `device` can read them."""
        return fq.packing.BYTES if self.wide_weights else fq.activation_layout(device)


@dataclass(frozen=True, kw_only=True)
class Activation:
    """An input that its norm has prepared for the linears that share it.

    It stands in for the hidden states between a norm and q/k/v or gate/up, so it has the
    attributes that modelling code reads there: shape, dtype and device.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class FloatActivation(Activation):
    """A transformed input in floating point (A is 16 bits), [..., width]."""

    value: Tensor


@dataclass(frozen=True, kw_only=True)
class QuantizedActivation(Activation):
    """Codes, scale and zero point (None when symmetric) of a transformed input.

    `layout` is that of the codes, `flatquant_cuda.packing.PACKED` or `BYTES`.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    layout: int


class InputQuantizer(ExactBuffers):
    """[SiLU·mul] + [scale] + [RMSNorm] + transform + clip + quantization of one input.

    Buffers: left_trans (P1ᵀ) [n1, n1], right_trans (P2) [n2, n2], both float32, and clip_ratio
    float32 [2] = (max, min), each only where the spec asks for it.
    """

    exact = frozenset({"left_trans", "right_trans", "clip_ratio"})
    left_trans: Tensor | None
    right_trans: Tensor | None
    clip_ratio: Tensor | None

    def __init__(
        self, spec: ActivationSpec, *, online: bool = True, device: torch.device | None = None
    ) -> None:
        """`online` False leaves the buffers out: a norm has prepared the input already."""
        super().__init__()
        self.spec = spec
        self.online = online

        def empty(present: bool, *shape: int) -> Tensor | None:
            if not (present and online):
                return None
            return torch.empty(*shape, dtype=torch.float32, device=device)

        left, right = spec.left, spec.right
        self.register_buffer("left_trans", empty(left > 0, left, left))
        self.register_buffer("right_trans", empty(right > 0, right, right))
        self.register_buffer("clip_ratio", empty(spec.bits < 16, 2))

    def transform(self, x: Tensor) -> Tensor:
        """x·(P1 ⊗ P2), floating point in and out, [..., width]."""
        if self.left_trans is None and self.right_trans is None:
            return x
        if x.dtype == torch.float64:
            left = None if self.left_trans is None else self.left_trans.mT
            return kronecker_product(x, left, self.right_trans)
        return fq.ops.kronecker(x, self.left_trans, self.right_trans)

    def quantize(
        self,
        x: Tensor,
        *,
        gate: Tensor | None = None,
        channel_scale: Tensor | None = None,
        rms_eps: float | None = None,
    ) -> QuantizedActivation:
        """Codes of the transformed input; the spec's bits must be below 16."""
        layout = self.spec.layout(x.device)
        codes, scale, zero = fq.ops.kronecker_quantize(
            x,
            self.left_trans,
            self.right_trans,
            gate=gate,
            channel_scale=channel_scale,
            rms_eps=rms_eps,
            clip=self.clip_ratio,
            bits=self.spec.bits,
            symmetric=self.spec.symmetric,
            layout=layout,
        )
        return QuantizedActivation(
            shape=x.shape,
            dtype=x.dtype,
            device=x.device,
            codes=codes,
            scale=scale,
            zero=None if self.spec.symmetric else zero,
            layout=layout,
        )

    def prepare(self, x: Tensor) -> Activation:
        """Transform a plain input, and quantize it if the spec says so."""
        return self.quantize(x) if self.spec.bits < 16 else as_float(self.transform(x))


def as_float(value: Tensor) -> FloatActivation:
    """A transformed input that stays in floating point."""
    return FloatActivation(shape=value.shape, dtype=value.dtype, device=value.device, value=value)
