"""A linear in learnable form: bases of input and output, weight clip, fake-quantized weight."""

from __future__ import annotations

from torch import Tensor, nn

from flatquant.clips import ClipSetting, clamped, make_clip
from flatquant.fakequant import simulate_around
from flatquant.fit.group import GroupFit
from flatquant.fit.precision import linear, transform_rows
from flatquant.fit.rounding import SoftRounding
from flatquant.scheme import Scheme
from flatquant.transforms.base import FrozenTransform


def transformed_weight(
    weight: Tensor,
    bias: Tensor | None,
    matrices: FrozenTransform,
    channel: Tensor | None,
    output: FrozenTransform | None,
    input_right: FrozenTransform | None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """W' and b' of a linear whose input and output change basis.

    Args:
        weight: [out, in].
        bias: [out] or None.
        matrices: transform of the input.
        channel: per-channel scale c of the input [in], or None.
        output: P_v, for v_proj: W' = P_vᵀ·W in every head, b' likewise.
        input_right: P_v, for o_proj: the right factor of its input's transform, merged in v_proj.
        rows: c of o_proj's input [out], for v_proj, before P_v mixes its outputs.
    """
    if rows is not None:
        weight = rows[:, None] * weight
        bias = None if bias is None else rows * bias
    if output is not None and output.right is not None:
        right = output.right.to(weight.dtype)
        head_dim = right.shape[0]
        shape = weight.shape
        weight = (right.mT @ weight.reshape(-1, head_dim, shape[1])).reshape(shape)
        if bias is not None:
            bias = (bias.reshape(-1, head_dim) @ right).reshape(-1)
    if channel is not None:
        weight = weight / channel
    if input_right is not None:
        matrices = FrozenTransform(
            left_inv_t=matrices.left_inv_t, right_inv_t=input_right.right_inv_t
        )
    return transform_rows(weight, matrices, inverse=True), bias


class LinearFit(nn.Module):
    """A linear with a learnable input basis, output basis and scale (v_proj), and weight clip."""

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        module: nn.Linear,
        group: GroupFit,
        *,
        online: bool,
        clip: ClipSetting = 1.0,
        early_clip: bool = False,
        amp: bool,
        scheme: Scheme | None = None,
    ) -> None:
        """`scheme`: of the weight; None is the group's."""
        super().__init__()
        self.early_clip = early_clip
        self.register_buffer("weight", module.weight.detach().clone())
        self.register_buffer("bias", None if module.bias is None else module.bias.detach().clone())
        self.group = group
        self.online = online
        self.amp = amp
        self.scheme = scheme = scheme or group.scheme
        scheme.check_width(module.in_features)
        rows = module.out_features
        if scheme.weights.block is not None and not early_clip:
            rows *= module.in_features // scheme.weights.block
        self.clip = make_clip(clip, rows) if scheme.quantizes_weights else None
        self.input_right: FrozenTransform | None = None
        self.output: FrozenTransform | None = None
        self.rows: Tensor | None = None
        self.effective: Tensor | None = None
        self.effective_bias: Tensor | None = None
        self.fixed: Tensor | None = None
        self.rounding: SoftRounding | None = None
        self.kept_weight: Tensor | None = None

    def transformed(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias in the bases of input and output, before quantization."""
        group = self.group
        return transformed_weight(
            self.early(self.weight),
            self.bias,
            group.now,
            group.channel,
            self.output,
            self.input_right,
            self.rows,
        )

    def early(self, weight: Tensor) -> Tensor:
        """The weight [out, in] as it goes into the transforms: clamped where clips come first."""
        if not self.early_clip or self.clip is None:
            return weight
        return clamped(weight, self.clip.ratios())

    def late_clip(self) -> Tensor | None:
        """Clip ratios of the transformed weight's grid, [2, out] or [2, out·groups]."""
        return None if self.early_clip or self.clip is None else self.clip.ratios()

    def refresh(self) -> None:
        """Compute the fake-quantized weight for the next forward pass."""
        weight, self.effective_bias = self.transformed()
        if self.fixed is not None:
            self.effective = self.fixed
            return
        if self.rounding is not None:
            self.effective = self.rounding()
            return
        clip, kept = self.late_clip(), self.group.kept
        self.effective = simulate_around(weight, kept, self.scheme.weights, clip)

    def forward(self, x: Tensor) -> Tensor:
        """x: the group's fake-quantized input, or the raw input where this linear is alone."""
        x = x.to(self.weight.dtype)  # attention may have run in bfloat16
        if self.online:
            x = self.group.activation(x)
        if self.effective is None:
            raise RuntimeError("LinearFit: refresh() must run before forward()")
        return linear(x, self.effective, self.effective_bias, amp=self.amp)
