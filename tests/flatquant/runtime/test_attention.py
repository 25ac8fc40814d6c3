"""The "flatquant" attention: same codes with and without a cache, nothing done twice."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from flatquant.runtime import attention, cache
from flatquant.runtime.attention import KVQuantizer, activate, flatquant_attention
from flatquant.runtime.cache import Int4Cache, Int4Layer
from flatquant.runtime.storage import PackedStates

from ..conftest import FAMILIES, attach_kv_quantizers, build_tiny_model

HEADS, KV_HEADS, DIM = 4, 2, 16


class Attention(nn.Module):
    """As much of an attention module as the function looks at."""

    def __init__(self, quantizer: nn.Module | None, implementation: str = "flatquant") -> None:
        super().__init__()
        self.kv_quantizer = quantizer
        self.config = types.SimpleNamespace(_attn_implementation=implementation)
        self.is_causal = True


def quantizer(k_bits: int = 4, v_bits: int = 4, transform: bool = True, **kw: Any) -> KVQuantizer:
    made = KVQuantizer(DIM, k_bits, v_bits, transform, **kw)
    if transform:
        torch.manual_seed(5)
        matrix = torch.linalg.qr(torch.randn(DIM, DIM)).Q * (0.5 + torch.rand(DIM))
        made.k_trans.copy_(matrix)
        made.q_trans.copy_(torch.linalg.inv(matrix.double()).T)
    return made


def states(
    length: int, queries: int | None = None, batch: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(length)
    queries = length if queries is None else queries
    key, value = torch.randn(2, batch, KV_HEADS, length, DIM).unbind()
    return torch.randn(batch, HEADS, queries, DIM), key, value


def plain(query: Tensor, key: Tensor, value: Tensor, **kw: Any) -> Tensor:
    """Float attention with the function's output layout."""
    return flatquant_attention(Attention(None), query, key, value, None, **kw)[0]


class Counter:
    """Counts calls of the ops the runtime uses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        for name in ("kv_quantize_append", "kv_dequantize", "kronecker", "attention_decode"):
            self._wrap(monkeypatch, name)

    def _wrap(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        original = getattr(attention.ops, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(attention.ops, name, counted)

    def take(self) -> dict[str, int]:
        counts = {name: self.calls.count(name) for name in set(self.calls)}
        self.calls.clear()
        return counts


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gqa", [True, False])
def test_eight_bits_stay_close_to_the_float_model(family, gqa, token_ids):
    model = build_tiny_model(family, gqa, bias=family == "llama")
    with torch.no_grad():
        expected = model(token_ids, use_cache=False).logits
        attach_kv_quantizers(model, 8, 8)
        fine = (model(token_ids, use_cache=False).logits - expected).std()
        attach_kv_quantizers(model, 4, 4)
        coarse = (model(token_ids, use_cache=False).logits - expected).std()
    assert 0 < fine < 0.05 * expected.std()
    assert fine < coarse / 5


def test_transform_alone_changes_nothing_but_rounding(token_ids):
    """The key transform and the query transform cancel: judged without quantization noise."""
    made = quantizer()
    query, key, _ = states(6)
    scores = made.rotate_query(query) @ (key @ made.k_trans).repeat_interleave(2, 1).mT
    assert torch.allclose(scores, query @ key.repeat_interleave(2, 1).mT, atol=1e-4)
    assert torch.allclose(made.restore_key(key @ made.k_trans), key, atol=1e-5)


@pytest.mark.parametrize("bits", [(4, 4), (2, 3), (8, 4), (16, 4), (4, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_and_uncached_codes_are_the_same(bits, dtype, monkeypatch):
    """Prefill in pieces through the cache, and all at once without: same codes, same result."""
    module = Attention(quantizer(*bits))
    query, key, value = (t.to(dtype) for t in states(20))
    layer = Int4Layer(module)
    for start, stop in ((0, 7), (7, 8), (8, 20)):
        handles = layer.update(key[:, :, start:stop], value[:, :, start:stop])
    seen: list[Any] = []
    original = attention._attend_float

    def spy(query: Tensor, key: Any, value: Any, *rest: Any) -> Tensor:
        seen.append((key, value))
        return original(query, key, value, *rest)

    uncached = flatquant_attention(module, query, key, value, None)[0]
    cached = flatquant_attention(module, query, *handles, None)[0]
    assert torch.equal(cached, uncached)
    monkeypatch.setattr(attention, "_attend_float", spy)
    monkeypatch.setattr(attention, "DECODE_QUERIES", 16)
    uncached = flatquant_attention(module, query, key, value, None)[0]
    cached = flatquant_attention(module, query, *handles, None)[0]
    assert torch.equal(cached, uncached)
    for ours, other, width in zip(handles, seen[0], bits, strict=True):
        if width == 16:
            assert torch.equal(ours, other)
            continue
        assert isinstance(ours, PackedStates) and ours.shape == (2, KV_HEADS, 20, DIM)
        for name in ("codes", "scale", "zero"):
            assert torch.equal(getattr(ours, name)[:, :, :20], getattr(other, name)), name


def test_decode_op_agrees_with_dequantized_attention(monkeypatch):
    module = Attention(quantizer())
    for queries, length in ((1, 9), (5, 9), (9, 9)):
        query, key, value = states(length, queries)
        layer = Int4Layer(module)
        handles = layer.update(key, value)
        packed = flatquant_attention(module, query, *handles, None)[0]
        monkeypatch.setattr(attention, "DECODE_QUERIES", 0)
        floats = flatquant_attention(module, query, *handles, None)[0]
        monkeypatch.undo()
        assert packed.shape == (2, queries, HEADS, DIM)
        assert torch.allclose(packed, floats, atol=1e-5)


def test_nothing_is_done_twice(monkeypatch):
    """Of 40 positions, 20 queries take the op that reads codes, 40 dequantize once."""
    monkeypatch.setattr(attention, "DECODE_QUERIES", 20)
    counter = Counter(monkeypatch)
    module = Attention(quantizer())
    query, key, value = states(40)
    flatquant_attention(module, query, key, value, None)
    assert counter.take() == {"kv_quantize_append": 2, "kronecker": 1, "kv_dequantize": 2}
    layer = Int4Layer(module)
    handles = layer.update(key, value)
    assert counter.take() == {"kv_quantize_append": 2}
    flatquant_attention(module, query, *handles, None)
    assert counter.take() == {"kronecker": 1, "kv_dequantize": 2}
    for queries in (20, 1):
        flatquant_attention(module, query[:, :, :queries], *handles, None)
        assert counter.take() == {"kronecker": 1, "attention_decode": 1}


def test_a_query_that_wants_a_gradient_gets_one():
    query, key, value = states(20)
    query.requires_grad_()
    module = Attention(quantizer(transform=False))
    out = flatquant_attention(module, query, key, value, None)[0]
    out.sum().backward()
    assert query.grad is not None and query.grad.abs().sum() > 0
    with torch.no_grad():
        codes = flatquant_attention(module, query, key, value, None)[0]
    assert torch.allclose(out, codes, atol=1e-5)


def test_sixteen_bits_are_left_alone(monkeypatch):
    counter = Counter(monkeypatch)
    query, key, value = states(20)
    keys_off = flatquant_attention(Attention(quantizer(16, 4)), query, key, value, None)[0]
    assert counter.take() == {"kv_quantize_append": 1, "kv_dequantize": 1}
    both_off = flatquant_attention(Attention(quantizer(16, 16)), query, key, value, None)[0]
    assert counter.take() == {}
    assert torch.equal(both_off, plain(query, key, value))
    assert not torch.equal(keys_off, both_off)


@pytest.mark.parametrize("queries", [12, 20])
def test_nan_reaches_exactly_the_queries_that_attend_to_it(queries, monkeypatch):
    """12 queries take the op that reads codes, 20 take SDPA."""
    monkeypatch.setattr(attention, "DECODE_QUERIES", 16)
    module = Attention(quantizer())
    query, key, value = states(queries)
    key[0, 1, 7, 3] = float("nan")
    value[1, 0, 9, 0] = float("inf")
    out = flatquant_attention(module, query, key, value, None)[0]
    expected = torch.zeros(2, queries, HEADS, dtype=torch.bool)
    expected[0, 7:, 2:] = True  # key-value head 1 serves query heads 2 and 3
    expected[1, 9:, :2] = True
    assert torch.equal(out.isnan().any(-1), expected)
    assert torch.equal(out.isnan().all(-1), expected)
    mask = torch.ones(queries, queries, dtype=torch.bool).tril()
    mask[:, 7] = False
    masked = flatquant_attention(module, query, key, value, mask[None, None])[0]
    assert not masked[0].isnan().any()
    additive = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)[None, None]
    again = flatquant_attention(module, query, key, value, additive)[0]
    assert torch.equal(again.isnan(), masked.isnan())


def test_a_query_that_may_attend_to_nothing_gives_zero(monkeypatch):
    monkeypatch.setattr(attention, "DECODE_QUERIES", 16)
    module = Attention(quantizer())
    for queries in (4, 20):
        query, key, value = states(queries)
        mask = torch.ones(queries, queries, dtype=torch.bool).tril()
        mask[0] = False
        out = flatquant_attention(module, query, key, value, mask[None, None])[0]
        assert out[:, 0].abs().max() == 0 and out[:, 1:].abs().amax(-1).min() > 0


def test_left_padding_does_not_change_a_row(token_ids):
    model = attach_kv_quantizers(build_tiny_model())
    short = token_ids[:1, :18]
    padded = torch.cat((torch.zeros(1, 6, dtype=torch.int64), short), dim=1)
    batch = torch.cat((padded, token_ids[1:]))
    mask = (batch != 0).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        alone = model(short, use_cache=False).logits
        inside = model(batch, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert torch.allclose(inside[:1, 6:], alone, atol=1e-3)


def test_prefill_may_attend_to_unquantized_states(token_ids):
    model = build_tiny_model()
    with torch.no_grad():
        exact = model(token_ids, use_cache=False).logits
        attach_kv_quantizers(model, 3, 3)
        quantized = model(token_ids, use_cache=False).logits
        activate(model, attend_unquantized_prefill=True)
        uncached = model(token_ids, use_cache=False).logits
        store = Int4Cache(model)
        cached = model(token_ids, past_key_values=store).logits
        foreign = DynamicCache(config=model.config)
        model(token_ids, past_key_values=foreign)
        step = model(token_ids[:, :1], past_key_values=store).logits
        same_step = model(token_ids[:, :1], past_key_values=foreign).logits
    assert torch.equal(uncached, exact) and torch.equal(cached, exact)
    assert not torch.allclose(quantized, exact, atol=1e-2)
    assert torch.allclose(step, same_step, atol=1e-4)  # decoding reads the codes again


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("window", [None, 6])
def test_every_cache_gives_the_same_logits(family, window, token_ids):
    if window is not None and family not in ("mistral", "qwen2"):
        pytest.skip("no sliding window in this family")
    options: dict[str, Any] = {} if window is None else {"sliding_window": window}
    if window is not None and family == "qwen2":  # one full and one sliding layer
        options |= {"use_sliding_window": True, "max_window_layers": 1}
    model = attach_kv_quantizers(build_tiny_model(family, **options))
    static = StaticCache(config=model.config, max_cache_len=32)
    caches = [Int4Cache(model), DynamicCache(config=model.config), static]
    with torch.no_grad():
        expected = model(token_ids, use_cache=False).logits
        for store in caches:
            pieces = []
            for start, stop in ((0, 14), (14, 17), *((i, i + 1) for i in range(17, 24))):
                positions = torch.arange(start, stop)
                out = model(
                    token_ids[:, start:stop],
                    past_key_values=store,
                    position_ids=positions[None],
                    cache_position=positions,
                )
                pieces.append(out.logits)
            assert torch.allclose(torch.cat(pieces, 1), expected, atol=2e-3), type(store)


def test_another_attention_gets_floats_in_the_models_basis(token_ids):
    model = attach_kv_quantizers(build_tiny_model())
    with torch.no_grad():
        model.set_attn_implementation("flatquant")
        store = Int4Cache(model)
        model(token_ids[:, :20], past_key_values=store)
        other = copy.deepcopy(store)
        ours = model(token_ids[:, 20:21], past_key_values=store).logits
        model.set_attn_implementation("sdpa")
        theirs = model(token_ids[:, 20:21], past_key_values=other).logits
    assert torch.allclose(ours, theirs, atol=1e-3)
    layer = Int4Layer(Attention(quantizer(8, 8), "sdpa"))
    _, key, value = states(5)
    found_key, found_value = layer.update(key, value)
    assert torch.allclose(found_key, key, atol=0.05)
    assert torch.allclose(found_value, value, atol=0.05)


def test_calibration_hook_replaces_the_quantizer(token_ids):
    class Fit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return q, k * self.gain, v

    model = attach_kv_quantizers(build_tiny_model(), 2, 2)
    model.set_attn_implementation("sdpa")
    expected = model(token_ids, use_cache=False).logits
    model.set_attn_implementation("flatquant")
    fit = Fit()
    for layer in model.model.layers:
        layer.self_attn.kv_fit = fit
    found = model(token_ids, use_cache=False).logits
    found.sum().backward()
    assert torch.allclose(found, expected, atol=1e-4)
    assert fit.gain.grad is not None and fit.gain.grad != 0


def test_bad_arguments_are_named():
    query, key, value = states(4)
    with pytest.raises(ValueError, match="softcap is not supported"):
        flatquant_attention(Attention(quantizer()), query, key, value, None, softcap=30.0)
    handles = Int4Layer(Attention(quantizer())).update(key, value)
    with pytest.raises(ValueError, match="no kv_quantizer"):
        flatquant_attention(Attention(None), query, *handles, None)
    fitting = Attention(quantizer())
    fitting.kv_fit = nn.Identity()
    with pytest.raises(ValueError, match="needs use_cache=False"):
        flatquant_attention(fitting, query, *handles, None)
    with pytest.raises(ValueError, match="k_bits=1 must be 2"):
        KVQuantizer(16, 1, 4, False)
    with pytest.raises(ValueError, match="v_bits=12 must be 2"):
        KVQuantizer(16, 4, 12, False)
    with pytest.raises(ValueError, match="head_dim=0"):
        KVQuantizer(0, 4, 4, False)


def test_quantizer_buffers_stay_float32():
    made = quantizer()
    before = {name: buffer.clone() for name, buffer in made.named_buffers()}
    assert set(before) == {"k_trans", "q_trans", "k_clip", "v_clip"}
    for cast in (nn.Module.half, nn.Module.bfloat16, nn.Module.double):
        cast(nn.Sequential(made))
        for name, buffer in made.named_buffers():
            assert buffer.dtype == torch.float32 and torch.equal(buffer, before[name])
    assert all(b.device.type == "meta" for b in copy.deepcopy(made).to("meta").buffers())
    assert set(dict(KVQuantizer(16, 4, 4, False).named_buffers())) == {"k_clip", "v_clip"}
    assert cache.ATTENTION == "flatquant"
