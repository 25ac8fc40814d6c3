"""Models with fewer decoder blocks: ShortGPT's pruning of depth, before any quantization."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flatquant.capture import check_tokens, first_block_inputs
from flatquant.models import family_of
from flatquant.offload import float_block, shards_of
from flatquant.surgery import block_names


@torch.no_grad()
def block_influence(model: PreTrainedModel, calibration: Tensor) -> list[float]:
    """How much every decoder block turns the hidden states (ShortGPT, arXiv 2403.03853, eq. 1).

    BI_i = 1 − E[x_i·x_{i+1} / (‖x_i‖·‖x_{i+1}‖)] over all tokens, x_i in front of block i and
    x_{i+1} behind it.

    Args:
        model: a floating-point causal LM of a known family; unchanged.
        calibration: token ids int64 [samples, seqlen].

    Raises:
        ValueError: unusable text, or a model that is quantized.
    """
    if getattr(model, "flatquant_plan", None) is not None:
        raise ValueError("block_influence: the model is quantized; shorten the original")
    family = family_of(model.config)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = check_tokens(calibration, vocabulary, "block_influence")
    hidden, run = first_block_inputs(model, family, tokens, batch_size=1)
    influence = []
    for name in block_names(model, family):
        block = float_block(model, name).to(hidden.dtype).eval()
        after = torch.cat([run(block, part) for part in hidden.split(1)])
        cosine = torch.cosine_similarity(hidden.double(), after.double(), dim=-1)
        influence.append(1.0 - float(cosine.mean()))
        hidden = after
    return influence


def shortgpt(
    model: PreTrainedModel, calibration: Tensor, blocks: int | None = None
) -> PreTrainedModel:
    """Remove the decoder blocks of least influence, all at once and in place; returns the model.

    What is left is an ordinary, smaller model: its config says how many blocks it has, and any
    method may quantize it.

    Args:
        model: a floating-point causal LM of a known family, in memory.
        calibration: token ids int64 [samples, seqlen].
        blocks: how many to remove; None removes a quarter, about what the paper does (its
            table 1: 9 of 32, 10 of 40).

    Raises:
        ValueError: more blocks than there are, unusable text, or a model that is quantized or
            was opened by `open_model`.
    """
    if shards_of(model) is not None:
        raise ValueError("shortgpt: the model's blocks are on disk; load it with from_pretrained")
    family = family_of(model.config)
    present = family.get_blocks(model)
    count = len(present) // 4 if blocks is None else blocks
    if not 0 <= count < len(present):
        raise ValueError(f"shortgpt: blocks={count} must be at least 0 and below {len(present)}")
    influence = block_influence(model, calibration)
    gone = set(sorted(range(len(present)), key=influence.__getitem__)[:count])
    kept = [index for index in range(len(present)) if index not in gone]
    parent, _, child = family.blocks.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.ModuleList(present[index] for index in kept))
    for place, block in enumerate(family.get_blocks(model)):
        for module in block.modules():
            if hasattr(module, "layer_idx"):  # the cache slot of an attention module
                module.layer_idx = place  # type: ignore[assignment]
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[index] for index in kept]
    return model
