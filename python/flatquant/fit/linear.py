"""A linear in learnable form: bases of input and output, weight clip, fake-quantized weight."""

from __future__ import annotations

from torch import Tensor, nn

from flatquant.clips import ClipSetting, make_clip
from flatquant.fakequant import fake_quantize
from flatquant.fit.group import GroupFit
from flatquant.fit.precision import linear, transform_rows
from flatquant.transforms.base import FrozenTransform


def transformed_weight(
    weight: Tensor,
    bias: Tensor | None,
    matrices: FrozenTransform,
    channel: Tensor | None,
    output: FrozenTransform | None,
    input_right: FrozenTransform | None,
) -> tuple[Tensor, Tensor | None]:
    """W' and b' of a linear whose input and output change basis.

    Args:
        weight: [out, in].
        bias: [out] or None.
        matrices: transform of the input.
        channel: per-channel scale c of the input [in], or None.
        output: P_v, for v_proj: W' = P_vᵀ·W in every head, b' likewise.
        input_right: P_v, for o_proj: the right factor of its input's transform, merged in v_proj.
    """
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
    """A linear with a learnable input basis, output basis (v_proj) and weight clip."""

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        module: nn.Linear,
        group: GroupFit,
        *,
        online: bool,
        clip: ClipSetting = 1.0,
        amp: bool,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", module.weight.detach().clone())
        self.register_buffer("bias", None if module.bias is None else module.bias.detach().clone())
        self.group = group
        self.online = online
        self.amp = amp
        scheme = group.scheme
        scheme.check_width(module.in_features)
        rows = module.out_features
        self.clip = make_clip(clip, rows) if scheme.quantizes_weights else None
        self.input_right: FrozenTransform | None = None
        self.output: FrozenTransform | None = None
        self.effective: Tensor | None = None
        self.effective_bias: Tensor | None = None
        self.fixed: Tensor | None = None

    def transformed(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias in the bases of input and output, before quantization."""
        group = self.group
        return transformed_weight(
            self.weight, self.bias, group.now, group.channel, self.output, self.input_right
        )

    def refresh(self) -> None:
        """Compute the fake-quantized weight for the next forward pass."""
        weight, self.effective_bias = self.transformed()
        if self.fixed is not None:
            self.effective = self.fixed
            return
        scheme = self.group.scheme
        clip = None if self.clip is None else self.clip.ratios()
        if scheme.w_group is None:
            self.effective = fake_quantize(weight, scheme.w_bits, clip, symmetric=True)
            return
        groups = weight.reshape(-1, scheme.w_group)
        if clip is not None:
            clip = clip.repeat_interleave(weight.shape[1] // scheme.w_group, dim=1)
        self.effective = fake_quantize(groups, scheme.w_bits, clip, symmetric=True).reshape(
            weight.shape
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: the group's fake-quantized input, or the raw input where this linear is alone."""
        x = x.to(self.weight.dtype)  # attention may have run in bfloat16
        if self.online:
            x = self.group.activation(x)
        if self.effective is None:
            raise RuntimeError("LinearFit: refresh() must run before forward()")
        return linear(x, self.effective, self.effective_bias, amp=self.amp)
