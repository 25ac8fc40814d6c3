"""The "flatquant" attention: every forward pass sees the quantized keys and values.

It is registered with transformers' attention interface, so no model code is copied: the model
applies RoPE and its own q/k norms, the cache (if any) quantizes, this function attends.
Without a cache, or with a foreign one, it quantizes K and V itself by the same ops, so that
perplexity without a cache and generation with one read the same codes.
"""

from __future__ import annotations

import types
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from flatquant.runtime.cache import ATTENTION, Int4Cache
from flatquant.runtime.kv import KVQuantizer
from flatquant.runtime.storage import PackedStates
from flatquant_cuda import library, ops

_LONGEST = {"amx": 512, "avx512": 64, "avx2": 32}
DECODE_QUERIES = _LONGEST.get(library.cpu_isa() if library.loaded else "", 16)
"""Longest query that is answered from the codes themselves; longer ones dequantize once.

Measured on one thread, query as long as the keys, SmolLM2 and Llama-7B in bfloat16: time of the
former over time of the latter. With AMX 0.5 to 0.8 up to 512 tokens, 0.9 to 1.1 at 1024, 1.1 to 1.4
at 2048; with AVX-512 0.5 at 16, 1.0 to 1.2 at 64; with AVX2 0.5 at 16, 1.3 to 1.5 at 64.
"""
_FEW_QUERIES = 16  # the same where there is no kernel but the reference

# arguments some model families pass that change the result and that we do not implement
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "head_mask")


def flatquant_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | PackedStates,
    value: Tensor | PackedStates,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over quantized keys and values; transformers' attention signature.

    Args:
        module: the attention module. Its `kv_quantizer` says how K and V are quantized; none
            means they are not. A `kv_fit` child (calibration) is called as
            `q, k, v = kv_fit(q, k, v)` instead and is followed by plain attention.
        query: [batch, heads, t, d] after RoPE.
        key: [batch, kv_heads, length, d] after RoPE, or what `Int4Cache` returned.
        value: the same.
        attention_mask: None, bool (True attends) or additive float, broadcastable to
            [batch, heads, t, length].
        dropout: probability, while training.
        scaling: factor on the scores; None is 1/sqrt(d).
        is_causal: whether None as a mask means causal; None asks the module.
        kwargs: what else transformers passes; the mask already covers sliding windows.

    Returns:
        [batch, t, heads, d] of the query's dtype, and None for the weights.

    Raises:
        ValueError: an argument that changes the result and is not supported, packed keys
            without a quantizer, or packed keys in calibration.
    """
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"flatquant attention: {name} is not supported")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    length = key.shape[2]
    if attention_mask is not None:
        attention_mask = attention_mask[..., :length]
    elif isinstance(key, Tensor) and isinstance(value, Tensor):
        queries = query.shape[2]
        if causal and 1 < queries < length:
            # a static cache at its first call: the rest of the keys is still empty
            key, value = key[:, :, :queries], value[:, :, :queries]
    query, key, value = _quantized(module, query, key, value)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    mask = attention_mask
    from_codes = (
        query.shape[2] <= (DECODE_QUERIES if query.device.type == "cpu" else _FEW_QUERIES)
        and dropout == 0.0
        and not (torch.is_grad_enabled() and query.requires_grad)  # the op has no gradient
    )
    if from_codes and _has_codes(key) and _has_codes(value):
        mask = _causal_mask(query, key) if mask is None and causal else mask
        out = _attend_packed(query, key, value, mask, scale)
    else:
        out = _attend_float(query, key, value, mask, scale, causal, dropout)
    return out.transpose(1, 2).contiguous(), None


def _quantized(
    module: nn.Module, query: Tensor, key: Tensor | PackedStates, value: Tensor | PackedStates
) -> tuple[Tensor, Tensor | PackedStates, Tensor | PackedStates]:
    """Query in the basis of the stored keys, and quantized K and V; nothing is done twice."""
    fit = getattr(module, "kv_fit", None)
    packed = isinstance(key, PackedStates) or isinstance(value, PackedStates)
    if fit is not None:
        if packed:
            raise ValueError("flatquant attention: calibration (kv_fit) needs use_cache=False")
        fitted: tuple[Tensor, Tensor, Tensor] = fit(query, key, value)
        return fitted
    quantizer = getattr(module, "kv_quantizer", None)
    if isinstance(key, PackedStates) or isinstance(value, PackedStates):
        if not isinstance(quantizer, KVQuantizer):
            raise ValueError("flatquant attention: packed keys, but the module has no kv_quantizer")
        exact_k, exact_v = getattr(key, "exact", None), getattr(value, "exact", None)
        if exact_k is not None or exact_v is not None:
            return query, key if exact_k is None else exact_k, value if exact_v is None else exact_v
        return quantizer.rotate_query(query), key, value
    if not isinstance(quantizer, KVQuantizer):
        return query, key, value
    if quantizer.attend_unquantized_prefill and 1 < query.shape[2] == key.shape[2]:
        return query, key, value
    keys, values = quantizer.store(key, value, capacity=key.shape[2])
    keys.append(key)
    values.append(value)
    return quantizer.rotate_query(query), keys.view(), values.view()


def _has_codes(states: Tensor | PackedStates) -> TypeGuard[PackedStates]:
    return isinstance(states, PackedStates) and states.has_codes


def _attend_packed(
    query: Tensor, key: PackedStates, value: PackedStates, mask: Tensor | None, scale: float
) -> Tensor:
    """Attention that reads the codes; [batch, heads, t, d]."""
    return ops.attention_decode(
        query,
        key.codes,
        key.scale,
        key.zero,
        value.codes,
        value.scale,
        value.zero,
        mask=mask,
        k_bits=key.bits,
        v_bits=value.bits,
        length=key.length,
        scaling=scale,
    )


def _attend_float(
    query: Tensor,
    key: Tensor | PackedStates,
    value: Tensor | PackedStates,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    dropout: float,
) -> Tensor:
    """Attention over the dequantized states; [batch, heads, t, d]."""
    square = query.shape[2] == key.shape[2]
    flag = causal and mask is None and query.shape[2] > 1 and square
    if causal and mask is None and not flag:
        mask = _causal_mask(query, key)
    out = scaled_dot_product_attention(
        query,
        key.dequantize(clean=True) if isinstance(key, PackedStates) else key,
        value.dequantize(clean=True) if isinstance(value, PackedStates) else value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=flag,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    poisoned = _poisoned(key, value)
    if poisoned is None:
        return out
    return _spread(out, poisoned, None if flag else mask, flag)


def _poisoned(key: Tensor | PackedStates, value: Tensor | PackedStates) -> Tensor | None:
    """bool [batch, kv_heads, length]: positions whose K or V held NaN or Inf."""
    packed = [states.poisoned() for states in (key, value) if isinstance(states, PackedStates)]
    if not packed:
        return None
    return packed[0] if len(packed) == 1 else packed[0] | packed[1]


def _spread(out: Tensor, poisoned: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """NaN for exactly the queries that attend to a poisoned position.

    The states there were dequantized to 0: a NaN would reach masked queries too, through
    0*NaN in the weighted sum.
    """
    if causal:  # query i attends to positions 0..i
        hit = (poisoned.cumsum(-1) > 0).unsqueeze(-1)
    elif mask is None:
        hit = poisoned.any(-1)[..., None, None]
    else:
        if not torch.compiler.is_compiling() and not bool(poisoned.any()):
            return out  # spares the product below, which is as large as the mask
        attended = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
        per_head = poisoned.repeat_interleave(out.shape[1] // poisoned.shape[1], dim=1)
        hit = (attended.to(torch.float32) @ per_head.unsqueeze(-1).to(torch.float32)) > 0
    if hit.shape[1] != out.shape[1]:
        hit = hit.repeat_interleave(out.shape[1] // hit.shape[1], dim=1)
    return out.masked_fill(hit, float("nan"))


def _causal_mask(query: Tensor, key: Tensor | PackedStates) -> Tensor | None:
    """bool [t, length] for queries that are the last t of the positions; None if all attend."""
    queries, length = query.shape[2], key.shape[2]
    if queries == 1:
        return None
    full = torch.ones(queries, length, dtype=torch.bool, device=query.device)
    return full.tril(length - queries)


def register() -> None:
    """Make the attention known to transformers; calling it again changes nothing."""
    AttentionInterface.register(ATTENTION, flatquant_attention)
    # without an entry of its own transformers would build no mask at all
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def activate(model: PreTrainedModel, *, attend_unquantized_prefill: bool | None = None) -> None:
    """Give a model the "flatquant" attention, and `generate` an `Int4Cache`; idempotent.

    Args:
        model: a transformers model whose attention modules have a `kv_quantizer` (or will).
        attend_unquantized_prefill: set this option on every quantizer; None leaves it alone.
    """
    register()
    model.set_attn_implementation(ATTENTION)
    if attend_unquantized_prefill is not None:
        for module in model.modules():
            if isinstance(module, KVQuantizer):
                module.attend_unquantized_prefill = attend_unquantized_prefill
    if hasattr(type(model), "_prepare_cache_for_generation"):
        # a bound method, because copy.deepcopy(model) rebinds those to the copy
        model._prepare_cache_for_generation = types.MethodType(_prepare_cache, model)


def _prepare_cache(
    model: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> None:
    """`_prepare_cache_for_generation` of a KV-quantized model."""
    wanted = (
        generation_config.use_cache is not False
        and generation_config.cache_implementation in (None, "dynamic", "dynamic_full")
        and model_kwargs.get("past_key_values") is None
        and model.config._attn_implementation == ATTENTION
    )
    if not wanted:
        prepare = type(model)._prepare_cache_for_generation
        prepare(model, generation_config, model_kwargs, *args, **kwargs)
        return
    cache = Int4Cache(model)
    mode = str(args[0]) if args else ""
    if getattr(generation_config, "is_assistant", False) or "assisted" in mode.lower():
        cache.activate_past_recording()  # rejected tokens are rolled back
    model_kwargs["past_key_values"] = cache


__all__ = ["DECODE_QUERIES", "KVQuantizer", "activate", "flatquant_attention", "register"]
