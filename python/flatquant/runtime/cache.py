"""`Int4Cache`: the transformers cache that stores keys and values as packed codes.

A layer quantizes what it is given, once, and hands the packed codes to the "flatquant"
attention. With any other attention (the user chose "sdpa", say) it hands out dequantized keys
and values in the model's own basis, so that every model and every attention works, slower.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from flatquant.runtime.kv import KVQuantizer
from flatquant.runtime.storage import Lockstep, PackedStates, Storage

ATTENTION = "flatquant"
"""Name of our attention function among transformers' attention implementations."""

_FIRST_CAPACITY = 64
# transformers 5.2x gave `crop` a new meaning: tokens to remove, as a negative number
_CROP_REMOVES = "tokens_to_remove" in inspect.signature(DynamicLayer.crop).parameters


class Int4Layer(DynamicLayer):
    """Packed keys and values of one attention layer.

    Args:
        attention: the attention module, which has a `kv_quantizer`; shared, not copied.
        sliding_window: tokens a query attends to, itself included; None for all. What no
            later query can see is dropped from time to time.
    """

    def __init__(self, attention: nn.Module, sliding_window: int | None = None) -> None:
        super().__init__()
        quantizer = attention.kv_quantizer
        if not isinstance(quantizer, KVQuantizer):
            raise TypeError(f"Int4Layer: kv_quantizer is a {type(quantizer).__name__}")
        self.quantizer = quantizer
        self.config: Any = attention.config
        self.is_sliding = sliding_window is not None
        self.sliding_window = sliding_window
        self.record_past = False
        self.dropped = 0  # positions before the first stored one
        self.key_store: Storage | None = None
        self.value_store: Storage | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Int4Layer:
        """A copy with its own storage; quantizer and config are the model's."""
        twin = copy.copy(self)
        twin.key_store = copy.deepcopy(self.key_store, memo)
        twin.value_store = copy.deepcopy(self.value_store, memo)
        return twin

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Allocate storage for states like these [batch, kv_heads, t, head_dim]."""
        capacity = max(_FIRST_CAPACITY, key_states.shape[2])
        values = key_states if value_states is None else value_states
        self.key_store, self.value_store = self.quantizer.store(key_states, values, capacity)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor | PackedStates, Tensor | PackedStates]:
        """Append K and V [batch, kv_heads, t, head_dim] and return all that is stored.

        Returns `PackedStates` (a float tensor for a width of 16) if the model's attention is
        "flatquant", else float tensors [batch, kv_heads, length, head_dim] in the model's basis.

        Raises:
            ValueError: the batch size is not that of what is stored.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.stores()
        stored, given = keys.tensors[0].shape[0], key_states.shape[0]
        if stored != given:
            raise ValueError(f"Int4Cache: the cache has batch {stored}, the new keys have {given}")
        first = keys.length + self.dropped == 0
        keys.append(key_states)
        values.append(value_states)
        result: tuple[Tensor | PackedStates, Tensor | PackedStates]
        if self.config._attn_implementation == ATTENTION:
            exact = first and key_states.shape[2] > 1 and self.quantizer.attend_unquantized_prefill
            result = (
                keys.view(key_states if exact else None),
                values.view(value_states if exact else None),
            )
        else:
            result = self.dequantize()
        # twice the window before dropping, so that the copying costs a constant per token
        if self.sliding_window is not None and keys.length >= 2 * self.sliding_window:
            self._forget_invisible()
        return result

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """Stored K and V as floats [batch, kv_heads, stored length, head_dim], model's basis."""
        keys, values = self.stores()
        return self.quantizer.restore_key(keys.dequantize()), values.dequantize()

    def get_seq_length(self, *args: Any) -> int:
        """Tokens seen, dropped ones included."""
        return self.dropped + (0 if self.key_store is None else self.key_store.length)

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Number of keys the next call returns, and the position of the first of them."""
        # transformers 4.57 passes the queries' positions, 5.x their number
        new = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self.get_seq_length() - self.dropped + new, self.dropped

    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(store.nbytes() for store in self._filled())

    def reset(self) -> None:
        """Forget everything and free the memory."""
        for store in self._filled():
            store.break_step()
        self.key_store = self.value_store = None
        self.dropped = 0
        self.is_initialized = False

    def activate_past_recording(self) -> None:
        """Drop nothing of a sliding window until `crop` (assisted generation)."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens: -n of them, or all after the first n if n is positive.

        0 means what it means in the installed transformers: nothing from 5.2x on, all before.

        Raises:
            ValueError: a sliding layer has already dropped tokens the next query could see.
        """
        if self.key_store is None:
            return
        length = self.get_seq_length()
        if tokens_to_remove > 0 or (tokens_to_remove == 0 and not _CROP_REMOVES):
            target = min(tokens_to_remove, length)
        else:
            target = max(length + tokens_to_remove, 0)
        visible = target if self.sliding_window is None else min(target, self.sliding_window - 1)
        if target - self.dropped < visible:
            raise ValueError(
                f"Int4Cache: crop from {length} to {target} tokens needs tokens from position "
                f"{target - visible} on, but those before {self.dropped} were dropped "
                f"(sliding window {self.sliding_window}); call activate_past_recording() first"
            )
        for store in self._filled():
            store.length = target - self.dropped
        if self.record_past:
            self._forget_invisible(keep_past=True)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Batch row i becomes the old row beam_idx[i]."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these batch rows, in this order."""
        for store in self._filled():
            store.map(lambda t: t[indices.to(t.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row."""
        for store in self._filled():
            store.map(lambda t: t.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        """Move the storage to the CPU."""
        for store in self._filled():
            store.map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move the storage back to the layer's device."""
        for store in self._filled():
            store.map(lambda t: t.to(self.device, non_blocking=True))

    def stores(self) -> tuple[Storage, Storage]:
        """Storages of keys and values.

        Raises:
            ValueError: the layer holds nothing yet.
        """
        if self.key_store is None or self.value_store is None:
            raise ValueError("Int4Cache: this layer holds nothing yet")
        return self.key_store, self.value_store

    def _filled(self) -> Iterator[Storage]:
        return (store for store in (self.key_store, self.value_store) if store is not None)

    def _forget_invisible(self, keep_past: bool = False) -> None:
        """Drop what is before the window of the next token."""
        keys, values = self.stores()
        if self.sliding_window is None or (self.record_past and not keep_past):
            return
        surplus = keys.length - (self.sliding_window - 1)
        if surplus > 0:
            keys.keep_last(keys.length - surplus)
            values.keep_last(values.length - surplus)
            self.dropped += surplus


class Int4Cache(Cache):
    """Packed 4-bit (any width of 2..8) key-value cache of a quantized model.

    `model.generate` uses one by default; `past_key_values=Int4Cache(model)` works too. Beams,
    padded batches, several returned sequences, cropping and deep copies are supported. Layers
    whose attention has no quantizer keep transformers' own cache layer.

    Args:
        model: a model whose attention modules have a `kv_quantizer`.

    Attributes:
        lockstep: what fills the storages of all layers together, if anything does.

    Raises:
        ValueError: no attention module has a quantizer, or a quantized layer is of a kind
            other than full or sliding-window attention.
    """

    lockstep: Lockstep | None = None

    def __init__(self, model: PreTrainedModel) -> None:
        layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
        quantized = {
            module.layer_idx: module
            for module in model.modules()
            if isinstance(getattr(module, "kv_quantizer", None), KVQuantizer)
        }
        if not quantized:
            raise ValueError(
                f"Int4Cache: no attention module of this {type(model).__name__} has a "
                "kv_quantizer; quantize the model with a scheme such as W4A4KV4 first"
            )
        for index, attention in quantized.items():
            kind = type(layers[index])
            if kind not in (DynamicLayer, DynamicSlidingWindowLayer):
                raise ValueError(
                    f"Int4Cache: layer {index} needs a {kind.__name__}; only full and "
                    "sliding-window attention can be quantized"
                )
            layers[index] = Int4Layer(attention, getattr(layers[index], "sliding_window", None))
        super().__init__(layers=layers)
        self._in_step = list(self.layers)  # those that `lockstep` is of

    def in_step(
        self,
        owner: object,
        quantizers: Sequence[KVQuantizer],
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Lockstep | None:
        """Storages of all layers, with room for keys and values of a shape.

        Args:
            owner: who will fill them, by writing the tensors and advancing the length.
            quantizers: those it uses, layer by layer.
            shape: [batch, kv_heads, t, head_dim] of what it will add.
            dtype: of the states.
            device: of the states.

        Returns:
            None if the layers differ in what they hold, or cannot hold this.
        """
        step = self.lockstep
        if (
            step is None
            or not step.active
            or step.owner is not owner
            or self._in_step != self.layers
        ):
            self._in_step = list(self.layers)
            states = torch.empty((), dtype=dtype, device=device).expand(shape)
            stores = _alike(self.layers, quantizers, states)
            step = self.lockstep = None if stores is None else Lockstep(stores, owner)
        if step is None or (step.batch, step.dtype, step.device) != (shape[0], dtype, device):
            return None
        if step.length + shape[2] > step.capacity:
            for store in step.storages:
                store.reserve(shape[2])
            step = self.lockstep = Lockstep(step.storages, owner)
        return step

    def nbytes(self) -> int:
        """Bytes allocated for keys and values in all layers."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, Int4Layer):
                total += layer.nbytes()
            else:
                states = (layer.keys, layer.values)
                total += sum(t.numel() * t.element_size() for t in states if t is not None)
        return total

    def activate_past_recording(self) -> None:
        """Keep what sliding windows would drop until `crop` (assisted generation)."""
        for layer in self.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()


def _alike(
    layers: Sequence[Any], quantizers: Sequence[KVQuantizer], states: Tensor
) -> list[Storage] | None:
    """Storages of keys and values of all layers, if they hold codes of equally many tokens."""
    if len(layers) != len(quantizers):
        return None
    stores: list[Storage] = []
    for layer, quantizer in zip(layers, quantizers, strict=True):
        if type(layer) is not Int4Layer or layer.quantizer is not quantizer or layer.dropped:
            return None
        if not layer.is_initialized:
            layer.lazy_initialization(states)
        keys, values = layer.stores()
        if not quantizer.fills(keys, values):
            return None
        stores += (keys, values)
    kinds = {
        (store.length, store.tensors[0].shape[0], store.dtype, store.tensors[0].device)
        for store in stores
    }
    return stores if len(kinds) == 1 else None


__all__ = ["ATTENTION", "Int4Cache", "Int4Layer"]
