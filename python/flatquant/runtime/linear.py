"""A linear layer on packed 4-bit weights and quantized inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import flatquant_cuda as fq
from flatquant.formats import INTEGER, Format
from flatquant.runtime.activation import (
    Activation,
    ActivationSpec,
    FloatActivation,
    InputQuantizer,
    QuantizedActivation,
)
from flatquant.scheme import Scheme
from flatquant.weights.base import dequantized


class QuantizedLinear(InputQuantizer):
    """y = x·Wᵀ + b from codes: `gemm_w4a4`, `gemm_w4a8`, `gemm_w8a8` or `gemm_w4a16`.

    Buffers: weight_packed uint8 [out, ceil(in/2)] (2-bit weights with floating-point inputs:
    four a byte; more than 4 bits: int8 [out, in]), weight_scale float32 [out] or [out, groups],
    weight_colsum int32 [out] for asymmetric inputs, weight_zero float32 like the scale for
    asymmetric weights, kept_weight [out, kept] of input channels that stay in floating point,
    weight [out, in] where W is 16, bias.
    Where the linear alone reads its input, it holds the transform too: left_trans, right_trans
    and clip_ratio.

    What no kernel computes (floating-point weights with quantized inputs, weights above 4 bits
    with floating-point inputs, asymmetric weights, other formats) runs simulated; `kernel` says
    so.
    """

    exact = InputQuantizer.exact | {"weight_scale", "weight_zero"}
    weight_packed: Tensor | None
    weight_scale: Tensor | None
    weight_zero: Tensor | None
    weight_colsum: Tensor | None
    weight: Tensor | None
    kept_weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        spec: ActivationSpec,
        *,
        bias: bool,
        online: bool,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(spec, online=online, device=device)
        self.in_features = in_features
        self.out_features = out_features
        self.w_bits, self.a_bits = scheme.w_bits, spec.bits
        self.w_format = scheme.weights
        self.kernel = _kernel_of(scheme.weights, spec)
        self.simulate = False
        quantized = self.w_bits < 16

        def empty(present: bool, *shape: int, kind: torch.dtype) -> Tensor | None:
            return torch.empty(*shape, dtype=kind, device=device) if present else None

        packed = self._packed_width()
        storage = torch.int8 if 4 < self.w_bits < 16 else torch.uint8
        block = scheme.weights.block
        groups = () if block is None else (in_features // block,)
        self.register_buffer("weight_packed", empty(quantized, out_features, packed, kind=storage))
        self.register_buffer(
            "weight_scale", empty(quantized, out_features, *groups, kind=torch.float32)
        )
        shifted = quantized and spec.to_codes and not spec.symmetric
        self.register_buffer("weight_colsum", empty(shifted, out_features, kind=torch.int32))
        self.register_buffer(
            "weight_zero",
            empty(quantized and not scheme.w_symmetric, out_features, *groups, kind=torch.float32),
        )
        self.register_buffer("weight", empty(not quantized, out_features, in_features, kind=dtype))
        self.register_buffer(
            "kept_weight", empty(spec.kept > 0, out_features, spec.kept, kind=dtype)
        )
        self.register_buffer("bias", empty(bias, out_features, kind=dtype))

    @classmethod
    def empty_like(
        cls,
        linear: nn.Linear,
        scheme: Scheme,
        spec: ActivationSpec,
        *,
        online: bool,
    ) -> QuantizedLinear:
        """An uninitialised replacement for `linear`, on its device.

        Raises:
            ValueError: the layer's input is not as wide as the family's geometry says.
        """
        if linear.in_features != spec.width:
            raise ValueError(
                f"linear has in_features={linear.in_features}, the config implies {spec.width}"
            )
        return cls(
            linear.in_features,
            linear.out_features,
            scheme,
            spec,
            bias=linear.bias is not None,
            online=online,
            dtype=linear.weight.dtype,
            device=linear.weight.device,
        )

    def _packed_width(self) -> int:
        if 4 < self.w_bits < 16:
            return self.in_features
        per_byte = 4 if self.w_bits == 2 and self.a_bits == 16 else 2
        return -(-self.in_features // per_byte)

    def forward(self, x: Tensor | Activation) -> Tensor:
        """x: [..., in], or the input that a norm has prepared."""
        if isinstance(x, Tensor):
            if not self.online:
                raise TypeError(
                    "this linear shares its input with others: it expects what the norm in front "
                    "of it prepared, not a tensor"
                )
            x = self.prepare(x)
        out = self._product(x)
        if x.kept is None or self.kept_weight is None:
            return out
        return out + linear(x.kept.to(self.kept_weight.dtype), self.kept_weight).to(out.dtype)

    def _product(self, x: Activation) -> Tensor:
        """All but the channels that stay in floating point."""
        simulated = self.simulate or self.kernel == "simulated" or x.dtype == torch.float64
        if isinstance(x, FloatActivation):
            if simulated:
                return self._simulated_float(x.value).to(x.dtype)
            return self._gemm_float(x.value)
        assert isinstance(x, QuantizedActivation)
        if not simulated:
            return self._gemm_integer(x)
        if self.kernel == "simulated":
            value = self._input_codes(x).float() * x.scale.unsqueeze(-1)
            return self._simulated_float(value).to(x.dtype)
        return self._simulated_integer(x)

    def _gemm_integer(self, x: QuantizedActivation) -> Tensor:
        packed, scale = self._weight()
        if self.w_bits > 4:
            gemm = fq.ops.gemm_w8a8
        else:
            nibbles = self.a_bits <= 4 and x.layout == fq.packing.PACKED
            gemm = fq.ops.gemm_w4a4 if nibbles else fq.ops.gemm_w4a8
        return gemm(
            x.codes,
            x.scale,
            packed,
            scale,
            a_zero=x.zero,
            w_colsum=self.weight_colsum,
            bias=self.bias,
            out_dtype=x.dtype,
        )

    def _gemm_float(self, value: Tensor) -> Tensor:
        packed, scale = self._weight()
        scale = scale.unsqueeze(-1) if scale.dim() == 1 else scale
        return fq.ops.gemm_w4a16(value, packed, scale, bias=self.bias, bits=self.w_bits)

    def _simulated_integer(self, x: QuantizedActivation) -> Tensor:
        """The integer GEMM's numbers without it: float64 products of codes are exact."""
        _, scale = self._weight()
        accumulator = self._input_codes(x).double() @ self.weight_codes().double().mT
        out = accumulator.to(torch.float32) * (x.scale.unsqueeze(-1) * scale)
        return (out if self.bias is None else out + self.bias.to(torch.float32)).to(x.dtype)

    def _simulated_float(self, value: Tensor) -> Tensor:
        wide = torch.promote_types(value.dtype, torch.float32)
        out = value.to(wide) @ self.dequantized_weight(wide).mT
        return out if self.bias is None else out + self.bias.to(wide)

    def _weight(self) -> tuple[Tensor, Tensor]:
        if self.weight_packed is None or self.weight_scale is None:
            raise TypeError("this linear has no packed weight (W is 16 bits)")
        return self.weight_packed, self.weight_scale

    def weight_codes(self) -> Tensor:
        """Integer codes of the weight, int8 [out, in]."""
        packed, _ = self._weight()
        if self.w_bits > 4:
            return packed
        if self.w_bits == 2 and self.a_bits == 16:
            return fq.packing.unpack(packed, 2, self.in_features)
        return fq.packing.unpack_nibbles(packed, self.in_features, True)

    def dequantized_weight(self, dtype: torch.dtype) -> Tensor:
        """The whole weight in floating point, [out, in], in the transformed basis."""
        if self.weight is not None:
            return self.weight.to(dtype)
        _, scale = self._weight()
        number = self.w_format.number
        name = None if number is None else number.name
        weight = dequantized(self.weight_codes(), scale, self.weight_zero, name, dtype)
        if self.kept is None or self.kept_weight is None:
            return weight
        return weight.index_copy(1, self.kept, self.kept_weight.to(dtype))

    def _input_codes(self, x: QuantizedActivation) -> Tensor:
        """Codes minus zero points, int32 [..., in]."""
        codes = fq.packing.unpack_activation(
            x.codes, self.in_features, self.a_bits, x.layout, x.zero is None
        ).to(torch.int32)
        return codes if x.zero is None else codes - x.zero.unsqueeze(-1)

    def extra_repr(self) -> str:
        """For printing the model."""
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, "
            f"w_bits={self.w_bits}, a_bits={self.a_bits}, kernel={self.kernel}"
        )


def _kernel_of(weights: Format, spec: ActivationSpec) -> str:
    """The op that computes products of these weights and inputs."""
    w_bits, a_bits = weights.bits, spec.bits
    if spec.simulated is not None or weights.kind != INTEGER or not weights.symmetric:
        return "simulated"
    if w_bits > 4:
        return "gemm_w8a8" if w_bits <= 8 and a_bits <= 8 else "simulated"
    if a_bits <= 4:
        # codes lie in bytes where another linear with wider weights reads them
        return "gemm_w4a8" if spec.wide_weights else "gemm_w4a4"
    return "gemm_w4a8" if a_bits <= 8 else "gemm_w4a16"
