"""Methods that keep outlier columns: which, what the others lose, and that they run on kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import flatquant
from flatquant.models import FAMILIES, Site
from flatquant.outliers import Outliers
from flatquant.runtime.linear import QuantizedLinear
from flatquant.weights import Gptq, Hqq, Rtn, WeightQuantizer, WeightTask
from flatquant.weights.columns import quantize_around

from .conftest import build_tiny_model

CALIBRATION = torch.randint(2, 128, (4, 12), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    result: Tensor = model(tokens, use_cache=False).logits
    return result


def with_outliers(family: str = "llama", **options: object) -> PreTrainedModel:
    """A model whose norms blow up three channels."""
    model = build_tiny_model(family, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[[5, 17, 40]] *= 30
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                linear.weight[:, [5, 17, 40]] /= 20
    return model


def test_columns_are_chosen_by_the_papers_rules() -> None:
    largest = torch.tensor([1.0, 9.0, 3.0, 9.0, 7.0, 6.0, 0.0, 2.0])
    power, loss = torch.arange(8.0), torch.tensor([9.0, 1, 1, 1, 1, 1, 1, 0])
    by_size = Outliers(by="largest", share=0.25)
    assert by_size.columns(largest, power, loss).tolist() == [1, 3]
    reached = Outliers(by="largest", share=1.0, threshold=6.0)
    assert reached.columns(largest, power, loss).tolist() == [1, 3, 4, 5]
    assert reached.columns(largest / 10, power, loss).tolist() == []
    sensitive = Outliers(by="sensitive", share=0.25)
    assert sensitive.columns(largest, power, loss).tolist() == [5, 6]
    assert Outliers(share=0.01).columns(largest, power, loss).tolist() == [1]
    for bad in ({"by": "size"}, {"share": 0.0}, {"share": 1.5}):
        with pytest.raises(ValueError, match="must"):
            Outliers(**bad)  # type: ignore[arg-type]


def make_task(symmetric: bool = True, group: int | None = None) -> WeightTask:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(6, 32, generator=generator, dtype=torch.float64)
    weight[:, [3, 20]] *= 10
    x = torch.randn(300, 32, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(32, 32, generator=generator, dtype=torch.float64)
    return WeightTask(
        name="w",
        weight=weight,
        bits=4,
        group=group,
        clip=None,
        hessian=x.T @ x,
        symmetric=symmetric,
    )


@pytest.mark.parametrize("quantizer", [Rtn(), Gptq(), Gptq(act_order=False), Hqq()])
@pytest.mark.parametrize("symmetric", [True, False])
def test_kept_columns_make_up_for_the_others(quantizer: WeightQuantizer, symmetric: bool) -> None:
    """With the codes as they are, no other kept columns give less error."""
    task = make_task(symmetric)
    columns = torch.tensor([3, 20])
    codes, kept = quantize_around(quantizer, task, columns)
    whole = codes.dequantize().double().index_copy(1, columns, kept)
    delta = task.weight - whole
    assert task.hessian is not None
    slope = (delta @ task.hessian)[:, columns]
    assert float(slope.abs().max()) < 1e-4 * float(task.hessian.diagonal().mean())
    plain = torch.where(
        torch.zeros(32, dtype=torch.bool).index_fill(0, columns, True), task.weight, whole
    )
    better = ((delta @ task.hessian) * delta).sum()
    worse = task.weight - plain
    assert better <= ((worse @ task.hessian) * worse).sum()
    # the scale is that of the others: columns ten times as large have not widened it
    others = task.weight.clone()
    others[:, columns] = 0
    if isinstance(quantizer, Gptq) and symmetric:
        assert torch.allclose(codes.scale, (others.abs().amax(1) / 7).float())


def test_gptq_around_columns_is_gptq_that_ends_with_them() -> None:
    """An independent loop (GPTQ's equations 2 and 3): kept columns last, nothing rounded there."""
    task = make_task()
    columns = torch.tensor([3, 20])
    assert task.hessian is not None
    codes, kept = quantize_around(Gptq(act_order=False, damp=0.0), task, columns)
    order = [i for i in range(32) if i not in (3, 20)] + [3, 20]
    inverse = torch.linalg.inv(task.hessian[order][:, order])
    weight = task.weight[:, order].clone()
    scale = weight[:, :30].abs().amax(1) / 7
    for k in range(30):
        rounded = (weight[:, k] / scale).round().clamp(-8, 7) * scale
        step = (weight[:, k] - rounded) / inverse[k, k]
        weight[:, k:] -= step[:, None] * inverse[k, k:]
        weight[:, k] = rounded
        inverse = inverse - torch.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    found = codes.dequantize().double()[:, order]
    same = (found[:, :30] - weight[:, :30]).abs().amax(1) < 1e-5
    assert int(same.sum()) >= 5  # a row in which rounding to nearest is better is left at that
    assert torch.allclose(kept[same], weight[same][:, 30:], rtol=1e-4, atol=1e-4)


def test_sensitive_columns_are_worth_keeping() -> None:
    """OWQ's rule picks the planted ones, and GPTQ around them has far less error than GPTQ."""
    task = make_task()
    assert task.hessian is not None
    near = Rtn().quantize(task).dequantize().double()
    loss = (task.weight - near).square().sum(0)
    rule = Outliers(by="sensitive", share=2 / 32)
    kept = rule.columns(torch.zeros(32), task.hessian.diagonal(), loss)
    errors = []
    for columns in (kept, kept[:0]):
        codes, exact = quantize_around(Gptq(), task, columns)
        values = codes.dequantize().double().index_copy(1, columns, exact)
        errors.append(
            float((((task.weight - values) @ task.hessian) * (task.weight - values)).sum())
        )
    assert errors[0] < errors[1]


def test_llm_int8_is_its_formula() -> None:
    """X_O·W_O + dequantized(Q(X_N)·Q(W_N)) (arXiv 2208.07339, equation 8), in float64."""
    model = with_outliers()
    layer = model.model.layers[0]
    seen: list[Tensor] = []
    layer.self_attn.q_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits(model, CALIBRATION)
    weight = layer.self_attn.q_proj.weight.detach().double()
    x = torch.cat(seen).reshape(-1, 64).double()
    outlier = x.abs().amax(0) >= 6
    assert 0 < int(outlier.sum()) < 32
    inside, rest = x * ~outlier, weight * ~outlier
    s_x, s_w = inside.abs().amax(1) / 127, rest.abs().amax(1) / 127
    q_x, q_w = (inside / s_x[:, None]).round(), (rest / s_w[:, None]).round()
    wanted = (q_x @ q_w.T) * torch.outer(s_x, s_w) + (x * outlier) @ weight.T

    model = with_outliers()
    flatquant.quantize(model, "llm_int8", "W8A8", CALIBRATION, progress=False)
    found: list[Tensor] = []
    q_proj = model.model.layers[0].self_attn.q_proj
    q_proj.register_forward_hook(lambda module, args, out: found.append(out))
    logits(model, CALIBRATION)
    assert q_proj.kernel == "gemm_w8a8"
    assert torch.allclose(torch.cat(found).reshape(-1, 64).double(), wanted, rtol=1e-3, atol=1e-3)
    assert q_proj.kept_weight.shape == (64, int(outlier.sum()))


SCHEMES = ("W8A8", "W4A4KV4", "W4A4-asym-down_proj:8", "W4A16", "W3A16-wasym-g16", "WMXFP4AMXFP4")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("method", ["llm_int8", "quik", "owq"])
@pytest.mark.parametrize("family", FAMILIES)
def test_models_keep_columns_and_run_on_their_kernels(
    family: str, method: str, scheme: str, token_ids: Tensor, tmp_path: Path
) -> None:
    model = with_outliers(family)
    exact = logits(model, token_ids)
    plain = with_outliers(family)
    flatquant.quantize(plain, "rtn", scheme, progress=False)
    flatquant.quantize(model, method, scheme, CALIBRATION, progress=False)
    found = logits(model, token_ids)
    if method != "owq":  # which is for weights alone and keeps one column of the three here
        assert float((found - exact).norm()) < float((logits(plain, token_ids) - exact).norm())
    kernels = [entry.kernel for entry in flatquant.report(model).linears]
    assert kernels == [entry.kernel for entry in flatquant.report(plain).linears]
    assert any(m.kept_weight is not None for m in model.modules() if isinstance(m, QuantizedLinear))
    with flatquant.fake_quantized(model):
        simulated = logits(model, token_ids)
    if "A16" in scheme:  # floats add up in another order
        assert torch.allclose(found, simulated, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(found, simulated)
    model.save_pretrained(tmp_path)
    assert torch.equal(found, logits(flatquant.load(tmp_path), token_ids))


def test_runs_repeat_resume_and_survive_disk(tmp_path: Path, token_ids: Tensor) -> None:
    def run(**options: object) -> flatquant.CalibrationResult:
        return flatquant.calibrate(
            with_outliers(), "quik", "W4A4KV4", CALIBRATION, progress=False, **options
        )  # type: ignore[arg-type]

    first = run(work_dir=tmp_path / "work")
    last = max((tmp_path / "work").rglob("*1.safetensors"))
    last.unlink()
    for again in (run(), run(work_dir=tmp_path / "work", resume=True)):
        assert again.plan == first.plan
        for a, b in zip(first.blocks, again.blocks, strict=True):
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    first.save(tmp_path / "result")
    loaded = flatquant.CalibrationResult.load(tmp_path / "result")
    assert loaded.plan == first.plan and loaded.plan.kept
    a, b = (result.apply(with_outliers()) for result in (first, loaded))
    assert torch.equal(logits(a, token_ids), logits(b, token_ids))


def test_generation_works_without_the_fast_path(token_ids: Tensor) -> None:
    model = with_outliers()
    flatquant.quantize(model, "quik", "W4A4KV4", CALIBRATION, progress=False)
    assert "integer kernel" in flatquant.report(model).decoding
    out = model.generate(token_ids[:1, :6], max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 10)
    model.to(torch.bfloat16)
    assert torch.isfinite(logits(model, token_ids)).all()


def test_the_whole_weight_has_the_kept_columns(token_ids: Tensor) -> None:
    model = with_outliers()
    exact = model.model.layers[0].mlp.gate_proj.weight.detach().clone()
    flatquant.quantize(model, "llm_int8", "W4A4", CALIBRATION, progress=False)
    gate = model.model.layers[0].mlp.gate_proj
    whole = gate.dequantized_weight(torch.float32)
    assert torch.equal(whole[:, gate.kept], exact[:, gate.kept]) and len(gate.kept) > 0
    assert not torch.equal(whole, exact)


def test_nothing_is_kept_where_no_channel_is_an_outlier(token_ids: Tensor) -> None:
    recipe = flatquant.Recipe(
        method="none",
        scheme=flatquant.Scheme(),
        outliers=Outliers(by="largest", share=1.0, threshold=1e9),
    )
    model, plain = build_tiny_model("llama"), build_tiny_model("llama")
    flatquant.quantize(model, recipe, "W4A4KV4", CALIBRATION, progress=False)
    flatquant.quantize(plain, "rtn", "W4A4KV4", progress=False)
    assert torch.equal(logits(model, token_ids), logits(plain, token_ids))
    assert model.flatquant_plan.kept == ()


def test_columns_go_with_no_other_basis() -> None:
    with pytest.raises(ValueError, match="the model's own basis"):
        flatquant.Recipe(
            method="both",
            scheme=flatquant.Scheme.parse("W4A4"),
            transforms={Site.ATTN_IN: "hadamard"},
            outliers=Outliers(),
        )
