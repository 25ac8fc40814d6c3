"""How many bits a quantized model spends on a weight."""

from __future__ import annotations

from torch import nn

from flatquant.runtime.linear import QuantizedLinear

#: Buffers of a quantized linear or norm that stand for its weights, besides the codes.
_SIDE = ("weight_scale", "weight_zero", "weight_colsum", "kept_weight", "left_trans", "right_trans")


def bits_per_weight(model: nn.Module) -> float:
    """Bits for codes, scales and online transforms, over the number of quantized weights.

    16-bit weights count 16. What a scheme stores in floating point for want of a kernel counts as
    what its format needs.

    Raises:
        ValueError: the model has no quantized linear.
    """
    bits, weights = 0, 0
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            size = module.in_features * module.out_features
            weights += size
            bits += size * module.w_bits
        for name in _SIDE:
            buffer = getattr(module, name, None)
            if buffer is not None:
                bits += buffer.numel() * buffer.element_size() * 8
    if weights == 0:
        raise ValueError("bits_per_weight: the model has no quantized linear")
    return bits / weights
