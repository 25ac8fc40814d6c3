"""Clip searches and HQQ against independent float64 writings of their formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flatquant.weights import AwqClip, ClipSearch, Gptq, Hqq, MseClip, Rtn, WeightTask

from .test_weights import layer_error, make_task

F64 = torch.float64


def quantized(part: Tensor, high: Tensor, low: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Values of float64 [out, n] on a grid from −low to high (both [out], positive).

    Scale and zero point in float32, as the contract says: where high = low at 4 bits, the zero
    point 7.5 is a tie.
    """
    high, low = high[:, None].float(), low[:, None].float()
    if symmetric:
        scale = (torch.maximum(high, low) / (2 ** (bits - 1) - 1)).double()
        return (part / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
    scale = (high + low) / (2**bits - 1)
    zero = (low / scale).round()
    codes = ((part / scale.double()).round() + zero).clamp(0, 2**bits - 1)
    return (codes - zero) * scale.double()


def ends(part: Tensor) -> tuple[Tensor, Tensor]:
    return part.amax(1).clamp(min=0), (-part.amin(1)).clamp(min=0)


def heavy(
    bits: int, group: int | None, symmetric: bool, rows: int = 40
) -> tuple[WeightTask, Tensor]:
    """A weight with outliers, larger on one side, and inputs [tokens, in]; H is their XᵀX."""
    generator = torch.Generator().manual_seed(11)
    weight = torch.randn(rows, 64, generator=generator, dtype=F64)
    weight = weight.sign() * weight.abs().pow(1.6) + 0.4 * (weight > 1)
    x = torch.randn(300, 64, generator=generator, dtype=F64)
    x = (
        x
        * torch.rand(64, generator=generator, dtype=F64).mul(3)
        @ torch.randn(64, 64, generator=generator, dtype=F64)
    )
    task = WeightTask(
        name="w",
        weight=weight.float().double(),
        bits=bits,
        group=group,
        clip=None,
        hessian=x.T @ x,
        symmetric=symmetric,
    )
    return task, x


def search(
    task: WeightTask, x: Tensor | None, ratios: list[float], sides: str, norm: float = 2.0
) -> Tensor:
    """Least error over the ratios, group by group: values [out, in].

    With x: Σ_t (Σ_j (ŵ_j − w_j)·x_tj)² over the group's channels j (AWQ); without: Σ|ŵ − w|^norm.
    """
    size = task.group or 64
    found = torch.empty_like(task.weight)
    for begin in range(0, 64, size):
        part = task.weight[:, begin : begin + size]
        high, low = (end.float() for end in ends(part))
        best = torch.full((len(part),), torch.inf, dtype=F64)
        for ratio in ratios:
            bound = torch.maximum(high, low) * ratio
            tried = (high * ratio, low * ratio)
            if sides == "absmax":
                tried = (torch.minimum(high, bound), torch.minimum(low, bound))
            values = quantized(part, *tried, task.bits, task.symmetric)
            if x is None:
                error = (values - part).abs().pow(norm).sum(1)
            else:
                error = (x[:, begin : begin + size] @ (values - part).T).square().sum(0)
            better = error < best * (1 - 1e-9)
            best = torch.where(better, error, best)
            found[:, begin : begin + size][better] = values[better]
    return found


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_mse_is_gptqs_linear_search(bits: int, group: int | None, symmetric: bool) -> None:
    """GPTQ's `mse`, QuaRot's W clip: 80 ratios from 1 to 0.21, Σ|ŵ − w|^2.4."""
    task, _ = heavy(bits, group, symmetric)
    ratios = [1 - i / 100 for i in range(80)]
    expected = search(task, None, ratios, "same", 2.4)
    ours = Rtn(clip=MseClip()).quantize(task).dequantize().double()
    assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("sides", ["absmax", "same"])
@pytest.mark.parametrize("bits", [2, 4])
def test_awq_clip_is_its_search_over_outputs(
    bits: int, sides: str, group: int | None, symmetric: bool
) -> None:
    """AWQ's clip search with every token kept; ours has only their second moments."""
    task, x = heavy(bits, group, symmetric)
    expected = search(task, x, [1 - i / 20 for i in range(10)], sides)
    ours = Rtn(clip=AwqClip(sides=sides)).quantize(task).dequantize().double()
    assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(ours, Rtn().quantize(task).dequantize().double())


def test_sides_are_one_choice_on_the_symmetric_grid_and_three_on_the_other() -> None:
    for symmetric, kinds in ((True, 1), (False, 3)):
        task, _ = heavy(3, 32, symmetric)
        results = [
            Rtn(clip=AwqClip(sides=sides)).quantize(task) for sides in ("absmax", "same", "each")
        ]
        assert len({tuple(r.scale.flatten().tolist()) for r in results}) == kinds


@pytest.mark.parametrize("search_type", [MseClip, AwqClip])
@pytest.mark.parametrize("group", [None, 32])
def test_each_side_alone_is_no_worse_than_both(
    search_type: type[ClipSearch], group: int | None
) -> None:
    """The error that is searched, group by group, at 2 bits on lopsided weights."""
    task, _ = heavy(2, group, False)
    settings = {"steps": 20, "shrink": 0.8}
    common, each = (search_type(sides=s, **settings) for s in ("same", "each"))  # type: ignore[arg-type]
    error_of = common.error_of(task)
    assert error_of is not None
    errors = [
        error_of(task.rows(Rtn(clip=s).quantize(task).dequantize()) - task.rows())
        for s in (common, each)
    ]
    assert bool((errors[1] <= errors[0] * (1 + 1e-5)).all())
    assert float(errors[1].sum()) < float(errors[0].sum())


def test_uncorrelated_inputs_of_equal_power_mean_the_search_without_data() -> None:
    task, _ = heavy(3, 32, True)
    task = replace(task, hessian=torch.eye(64, dtype=F64))
    without = MseClip(steps=20, shrink=0.5, norm=2.0)
    first, second = (Rtn(clip=c).quantize(task) for c in (AwqClip(), without))
    assert torch.equal(first.scale, second.scale)


def test_a_search_never_raises_its_own_error_and_starts_from_the_clip_it_is_given() -> None:
    for symmetric in (True, False):
        task, _ = heavy(3, 32, symmetric)
        task = replace(task, clip=torch.full((2, 40), 0.9))
        plain = Rtn().quantize(task)
        none = Rtn(clip=MseClip(shrink=0.0)).quantize(task)
        assert torch.equal(plain.scale, none.scale) and torch.equal(plain.codes, none.codes)
        for clip in (MseClip(), MseClip(sides="each", steps=20), AwqClip(), AwqClip(sides="each")):
            error_of = clip.error_of(task)
            assert error_of is not None
            before, after = (
                error_of(task.rows(r.dequantize()) - task.rows())
                for r in (plain, Rtn(clip=clip).quantize(task))
            )
            assert bool((after <= before * (1 + 1e-6)).all())


def test_queries_and_keys_are_left_alone_unless_asked_for() -> None:
    task, _ = heavy(3, None, True)
    task = replace(task, makes_scores=True)
    plain = Rtn().quantize(task)
    assert torch.equal(Rtn(clip=AwqClip()).quantize(task).scale, plain.scale)
    clipped = Rtn(clip=AwqClip(skip_scores=False)).quantize(task)
    assert not torch.equal(clipped.scale, plain.scale)


def test_clips_and_rounding_combine() -> None:
    """AWQ + GPTQ, QuaRot + GPTQ: the search lowers the layer error of either rounding."""
    task, _ = heavy(3, None, True)
    for clip in (MseClip(), AwqClip()):
        assert layer_error(task, Rtn(clip=clip)) < layer_error(task, Rtn())
        assert layer_error(task, Gptq(clip=clip)) < layer_error(task, Rtn(clip=clip))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, r"MseClip: steps=0 must be at least 1"),
        ({"shrink": 1.5}, r"shrink=1.5 must lie in \[0, 1\]"),
        ({"sides": "both"}, r"sides='both' must be one of"),
    ],
)
def test_search_settings_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MseClip(**settings)  # type: ignore[arg-type]


def half_quadratic(task: WeightTask, p: float, beta: float, kappa: float, steps: int) -> Tensor:
    """HQQ's updates written for one group at a time; values [out, in]."""
    size = task.group or 64
    found = torch.empty_like(task.weight)
    top = 2 ** (task.bits - 1) - 1 if task.symmetric else 2**task.bits - 1
    bottom = -top - 1 if task.symmetric else 0
    for row in range(len(task.weight)):
        for begin in range(0, 64, size):
            w = task.weight[row, begin : begin + size]
            high, low = w.max().clamp(min=0), (-w.min()).clamp(min=0)
            scale = torch.maximum(high, low) / top if task.symmetric else (high + low) / top
            scale = scale.float().double()  # as the contract's
            zero = torch.zeros(()) if task.symmetric else (low / scale).round()
            weight, least, kept = beta, torch.inf, w
            for _ in range(steps + 1):
                q = (w / scale + zero).round().clamp(bottom, top)
                value = (q - zero) * scale
                error = float((w - value).abs().mean())
                if error < least * (1 - 1e-9):
                    least, kept = error, value
                e = w - value
                e = e.sign() * (e.abs() - e.abs().pow(p - 1) / weight).clamp(min=0)
                if task.symmetric:
                    scale = (q @ (w - e)) / (q @ q)
                else:
                    zero = (q - (w - e) / scale).mean()
                weight *= kappa
            found[row, begin : begin + size] = kept
    return found


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("p", "beta"), [(0.7, 10.0), (0.5, 2.0), (1.0, 3.0)])
def test_hqq_is_its_updates(
    bits: int, group: int | None, symmetric: bool, p: float, beta: float
) -> None:
    task, _ = heavy(bits, group, symmetric, rows=12)
    expected = half_quadratic(task, p, beta, 1.01, 20)
    ours = Hqq(p=p, beta=beta).quantize(task).dequantize().double()
    same = (ours - expected).abs().reshape(-1, group or 64).amax(1) < 1e-4
    assert bool(same.all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_hqq_lowers_the_error_it_looks_at(symmetric: bool) -> None:
    task, _ = heavy(2, 32, symmetric)
    errors = [
        (task.rows(q.quantize(task).dequantize()) - task.rows()).abs().mean(-1)
        for q in (Rtn(), Hqq())
    ]
    assert bool((errors[1] <= errors[0] * (1 + 1e-6)).all())
    assert float(errors[1].mean()) < 0.98 * float(errors[0].mean())


def test_hqq_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"p=1.5 must lie in \(0, 1\]"):
        Hqq(p=1.5)
    with pytest.raises(ValueError, match=r"kappa=0.5 at least 1"):
        Hqq(kappa=0.5)
    task = make_task()
    assert torch.equal(Hqq(iterations=0).quantize(task).codes, Rtn().quantize(task).codes)
