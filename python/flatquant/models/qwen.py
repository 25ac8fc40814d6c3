"""Qwen2 (bias on q, k, v) and Qwen3 (q/k-norm): wired like Llama at every site.

The bias of v_proj goes through P_v with the weight. q- and k-norm act before RoPE: P_h, which
acts after it, does not know of them; a scale of keys is merged into their weights.
"""

from __future__ import annotations

from dataclasses import replace

from flatquant.models.llama import LLAMA

QWEN2 = replace(LLAMA, name="qwen2")
QWEN3 = replace(LLAMA, name="qwen3", query_norm="self_attn.q_norm", key_norm="self_attn.k_norm")
