"""The fast path: all blocks as one op give what they give one by one, bit for bit."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

import flatquant
from flatquant.runtime import stack
from flatquant.runtime.bind import Bound
from flatquant.runtime.cache import Int4Cache
from flatquant_cuda import decoder as native

from ..conftest import build_tiny_model

pytestmark = pytest.mark.skipif(not native.available(), reason="no native decoder_stack")

FAMILIES = ("llama", "mistral", "qwen2")  # qwen3 has norms that the op does not know
SCHEMES = ("W4A4KV4", "W4A4KV4-asym", "W4A8KV4", "W4A8K8V2-asym", "W8A8KV8", "W6A4KV4-asym")
SCHEMES += ("W3A3K3V5", "W2A6KV4", "W5A8KV6-asym")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _quiet(recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    threads = torch.get_num_threads()
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def quantized(
    family: str = "llama",
    scheme: str = "W4A4KV4",
    dtype: torch.dtype = torch.float32,
    transform: str = "random",
    **options: Any,
) -> PreTrainedModel:
    model = build_tiny_model(family, bias=family != "mistral", **options).to(dtype)
    return flatquant.replace_linear(model, scheme, transform=transform)


class Counter:
    """Counts the runs of one-op plans."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs = 0
        original = native.DecoderPlan.run

        def counted(plan: native.DecoderPlan, *args: Any, **kwargs: Any) -> Tensor:
            self.runs += 1
            return original(plan, *args, **kwargs)

        monkeypatch.setattr(native.DecoderPlan, "run", counted)

    def take(self) -> int:
        runs, self.runs = self.runs, 0
        return runs


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    return Counter(monkeypatch)


def both(model: PreTrainedModel, call: Any) -> tuple[Any, Any]:
    """What call() gives with the fast path and without."""
    flatquant.fast_path(model, True)
    fast = call()
    flatquant.fast_path(model, False)
    plain = call()
    flatquant.fast_path(model, True)
    return fast, plain


def stepwise(model: PreTrainedModel, ids: Tensor, cuts: tuple[int, ...], **kwargs: Any) -> Tensor:
    """Logits of ids through a cache, in pieces that end at the cuts."""
    cache, pieces, start = Int4Cache(model), [], 0
    for stop in cuts:
        arguments = {
            name: value[:, :stop] if name == "attention_mask" else value[:, start:stop]
            for name, value in kwargs.items()
        }
        out = model(ids[:, start:stop], past_key_values=cache, **arguments)
        assert out.past_key_values is cache and cache.get_seq_length() == stop
        assert all(layer.get_seq_length() == stop for layer in cache.layers)
        pieces.append(out.logits)
        start = stop
    return torch.cat(pieces, 1)


def padded(ids: Tensor, length: int = 7) -> dict[str, Tensor]:
    """Arguments that make the first tokens of the first row padding."""
    mask = torch.ones_like(ids)
    mask[0, :length] = 0
    return {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


CUTS = (1, 2, 9, 10, 11, 24)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_same(family, scheme, dtype, token_ids, counter):
    model = quantized(family, scheme, dtype)
    assert stack.obstacle(model) is None
    fast, plain = both(model, lambda: stepwise(model, token_ids, CUTS))
    assert torch.equal(fast, plain) and torch.isfinite(fast).all()
    assert counter.take() == len(CUTS)
    fast, plain = both(model, lambda: stepwise(model, token_ids, CUTS, **padded(token_ids)))
    assert torch.equal(fast, plain)
    assert counter.take() == len(CUTS)
    fast, plain = both(model, lambda: model(token_ids[:, :13], use_cache=False).logits)
    assert torch.equal(fast, plain)
    assert counter.take() == 1


@pytest.mark.parametrize("transform", ["identity", "hadamard"])
@pytest.mark.parametrize("gqa", [True, False])
def test_logits_are_the_same_for_other_shapes(transform, gqa, token_ids, counter):
    """No transforms; as many cache heads as heads; odd widths; one layer."""
    odd = {"hidden_size": 60, "intermediate_size": 99, "head_dim": 10, "num_hidden_layers": 1}
    for options in ({}, odd):
        model = quantized(transform=transform, gqa=gqa, **options)
        fast, plain = both(model, lambda m=model: stepwise(m, token_ids, CUTS))
        assert torch.equal(fast, plain)
        assert counter.take() == len(CUTS)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("scheme", ["W4A4KV4", "W8A8KV8-asym"])
def test_logits_do_not_depend_on_threads(scheme, threads, token_ids, counter):
    """Also: changing the number between calls. The sizes are such that threads pay off."""
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "head_dim": 32,
        "initializer_range": 0.05,
    }
    model = quantized(scheme=scheme, dtype=torch.bfloat16, **sizes)
    torch.set_num_threads(1)
    flatquant.fast_path(model, False)
    plain = stepwise(model, token_ids, CUTS)
    flatquant.fast_path(model, True)
    for number in (threads, 1, threads):
        torch.set_num_threads(number)
        assert torch.equal(stepwise(model, token_ids, CUTS), plain)
    assert counter.take() == 3 * len(CUTS)


def test_every_prompt_length(counter):
    """Prompts on both sides of the longest that takes the fast path, then a few steps."""
    model = quantized(dtype=torch.bfloat16)
    ids = torch.randint(2, 128, (3, 75), generator=torch.Generator().manual_seed(2))
    for length in range(1, 71):
        cuts = (length, length + 1, length + 2, length + 5)
        fast, plain = both(model, lambda c=cuts: stepwise(model, ids, c))
        assert torch.equal(fast, plain), length
        assert counter.take() == (4 if length <= stack.DECODE_QUERIES else 3)


def generated(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    torch.manual_seed(0)
    result: Tensor = model.generate(ids, **({"do_sample": False, "max_new_tokens": 20} | options))
    return result


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"use_cache": False, "max_new_tokens": 4},
        {"max_new_tokens": 130},  # the cache grows
    ],
    ids=["greedy", "beams", "sampling", "uncached", "long"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_generate(family, options, token_ids, counter):
    model = quantized(family)
    for prompt in (token_ids, token_ids[:1, :5]):
        fast, plain = both(model, lambda p=prompt: generated(model, p, **options))
        assert torch.equal(fast, plain)
    assert counter.take() > 0


def test_generate_with_left_padding(token_ids, counter):
    model = quantized()
    ids = torch.cat((torch.zeros(1, 9, dtype=torch.int64), token_ids[:1, :15]), 1)
    batch = torch.cat((ids, token_ids[1:]))
    mask = (batch != 0).long()
    fast, plain = both(model, lambda: generated(model, batch, attention_mask=mask))
    assert torch.equal(fast, plain)
    assert counter.take() == (20 if batch.shape[1] <= stack.DECODE_QUERIES else 19)


def test_rejected_guesses_are_rolled_back(token_ids, counter):
    model = quantized()
    prompt = token_ids[:1].repeat(1, 2)
    options = {"prompt_lookup_num_tokens": 4, "eos_token_id": 127}
    fast, plain = both(model, lambda: generated(model, prompt, **options))
    assert torch.equal(fast, plain) and counter.take() > 0
    assert torch.equal(fast, generated(model, prompt, eos_token_id=127))


def test_a_cache_may_change_hands(token_ids, counter):
    """Steps of both kinds, crops, copies and reorderings in turn, on one cache."""
    model = quantized()

    def run(fast: bool) -> Tensor:
        cache, found = Int4Cache(model), []

        def step(start: int, stop: int, quick: bool = fast) -> None:
            flatquant.fast_path(model, quick)
            found.append(model(token_ids[:, start:stop], past_key_values=cache).logits)

        step(0, 6)
        step(6, 7)
        step(7, 8, False)
        step(8, 9)
        twin = copy.deepcopy(cache)
        assert twin.lockstep is None and twin.get_seq_length() == 9
        step(9, 20)
        cache.crop(-8)
        assert cache.get_seq_length() == 12
        step(12, 13)
        cache.reorder_cache(torch.tensor([1, 0]))
        step(13, 14)
        cache.batch_select_indices(torch.tensor([0]))
        found.append(model(token_ids[:1, 14:15], past_key_values=cache).logits)
        cache = twin
        step(9, 10)
        cache.reset()
        assert cache.get_seq_length() == 0
        step(0, 5)
        step(5, 6)
        return torch.cat([part.flatten() for part in found])

    fast = run(True)
    assert counter.take() == 10
    assert torch.equal(fast, run(False))
    assert counter.take() == 0


def test_lengths_are_those_of_every_layer(token_ids):
    model = quantized()
    cache = Int4Cache(model)
    model(token_ids[:, :3], past_key_values=cache)
    step = cache.lockstep
    assert step is not None and step.active
    cache.layers[1].crop(-1)
    assert not step.active
    assert [layer.get_seq_length() for layer in cache.layers] == [3, 2]
    model(token_ids[:, 3:4], past_key_values=cache)  # unequal lengths: one by one
    assert [layer.get_seq_length() for layer in cache.layers] == [4, 3]


def test_a_batch_of_another_size_is_refused_as_before(token_ids):
    model = quantized()
    cache = Int4Cache(model)
    model(token_ids[:, :3], past_key_values=cache)
    with pytest.raises(ValueError, match="the cache has batch 2, the new keys have 1"):
        model(token_ids[:1, 3:4], past_key_values=cache)


# ---- calls that are not for the fast path --------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"return_dict": False},
        {"use_cache": False, "attention_mask": torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()},
    ],
    ids=["hidden states", "attentions", "tuple", "four-dimensional mask"],
)
def test_unusual_arguments_take_the_plain_path(arguments, token_ids, counter):
    model = quantized()
    options = {"past_key_values": None if "use_cache" in arguments else Int4Cache(model)}
    model.model(token_ids[:1, :5], **options, **arguments)
    assert counter.take() == 0
    model(token_ids[:1, :5], past_key_values=Int4Cache(model))  # collecting leaves hooks behind
    assert counter.take() == 1


def test_other_caches_and_attentions_take_the_plain_path(token_ids, counter):
    model = quantized()
    ids = token_ids[:, :5]
    model(ids, past_key_values=DynamicCache(config=model.config))
    assert isinstance(model(ids).past_key_values, DynamicCache)
    model.set_attn_implementation("sdpa")
    model(ids, past_key_values=Int4Cache(model))
    assert counter.take() == 0
    model.set_attn_implementation("flatquant")
    model(ids, past_key_values=Int4Cache(model))
    model(inputs_embeds=model.model.embed_tokens(ids), past_key_values=Int4Cache(model))
    assert counter.take() == 2


def test_gradients_training_and_autocast_take_the_plain_path(token_ids, counter):
    model = quantized()
    ids = token_ids[:, :5]
    with torch.enable_grad():
        model(ids, use_cache=False)
    with torch.autocast("cpu", torch.bfloat16):
        model(ids, use_cache=False)
    model.train()(ids, use_cache=False)
    assert counter.take() == 0
    with torch.inference_mode():
        model.eval()(ids, use_cache=False)
    assert counter.take() == 1


def test_a_window_ends_the_fast_path_where_it_cuts_off(token_ids, counter):
    model = quantized("mistral", sliding_window=12)
    cuts = (5, 11, 12, 13, 14, 24)
    fast, plain = both(model, lambda: stepwise(model, token_ids, cuts))
    assert torch.equal(fast, plain)
    assert counter.take() == 3


def test_a_prompt_that_attends_to_itself_unquantized(token_ids, counter):
    model = quantized()
    for layer in model.model.layers:
        layer.self_attn.kv_quantizer.attend_unquantized_prefill = True
    fast, plain = both(model, lambda: stepwise(model, token_ids, (5, 6, 9)))
    assert torch.equal(fast, plain)
    assert counter.take() == 2


def test_simulation_takes_the_plain_path(token_ids, counter):
    model = quantized()
    fast = model(token_ids[:, :9], use_cache=False).logits
    assert counter.take() == 1
    with flatquant.fake_quantized(model):
        assert torch.equal(model(token_ids[:, :9], use_cache=False).logits, fast)
    assert counter.take() == 0
    model(token_ids[:, :9], use_cache=False)
    assert counter.take() == 1


def test_hooks_see_what_they_ask_for(token_ids, counter):
    model = quantized()
    ids = token_ids[:, :5]
    expected = model(ids, use_cache=False).logits
    seen: list[Any] = []
    for module in (model.model.layers[1], model.model.layers[0].mlp.act_fn):
        module.register_forward_pre_hook(lambda *_: None).remove()
    handles = [
        model.model.layers[1].register_forward_hook(lambda *_: seen.append("layer")),
        model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
            lambda *_: seen.append("q_proj")
        ),
        nn.modules.module.register_module_forward_hook(lambda *_: seen.append("any")),
    ]
    counter.take()
    for handle in handles:
        assert torch.equal(model(ids, use_cache=False).logits, expected)
        assert counter.take() == 0 and seen
        handle.remove()
        seen.clear()
    assert torch.equal(model(ids, use_cache=False).logits, expected)
    assert counter.take() == 1
    model.model.norm.register_forward_hook(lambda *_: seen.append("norm"))  # it is not skipped
    model(ids, use_cache=False)
    assert counter.take() == 1 and seen == ["norm"]


def test_no_fast_path_where_the_op_would_give_something_else(token_ids):
    reasons = {
        "W4A4": "keys and values are not quantized",
        "W4A4K16V4": "keys or values of layers.0 are not quantized",
        "W4A16KV4": "layers.0.self_attn.q_proj does not run on an integer kernel",
        "KV4": "layers.0.self_attn.q_proj does not run on an integer kernel",
    }
    for scheme, reason in reasons.items():
        model = quantized(scheme=scheme)
        assert stack.obstacle(model) == reason
        assert f"one by one: {reason}" in str(flatquant.report(model))
    ignored = flatquant.replace_linear(
        build_tiny_model(), "W4A4KV4", ignore=("lm_head", "model.layers.1.mlp.down_proj")
    )
    assert stack.obstacle(ignored) == "layers.1.mlp.down_proj does not run on an integer kernel"
    assert stack.obstacle(quantized("qwen3")) == "layers.0 has a q_norm"
    nowhere = stack.obstacle(quantized().to("meta"))
    assert nowhere is not None and "no native decoder_stack on meta" in nowhere
    wide = quantized(dtype=torch.float64)
    assert "channel_scale has dtype float64: it must be float32" in (stack.obstacle(wide) or "")
    gelu = quantized(hidden_act="gelu")
    assert stack.obstacle(gelu) == "the MLP of layers.0 is not a gated SiLU"
    model = quantized()
    assert "decoding: all blocks as one op" in str(flatquant.report(model))
    flatquant.fast_path(model, False)
    assert stack.obstacle(model) == "it is switched off"
    with pytest.raises(ValueError, match="fast_path: the model has none"):
        flatquant.fast_path(build_tiny_model(), True)


# ---- models that change --------------------------------------------------------------------------


def change_weight(model: Any) -> None:
    linear = model.model.layers[1].mlp.up_proj
    linear.weight_packed = linear.weight_packed.flip(0).contiguous()


def change_in_place(model: Any) -> None:
    model.model.layers[0].self_attn.k_proj.weight_scale.mul_(1.5)


def change_module(model: Any) -> None:
    layers = model.model.layers
    layers[0].mlp.down_proj = copy.deepcopy(layers[1].mlp.down_proj)


def change_block(model: Any) -> None:
    model.model.layers[0] = copy.deepcopy(model.model.layers[1])


def change_quantizer(model: Any) -> None:
    quantizer = model.model.layers[0].self_attn.kv_quantizer
    quantizer.k_clip = quantizer.k_clip * 0.5


def change_forward(model: Any) -> None:
    norm = model.model.layers[1].post_attention_layernorm
    original = norm.forward
    norm.forward = lambda x: original(2 * x + 1)


def change_attention_forward(model: Any) -> None:
    attention = model.model.layers[1].self_attn
    original = attention.forward
    attention.forward = lambda **kwargs: (2 * original(**kwargs)[0], None)


def change_forward_again(model: Any) -> None:
    attention = model.model.layers[1].self_attn
    attention.forward = attention.forward  # the same, as an attribute of the instance
    assert stack.obstacle(model) is None
    change_attention_forward(model)


def change_depth(model: Any) -> None:
    model.config.num_hidden_layers = 1


def change_epsilon(model: Any) -> None:
    model.model.layers[0].input_layernorm.eps = 0.5


def load_state(model: Any) -> None:
    other = quantized(seed=3)
    model.load_state_dict(other.state_dict())


def assign_state(model: Any) -> None:
    other = quantized(seed=3)
    model.load_state_dict(other.state_dict(), assign=True)


def cast(model: Any) -> None:
    model.to(torch.bfloat16)


def share(model: Any) -> None:
    model.share_memory()
    model.model.layers[0].self_attn.v_proj.weight_scale.mul_(0.5)


@pytest.mark.parametrize(
    "change",
    [
        change_weight,
        change_in_place,
        change_module,
        change_block,
        change_quantizer,
        change_forward,
        change_attention_forward,
        change_forward_again,
        change_depth,
        change_epsilon,
        load_state,
        assign_state,
        cast,
        share,
    ],
)
def test_a_changed_model_is_noticed(change, token_ids):
    model = quantized()
    before = model(token_ids[:, :13], use_cache=False).logits
    change(model)
    fast, plain = both(model, lambda: model(token_ids[:, :13], use_cache=False).logits)
    assert torch.equal(fast, plain)
    assert not torch.equal(fast.float(), before.float())


def test_a_changed_quantizer_is_noticed_by_a_cache_in_use(token_ids):
    model = quantized()

    def run() -> Tensor:
        cache = Int4Cache(model)
        first = model(token_ids[:, :9], past_key_values=cache).logits
        quantizer = model.model.layers[0].self_attn.kv_quantizer
        quantizer.v_clip = quantizer.v_clip * 0.9
        second = model(token_ids[:, 9:10], past_key_values=cache).logits
        quantizer.v_clip = torch.ones(2)
        return torch.cat((first, second), 1)

    fast, plain = both(model, run)
    assert torch.equal(fast, plain)


def test_a_plan_is_kept_while_nothing_changes(token_ids):
    model = quantized()
    path = model.model.fast_path
    first = path.bound(model.model)
    assert isinstance(first, Bound)
    stepwise(model, token_ids, CUTS)
    generated(model, token_ids)
    assert path.bound(model.model) is first
    change_weight(model)
    assert path.bound(model.model) is not first


def test_a_copied_model_binds_its_own_tensors(token_ids, counter):
    model = quantized()
    expected = stepwise(model, token_ids, CUTS)
    twin = copy.deepcopy(model)
    assert twin.model.forward.__self__ is twin.model
    assert torch.equal(stepwise(twin, token_ids, CUTS), expected)
    assert counter.take() == 2 * len(CUTS)
    change_in_place(twin)
    assert torch.equal(stepwise(model, token_ids, CUTS), expected)
    assert not torch.equal(stepwise(twin, token_ids, CUTS), expected)
    own, other = (m.model.fast_path.bound(m.model).plan for m in (model, twin))
    assert own is not other
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy.copy(own)
    flatquant.fast_path(twin, False)
    assert not copy.deepcopy(twin).model.fast_path.enabled


def test_a_cache_of_another_model_is_not_confused(token_ids):
    """Assisted decoding and plain carelessness hand over caches; codes follow their quantizer."""
    one, two = quantized(seed=0), quantized(seed=1)

    def run() -> Tensor:
        cache = Int4Cache(one)
        two(token_ids[:, :9], past_key_values=cache)
        return two(token_ids[:, 9:10], past_key_values=cache).logits

    fast, plain = both(two, run)
    assert torch.equal(fast, plain)


def test_saved_and_loaded(tmp_path, token_ids, counter):
    model = quantized()
    expected = stepwise(model, token_ids, CUTS)
    model.save_pretrained(tmp_path)
    loaded = flatquant.load(tmp_path)
    assert stack.obstacle(loaded) is None
    counter.take()
    assert torch.equal(stepwise(loaded, token_ids, CUTS), expected)
    assert counter.take() == len(CUTS)


def test_compiling_takes_the_plain_path(token_ids, counter):
    model = quantized()
    ids = token_ids[:, :5]
    expected = model(ids, use_cache=False).logits
    counter.take()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids, use_cache=False).logits, expected)
    assert counter.take() == 0


def test_threads_of_the_caller_do_not_disturb_each_other(token_ids):
    model = quantized(dtype=torch.bfloat16)
    expected = stepwise(model, token_ids, CUTS)
    wrong: list[int] = []

    def run(number: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                if not torch.equal(stepwise(model, token_ids, CUTS), expected):
                    wrong.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
