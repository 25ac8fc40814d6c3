"""`Int4Cache`: storage, bookkeeping, and `generate` in its variants."""

from __future__ import annotations

import copy
import inspect
import types

import pytest
import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from flatquant.runtime.attention import KVQuantizer, activate
from flatquant.runtime.cache import Int4Cache, Int4Layer

from ..conftest import FAMILIES, attach_kv_quantizers, build_tiny_model


def layer(k_bits: int = 4, v_bits: int = 4, window: int | None = None) -> Int4Layer:
    module = nn.Module()
    module.kv_quantizer = KVQuantizer(16, k_bits, v_bits, False)
    module.config = types.SimpleNamespace(_attn_implementation="flatquant")
    return Int4Layer(module, window)


def filled(length: int = 10, batch: int = 3, **kwargs: int | None) -> Int4Layer:
    made = layer(**kwargs)
    torch.manual_seed(0)
    key, value = torch.randn(2, batch, 2, length, 16).unbind()
    for position in range(length):
        made.update(key[:, :, position : position + 1], value[:, :, position : position + 1])
    return made


def spied_generate(model, *args, **kwargs):
    """Output of `generate` and the cache it used."""
    out = model.generate(*args, do_sample=False, return_dict_in_generate=True, **kwargs)
    return out.sequences, out.past_key_values


def test_growth_keeps_what_was_stored():
    made = layer()
    torch.manual_seed(0)
    key, value = torch.randn(2, 1, 2, 200, 16).unbind()
    for position in range(200):
        handles = made.update(
            key[:, :, position : position + 1], value[:, :, position : position + 1]
        )
    at_once = layer().update(key, value)
    for one, other in zip(handles, at_once, strict=True):
        for name in ("codes", "scale", "zero"):
            assert torch.equal(getattr(one, name)[:, :, :200], getattr(other, name)[:, :, :200])
    assert made.key_store is not None and 200 <= made.key_store.capacity <= 512


def test_memory_is_a_fraction_of_the_float_cache():
    made = layer()
    key = torch.randn(1, 2, 512, 16)
    made.update(key, key)
    # per token and head: 8 bytes of codes, 4 of scale, 1 of zero point, against 64 of float32
    assert made.nbytes() == 2 * 2 * 512 * (8 + 4 + 1)
    assert made.nbytes() * 4.9 < 2 * key.numel() * 4


@pytest.mark.parametrize("bits", [(4, 4), (16, 4)])
def test_batch_operations(bits):
    made = filled(k_bits=bits[0], v_bits=bits[1])
    key, value = made.dequantize()
    order = torch.tensor([2, 0, 0])
    made.reorder_cache(order)
    found = made.dequantize()
    assert torch.equal(found[0], key[order]) and torch.equal(found[1], value[order])
    made.batch_repeat_interleave(2)
    assert torch.equal(made.dequantize()[0], key[order].repeat_interleave(2, 0))
    made.batch_select_indices(torch.tensor([1]))
    assert torch.equal(made.dequantize()[0], key[order][:1])
    made.offload()
    made.prefetch()
    assert made.get_seq_length() == 10
    with pytest.raises(ValueError, match="the cache has batch 1, the new keys have 2"):
        made.update(torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16))


def test_crop_reset_and_copy():
    made = filled()
    twin = copy.deepcopy(made)
    key, _ = made.dequantize()
    made.crop(-3)
    assert made.get_seq_length() == 7 and torch.equal(made.dequantize()[0], key[:, :, :7])
    made.crop(5)  # an absolute length, as in transformers 4.57
    assert made.get_seq_length() == 5
    removes = "tokens_to_remove" in inspect.signature(DynamicLayer.crop).parameters
    made.crop(0)
    assert made.get_seq_length() == (5 if removes else 0)
    made.update(torch.zeros(3, 2, 4, 16), torch.zeros(3, 2, 4, 16))
    assert torch.equal(twin.dequantize()[0], key) and twin.quantizer is made.quantizer
    made.reset()
    assert made.get_seq_length() == 0 and made.nbytes() == 0
    with pytest.raises(ValueError, match="holds nothing yet"):
        made.dequantize()


def test_sliding_layer_forgets_what_nobody_sees():
    made = filled(length=100, window=8)
    whole, _ = filled(length=100).dequantize()
    assert made.is_sliding and made.get_seq_length() == 100
    stored, offset = made.get_mask_sizes(1)
    assert offset + stored - 1 == 100 and 7 <= stored - 1 < 16
    assert torch.equal(made.dequantize()[0], whole[:, :, offset:])
    assert made.get_mask_sizes(torch.arange(3)) == (stored + 2, offset)
    assert made.key_store is not None and made.key_store.capacity <= 32
    with pytest.raises(
        ValueError, match="crop from 100 to 50 tokens needs tokens from position 43"
    ):
        made.crop(-50)


def test_sliding_layer_records_the_past_until_crop():
    made = layer(window=4)
    made.activate_past_recording()
    states = torch.randn(1, 2, 30, 16)
    made.update(states, states)
    assert made.get_mask_sizes(1) == (31, 0)
    made.crop(-10)
    assert made.get_seq_length() == 20 and made.get_mask_sizes(1) == (4, 17)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_uses_the_packed_cache(family, token_ids):
    model = attach_kv_quantizers(build_tiny_model(family))
    sequences, store = spied_generate(model, token_ids, max_new_tokens=6)
    assert isinstance(store, Int4Cache) and store.get_seq_length() == 29
    foreign, other = spied_generate(
        model, token_ids, max_new_tokens=6, past_key_values=DynamicCache(config=model.config)
    )
    assert not isinstance(other, Int4Cache) and torch.equal(foreign, sequences)
    assert store.nbytes() < sum(t.keys.nbytes + t.values.nbytes for t in other.layers)
    uncached = model.generate(token_ids, do_sample=False, max_new_tokens=6, use_cache=False)
    assert torch.equal(uncached, sequences)


def test_generate_variants(token_ids):
    model = attach_kv_quantizers(build_tiny_model())
    greedy, _ = spied_generate(model, token_ids, max_new_tokens=6)
    beams, store = spied_generate(model, token_ids, max_new_tokens=6, num_beams=3)
    assert beams.shape == greedy.shape and isinstance(store, Int4Cache)
    slow = model.generate(
        token_ids, do_sample=False, max_new_tokens=6, num_beams=3, use_cache=False
    )
    assert torch.equal(beams, slow)
    several = model.generate(
        token_ids, max_new_tokens=4, do_sample=True, num_return_sequences=3, top_k=5
    )
    assert several.shape == (6, 28)
    static = model.generate(
        token_ids, do_sample=False, max_new_tokens=6, cache_implementation="static"
    )
    assert torch.equal(static, greedy)


@pytest.mark.parametrize("window", [None, 5])
def test_generate_with_left_padding(window, token_ids):
    model = attach_kv_quantizers(build_tiny_model("mistral", sliding_window=window))
    short = token_ids[:1, :15]
    padded = torch.cat((torch.zeros(1, 9, dtype=torch.int64), short), dim=1)
    batch = torch.cat((padded, token_ids[1:]))
    both = model.generate(
        batch, attention_mask=(batch != 0).long(), do_sample=False, max_new_tokens=12
    )
    alone = model.generate(
        short, attention_mask=torch.ones_like(short), do_sample=False, max_new_tokens=12
    )
    assert torch.equal(both[:1, 9:], alone)


@pytest.mark.parametrize("window", [None, 5])
def test_rejected_guesses_are_rolled_back(window, token_ids):
    model = attach_kv_quantizers(build_tiny_model("mistral", sliding_window=window))
    prompt = token_ids[:1].repeat(1, 2)  # repetition, so that guesses are made
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": 127}
    plain = model.generate(prompt, **options)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=4, **options), plain)


def test_conversation_reuses_the_cache(token_ids):
    """A second `generate` on the same cache, and a copy of it, continue where it stopped."""
    model = attach_kv_quantizers(build_tiny_model())
    store = Int4Cache(model)
    with torch.no_grad():
        model(token_ids[:, :20], past_key_values=store)
    twin = copy.deepcopy(store)
    first = model.generate(token_ids, past_key_values=store, do_sample=False, max_new_tokens=5)
    second = model.generate(token_ids, past_key_values=twin, do_sample=False, max_new_tokens=5)
    fresh = model.generate(token_ids, do_sample=False, max_new_tokens=5)
    assert torch.equal(first, second) and torch.equal(first, fresh)
    assert repr(store).startswith("Int4Cache(")


def test_copied_model_uses_its_own_quantizers(token_ids):
    model = attach_kv_quantizers(build_tiny_model())
    twin = copy.deepcopy(model)
    activate(model)  # twice is once
    _, store = spied_generate(twin, token_ids, max_new_tokens=2)
    own = twin.model.layers[0].self_attn.kv_quantizer
    assert isinstance(store, Int4Cache) and store.layers[0].quantizer is own
    assert twin._prepare_cache_for_generation.__self__ is twin


def test_models_that_cannot_have_one_are_refused():
    model = build_tiny_model()
    with pytest.raises(ValueError, match="no attention module of this LlamaForCausalLM"):
        Int4Cache(model)
    module = nn.Module()
    module.kv_quantizer = nn.Identity()
    with pytest.raises(TypeError, match="kv_quantizer is a Identity"):
        Int4Layer(module)


def test_unquantized_layers_keep_their_own_cache(token_ids):
    model = attach_kv_quantizers(build_tiny_model())
    del model.model.layers[0].self_attn.kv_quantizer
    _, store = spied_generate(model, token_ids, max_new_tokens=3)
    assert [isinstance(made, Int4Layer) for made in store.layers] == [False, True]
    assert store.nbytes() > store.layers[1].nbytes()
