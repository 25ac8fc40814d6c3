"""Magnitude and Wanda against independent writings, with and without rounding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import flatquant
from flatquant.weights import Gptq, Hqq, Magnitude, Rtn, Wanda, WeightQuantizer, WeightTask
from flatquant_cuda import packing

from .conftest import FAMILIES, build_tiny_model

CALIBRATION = torch.randint(2, 128, (8, 16), generator=torch.Generator().manual_seed(5))
LINEARS = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")


def make_task(symmetric: bool = True, group: int | None = None) -> WeightTask:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(12, 32, generator=generator, dtype=torch.float64)
    x = torch.randn(64, 32, generator=generator, dtype=torch.float64)
    x = x * torch.linspace(0.1, 3, 32).double()
    return WeightTask(
        name="w", weight=weight, bits=4, group=group, clip=None, hessian=x.T @ x,
        symmetric=symmetric,
    )  # fmt: skip


def inputs(model: object, name: str) -> Tensor:
    """float64 [tokens, channels] that a linear of the first block reads from the text."""
    seen: list[Tensor] = []
    linear = model.model.layers[0].get_submodule(name)  # type: ignore[attr-defined]
    handle = linear.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(CALIBRATION, use_cache=False)  # type: ignore[operator]
    handle.remove()
    return seen[0].double().flatten(0, -2)


def wanda_by_hand(weight: Tensor, x: Tensor, kept: int, of: int) -> Tensor:
    """Equation 1, S_ij = |W_ij|·‖X_j‖₂, output by output, `kept` of every `of` survive."""
    scores = weight.double().abs() * x.square().sum(0).sqrt()
    keep = torch.zeros(weight.shape, dtype=torch.bool)
    for row in range(weight.shape[0]):
        for begin in range(0, weight.shape[1], of):
            part = scores[row, begin : begin + of]
            for column in sorted(range(len(part)), key=lambda j: -float(part[j]))[:kept]:
                keep[row, begin + column] = True
    return keep


@pytest.mark.parametrize("pattern", [None, (2, 4), (4, 8)])
@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.v_proj"])
def test_wanda_is_its_paper(name: str, pattern: tuple[int, int] | None) -> None:
    """The first group of a block reads what the unpruned block gives: the paper's own inputs."""
    model = build_tiny_model("llama")
    recipe = replace(flatquant.METHODS["wanda"](flatquant.Scheme()), weights=Wanda(pattern=pattern))
    result = flatquant.calibrate(model, recipe, "W16A16", CALIBRATION, progress=False)
    weight = model.model.layers[0].get_submodule(name).weight.detach()
    kept, of = pattern or (weight.shape[1] // 2, weight.shape[1])
    keep = wanda_by_hand(weight, inputs(model, name), kept, of)
    assert torch.equal(result.blocks[0][f"{name}.weight"], weight * keep)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_magnitude_compares_the_whole_matrix(sparsity: float) -> None:
    task = make_task()
    keep = Magnitude(sparsity=sparsity).keeps(task)
    count = int(task.weight.numel() * sparsity)
    assert int((~keep).sum()) == count
    if count:
        assert task.weight[~keep].abs().max() < task.weight[keep].abs().min()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("pruned", [Wanda(), Magnitude(), Wanda(pattern=(2, 4))])
def test_pruned_weights_are_rounded_to_zero_and_the_rest_as_by_rtn(
    pruned: Wanda | Magnitude, group: int | None, symmetric: bool
) -> None:
    task = make_task(symmetric, group)
    keep = pruned.keeps(task)
    values = pruned.quantize(task).dequantize()
    assert bool((values[~keep] == 0).all())
    alone = Rtn().quantize(replace(task, weight=task.weight * keep)).dequantize()
    assert torch.equal(values[keep], alone[keep])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["wanda", "wanda-2to4", "magnitude", "magnitude-2to4"])
def test_pruned_and_rounded_models_obey_law_two(
    method: str, family: str, token_ids: Tensor
) -> None:
    """Wanda+RTN is the method with a scheme; half of the codes are 0."""
    model = build_tiny_model(family, bias=family != "mistral")
    flatquant.quantize(model, method, "W4A8KV4", CALIBRATION, progress=False)
    for name in LINEARS:
        packed = model.get_submodule(f"model.layers.1.{name}").weight_packed
        codes = packing.unpack_nibbles(packed, packed.shape[1] * 2)
        assert float((codes == 0).float().mean()) >= 0.5
        if method.endswith("2to4"):
            assert int((codes.reshape(len(codes), -1, 4) != 0).sum(-1).max()) <= 2
    with torch.no_grad():
        integer = model(token_ids).logits
        with flatquant.fake_quantized(model):
            assert torch.equal(integer, model(token_ids).logits)


@pytest.mark.parametrize("scheme", ["W16A16", "KV4", "W16A8"])
def test_weights_that_stay_in_floating_point_are_pruned_too(
    scheme: str, tmp_path: Path, token_ids: Tensor
) -> None:
    model = build_tiny_model("qwen2", bias=True)
    before = {name: p.detach().clone() for name, p in model.model.layers[1].named_parameters()}
    flatquant.quantize(model, "wanda", scheme, CALIBRATION, progress=False)
    for name in LINEARS:
        weight = model.get_submodule(f"model.layers.1.{name}").weight
        assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
        assert torch.equal(weight[weight != 0], before[f"{name}.weight"][weight != 0])
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, flatquant.load(tmp_path)(token_ids).logits)


def test_wanda_loses_less_than_magnitude() -> None:
    """By the output error that it is made for, ‖(W − W')·X‖, where inputs differ in size."""
    task = make_task()
    assert task.hessian is not None
    errors = []
    for pruned in (Wanda(), Magnitude()):
        delta = task.weight * ~pruned.keeps(task)
        errors.append(float(((delta @ task.hessian) * delta).sum()))
    assert errors[0] < 0.8 * errors[1]


def test_what_is_ignored_keeps_its_weights() -> None:
    model = build_tiny_model("llama")
    ignore = ("model.layers.0.mlp.down_proj",)
    result = flatquant.calibrate(model, "magnitude", "W16A16", ignore=ignore, progress=False)
    assert "mlp.down_proj.weight" not in result.blocks[0]
    assert "mlp.down_proj.weight" in result.blocks[1]


def test_runs_resume(tmp_path: Path) -> None:
    arguments = ("wanda", "W4A16", CALIBRATION)
    first = flatquant.calibrate(build_tiny_model("llama"), *arguments, progress=False)
    flatquant.calibrate(build_tiny_model("llama"), *arguments, work_dir=tmp_path, progress=False)
    (tmp_path / "block-00001.safetensors").unlink()
    again = flatquant.calibrate(
        build_tiny_model("llama"), *arguments, work_dir=tmp_path, resume=True, progress=False
    )
    for a, b in zip(first.blocks, again.blocks, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    with pytest.raises(ValueError, match="recipe differ"):
        flatquant.calibrate(
            build_tiny_model("llama"), *arguments, weights=Wanda(sparsity=0.6),
            work_dir=tmp_path, resume=True, progress=False,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Wanda(sparsity=1.0), r"Wanda: sparsity=1.0 must lie in \[0, 1\)"),
        (lambda: Magnitude(pattern=(5, 4)), r"pattern=\(5, 4\) must be \(kept, of\)"),
        (lambda: Wanda(then=Gptq()), "then=Gptq moves errors onto weights that are 0"),
        (lambda: Wanda(pattern=(3, 7)).keeps(make_task()), "3 in 7 does not divide its 32"),
        (lambda: Magnitude(sparsity=0.1, then=Hqq()).quantize(make_task(False)), "so no code is 0"),
        (
            lambda: Wanda().quantize(replace(make_task(), hessian=None)),
            "needs the Hessian of its inputs",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_only_wanda_needs_text() -> None:
    scheme = flatquant.Scheme()
    needs: dict[str, bool] = {
        name: flatquant.METHODS[name](scheme).needs_data for name in ("magnitude", "wanda")
    }
    assert needs == {"magnitude": False, "wanda": True}
    rounding: WeightQuantizer = Magnitude(then=Rtn())
    assert not rounding.needs_hessian
