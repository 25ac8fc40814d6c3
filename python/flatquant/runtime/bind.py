"""From the modules of a quantized decoder to one `DecoderPlan`, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from flatquant.models import family_of
from flatquant.models.spec import FamilySpec, Site
from flatquant.runtime.activation import InputQuantizer
from flatquant.runtime.buffers import ExactBuffers
from flatquant.runtime.cache import ATTENTION
from flatquant.runtime.kv import KVQuantizer
from flatquant.runtime.linear import QuantizedLinear
from flatquant.runtime.mlp import QuantizedMLP
from flatquant.runtime.norm import QuantizedNorm
from flatquant.runtime.storage import Lockstep
from flatquant.scheme import OFF
from flatquant_cuda import decoder as native

# hooks that act only while transformers collects outputs; they stay when it has collected some
_COLLECTING = "transformers.utils.output_capturing"


class UnfitError(ValueError):
    """The decoder cannot run as one op; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A decoder whose blocks are bound to a plan.

    Attributes:
        plan: the blocks.
        quantizers: of the keys and values of every block.
        window: longest context for which attention is not cut off; None is any.
        exact_prefill: whether a prompt attends to its own unquantized keys and values.
        use_cache: whether a call that does not say so wants a cache.
    """

    plan: native.DecoderPlan
    quantizers: tuple[KVQuantizer, ...]
    window: int | None
    exact_prefill: bool
    use_cache: bool

    def fits(self, past: int, t: int) -> bool:
        """Whether t tokens after `past` others attend to the codes of all of them."""
        exact = self.exact_prefill and past == 0 and t > 1
        return not exact and (self.window is None or past + t <= self.window)

    def shape(self, batch: int, t: int) -> tuple[int, int, int, int]:
        """[batch, kv_heads, t, head_dim] of the keys and values of t tokens."""
        return batch, self.plan.sizes.kv_heads, t, self.plan.sizes.head_dim

    def bind(self, step: Lockstep) -> native.BoundCache:
        """The storages of a cache, bound once for as long as they stay in step."""
        if step.binding is None:
            step.binding = self.plan.bind_cache(step.tensors())
        bound: native.BoundCache = step.binding
        return bound

    def fresh_cache(
        self, batch: int, t: int, dtype: torch.dtype, device: torch.device
    ) -> native.BoundCache:
        """A cache for one call."""
        states = torch.empty((), dtype=dtype, device=device).expand(self.shape(batch, t))
        pairs = [quantizer.store(states, states, t) for quantizer in self.quantizers]
        return self.plan.bind_cache(
            [tensor for pair in pairs for storage in pair for tensor in storage.tensors]
        )


class Watch:
    """Notices that a decoder's blocks and config are no longer what they were when it was made.

    It is asked at every token, so it reads counters where there are any (changes to our own
    modules, hooks), and of other modules only the children and how many attributes they have.
    """

    def __init__(self, decoder: Any) -> None:
        self._changes = ExactBuffers.changes
        self._layers, self._config = decoder.layers, decoder.config
        self._options = vars(self._config)
        self._options_then = dict(self._options)
        modules = list(self._layers.modules())
        foreign = [module for module in modules if not isinstance(module, ExactBuffers)]
        self._children = [module._modules for module in foreign]
        self._children_then = list(_all_values(self._children))
        self._attributes = [vars(module) for module in foreign]
        self._attributes_then = list(map(len, self._attributes))
        self._forwards = [(a, a["forward"]) for a in self._attributes if "forward" in a]
        self._hooks: list[dict[int, Any]] = [
            torch_module._global_forward_hooks,
            torch_module._global_forward_pre_hooks,
        ]
        for module in modules:
            self._hooks += [module._forward_hooks, module._forward_pre_hooks]
        self._handle, self._hooked = -1, True

    def unchanged(self, decoder: Any) -> bool:
        """Whether what was read from the modules still holds."""
        return (
            ExactBuffers.changes == self._changes
            and decoder.layers is self._layers
            and decoder.config is self._config
            and self._options == self._options_then
            and list(_all_values(self._children)) == self._children_then
            and list(map(len, self._attributes)) == self._attributes_then
            and all(found.get("forward") is then for found, then in self._forwards)
        )

    def hooked(self) -> bool:
        """Whether a hook wants to see what passes through one of the modules."""
        # every hook that is registered anywhere takes the next number
        if self._hooked or RemovableHandle.next_id != self._handle:
            self._handle = RemovableHandle.next_id
            hooks = _all_values(self._hooks)
            self._hooked = any(getattr(hook, "__module__", "") != _COLLECTING for hook in hooks)
        return self._hooked


def _all_values(dicts: Iterable[dict[Any, Any]]) -> Iterator[Any]:
    return chain.from_iterable(map(dict.values, dicts))


def bind(decoder: Any) -> Bound:
    """Bind all blocks of a decoder, a module of transformers with `config` and `rotary_emb`.

    Raises:
        UnfitError: something in it is not quantized, or is not what the op computes.
    """
    config = decoder.config
    family = family_of(config)
    geometry = family.geometry(config)
    _check_config(config)
    _require(
        2 * decoder.rotary_emb.inv_freq.numel() == geometry.head_dim,
        "the rotary embedding leaves some channels of a head alone",
    )
    blocks = [_read(block, f"layers.{index}", family) for index, block in enumerate(decoder.layers)]
    _require(0 < len(blocks) == config.num_hidden_layers, "not all blocks are used")
    widths = blocks[0].widths
    _require(all(block.widths == widths for block in blocks), "bit widths differ between blocks")
    sizes = native.Sizes(
        hidden=geometry.hidden,
        intermediate=geometry.intermediate,
        heads=geometry.heads,
        kv_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        a_bits=widths.a_bits,
        w_bits=widths.w_bits,
        k_bits=widths.k_bits,
        v_bits=widths.v_bits,
        a_symmetric=widths.a_symmetric,
    )
    try:
        plan = native.DecoderPlan([block.layer for block in blocks], sizes, widths.scaling)
    except RuntimeError as error:
        raise UnfitError(str(error)) from error
    quantizers = tuple(block.quantizer for block in blocks)
    return Bound(
        plan=plan,
        quantizers=quantizers,
        window=getattr(config, "sliding_window", None),
        exact_prefill=any(quantizer.attend_unquantized_prefill for quantizer in quantizers),
        use_cache=bool(config.use_cache),
    )


def _check_config(config: Any) -> None:
    """Refuse what one op cannot give: outputs of single blocks, another attention."""
    name = config._attn_implementation
    _require(name == ATTENTION, f'the attention is "{name}", not "{ATTENTION}"')
    for flag in ("output_attentions", "output_hidden_states"):
        _require(not getattr(config, flag, False), f"config.{flag} is set")
    for flag in ("return_dict", "is_causal"):
        _require(getattr(config, flag, True) is not False, f"config.{flag} is False")


@dataclass(frozen=True, kw_only=True)
class _Widths:
    """What all blocks must agree on."""

    a_bits: int
    a_symmetric: bool
    w_bits: int
    k_bits: int
    v_bits: int
    scaling: float


@dataclass(frozen=True, kw_only=True)
class _Block:
    """One block, read."""

    layer: native.Layer
    widths: _Widths
    quantizer: KVQuantizer


def _read(block: nn.Module, name: str, family: FamilySpec) -> _Block:
    attention: Any = block.get_submodule(family.attention)
    _check_wiring(block, attention, name, family)
    quantizer = getattr(attention, "kv_quantizer", None)
    if (
        type(quantizer) is not KVQuantizer
        or OFF in (quantizer.k_bits, quantizer.v_bits)
        or quantizer.simulated
    ):
        raise UnfitError(f"keys or values of {name} are not quantized")

    def linear(path: str) -> QuantizedLinear:
        found = block.get_submodule(path)
        if (
            type(found) is not QuantizedLinear
            or OFF in (found.w_bits, found.a_bits)
            or found.kernel == "simulated"
            or found.kept_weight is not None
        ):
            raise UnfitError(f"{name}.{path} does not run on an integer kernel")
        _require(not found.simulate, f"{name}.{path} is simulated in floating point")
        return found

    def norm(site: Site) -> QuantizedNorm:
        found = block.get_submodule(family.group(site).norm or "")
        if type(found) is not QuantizedNorm:
            raise UnfitError(f"{name}.{family.group(site).norm} is not a quantized norm")
        return found

    q, k, v = (linear(path) for path in (family.query, family.key, family.value))
    (o,) = (linear(path) for path in family.group(Site.ATTN_OUT).linears)
    gate, up = (linear(path) for path in family.group(Site.MLP_IN).linears)
    (down,) = (linear(path) for path in family.group(Site.MLP_OUT).linears)
    mlp = block.get_submodule(family.mlp)
    gated = type(mlp) is QuantizedMLP and mlp.fuses_silu
    _require(gated, f"the MLP of {name} is not a gated SiLU")
    linears = (q, k, v, o, gate, up, down)
    widths = {(found.w_bits, found.spec.bits, found.spec.symmetric) for found in linears}
    _require(len(widths) == 1, f"bit widths differ within {name}")
    before_attention, before_mlp = norm(Site.ATTN_IN), norm(Site.MLP_IN)
    return _Block(
        layer=native.Layer(
            attention_in=_input(before_attention, before_attention.weight),
            attention_out=_input(o),
            mlp_in=_input(before_mlp, before_mlp.weight),
            mlp_out=_input(down),
            q=_linear(q),
            k=_linear(k),
            v=_linear(v),
            o=_linear(o),
            gate=_linear(gate),
            up=_linear(up),
            down=_linear(down),
            k_transform=quantizer.k_trans,
            q_transform=quantizer.q_trans,
            k_clip=quantizer.k_clip,
            v_clip=quantizer.v_clip,
            attention_eps=before_attention.eps,
            mlp_eps=before_mlp.eps,
        ),
        widths=_Widths(
            a_bits=q.spec.bits,
            a_symmetric=q.spec.symmetric,
            w_bits=q.w_bits,
            k_bits=quantizer.k_bits,
            v_bits=quantizer.v_bits,
            scaling=attention.scaling,
        ),
        quantizer=quantizer,
    )


def _check_wiring(block: nn.Module, attention: nn.Module, name: str, family: FamilySpec) -> None:
    """Refuse a block that computes something else between its linears."""
    home = f"transformers.models.{family.name}.modeling_{family.name}"
    for module in (block, attention):
        kind = type(module)
        _require(kind.__module__ == home, f"{name} has a {kind.__name__} of {kind.__module__}")
    for path, module in block.named_modules(prefix=name):
        own = vars(module).get("forward")  # transformers 4.57 leaves the class's own behind
        usual = own is None or getattr(own, "__func__", None) is type(module).forward
        _require(usual, f"{path} has a forward of its own")
    for extra in ("q_norm", "k_norm", "kv_fit"):
        _require(getattr(attention, extra, None) is None, f"{name} has a {extra}")
    _require(getattr(attention, "is_causal", True), f"{name} attends to later tokens")


def _input(module: InputQuantizer, channel_scale: Tensor | None = None) -> native.Input:
    return native.Input(
        channel_scale=channel_scale,
        left=module.left_trans,
        right=module.right_trans,
        clip=module.clip_ratio,
    )


def _linear(module: QuantizedLinear) -> native.Linear:
    if module.weight_packed is None or module.weight_scale is None:
        raise UnfitError("a linear has no packed weight")
    return native.Linear(
        weight=module.weight_packed,
        scale=module.weight_scale,
        colsum=module.weight_colsum,
        bias=module.bias,
    )


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise UnfitError(reason)
