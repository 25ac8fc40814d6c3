"""Llama and everything that is wired like it (SmolLM2, Mistral)."""

from __future__ import annotations

from dataclasses import replace

from flatquant.models.spec import FamilySpec, Group, Site

LLAMA = FamilySpec(
    name="llama",
    groups=(
        Group(
            site=Site.ATTN_IN,
            linears=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            norm="input_layernorm",
        ),
        Group(site=Site.ATTN_OUT, linears=("self_attn.o_proj",), scaled_by="self_attn.v_proj"),
        Group(
            site=Site.MLP_IN,
            linears=("mlp.gate_proj", "mlp.up_proj"),
            norm="post_attention_layernorm",
        ),
        Group(site=Site.MLP_OUT, linears=("mlp.down_proj",), scaled_by="mlp.up_proj"),
    ),
)

MISTRAL = replace(LLAMA, name="mistral")
