"""GPTQ and LDLQ against independent float64 writings of their papers' formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flatquant.weights import Gptq, Ldlq, MseClip, QuantizedWeight, Rtn, WeightTask
from flatquant.weights.feedback import damped, row_errors

from .test_weights import layer_error, make_task

Scales = tuple[Tensor, Tensor]


def min_max(part: Tensor, bits: int, symmetric: bool) -> Scales:
    """Scale and zero point [out] of the columns [out, n], in float64."""
    high, low = part.amax(1).clamp(min=0), part.amin(1).clamp(max=0)
    if symmetric:
        return torch.maximum(high, -low) / (2 ** (bits - 1) - 1), torch.zeros_like(high)
    scale = (high - low) / (2**bits - 1)
    return scale, (-low / scale).round()


def nearest(column: Tensor, scales: Scales, bits: int, symmetric: bool) -> Tensor:
    """Value of the nearest code of a column [out]."""
    scale, zero = scales
    low = -(2 ** (bits - 1)) if symmetric else 0
    code = ((column / scale).round() + zero).clamp(low, low + 2**bits - 1)
    return (code - zero) * scale


def optimal_brain_quantization(
    task: WeightTask, order: list[int], *, static: bool = True, damp: float = 0.01
) -> Tensor:
    """GPTQ, equations 2 and 3, column by column, with an inverse of its own for every column.

    δ_F = −(w_q − quant(w_q)) / [H_F⁻¹]_qq · (H_F⁻¹)_{:,q}; then q leaves F.
    """
    assert task.hessian is not None
    width = task.weight.shape[1]
    size = task.group or width
    h = task.hessian + damp * task.hessian.diagonal().mean() * torch.eye(width).double()
    weight = task.weight.clone()
    values = torch.zeros_like(weight)
    scales = [
        min_max(weight[:, begin : begin + size], task.bits, task.symmetric)
        for begin in range(0, width, size)
    ]
    free = list(order)
    for q in order:
        if not static and q % size == 0:
            scales[q // size] = min_max(weight[:, q : q + size], task.bits, task.symmetric)
        inverse = torch.linalg.inv(h[free][:, free])
        values[:, q] = nearest(weight[:, q], scales[q // size], task.bits, task.symmetric)
        error = (weight[:, q] - values[:, q]) / inverse[0, 0]
        weight[:, free] -= torch.outer(error, inverse[:, 0])
        free.pop(0)
    return values


def linear_feedback(task: WeightTask, damp: float = 0.01) -> Tensor:
    """QuIP, section 3: H = (U + I)·D·(U + I)ᵀ, ŵ_k = Q(w_k + (w − ŵ)_<k · U_<k,k).

    The factor by elimination of the last column first, with no Cholesky.
    """
    assert task.hessian is not None
    width = task.weight.shape[1]
    rest = task.hessian + damp * task.hessian.diagonal().mean() * torch.eye(width).double()
    upper = torch.zeros_like(rest)
    for k in reversed(range(width)):
        upper[:k, k] = rest[:k, k] / rest[k, k]
        rest = rest - rest[k, k] * torch.outer(
            upper[:, k] + _unit(k, width), upper[:, k] + _unit(k, width)
        )
    scales = min_max(task.weight, task.bits, task.symmetric)
    values = torch.zeros_like(task.weight)
    for k in range(width):
        fed = (task.weight[:, :k] - values[:, :k]) @ upper[:k, k]
        values[:, k] = nearest(task.weight[:, k] + fed, scales, task.bits, task.symmetric)
    return values


def _unit(k: int, width: int) -> Tensor:
    return torch.eye(width).double()[k]


def by_activity(task: WeightTask) -> list[int]:
    assert task.hessian is not None
    return task.hessian.diagonal().argsort(descending=True, stable=True).tolist()


def agrees(task: WeightTask, result: QuantizedWeight, values: Tensor) -> bool:
    """The formula's values, but rounding to nearest in rows where that has less error.

    Scales are float32 in one and float64 in the other.
    """
    assert task.hessian is not None
    plain = Rtn().quantize(task).dequantize().double()
    errors = [((d @ task.hessian) * d).sum(1) for d in (values - task.weight, plain - task.weight)]
    worse = errors[0] > errors[1]
    count = int(worse.sum())
    assert count <= 2
    assert len(result.notes) == (count > 0)
    assert all(note.startswith(f"{count} of 24 rows") for note in result.notes)
    expected = torch.where(worse[:, None], plain, values)
    return torch.allclose(result.dequantize().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_gptq_is_optimal_brain_quantization(
    bits: int, act_order: bool, group: int | None, symmetric: bool
) -> None:
    task = make_task(bits, group, symmetric=symmetric)
    order = by_activity(task) if act_order else list(range(64))
    result = Gptq(act_order=act_order).quantize(task)
    assert agrees(task, result, optimal_brain_quantization(task, order))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, 32])
def test_moving_groups_take_their_scale_from_updated_weights(group: int, symmetric: bool) -> None:
    task = make_task(3, group, symmetric=symmetric)
    result = Gptq(act_order=False, static_groups=False).quantize(task)
    expected = optimal_brain_quantization(task, list(range(64)), static=False)
    assert agrees(task, result, expected)
    assert not torch.equal(result.scale, Rtn().quantize(task).scale)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_ldlq_is_linear_feedback_and_gptq_without_act_order(bits: int, symmetric: bool) -> None:
    task = make_task(bits, seed=1, symmetric=symmetric)
    result = Ldlq().quantize(task)
    assert agrees(task, result, linear_feedback(task))
    other = Gptq(act_order=False).quantize(task)
    assert torch.equal(result.codes, other.codes) and torch.equal(result.scale, other.scale)
    assert agrees(task, result, optimal_brain_quantization(task, list(range(64))))


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("act_order", [True, False])
def test_the_block_size_changes_nothing(group: int, act_order: bool) -> None:
    task = make_task(3, group, width=128)
    results = [Gptq(act_order=act_order, block=b).quantize(task) for b in (1, 24, 128, 1000)]
    assert all(torch.equal(results[0].codes, r.codes) for r in results[1:])


def test_float32_finds_nearly_the_same_codes() -> None:
    task = make_task(width=128)
    wide, narrow = (Gptq(precision=p).quantize(task) for p in ("float64", "float32"))
    assert float((wide.codes != narrow.codes).double().mean()) < 0.02
    assert layer_error(task, Gptq(precision="float32")) < layer_error(task, "rtn")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [None, 16])
def test_gptq_never_loses_to_rtn(bits: int, group: int | None, symmetric: bool) -> None:
    for seed in range(2):
        task = make_task(bits, group, seed, symmetric=symmetric)
        ours, theirs = layer_error(task, "gptq"), layer_error(task, "rtn")
        assert ours < theirs
        assert layer_error(task, "gptq-mse") <= min(layer_error(task, "rtn-mse"), theirs)


def test_rows_that_would_lose_are_rounded_to_nearest_and_counted() -> None:
    """Nearly collinear inputs of rising power, in the worst order, at 2 bits."""
    task = make_task(2, rows=200, width=16)
    assert task.hessian is not None
    steep = torch.diag(torch.logspace(0, 6, 16).double())
    mixed = steep.sqrt() @ (torch.ones(16, 16).double() * 0.9 + 0.1 * torch.eye(16)) @ steep.sqrt()
    task = replace(task, hessian=mixed)
    result = Gptq(act_order=False).quantize(task)
    plain = Rtn().quantize(task)
    ours, theirs = (row_errors(task.weight, r, mixed) for r in (result, plain))
    assert bool((ours <= theirs).all())
    same = int((result.codes == plain.codes).all(1).sum())
    assert same > 0
    assert any("of 200 rows are rounded to nearest" in note for note in result.notes)


def test_act_order_helps_where_channels_are_unequal() -> None:
    """And the groups stay contiguous: every scale is the one of its 16 neighbours."""
    errors: dict[bool, float] = {True: 0.0, False: 0.0}
    for seed in range(4):
        task = make_task(3, 16, seed, width=128)
        for act_order in errors:
            result = Gptq(act_order=act_order).quantize(task)
            assert torch.equal(result.scale, Rtn().quantize(task).scale)
            errors[act_order] += layer_error(task, Gptq(act_order=act_order))
    assert errors[True] < errors[False]


def test_dead_channels_are_rounded_to_nearest_and_disturb_nobody() -> None:
    task = make_task(width=64)
    assert task.hessian is not None
    hessian = task.hessian.clone() * 1e-8  # a dead channel's diagonal must not depend on units
    dead = torch.tensor([0, 17, 63])
    hessian[dead], hessian[:, dead] = 0.0, 0.0
    result = Gptq().quantize(replace(task, hessian=hessian))
    plain = Rtn().quantize(task)
    assert torch.equal(result.codes[:, dead], plain.codes[:, dead])
    live = torch.tensor([i for i in range(64) if i not in dead.tolist()])
    alone = replace(task, weight=task.weight[:, live], hessian=hessian[live][:, live])
    assert torch.equal(plain.scale, Rtn().quantize(alone).scale)
    assert torch.equal(result.codes[:, live], Gptq().quantize(alone).codes)


def test_a_text_that_excites_nothing_means_round_to_nearest() -> None:
    task = replace(make_task(), hessian=torch.zeros(64, 64).double())
    assert torch.equal(Gptq().quantize(task).codes, Rtn().quantize(task).codes)


def test_damping_grows_for_a_singular_hessian_and_says_so() -> None:
    task = make_task()
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).double()
    singular = replace(task, hessian=x.T @ x)
    quiet = Gptq().quantize(singular)
    assert not any("damping" in note for note in quiet.notes)  # 1% is enough for rank 5
    indefinite = singular.hessian - 0.1 * torch.eye(64).double()
    result = Gptq().quantize(replace(task, hessian=indefinite))
    assert any("damping grew from 0.01 to" in note for note in result.notes)
    undamped = Gptq(damp=0.0).quantize(singular)
    assert undamped.codes.shape == (24, 64)
    hopeless = -1e9 * torch.eye(64).double()
    hopeless[0, 0] = 1.0
    hopeless[1:, 0] = hopeless[0, 1:] = 1e9
    with pytest.raises(ValueError, match=r"gptq: w: the Hessian is not positive definite"):
        Gptq().quantize(replace(task, hessian=hopeless))


def test_damping_is_a_share_of_the_mean_diagonal() -> None:
    hessian = torch.diag(torch.tensor([1.0, 3.0, 0.0])).double()
    assert torch.equal(damped(hessian, 0.5).diagonal(), torch.tensor([2.0, 4.0, 3.0]).double())
    assert torch.equal(hessian.diagonal(), torch.tensor([1.0, 3.0, 0.0]).double())


@pytest.mark.parametrize("group", [None, 16])
def test_passes_of_coordinate_descent_lower_the_error(group: int | None) -> None:
    """QuIP's greedy updates: each pass ends no worse, and at a point no single code improves."""
    task = make_task(2, group)
    assert task.hessian is not None
    errors = []
    for passes in (0, 1, 2, 20):
        result = Ldlq(passes=passes).quantize(task)
        delta = task.weight - result.dequantize().double()
        errors.append(float(((delta @ damped(task.hessian, 0.01)) * delta).sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.98 * errors[0]
    h = damped(task.hessian, 0.01)
    scale = result.scale if group is None else result.scale[:, 5 // group]
    for step in (-1, 1):
        moved = result.codes[:, 5] + step
        allowed = (moved >= -2) & (moved <= 1)
        change = delta.clone()
        change[:, 5] -= step * scale.reshape(-1).double()
        old, new = (((d @ h) * d).sum(1) for d in (delta, change))
        assert bool((new[allowed] >= old[allowed] * (1 - 1e-6)).all())


def test_lazy_passes_equal_plain_coordinate_descent() -> None:
    """One pass, written without blocks: ŵ_k ← Q(w_k + Σ_{j≠k} (w_j − ŵ_j)·H_jk / H_kk)."""
    task = make_task(3, seed=5)
    assert task.hessian is not None
    h = damped(task.hessian, 0.01)
    values = linear_feedback(task)
    scales = min_max(task.weight, 3, True)
    for k in range(64):
        error = task.weight - values
        others = error @ h[:, k] - error[:, k] * h[k, k]
        values[:, k] = nearest(task.weight[:, k] + others / h[k, k], scales, 3, True)
    for block in (8, 128):
        assert agrees(task, Ldlq(passes=1, block=block).quantize(task), values)


def test_reordering_with_greedy_passes_beats_plain_ldlq() -> None:
    tasks = [make_task(2, seed=seed) for seed in range(4)]
    plain = sum(layer_error(task, Ldlq()) for task in tasks)
    assert sum(layer_error(task, Ldlq(act_order=True, passes=5)) for task in tasks) < plain


def test_a_clip_search_makes_the_grid_of_the_loop() -> None:
    task = make_task(2)
    result = Gptq(clip=MseClip()).quantize(task)
    assert torch.equal(result.scale, Rtn(clip=MseClip()).quantize(task).scale)
    assert layer_error(task, Gptq(clip=MseClip())) < layer_error(task, Gptq())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"damp": -0.1}, r"gptq: damp=-0.1 must be at least 0"),
        ({"block": 0}, r"block=0 must be at least 1"),
        ({"passes": -1}, r"passes=-1 must be at least 0"),
        ({"precision": "half"}, r"precision='half' must be one of"),
        ({"static_groups": False}, r"act_order=True needs static_groups=True"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gptq(**settings)  # type: ignore[arg-type]
