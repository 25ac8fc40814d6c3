"""RMSNorm, transform and quantization in one module: what precedes q/k/v and gate/up."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flatquant.models.spec import norm_epsilon
from flatquant.runtime.activation import Activation, ActivationSpec, InputQuantizer


class QuantizedNorm(InputQuantizer):
    """RMSNorm whose output is the quantized, transformed input that its linears share.

    Codes do not depend on 1/rms, so the op quantizes the un-normalised row and multiplies the
    scale (docs/numerics.md, "Folded RMSNorm"). Buffer `weight` [width], float32 (float64 in a
    float64 model), is the norm's weight times the learned per-channel scale c.
    """

    exact = InputQuantizer.exact | {"weight"}
    weight: Tensor

    def __init__(
        self,
        spec: ActivationSpec,
        *,
        eps: float,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(spec, device=device)
        self.eps = eps
        self.register_buffer("weight", torch.empty(spec.width, dtype=dtype, device=device))

    @classmethod
    def empty_like(cls, norm: nn.Module, spec: ActivationSpec) -> QuantizedNorm:
        """An uninitialised replacement for an RMSNorm module, on its device."""
        weight = norm.get_parameter("weight")
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return cls(spec, eps=norm_epsilon(norm), dtype=dtype, device=weight.device)

    def forward(self, x: Tensor) -> Activation:
        """x: [..., width] residual stream."""
        if self.spec.to_codes:
            return self.quantize(x, channel_scale=self.weight, rms_eps=self.eps)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.as_float(self.transform((wide * self.weight).to(x.dtype)))

    def extra_repr(self) -> str:
        """For printing the model."""
        return f"{self.spec.width}, eps={self.eps}, bits={self.spec.bits}"
