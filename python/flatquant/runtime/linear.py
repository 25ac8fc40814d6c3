"""A linear layer on packed 4-bit weights and quantized inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import flatquant_cuda as fq
from flatquant.runtime.activation import (
    Activation,
    ActivationSpec,
    FloatActivation,
    InputQuantizer,
    QuantizedActivation,
)
from flatquant.scheme import Scheme


class QuantizedLinear(InputQuantizer):
    """y = x·Wᵀ + b from codes: `gemm_w4a4`, `gemm_w4a8`, `gemm_w8a8` or `gemm_w4a16`.

    Buffers: weight_packed uint8 [out, ceil(in/2)] (2-bit weights with floating-point inputs:
    four a byte; more than 4 bits: int8 [out, in]), weight_scale float32 [out] or [out, groups],
    weight_colsum int32 [out] for asymmetric inputs, weight [out, in] where W is 16, bias.
    Where the linear alone reads its input, it holds the transform too: left_trans, right_trans
    and clip_ratio.

    Bit widths for which no kernel exists (floating-point weights with quantized inputs, or
    weights above 4 bits with floating-point inputs) run simulated; `kernel` says so.
    """

    exact = InputQuantizer.exact | {"weight_scale"}
    weight_packed: Tensor | None
    weight_scale: Tensor | None
    weight_colsum: Tensor | None
    weight: Tensor | None
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
        self.w_group = scheme.w_group
        self.kernel = _kernel_of(self.w_bits, self.a_bits)
        self.simulate = False
        quantized = self.w_bits < 16

        def empty(present: bool, *shape: int, kind: torch.dtype) -> Tensor | None:
            return torch.empty(*shape, dtype=kind, device=device) if present else None

        packed = self._packed_width()
        storage = torch.int8 if 4 < self.w_bits < 16 else torch.uint8
        scheme.check_width(in_features)
        groups = () if self.w_group is None else (in_features // self.w_group,)
        self.register_buffer("weight_packed", empty(quantized, out_features, packed, kind=storage))
        self.register_buffer(
            "weight_scale", empty(quantized, out_features, *groups, kind=torch.float32)
        )
        self.register_buffer(
            "weight_colsum",
            empty(
                quantized and not spec.symmetric and spec.bits < 16, out_features, kind=torch.int32
            ),
        )
        self.register_buffer("weight", empty(not quantized, out_features, in_features, kind=dtype))
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
        simulated = self.simulate or self.kernel == "simulated" or x.dtype == torch.float64
        if isinstance(x, FloatActivation):
            return self._simulated_float(x.value) if simulated else self._gemm_float(x.value)
        assert isinstance(x, QuantizedActivation)
        if not simulated:
            return self._gemm_integer(x)
        if self.w_bits == 16:
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
        return (out if self.bias is None else out + self.bias.to(wide)).to(value.dtype)

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
        """The weight in floating point, [out, in], in the transformed basis."""
        if self.weight is not None:
            return self.weight.to(dtype)
        _, scale = self._weight()
        scale = scale.unsqueeze(-1) if scale.dim() == 1 else scale
        repeats = self.in_features // scale.shape[1]
        return self.weight_codes().to(dtype) * scale.to(dtype).repeat_interleave(repeats, dim=1)

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


def _kernel_of(w_bits: int, a_bits: int) -> str:
    if w_bits > 4:
        return "gemm_w8a8" if w_bits <= 8 and a_bits <= 8 else "simulated"
    if a_bits <= 4:
        return "gemm_w4a4"
    return "gemm_w4a8" if a_bits <= 8 else "gemm_w4a16"
