"""A quantized input on its way from the norm that made it to the linears that share it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

import flatquant_cuda as fq
from flatquant.fakequant import simulate
from flatquant.formats import Format
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
        simulated: a format that no kernel quantizes to; None is the integers of `bits`.
        kept: channels that stay in floating point.
    """

    width: int
    bits: int
    symmetric: bool
    left: int
    right: int
    wide_weights: bool = False
    simulated: Format | None = None
    kept: int = 0

    @property
    def to_codes(self) -> bool:
        """Whether a kernel makes integer codes of the input."""
        return self.bits < 16 and self.simulated is None

    def layout(self, device: torch.device) -> int:
        """How the codes lie in memory, so that the linears' GEMM on `device` can read them."""
        return fq.packing.BYTES if self.wide_weights else fq.activation_layout(device)


@dataclass(frozen=True, kw_only=True)
class Activation:
    """An input that its norm has prepared for the linears that share it.

    It stands in for the hidden states between a norm and q/k/v or gate/up, so it has the
    attributes that modelling code reads there: shape, dtype and device.

    `kept` [..., n] are the channels that stay in floating point, if any; the others' numbers
    hold 0 there.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    kept: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class FloatActivation(Activation):
    """A transformed input in floating point (A is 16 bits, or simulated), [..., width]."""

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

    Buffers: left_trans (P1ᵀ) [n1, n1], right_trans (P2) [n2, n2], both float32, clip_ratio
    float32 [2] = (max, min), span float32 [2] = (max, −min) of a static range, and kept int64
    [n], the channels that stay in floating point, each only where the spec asks for it.
    """

    exact = frozenset({"left_trans", "right_trans", "clip_ratio", "span"})
    left_trans: Tensor | None
    right_trans: Tensor | None
    clip_ratio: Tensor | None
    span: Tensor | None
    kept: Tensor | None

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
        static = spec.simulated is not None and spec.simulated.static
        self.register_buffer("span", empty(static, 2))
        # also where the input arrives prepared: a linear's kept weights belong to these channels
        kept = torch.empty(spec.kept, dtype=torch.int64, device=device) if spec.kept > 0 else None
        self.register_buffer("kept", kept)

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
        """Codes of the transformed input; the spec must ask for codes."""
        layout = self.spec.layout(x.device)
        kept = None
        if self.kept is not None:
            kept = self._kept_values(x, gate, channel_scale, rms_eps)
            # a channel whose scale is 0 has no part in the grid of its token, and gets code 0
            if channel_scale is None:
                channel_scale = torch.ones(self.spec.width, dtype=torch.float32, device=x.device)
            channel_scale = channel_scale.index_fill(0, self.kept, 0.0)
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
            kept=kept,
        )

    def _kept_values(
        self,
        x: Tensor,
        gate: Tensor | None,
        channel_scale: Tensor | None,
        rms_eps: float | None,
    ) -> Tensor:
        """The channels that stay, of an input that is gated, scaled and normalised meanwhile."""
        assert self.kept is not None
        wide = torch.promote_types(x.dtype, torch.float32)
        values = x.index_select(-1, self.kept).to(wide)
        if gate is not None:
            values = silu(gate.index_select(-1, self.kept).to(wide)) * values
        if channel_scale is not None:
            values = values * channel_scale[self.kept].to(wide)
        if rms_eps is not None:
            values = values * torch.rsqrt(x.to(wide).pow(2).mean(-1, keepdim=True) + rms_eps)
        return values.to(x.dtype)

    def prepare(self, x: Tensor) -> Activation:
        """Transform a plain input, and quantize it if the spec says so."""
        return self.quantize(x) if self.spec.to_codes else self.as_float(self.transform(x))

    def as_float(self, value: Tensor) -> FloatActivation:
        """A transformed input that stays in floating point, in the numbers of a simulated format.

        Those are float32 whatever the model's dtype is: a product of number and scale would not
        fit 16 bits.
        """
        dtype, kept = value.dtype, None
        if self.kept is not None:
            kept = value.index_select(-1, self.kept)
            value = value.index_fill(-1, self.kept, 0.0)
        if self.spec.simulated is not None:
            wide = value.to(torch.promote_types(dtype, torch.float32))
            value = simulate(wide, self.spec.simulated, self.clip_ratio, self.span)
        return FloatActivation(
            shape=value.shape, dtype=dtype, device=value.device, value=value, kept=kept
        )
