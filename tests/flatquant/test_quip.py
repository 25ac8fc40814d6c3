"""QuIP: what reaches the rounding is incoherent, as the paper's formulas make it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import flatquant
from flatquant.models import FAMILIES
from flatquant.weights import Ldlq, QuantizedWeight, WeightTask

from .conftest import build_tiny_model

CALIBRATION = torch.randint(2, 128, (6, 16), generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True, kw_only=True)
class Watched(Ldlq):
    """LDLQ that keeps its tasks."""

    tasks: tuple[dict[str, WeightTask], ...] = ({},)

    def quantize(self, task: WeightTask) -> QuantizedWeight:
        self.tasks[0][task.name] = task
        return super().quantize(task)


def inputs_of(model: PreTrainedModel, name: str) -> Tensor:
    """What a linear of the floating-point model reads, float64 [rows, channels]."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach())
    )
    with torch.no_grad():
        model(CALIBRATION, use_cache=False)
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1]).double()


@torch.no_grad()
def test_weight_and_hessian_are_those_of_the_papers_algorithm() -> None:
    """down_proj of block 0: D = (diag H / diag WᵀW)^¼, then U·W·D·Vᵀ and V·D⁻¹·H·D⁻¹·Vᵀ."""
    model = build_tiny_model()
    watched = Watched(tasks=({},))
    recipe = replace(flatquant.METHODS["quip"](flatquant.Scheme.parse("W8A16")), weights=watched)
    recipe = replace(recipe, fit=replace(recipe.fit, amp="off"))
    result = flatquant.calibrate(model, recipe, "W8A16", CALIBRATION, progress=False)
    name = "mlp.down_proj"
    task, block = watched.tasks[0][f"model.layers.0.{name}"], result.blocks[0]
    embedding = model.model.embed_tokens.weight.double()
    turn = torch.linalg.lstsq(embedding, result.outer["model.embed_tokens.weight"].double())
    left, right = block[f"{name}.left_trans"].T.double(), block[f"{name}.right_trans"].double()
    v_transposed = torch.kron(left.contiguous(), right.contiguous())
    for matrix in (v_transposed, turn.solution):
        eye = torch.eye(len(matrix), dtype=torch.float64)
        assert torch.allclose(matrix @ matrix.T, eye, atol=1e-5)
    weight = model.model.layers[0].mlp.down_proj.weight.double()
    x = inputs_of(model, f"model.layers.0.{name}")
    scale = (x.square().sum(0) / weight.square().sum(0)) ** 0.25
    scale /= scale.log().mean().exp()  # a common factor changes nothing
    merged = turn.solution.T @ (weight * scale) @ v_transposed
    assert torch.allclose(task.weight, merged, atol=1e-5)
    # what comes before is rounded already (to 8 bits), so the Hessian is close, not equal
    hessian = v_transposed.T @ ((x / scale).T @ (x / scale)) @ v_transposed
    assert task.hessian is not None
    assert float((task.hessian - hessian).norm() / hessian.norm()) < 0.02


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("scheme", ["W4A4KV4", "W2A16"])
@torch.no_grad()
def test_quip_models_agree_with_their_simulation(
    family: str, scheme: str, token_ids: Tensor
) -> None:
    model = build_tiny_model(family, bias=family != "mistral", tie_word_embeddings=True)
    flatquant.quantize(model, "quip", scheme, CALIBRATION, progress=False)
    packed = model(token_ids, use_cache=False).logits
    with flatquant.fake_quantized(model):
        simulated = model(token_ids, use_cache=False).logits
    if scheme == "W4A4KV4":
        assert torch.equal(packed, simulated)
    assert torch.allclose(packed, simulated, rtol=1e-4, atol=1e-4)
