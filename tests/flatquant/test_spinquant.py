"""Rotations learned through the whole model: the step, the gradient, what comes of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, silu
from transformers import PreTrainedModel

import flatquant
from flatquant.fit import FitDivergedError
from flatquant.models import FAMILIES, Site
from flatquant.recipe import EndToEnd, Recipe
from flatquant.transforms.matrices import random_orthogonal
from flatquant.transforms.stiefel import Stiefel, cayley_step

from .conftest import build_tiny_model

CALIBRATION = torch.randint(2, 128, (6, 12), generator=torch.Generator().manual_seed(5))
METHODS = ("spinquant", "spinquant-gptq", "spinquant-nohad")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no Hadamard matrix")
        yield


def short(method: str, scheme: str = "W4A4KV4", **settings: object) -> Recipe:
    """A method with few steps."""
    recipe = flatquant.METHODS[method](flatquant.Scheme.parse(scheme))
    config = recipe.end_to_end
    assert config is not None
    few = {"steps": 2, "batch_size": 2} | settings
    return replace(recipe, end_to_end=replace(config, **few))  # type: ignore[arg-type]


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    result: Tensor = model(tokens, use_cache=False).logits
    return result


def test_cayley_step_is_the_papers_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    n, lr = 12, 0.05
    matrix = random_orthogonal(n, generator)
    gradient = torch.randn(n, n, generator=generator, dtype=torch.float64)
    hat = gradient @ matrix.T - 0.5 * matrix @ matrix.T @ gradient @ matrix.T
    skew = hat - hat.T
    assert float(torch.linalg.matrix_norm(skew, 1)) < 1 / lr
    eye = torch.eye(n, dtype=torch.float64)
    cayley = torch.linalg.inv(eye + lr / 2 * skew) @ (eye - lr / 2 * skew)
    after = cayley_step(matrix, gradient, lr)
    assert torch.allclose(after, cayley @ matrix, atol=1e-12)
    assert torch.allclose(after @ after.T, eye, atol=1e-12)
    assert float((gradient * (after - matrix)).sum()) < 0  # downhill
    longest = cayley_step(matrix, gradient, 1e9)
    assert torch.equal(longest, cayley_step(matrix, gradient, 1e12))


def test_many_steps_stay_orthogonal_and_reach_a_target() -> None:
    target = random_orthogonal(8, torch.Generator().manual_seed(1))
    target[0] *= torch.linalg.det(target)  # the component of the identity
    found = Stiefel(torch.eye(8))
    for _ in range(300):
        (found.matrix - target.float()).square().sum().backward()
        found.step(0.5)
    eye = torch.eye(8, dtype=torch.float64)
    assert torch.allclose(found.exact @ found.exact.T, eye, atol=1e-12)
    assert torch.allclose(found.exact, target, atol=1e-3)
    with pytest.raises(RuntimeError, match="must follow a backward pass"):
        found.step(0.5)


class _Round(torch.autograd.Function):
    """Round half to even; the gradient passes."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x.round()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad


def rounded(x: Tensor) -> Tensor:
    """Symmetric 4-bit rows, differentiable as docs/numerics.md says, written out in float64."""
    scale = x.abs().amax(-1, keepdim=True) / 7
    return _Round.apply(x / scale).clamp(-8, 7) * scale


def loss_by_hand(model: PreTrainedModel, turn: Tensor, values: Tensor, tokens: Tensor) -> Tensor:
    """Next-token loss of a one-block Llama with W4A4 linears and R1, R2 merged; float64."""
    config, block = model.config, model.model.layers[0].double()
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    attention, mlp = block.self_attn, block.mlp
    first = torch.diag(block.input_layernorm.weight) @ turn
    second = torch.diag(block.post_attention_layernorm.weight) @ turn
    per_value = torch.block_diag(*[values] * kv_heads)
    per_head = torch.block_diag(*[values] * heads)

    def normed(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.rms_norm_eps)

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        return rounded(x) @ rounded(weight).T

    def split(x: Tensor, count: int) -> Tensor:
        return x.reshape(len(tokens), count, width).transpose(0, 1)

    def rotated(x: Tensor) -> Tensor:
        half = width // 2
        base = config.rope_parameters["rope_theta"]
        rates = base ** (-torch.arange(half, dtype=torch.float64) * 2 / width)
        angles = torch.arange(len(tokens), dtype=torch.float64)[:, None] * rates
        cos, sin = angles.cos(), angles.sin()
        left, right = x[..., :half], x[..., half:]
        return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)

    hidden = model.model.embed_tokens.weight.double()[tokens] @ turn
    x = normed(hidden)
    q = rotated(split(linear(x, attention.q_proj.weight @ first), heads))
    k = rotated(split(linear(x, attention.k_proj.weight @ first), kv_heads))
    v = split(linear(x, per_value.T @ attention.v_proj.weight @ first), kv_heads)
    k, v = (part.repeat_interleave(heads // kv_heads, 0) for part in (k, v))
    scores = q @ k.mT / width**0.5
    past = torch.ones(len(tokens), len(tokens)).tril() > 0
    mixed = scores.masked_fill(~past, -torch.inf).softmax(-1) @ v
    mixed = mixed.transpose(0, 1).reshape(len(tokens), -1)
    hidden = hidden + linear(mixed, turn.T @ attention.o_proj.weight @ per_head)
    x = normed(hidden)
    gate, up = (linear(x, part.weight @ second) for part in (mlp.gate_proj, mlp.up_proj))
    hidden = hidden + linear(silu(gate) * up, turn.T @ mlp.down_proj.weight)
    out = normed(hidden @ turn.T) * model.model.norm.weight.double()
    return cross_entropy((out @ model.lm_head.weight.double().T)[:-1], tokens[1:])


def test_a_step_of_spinquant_equals_an_independent_writing() -> None:
    """Loss, gradient of R1 and R2 through the whole model, and the step, in float64."""
    model = build_tiny_model("llama", num_hidden_layers=1)
    tokens = CALIBRATION[:1]
    recipe = replace(short("spinquant-nohad", "W4A4", steps=1, batch_size=1), weights="rtn")
    recipe = replace(recipe, fit=replace(recipe.fit, amp="off"))
    seen = _learned(model, recipe, tokens)
    start = _learned(model, replace(recipe, end_to_end=replace(recipe.end_to_end, lr=0.0)), tokens)
    name = "model.layers.0"
    turn = start.residual.clone().requires_grad_()
    values = start.values[name].clone().requires_grad_()
    loss = loss_by_hand(model, turn, values, tokens[0])
    loss.backward()
    assert seen.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    for ours, matrix in ((seen.residual, turn), (seen.values[name], values)):
        expected = cayley_step(matrix.detach(), matrix.grad, 1.5)
        moved = (expected - matrix.detach()).norm()
        assert float((ours - expected).norm() / moved) < 1e-3


def _learned(model: PreTrainedModel, recipe: Recipe, tokens: Tensor):  # type: ignore[no-untyped-def]
    """What `learn_rotations` gives in a run of this recipe."""
    from flatquant import pipeline

    found = []
    original = pipeline.learn_rotations

    def spy(*args, **kwargs):  # type: ignore[no-untyped-def]
        found.append(original(*args, **kwargs))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "learn_rotations", spy)
        flatquant.calibrate(model, recipe, recipe.scheme, tokens, progress=False)
    return found[0]


def test_without_quantizers_there_is_nothing_to_learn() -> None:
    """The loss does not depend on R, so its gradient vanishes on the orthogonal matrices."""
    model = build_tiny_model("qwen3")
    transforms = dict.fromkeys((Site.RESIDUAL, Site.V_HEAD), "randomised-hadamard")
    recipe = Recipe(
        method="still",
        scheme=flatquant.Scheme(),
        transforms=transforms,
        end_to_end=EndToEnd(steps=2, batch_size=1),
        fit=flatquant.FitConfig(epochs=0, amp="off"),
    )
    seen, start = (
        _learned(model, replace(recipe, end_to_end=config), CALIBRATION)
        for config in (recipe.end_to_end, EndToEnd(steps=1, batch_size=1, lr=0.0))
    )
    assert torch.allclose(seen.residual, start.residual, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", list(FAMILIES))
def test_learned_models_obey_law_two_and_survive_the_disk(
    method: str, family: str, token_ids: Tensor, tmp_path: Path
) -> None:
    model = build_tiny_model(family, bias=family != "mistral", tie_word_embeddings=True)
    flatquant.quantize(model, short(method), "W4A4KV4", CALIBRATION, progress=False)
    integer = logits(model, token_ids)
    with flatquant.fake_quantized(model):
        assert torch.equal(integer, logits(model, token_ids))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(flatquant.load(tmp_path), token_ids), integer)


@pytest.mark.parametrize("scheme", ["W4A4KV4", "W4A16", "K16V2", "W4A8"])
def test_learning_lowers_the_loss(scheme: str) -> None:
    recipe = short("spinquant", scheme, steps=12, batch_size=6)
    seen = _learned(build_tiny_model("llama"), recipe, CALIBRATION)
    assert seen.losses[-1] < seen.losses[0]
    assert (seen.residual is None) == (scheme == "K16V2")
    for matrix in seen.values.values():
        eye = torch.eye(len(matrix), dtype=torch.float64)
        assert torch.allclose(matrix @ matrix.T, eye, atol=1e-12)


def test_gptq_learns_for_the_activations_unless_there_are_none() -> None:
    settings = [short("spinquant-gptq", scheme).end_to_end for scheme in ("W4A4", "W3A16")]
    assert [config.round_weights for config in settings if config is not None] == [False, True]


def test_an_interrupted_run_goes_on_from_the_learned_rotations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flatquant import pipeline

    model, recipe = build_tiny_model(), short("spinquant")
    arguments = {"scheme": "W4A4KV4", "calibration": CALIBRATION, "progress": False}
    whole = flatquant.calibrate(model, recipe, **arguments)  # type: ignore[arg-type]
    flatquant.calibrate(model, recipe, work_dir=tmp_path, **arguments)  # type: ignore[arg-type]
    for file in tmp_path.glob("block-*"):
        file.unlink()

    def unwanted(*args: object, **kwargs: object) -> None:
        raise AssertionError("learned again")

    monkeypatch.setattr(pipeline, "learn_rotations", unwanted)
    resumed = flatquant.calibrate(model, recipe, work_dir=tmp_path, resume=True, **arguments)  # type: ignore[arg-type]
    pairs = zip((*whole.blocks, whole.outer), (*resumed.blocks, resumed.outer), strict=True)
    for ours, theirs in pairs:
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_linears_that_are_left_alone_take_part() -> None:
    ignore = ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj")
    model = build_tiny_model("qwen2", bias=True)
    result = flatquant.calibrate(
        model, short("spinquant"), "W4A4KV4", CALIBRATION, ignore=ignore, progress=False
    )
    assert "mlp.down_proj.weight" in result.blocks[0]
    assert "self_attn.v_proj.weight" in result.blocks[1]


def test_bad_settings_and_divergence_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="EndToEnd: steps=0 must be >= 1"):
        EndToEnd(steps=0)
    model = build_tiny_model()
    with torch.no_grad():
        model.lm_head.weight[0] = torch.nan
    with pytest.raises(FitDivergedError, match="rotations, step 0: the loss is nan"):
        flatquant.calibrate(model, short("spinquant"), "W4A4", CALIBRATION, progress=False)
    with pytest.raises(ValueError, match="needs calibration text"):
        flatquant.calibrate(model, short("spinquant"), "W4A4", progress=False)
