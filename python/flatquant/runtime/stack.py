"""All blocks of a decoder as one op, where that gives the same result as running them one by one.

A token of a small model costs more in Python and in dispatching ops than in arithmetic. So the
`forward` of a quantized model's decoder first asks its `FastPath`, which runs embedding, rotary
embedding, one `flatquant_cuda` op for all blocks, and the last norm. Whatever that op does not do
(long prompts, gradients, hooks, other caches and attentions, outputs of single layers, compiling)
takes transformers' own forward, as if there were no fast path.
"""

from __future__ import annotations

import inspect
import types
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from flatquant.models import family_of
from flatquant.runtime.attention import DECODE_QUERIES
from flatquant.runtime.bind import Bound, UnfitError, Watch, bind
from flatquant.runtime.cache import Int4Cache
from flatquant.runtime.graphs import Graphs
from flatquant.runtime.head import SharedEmbedding, quicken
from flatquant_cuda import decoder as native

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# arguments of the mask function: transformers 4.57 has other names
_MASK_ARGUMENTS = inspect.signature(create_causal_mask).parameters
_EMBEDDINGS = "inputs_embeds" if "inputs_embeds" in _MASK_ARGUMENTS else "input_embeds"


class FastPath:
    """What a decoder needs to run its blocks as one op: made at first use, kept while it holds.

    Attributes:
        enabled: False lets every call take transformers' own forward.
        obstacle: why the blocks cannot run as one op; None if they can, or nobody has asked yet.
        graphs: steps of single tokens as CUDA graphs; None on a CPU, and until blocks are bound.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.obstacle: str | None = None
        self.graphs: Graphs | None = None
        self._bound: Bound | None = None
        self._watch: Watch | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> FastPath:
        """The copy of a decoder binds its own tensors."""
        return FastPath(self.enabled)

    def __reduce__(self) -> tuple[type[FastPath], tuple[bool]]:
        return FastPath, (self.enabled,)

    def bound(self, decoder: Any) -> Bound | None:
        """The decoder's blocks bound to a plan, or None: `obstacle` says why."""
        if self._watch is None or not self._watch.unchanged(decoder):
            self._bound, self.obstacle, self.graphs = None, None, None
            try:
                self._watch = Watch(decoder)
                self._bound = bind(decoder)
                if self._bound.plan.device.type == "cuda":
                    self.graphs = Graphs(self._bound.plan)
            except UnfitError as error:
                self.obstacle = str(error)
        if self._watch is not None and self._watch.hooked():
            return None
        return self._bound

    def run(
        self,
        decoder: Any,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        **rest: Any,
    ) -> BaseModelOutputWithPast | None:
        """The decoder's output, or None if this call is not one for the fast path.

        Takes the arguments of a decoder of transformers; `rest` are those that change nothing when
        they are None or False.
        """
        given = inputs_embeds if input_ids is None else input_ids
        if (
            not self.enabled
            or (input_ids is None) is (inputs_embeds is None)
            or not _suits(given, attention_mask, 2 if inputs_embeds is None else 3)
            or decoder.training
            or rest.pop("return_dict", True) is False
            or any(value is not None and value is not False for value in rest.values())
        ):
            return None
        assert given is not None
        dtype = _dtype_of(decoder.embed_tokens) if inputs_embeds is None else given.dtype
        bound = self.bound(decoder) if dtype in _FLOATS else None
        if bound is None:
            return None
        batch, t = given.shape[:2]
        cached = bound.use_cache if use_cache is None else use_cache
        if not cached and past_key_values is None and bound.fits(0, t):
            step, past = None, 0
            cache = bound.fresh_cache(batch, t, dtype, given.device)
        elif cached and type(past_key_values) is Int4Cache:
            past = past_key_values.get_seq_length()
            if not bound.fits(past, t):
                return None
            shape = bound.shape(batch, t)
            step = past_key_values.in_step(bound, bound.quantizers, shape, dtype, given.device)
            if step is None:
                return None
            if self.graphs is not None and t == 1 and input_ids is not None:
                last = self.graphs.run(decoder, step, input_ids, position_ids, attention_mask)
                if last is not None:
                    step.length += 1
                    return BaseModelOutputWithPast(
                        last_hidden_state=last, past_key_values=past_key_values
                    )
            cache = bound.bind(step)
        else:
            return None

        hidden = decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(past, past + t, device=given.device).unsqueeze(0)
        mask = _mask(decoder, hidden, attention_mask, past_key_values, past, position_ids)
        cos, sin = decoder.rotary_emb(hidden, position_ids)
        hidden = bound.plan.run(hidden, cos, sin, cache, past=past, mask=mask)
        if step is not None:
            step.length += t
        return BaseModelOutputWithPast(
            last_hidden_state=decoder.norm(hidden), past_key_values=past_key_values
        )


def _dtype_of(embedding: Any) -> torch.dtype:
    """Dtype of the hidden states that an embedding gives."""
    found: torch.dtype = (
        embedding.dtype if type(embedding) is SharedEmbedding else embedding.weight.dtype
    )
    return found


def _suits(given: Tensor | None, attention_mask: Tensor | None, dimensions: int) -> bool:
    """Whether the call is a plain one, on plain tensors, and short enough."""
    return (
        type(given) is Tensor
        and given.dim() == dimensions
        and native.available(given.device.type)
        and given.shape[0] > 0
        and 1 <= given.shape[1] <= DECODE_QUERIES
        and (
            attention_mask is None or (type(attention_mask) is Tensor and attention_mask.dim() == 2)
        )
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(given.device.type)
        and not torch.jit.is_tracing()
    )


def _mask(
    decoder: Any,
    hidden: Tensor,
    attention_mask: Tensor | None,
    cache: Int4Cache | None,
    past: int,
    position_ids: Tensor,
) -> Tensor | None:
    """The mask that flatquant_attention would have got and made: bool [., ., t, past + t]."""
    t, length, device = hidden.shape[1], past + hidden.shape[1], hidden.device
    if t == 1 and (attention_mask is None or attention_mask.shape[1] == length):
        # what the call below finds out more slowly, and on a GPU by waiting for it
        if attention_mask is None or (device.type == "cpu" and bool(attention_mask.all())):
            return None
        if device.type != "cpu":
            return attention_mask.bool()[:, None, None, :]
    arguments = {
        "config": decoder.config,
        _EMBEDDINGS: hidden,
        "attention_mask": attention_mask,
        "past_key_values": cache,
        "position_ids": position_ids,
    }
    if "cache_position" in _MASK_ARGUMENTS:
        arguments["cache_position"] = torch.arange(past, length, device=device)
    mask: Tensor | None = create_causal_mask(**arguments)
    if mask is not None:
        return mask[..., :length]
    if t == 1:
        return None
    return torch.ones(1, 1, t, length, dtype=torch.bool, device=device).tril(past)


def forward(decoder: Any, *args: Any, **kwargs: Any) -> Any:
    """`forward` of a decoder with a `fast_path`; arguments and result as in transformers."""
    if len(args) <= 1 and not torch.compiler.is_compiling():
        named = {"input_ids": args[0], **kwargs} if args else kwargs
        output = decoder.fast_path.run(decoder, **named)
        if output is not None:
            return output
    return type(decoder).forward(decoder, *args, **kwargs)


def activate(model: nn.Module) -> None:
    """Give the decoder of a quantized model a fast path, and its head too; idempotent."""
    decoder = decoder_of(model)
    # `generate` asks for model.device at every token, which goes through all modules up to the
    # first parameter. The blocks have none, so they come last.
    decoder._modules["layers"] = decoder._modules.pop("layers")
    quicken(model)
    if not isinstance(getattr(decoder, "fast_path", None), FastPath):
        decoder.fast_path = FastPath()
    # a bound method, because copy.deepcopy(model) rebinds those to the copy
    decoder.forward = types.MethodType(forward, decoder)


def fast_path(model: nn.Module, enabled: bool) -> None:
    """Switch the fast path of a quantized model on (as it is from the start) or off.

    Off, every block runs its ops one by one. The results are the same, bit for bit.

    Raises:
        ValueError: the model has no quantized cache, so it has no fast path.
    """
    path = getattr(decoder_of(model), "fast_path", None)
    if not isinstance(path, FastPath):
        raise ValueError("fast_path: the model has none: its keys and values are not quantized")
    path.enabled = enabled
    if not enabled and path.graphs is not None:
        path.graphs.clear()


def obstacle(model: nn.Module) -> str | None:
    """Why the blocks of a model never run as one op; None if they do, where the call allows it."""
    decoder = decoder_of(model)
    path = getattr(decoder, "fast_path", None)
    if not isinstance(path, FastPath):
        return "keys and values are not quantized"
    if not path.enabled:
        return "it is switched off"
    return None if path.bound(decoder) is not None else path.obstacle or "modules have hooks"


def decoder_of(model: nn.Module) -> Any:
    """The module of a model that maps token ids to the last hidden state."""
    return model.get_submodule(family_of(model.config).decoder)
