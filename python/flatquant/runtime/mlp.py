"""The gated MLP with SiLU·mul fused in front of down_proj's transform and quantization."""

from __future__ import annotations

from torch import Tensor, nn

from flatquant.runtime.activation import Activation
from flatquant.runtime.linear import QuantizedLinear


class QuantizedMLP(nn.Module):
    """down(act(gate(x))·up(x)), child names as in the model it came from."""

    gate_proj: QuantizedLinear
    up_proj: QuantizedLinear
    down_proj: QuantizedLinear

    def __init__(
        self,
        gate_proj: QuantizedLinear,
        up_proj: QuantizedLinear,
        down_proj: QuantizedLinear,
        act_fn: nn.Module,
    ) -> None:
        super().__init__()
        self.gate_proj = gate_proj
        self.up_proj = up_proj
        self.down_proj = down_proj
        self.act_fn = act_fn
        self.fuses_silu = type(act_fn).__name__ in ("SiLU", "SiLUActivation")

    @classmethod
    def from_module(cls, mlp: nn.Module) -> QuantizedMLP:
        """Take over the children of a Hugging Face gated MLP."""
        return cls(mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn)  # type: ignore[arg-type]

    def forward(self, x: Tensor | Activation) -> Tensor:
        """x: hidden states, [..., hidden]."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.fuses_silu and self.down_proj.spec.to_codes:
            return self.down_proj(self.down_proj.quantize(up, gate=gate))
        return self.down_proj(self.act_fn(gate) * up)
