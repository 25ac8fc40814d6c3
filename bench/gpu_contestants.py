"""Models of Llama's sizes with random weights, ours and transformers': what gpu_models.py times."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from flatquant.models.spec import Site
from flatquant.plan import QuantizationPlan
from flatquant.runtime.cache import Int4Cache
from flatquant.runtime.stack import obstacle
from flatquant.scheme import Scheme
from flatquant.surgery import install

SITES = frozenset({Site.ATTN_IN, Site.ATTN_OUT, Site.MLP_IN, Site.MLP_OUT, Site.QK_HEAD})
SHARED = {"max_position_embeddings": 65536, "tie_word_embeddings": False}
MODELS: dict[str, dict[str, Any]] = {
    "7B": {  # Llama-2
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "8B": {  # Llama-3
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    },
}


def config_of(name: str, *, layers: int | None = None) -> LlamaConfig:
    """Of a model of the table, or of some of its layers under a small vocabulary."""
    sizes = SHARED | MODELS[name]
    if layers is not None:
        sizes |= {"num_hidden_layers": layers, "vocab_size": 64}
    return LlamaConfig(**sizes)


def empty_model(config: LlamaConfig) -> Any:
    """In bfloat16, without memory."""
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def materialize(model: Any, device: torch.device) -> Any:
    """Memory and random numbers: codes over their whole range, factors that change nothing."""
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        part = name.rpartition(".")[2]
        with torch.no_grad():
            if part == "weight_packed":
                low, high = (0, 256) if tensor.dtype == torch.uint8 else (-128, 128)
                tensor.random_(low, high, generator=generator)
            elif part == "weight_scale":
                tensor.fill_(0.002)
            elif part.endswith("_trans"):
                tensor.copy_(torch.eye(tensor.shape[0]))
            elif part.endswith(("_clip", "clip_ratio")) or "norm" in name:
                tensor.fill_(1)
            elif part == "weight_colsum":
                tensor.zero_()
            else:
                tensor.normal_(std=0.02, generator=generator)
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config).to(device)
    return model.requires_grad_(False)


def nbytes(model: nn.Module) -> int:
    """Of parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def tokens(batch: int, count: int, device: torch.device) -> Tensor:
    """A prompt."""
    generator = torch.Generator(device).manual_seed(count)
    return torch.randint(2, 60, (batch, count), device=device, generator=generator)


def chosen(output: Any) -> Tensor:
    """The likeliest tokens [batch, 1]."""
    logits: Tensor = output.logits
    return logits[:, -1:].argmax(-1)


class Contestant(Protocol):
    """A model that takes part.

    Attributes:
        name: what its figures are called.
        model: the module.
        captures: whether a text is one CUDA graph; else the model has its own.
    """

    name: str
    model: Any
    captures: bool

    def prompt(self, ids: Tensor) -> Tensor:
        """The tokens that come after a prompt; its keys and values are kept as for decoding."""

    def room(self, batch: int, context: int, new: int) -> Any:
        """A cache of `context` tokens, with room for `new` more."""

    def step(self, ids: Tensor, cache: Any) -> Tensor:
        """The tokens that come after one more of each sequence."""


class Ours:
    """A quantized model."""

    captures = False

    def __init__(self, config: LlamaConfig, scheme: str, device: torch.device) -> None:
        self.name, self.device = scheme, device
        model = empty_model(config)
        install(model, QuantizationPlan(scheme=Scheme.parse(scheme), sites=SITES))
        self.model = materialize(model, device)
        reason = obstacle(self.model)
        if reason is not None:
            print(f"{scheme}: no fast path: {reason}", flush=True)

    def prompt(self, ids: Tensor) -> Tensor:
        """With a new cache."""
        return self.step(ids, Int4Cache(self.model))

    def room(self, batch: int, context: int, new: int) -> Any:
        """Sequences that are alike; the cache grows by itself."""
        cache = Int4Cache(self.model)
        self.step(tokens(1, context, self.device), cache)
        cache.batch_repeat_interleave(batch)
        return cache

    def step(self, ids: Tensor, cache: Any) -> Tensor:
        """As a user does it."""
        return chosen(self.model(ids, past_key_values=cache, logits_to_keep=1))


class Plain:
    """The same model in bfloat16, with SDPA.

    Prompts get a cache that grows, so that attention needs no mask; steps a static one, as long as
    it must be. `compiled`: steps go through torch.compile.
    """

    captures = True

    def __init__(self, config: LlamaConfig, device: torch.device, *, compiled: bool) -> None:
        self.name, self.device, self.config = "bfloat16", device, config
        config._attn_implementation = "sdpa"
        self.model = self._run = materialize(empty_model(config), device)
        if compiled:
            self.name = "bfloat16 compiled"
            self._run = torch.compile(self.model, fullgraph=True, dynamic=False)

    def prompt(self, ids: Tensor) -> Tensor:
        """With a new cache."""
        return chosen(self.model(ids, use_cache=True, logits_to_keep=1))

    def room(self, batch: int, context: int, new: int) -> Any:
        """Nothing is in it, but it counts as full up to `context`."""
        cache = StaticCache(config=self.config, max_cache_len=context + new)
        shape = (batch, self.config.num_key_value_heads, 1, self.config.head_dim)
        states = torch.empty(shape, dtype=torch.bfloat16, device=self.device)
        for layer in cache.layers:
            layer.lazy_initialization(states, states)
            layer.cumulative_length.fill_(context)
        return cache

    def step(self, ids: Tensor, cache: Any) -> Tensor:
        """With a static cache."""
        return chosen(self._run(ids, past_key_values=cache, logits_to_keep=1))
