"""The output head: in 8 bits, with the embedding that shares its rows where the two are tied, or
as it is, by an op of our own for a few tokens in bfloat16.

On small models these two matrices are most of what a token reads (Scheme option "head8").
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from flatquant.runtime.activation import ActivationSpec
from flatquant.runtime.linear import QuantizedLinear
from flatquant.scheme import Scheme
from flatquant_cuda import head as native
from flatquant_cuda.reference import quantize_weight


class SharedEmbedding(nn.Module):
    """Embedding whose rows are the head's: codes times scale, rounded to `dtype`.

    It has no tensors of its own, so it is neither saved nor moved: the head is.

    Args:
        head: of a model with tied embeddings.
        like: the embedding whose place it takes.
    """

    def __init__(self, head: QuantizedLinear, like: nn.Embedding) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = like.num_embeddings, like.embedding_dim
        self.dtype = like.weight.dtype
        vars(self)["head"] = head  # not a child: the model has it already

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SharedEmbedding:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def forward(self, ids: Tensor) -> Tensor:
        """ids: int64 [...]; returns dtype [..., hidden]."""
        head: QuantizedLinear = vars(self)["head"]
        codes, scale = head.weight_packed, head.weight_scale
        assert codes is not None and scale is not None
        return (embedding(ids, codes).float() * scale[ids].unsqueeze(-1)).to(self.dtype)

    def extra_repr(self) -> str:
        """For printing the model."""
        return f"{self.num_embeddings}, {self.embedding_dim}, shared with the head"


def untie_head(model: Any) -> None:
    """Give a tied output head a weight of its own, equal to the embedding's; idempotent.

    The config says so too, so that a saved model is read back the same way.
    """
    if not model.config.tie_word_embeddings:
        return
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = {}


def install_head(model: Any, bits: int) -> None:
    """Replace the output head by an empty 8-bit one, and a tied embedding with it.

    Raises:
        TypeError: the model's head is not an `nn.Linear`.
    """
    linear, like = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"the model's head is a {type(linear).__name__}, not nn.Linear")
    scheme = Scheme(w_bits=bits, a_bits=bits)
    spec = ActivationSpec(
        width=linear.in_features, bits=bits, symmetric=True, left=0, right=0, wide_weights=True
    )
    head = QuantizedLinear.empty_like(linear, scheme, spec, online=True)
    model.set_output_embeddings(head)
    if model.config.tie_word_embeddings:
        model.set_input_embeddings(SharedEmbedding(head, like))
    # what was tied is one tensor now; a bound method, because copy.deepcopy rebinds those
    model.tie_weights = types.MethodType(_tie_nothing, model)
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = {}


def fill_head(head: QuantizedLinear, linear: nn.Linear) -> None:
    """Round the weight of `linear` to nearest, per output channel."""
    codes, scale = quantize_weight(linear.weight.detach(), head.w_bits)
    for name, value in (
        ("weight_packed", codes),
        ("weight_scale", scale),
        ("clip_ratio", torch.ones(2)),
        ("bias", linear.bias),
    ):
        buffer = getattr(head, name)
        if buffer is not None and value is not None:
            buffer.copy_(value.detach())


def quicken(model: Any) -> None:
    """Let an unquantized head of a model run on our op where that is faster; idempotent."""
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        # a bound method, because copy.deepcopy(model) rebinds those to the copy
        vars(head).setdefault("forward", types.MethodType(forward, head))


def forward(linear: Any, x: Tensor) -> Tensor:
    """`forward` of an output head: x [..., hidden] to logits [..., vocabulary]."""
    weight = linear.weight
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or type(x) is not Tensor
        or not native.fits(x, weight)
        or torch.is_autocast_enabled("cpu")
        or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    ):
        return type(linear).forward(linear, x)
    return native.head(x, weight.detach(), linear.bias)


def _tie_nothing(model: Any, *args: Any, **kwargs: Any) -> None:
    """`tie_weights` of a model whose tied tensors are shared by construction."""
