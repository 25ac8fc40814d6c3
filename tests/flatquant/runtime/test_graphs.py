"""Steps as CUDA graphs. On a CPU their logic, with recordings that repeat the step."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import flatquant
from flatquant.runtime import graphs, stack
from flatquant.runtime.cache import Int4Cache
from flatquant.runtime.graph_memory import Memory, bucket, capacity_for
from flatquant.runtime.graphs import Graphs
from flatquant_cuda import decoder as native

from .test_stack import quantized

needs_op = pytest.mark.skipif(not native.available(), reason="no native decoder_stack")
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or not native.available("cuda"),
    reason="no CUDA device: recordings are tested with a recorder that repeats the step",
)
IDS = torch.randint(2, 128, (8, 700), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Repeating:
    """Records a step as itself, with one tensor for all answers, as a graph has."""

    def __init__(self) -> None:
        self.recorded, self.replayed, self.is_busy, self.fails = 0, 0, False, False

    def busy(self) -> bool:
        return self.is_busy

    def record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.recorded += 1
        output: list[Tensor] = []

        def replay() -> Tensor:
            self.replayed += 1
            answer = step()
            if not output:
                output.append(answer)
            return output[0].copy_(answer)

        return replay


def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU's op understand slots and lengths: all sequences in use have one length."""
    original = native.DecoderPlan.run

    def run(plan: native.DecoderPlan, *args: Any, **kwargs: Any) -> Tensor:
        slots, lengths = kwargs.pop("slots", None), kwargs.pop("lengths", None)
        if lengths is None:
            return original(plan, *args, **kwargs)
        capacity, used = kwargs["past"] + 1, lengths > 0
        past = int(lengths.max()) - 1
        rows = torch.arange(len(lengths))
        assert torch.equal(lengths[used], torch.full_like(lengths[used], past + 1))
        assert torch.equal(slots[used, 0], rows[used] * capacity + past)
        assert (slots[~used] == -1).all()
        mask = kwargs.get("mask")
        kwargs |= {"past": past, "mask": None if mask is None else mask[..., : past + 1]}
        return original(plan, *args, **kwargs)

    monkeypatch.setattr(native.DecoderPlan, "run", run)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Repeating:
    on_cpu(monkeypatch)
    return Repeating()


def with_graphs(model: PreTrainedModel, recorder: Repeating) -> Graphs:
    """Give a model on the CPU the graphs that one on a GPU has."""
    path = model.model.fast_path
    bound = path.bound(model.model)
    assert bound is not None, path.obstacle
    path.graphs = Graphs(bound.plan, recorder)
    return path.graphs


def without(model: PreTrainedModel, call: Callable[[], Any]) -> Any:
    """What call() gives without graphs."""
    path = model.model.fast_path
    kept, path.graphs = path.graphs, None
    result = call()
    path.graphs = kept
    return result


def decode(
    model: PreTrainedModel, batch: int, start: int, stop: int, *, masked: bool = False
) -> Tensor:
    """Logits of a prompt of `start` tokens and of the single tokens after it."""
    cache, pieces = Int4Cache(model), []
    for first, last in [(0, start), *((i, i + 1) for i in range(start, stop))]:
        options: dict[str, Any] = {}
        if masked:
            mask = torch.ones(batch, last, dtype=torch.int64)
            mask[0, : min(2, start - 1)] = 0
            positions = (mask.cumsum(1) - 1).clamp_min(0)[:, first:last]
            options = {"attention_mask": mask, "position_ids": positions}
        ids = IDS[:batch, first:last]
        options = {name: tensor.to(model.device) for name, tensor in options.items()}
        out = model(ids.to(model.device), past_key_values=cache, **options)
        assert cache.get_seq_length() == last
        pieces.append(out.logits)
    return torch.cat(pieces, 1)


def test_buckets() -> None:
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 8, 9, 63, 64, 256)] == [
        *(1, 2, 4, 4, 8, 8, 16, 64, 64, 256)
    ]
    assert bucket(0) is None and bucket(257) is None
    for n in range(1, 257):
        size = bucket(n)
        assert size is not None and n <= size <= max(2 * n - 1, n + 7) and bucket(size) == size


def test_capacities() -> None:
    assert [capacity_for(n) for n in (1, 204, 205, 1000, 32768)] == [256, 256, 256, 1280, 40960]
    for n in range(1, 5000, 7):
        assert n < capacity_for(n) <= n + n // 4 + 256 and capacity_for(n) % 256 == 0


@needs_op
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_are_those_of_the_plain_way(dtype, batch, masked, recorder) -> None:
    """Also with sequences that are not there: 3 are served by a recording of 4."""
    model = quantized(dtype=dtype)
    found = with_graphs(model, recorder)
    for start in (1, 7, 5):  # the memory of one cache serves the next
        got = decode(model, batch, start, 14, masked=masked)
        plain = without(model, lambda n=start: decode(model, batch, n, 14, masked=masked))
        assert torch.equal(got, plain), start
        gc.collect()
    assert recorder.recorded == 1 and len(found._memories) == 1
    # Of each run the first call of one token goes the plain way, and so do prompts of more; one
    # step in all is run to be recorded.
    assert recorder.replayed == (13 - 1) + (7 - 1) + (9 - 1)
    assert found.obstacle is None


@needs_op
def test_a_recording_of_few_after_one_of_many(recorder) -> None:
    """What is left of a wider batch in the same memory is neither read nor written."""
    model = quantized()
    found = with_graphs(model, recorder)
    for batch in (8, 5, 7):
        got = decode(model, batch, 4, 9)
        assert torch.equal(got, without(model, lambda n=batch: decode(model, n, 4, 9)))
        gc.collect()
    assert len(found._memories) == 1 and recorder.recorded == 1


@needs_op
def test_a_cache_that_outgrows_its_memory_is_recorded_anew(recorder) -> None:
    model = quantized()
    with_graphs(model, recorder)
    got = decode(model, 2, 195, 270)
    assert torch.equal(got, without(model, lambda: decode(model, 2, 195, 270)))
    assert recorder.recorded == 2  # 256 positions, then 512


@needs_op
def test_two_caches_at_a_time_and_one_that_is_kept(recorder) -> None:
    model = quantized()
    found = with_graphs(model, recorder)
    caches = [Int4Cache(model) for _ in range(2)]
    rows = (IDS[:1], IDS[1:2])
    logits: list[list[Tensor]] = [[], []]
    for first, last in [(0, 6), *((i, i + 1) for i in range(6, 12))]:
        for i in (0, 1):
            out = model(rows[i][:, first:last], past_key_values=caches[i])
            logits[i].append(out.logits)
    assert len(found._memories) == 2
    for i in (0, 1):
        want = without(model, lambda r=rows[i]: feed(model, r, 6, 12))
        assert torch.equal(torch.cat(logits[i], 1), want)
    kept = caches[0].layers[0].key_store.view()
    before = kept.dequantize().clone()
    caches.clear()
    gc.collect()
    feed(model, IDS[2:3], 6, 12)
    feed(model, IDS[3:4], 6, 12)
    assert torch.equal(kept.dequantize(), before)  # whose memory is not given away


def feed(model: PreTrainedModel, ids: Tensor, start: int, stop: int) -> Tensor:
    cache = Int4Cache(model)
    pieces = [model(ids[:, :start], past_key_values=cache).logits]
    pieces += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(start, stop)]
    return torch.cat(pieces, 1)


@needs_op
def test_answers_stay(recorder) -> None:
    """A later step does not write over what an earlier one returned."""
    model = quantized()
    with_graphs(model, recorder)
    cache = Int4Cache(model)
    model(IDS[:2, :5], past_key_values=cache)
    answers = [
        model.model(IDS[:2, i : i + 1], past_key_values=cache).last_hidden_state
        for i in range(5, 10)
    ]
    copies = [answer.clone() for answer in answers]
    model(IDS[:2, 10:11], past_key_values=cache)
    assert all(torch.equal(a, b) for a, b in zip(answers, copies, strict=True))
    assert not torch.equal(answers[-1], answers[-2])


@needs_op
def test_crop_and_longer_steps_between(recorder) -> None:
    """Assisted decoding: several tokens at once, some of them taken back."""
    model = quantized()
    with_graphs(model, recorder)

    def run() -> Tensor:
        cache, pieces = Int4Cache(model), []
        for first, last, keep in ((0, 9, 9), (9, 10, 10), (10, 11, 11), (11, 14, 12), (12, 13, 13)):
            pieces.append(model(IDS[:1, first:last], past_key_values=cache).logits)
            for layer in cache.layers:
                for store in layer.stores():
                    store.length = keep
        for i in range(13, 18):
            pieces.append(model(IDS[:1, i : i + 1], past_key_values=cache).logits)
        return torch.cat(pieces, 1)

    got = run()
    assert recorder.replayed > 0
    assert torch.equal(got, without(model, run))


@needs_op
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}], ids=str)
def test_generate_is_unchanged(options, recorder) -> None:
    model = quantized()
    with_graphs(model, recorder)

    def run() -> Tensor:
        torch.manual_seed(0)
        fixed = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
        result: Tensor = model.generate(IDS[:3, :6], **(fixed | options))
        return result

    got = run()
    assert torch.equal(got, without(model, run))
    assert (recorder.replayed == 0) is ("num_beams" in options)  # whose cache moves every time


@needs_op
def test_inference_mode(recorder) -> None:
    model = quantized()
    with_graphs(model, recorder)
    with torch.inference_mode():
        got = decode(model, 2, 5, 10)
    gc.collect()
    again = decode(model, 2, 5, 10)
    assert torch.equal(got, again)


@needs_op
def test_what_is_beside_the_blocks_may_change(recorder) -> None:
    model = quantized()
    with_graphs(model, recorder)
    decode(model, 2, 5, 9)
    gc.collect()
    model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight * 1.5)
    got = decode(model, 2, 5, 9)
    assert torch.equal(got, without(model, lambda: decode(model, 2, 5, 9)))
    assert recorder.recorded == 2
    seen = []
    handle = model.model.norm.register_forward_hook(lambda *_: seen.append(1))
    replayed = recorder.replayed
    decode(model, 2, 5, 9)
    handle.remove()
    assert len(seen) == 5 and recorder.replayed == replayed


@needs_op
def test_plain_way_where_nothing_can_be_recorded(recorder) -> None:
    model = quantized()
    found = with_graphs(model, recorder)
    recorder.is_busy = True
    plain = decode(model, 2, 5, 9)
    assert recorder.recorded == 0 and not found._memories
    recorder.is_busy, recorder.fails = False, True
    assert torch.equal(decode(model, 2, 5, 9), plain)
    assert found.obstacle is not None and "not permitted" in found.obstacle
    recorder.fails = False
    assert torch.equal(decode(model, 2, 5, 9), plain)
    assert recorder.recorded == 0
    flatquant.fast_path(model, False)
    assert found.obstacle is None and not found._memories
    assert torch.equal(decode(model, 2, 5, 9), plain)
    flatquant.fast_path(model, True)
    assert torch.equal(decode(model, 2, 5, 9), plain) and recorder.recorded == 1
    embeds = model.model.embed_tokens(IDS[:2, :1])
    cache, replayed = Int4Cache(model), recorder.replayed
    for _ in range(3):
        model(inputs_embeds=embeds, past_key_values=cache)
    assert recorder.replayed == replayed


@needs_op
def test_no_memory_takes_the_plain_way(recorder, monkeypatch) -> None:
    model = quantized()
    found = with_graphs(model, recorder)
    plain = without(model, lambda: decode(model, 2, 5, 9))
    taken = Memory.take_in

    def fail_half_way(memory: Memory, step: Any) -> None:
        taken(memory, step)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Memory, "take_in", fail_half_way)
    assert torch.equal(decode(model, 2, 5, 9), plain)
    assert found.obstacle is not None and "no memory for 2 sequences" in found.obstacle


@needs_op
def test_rotary_embeddings_of_the_length_are_not_recorded(recorder) -> None:
    model = quantized()
    found = with_graphs(model, recorder)
    model.model.rotary_emb.rope_type = "dynamic"
    decode(model, 2, 5, 9)
    assert recorder.recorded == 0 and "dynamic" in (found.obstacle or "")


@needs_op
def test_idle_memory_is_bounded(recorder) -> None:
    model = quantized()
    found = with_graphs(model, recorder)
    for batch in (1, 2, 4, 8):
        decode(model, batch, 4, 8)
        gc.collect()
    assert len(found._memories) <= graphs._IDLE + 1


def test_compiled_without_breaks_around_the_quantized_cache() -> None:
    """The plain way: a prompt and single tokens, append and attention included."""
    model = quantized()
    want = decode(model, 2, 5, 8)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    cache, pieces = Int4Cache(model), []
    for first, last in ((0, 5), (5, 6), (6, 7), (7, 8)):
        pieces.append(compiled(IDS[:2, first:last], past_key_values=cache).logits)
    assert torch.equal(torch.cat(pieces, 1), want)


@needs_op
def test_neighbours_in_memory_are_saved_and_moved_as_before(tmp_path: Path) -> None:
    """What binding does on a GPU to weights that are one product there."""
    model = quantized()
    want = decode(model, 1, 5, 7)
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for linears in (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (mlp.gate_proj, mlp.up_proj),
        ):
            for name in ("weight_packed", "weight_scale"):
                native._place_side_by_side([getattr(linear, name) for linear in linears])
    storage = model.model.layers[0].self_attn.q_proj.weight_packed.untyped_storage()
    assert storage.data_ptr() <= model.model.layers[0].self_attn.v_proj.weight_packed.data_ptr()
    assert torch.equal(decode(model, 1, 5, 7), want)
    model.save_pretrained(tmp_path)
    assert torch.equal(decode(flatquant.load(tmp_path), 1, 5, 7), want)
    assert torch.equal(decode(copy.deepcopy(model), 1, 5, 7), want)
    with torch.inference_mode():
        fixed = [torch.ones(2), torch.zeros(3)]
    native._place_side_by_side(fixed)
    assert fixed[0].untyped_storage().nbytes() == 8  # nothing to be done for these


# ---- on a GPU ------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.cuda
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_graphs_on_a_gpu(dtype, batch, masked) -> None:
    """Bit-equal to the blocks one by one, and to the op that is launched anew for every token."""
    model = quantized(dtype=dtype).cuda()
    assert stack.obstacle(model) is None
    got = decode(model, batch, 7, 40, masked=masked)
    assert model.model.fast_path.graphs._memories
    launched = without(model, lambda: decode(model, batch, 7, 40, masked=masked))
    flatquant.fast_path(model, False)
    one_by_one = decode(model, batch, 7, 40, masked=masked)
    assert torch.equal(got, launched) and torch.equal(got, one_by_one)


@needs_gpu
@pytest.mark.cuda
def test_a_long_text_on_a_gpu() -> None:
    """Past the capacity, and past a chunk of attention."""
    model = quantized(dtype=torch.bfloat16).cuda()
    got = decode(model, 2, 195, 600)
    flatquant.fast_path(model, False)
    assert torch.equal(got, decode(model, 2, 195, 600))


@needs_gpu
@pytest.mark.cuda
def test_nothing_waits_for_the_gpu() -> None:
    """After the recording no step asks the device for an answer, and none allocates for good."""
    model = quantized(dtype=torch.bfloat16).cuda()
    cache = Int4Cache(model)
    ids = IDS[:2].cuda()
    model(ids[:, :9], past_key_values=cache)
    for i in range(9, 13):
        model(ids[:, i : i + 1], past_key_values=cache)
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(13, 40):
            model.model(ids[:, i : i + 1], past_key_values=cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_allocated() == before
