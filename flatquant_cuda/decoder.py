"""The decoder layers of a model as one op, for calls so short that dispatching ops would dominate.

:class:`DecoderPlan` binds the tensors of all layers once. A call then runs norms, transforms,
products, RoPE, the cache and attention of every layer by the kernels and in the order of the ops in
:mod:`flatquant_cuda.ops`, so the result has the same bits: on a CPU in a single parallel region, on
CUDA by launches one after another, which a CUDA graph can record. There is no reference here:
:func:`available` says whether a plan can be made for a device.

T is the dtype of the hidden states: float32, bfloat16 or float16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import NoReturn

import torch
from torch import Tensor

from . import library

_PLAN_ROW = 1024  # csrc/torch/decoder_plan.cpp: a plan is uint8 [1 + layers, _PLAN_ROW]
_CACHE_ROW = 128  # csrc/torch/decoder_stack.cpp: a bound cache is uint8 [1 + layers, _CACHE_ROW]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What all layers of a stack have in common.

    Attributes:
        hidden: width of the residual stream.
        intermediate: width of the MLP.
        heads: query heads.
        kv_heads: heads of the cache; divides ``heads``.
        head_dim: channels of a head, an even number.
        a_bits: width of activation codes, 2 to 8.
        w_bits: width of weight codes, 2 to 8.
        k_bits: width of cached keys, 2 to 8.
        v_bits: width of cached values, 2 to 8.
        a_symmetric: the grid of the activations.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    a_bits: int
    w_bits: int
    k_bits: int
    v_bits: int
    a_symmetric: bool


@dataclass(frozen=True, kw_only=True)
class Input:
    """How the input of linears is made: arguments of :func:`flatquant_cuda.ops.kronecker_quantize`.

    Attributes:
        channel_scale: float32 ``[width]``: given for the two inputs that follow a norm.
        left: P1 transposed ``[n1, n1]``, any T.
        right: P2 ``[n2, n2]``, any T.
        clip: float32 ``[2]``.
    """

    channel_scale: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    clip: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Linear:
    """One linear: arguments of the integer GEMM that the widths name.

    Attributes:
        weight: uint8 ``[N, ceil(K/2)]`` nibbles, or int8 ``[N, K]`` above 4 bits.
        scale: float32 ``[N]``.
        colsum: int32 ``[N]``; asymmetric activations need it.
        bias: ``[N]``, any T.
    """

    weight: Tensor
    scale: Tensor
    colsum: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The tensors of one decoder layer, and the epsilons of its two norms.

    Attributes:
        attention_in: input of q, k and v.
        attention_out: input of o; its only factor is ``left``.
        mlp_in: input of gate and up.
        mlp_out: input of down.
        q, k, v, o, gate, up, down: the linears.
        k_transform: ``[head_dim, head_dim]``, any T; keys are stored times it.
        q_transform: its inverse transposed, for the queries.
        k_clip: float32 ``[2]``.
        v_clip: float32 ``[2]``.
        attention_eps: of the norm before q, k and v.
        mlp_eps: of the norm before gate and up.
    """

    attention_in: Input
    attention_out: Input
    mlp_in: Input
    mlp_out: Input
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    gate: Linear
    up: Linear
    down: Linear
    k_transform: Tensor | None = None
    q_transform: Tensor | None = None
    k_clip: Tensor | None = None
    v_clip: Tensor | None = None
    attention_eps: float
    mlp_eps: float

    def tensors(self) -> list[Tensor | None]:
        """In the order that ``decoder_plan`` reads them."""
        inputs = (self.attention_in, self.attention_out, self.mlp_in, self.mlp_out)
        linears = (self.q, self.k, self.v, self.o, self.gate, self.up, self.down)
        parts = [getattr(part, f.name) for part in (*inputs, *linears) for f in fields(part)]
        return [*parts, self.k_transform, self.q_transform, self.k_clip, self.v_clip]

    def join(self) -> None:
        """Give linears with the same input neighbouring memory: they are one product then.

        The tensors stay the same objects, with the same values.
        """
        for linears in ((self.q, self.k, self.v), (self.gate, self.up)):
            for name in (f.name for f in fields(Linear)):
                tensors = [getattr(linear, name) for linear in linears]
                if not any(tensor is None for tensor in tensors):
                    _place_side_by_side(tensors)


def _place_side_by_side(tensors: Sequence[Tensor]) -> None:
    """Move tensors of one dtype, unless they are neighbours already."""
    ends = [t.data_ptr() + t.numel() * t.element_size() for t in tensors]
    starts = [t.data_ptr() for t in tensors[1:]]
    if starts == ends[:-1] or len({t.dtype for t in tensors}) > 1:
        return
    if any(isinstance(t, torch.nn.Parameter) or t.is_inference() for t in tensors):
        return  # whose memory cannot be exchanged
    with torch.inference_mode(False), torch.no_grad():
        together = torch.cat([t.flatten() for t in tensors])
        for tensor, part in zip(tensors, together.split([t.numel() for t in tensors]), strict=True):
            tensor.set_(part.view(tensor.shape))


class BoundCache:
    """Memory of the caches of all layers, kept alive; see :meth:`DecoderPlan.bind_cache`."""

    def __init__(self, handle: Tensor, tensors: tuple[Tensor, ...]) -> None:
        self.handle, self._tensors = handle, tensors

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a BoundCache is bound to memory: it cannot be copied or pickled")


class DecoderPlan:
    """All decoder layers of a model, bound to the memory that their tensors have now.

    The plan keeps that memory alive. It sees what is written into the tensors, but not what is
    assigned in their place: then make a new one. It cannot be copied.

    Args:
        layers: the layers, in order; their tensors are on one device and contiguous.
        sizes: what they have in common.
        scaling: factor on the scores of attention.

    Raises:
        RuntimeError: the library is not loaded, or a tensor or a number is wrong: the message
            names it, its value and the rule.
    """

    def __init__(self, layers: Sequence[Layer], sizes: Sizes, scaling: float) -> None:
        if not layers:
            raise RuntimeError("decoder_plan: layers is empty: it must have one or more")
        device = layers[0].q.weight.device
        if not available(device.type):
            raise RuntimeError(
                f"decoder_plan: flatquant_cuda has no native decoder_stack on {device}"
            )
        if device.type == "cuda":
            for layer in layers:
                layer.join()
        absent = torch.empty(0, device=device)
        # detached: assigning to `tensor.data` leaves the memory that was bound in place
        self._tensors = [
            absent if tensor is None else tensor.detach()
            for layer in layers
            for tensor in layer.tensors()
        ]
        self.sizes = sizes
        self.device = device
        self.layers = len(layers)
        self.plan: Tensor = torch.ops.flatquant_cuda.decoder_plan(
            self._tensors,
            [self.layers, *map(int, astuple(sizes))],
            [scaling, *(eps for layer in layers for eps in (layer.attention_eps, layer.mlp_eps))],
        )

    def bind_cache(self, tensors: Sequence[Tensor]) -> BoundCache:
        """Bind the memory that a cache has now, like that of the layers.

        Args:
            tensors: codes, scale and zero of the keys, then of the values, of every layer, as in
                :func:`flatquant_cuda.ops.kv_quantize_append`.

        Raises:
            RuntimeError: a tensor is wrong; the message names it, its value and the rule.
        """
        kept = tuple(tensor.detach() for tensor in tensors)
        handle: Tensor = torch.ops.flatquant_cuda.decoder_cache(self.plan, kept)
        return BoundCache(handle, kept)

    def run(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: BoundCache,
        *,
        past: int,
        mask: Tensor | None = None,
        slots: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Run all layers and fill their caches.

        With ``slots`` and ``lengths``, which only CUDA knows, a captured call serves all lengths:
        the bits are those of a call with the ``past`` that they say.

        Args:
            hidden: T ``[batch, t, hidden]``, the residual stream before the first layer.
            cos: T ``[batch or 1, t, head_dim]``, of the rotary embedding.
            sin: likewise.
            cache: what :meth:`bind_cache` returned; written at positions ``past`` to ``past + t``.
            past: positions that hold earlier tokens.
            mask: bool (True: attend) or float T (added) ``[batch or 1, heads or 1, t, past + t]``;
                None lets every token attend to every position.
            slots: int64 ``[batch, t]``: ``sequence * capacity + position`` of each token, or -1:
                it is not written. The layers' caches then have one capacity.
            lengths: int32 ``[batch]``: positions of each sequence that are in use after that, of
                which ``past + t`` are the most there may be.

        Returns:
            T ``[batch, t, hidden]``, the residual stream after the last layer.

        Raises:
            RuntimeError: an argument is wrong; the message names it, its value and the rule.
        """
        places = () if slots is None and lengths is None else (slots, lengths)
        result: Tensor = torch.ops.flatquant_cuda.decoder_stack.default(
            hidden.contiguous(),
            cos.contiguous(),
            sin.contiguous(),
            mask,
            self.plan,
            cache.handle,
            past,
            *places,
        )
        return result

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a DecoderPlan is bound to memory: it cannot be copied or pickled")


def available(device: str = "cpu") -> bool:
    """Whether the native library is loaded and has the op for a type of device."""
    return device in _DEVICES


def _host_of(tensor: Tensor) -> str:
    """Where a plan for a tensor lies; a device without memory stays what it is."""
    return "meta" if tensor.device.type == "meta" else "cpu"


def _fake_decoder_plan(tensors: Sequence[Tensor], sizes: list[int], numbers: list[float]) -> Tensor:
    return torch.empty((1 + sizes[0], _PLAN_ROW), dtype=torch.uint8, device=_host_of(tensors[0]))


def _fake_decoder_cache(plan: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    return plan.new_empty((plan.shape[0], _CACHE_ROW))


def _fake_decoder_stack(
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor | None,
    plan: Tensor,
    cache: Tensor,
    past: int,
    slots: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    return torch.empty_like(hidden)


def _devices() -> frozenset[str]:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    keys = {"cpu": "CPU", "cuda": "CUDA"} if library.loaded else {}
    return frozenset(d for d, k in keys.items() if has_kernel("flatquant_cuda::decoder_stack", k))


_DEVICES = _devices()

if library.loaded:
    torch.library.register_fake("flatquant_cuda::decoder_plan")(_fake_decoder_plan)
    torch.library.register_fake("flatquant_cuda::decoder_cache")(_fake_decoder_cache)
    torch.library.register_fake("flatquant_cuda::decoder_stack")(_fake_decoder_stack)
