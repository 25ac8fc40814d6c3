"""Methods that turn the residual stream: QuaRot against an independent writing; their models."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import flatquant
import flatquant_cuda as fq
from flatquant.models import FAMILIES, Geometry, Site
from flatquant.plan import QuantizationPlan
from flatquant.transforms import TRANSFORMS, kronecker_split, online_splits
from flatquant.transforms.hadamard import hadamard_matrix, sylvester
from flatquant.transforms.rotation import ROTATIONS

from .conftest import build_tiny_model

CALIBRATION = torch.randint(2, 128, (4, 12), generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no Hadamard matrix")
        yield


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    result: Tensor = model(tokens, use_cache=False).logits
    return result


@pytest.mark.parametrize("kind", list(ROTATIONS))
@pytest.mark.parametrize("n", [1, 12, 36, 64, 57])
def test_every_rotation_is_orthogonal(kind: str, n: int) -> None:
    turn = ROTATIONS[kind](n, torch.Generator().manual_seed(3))
    matrix = turn.apply(torch.eye(n, dtype=torch.float64))
    assert torch.allclose(matrix @ matrix.mT, torch.eye(n, dtype=torch.float64), atol=1e-12)
    weight = torch.randn(n, 5, dtype=torch.float64)
    assert torch.allclose(turn.apply_to_outputs(weight), matrix.mT @ weight, atol=1e-12)


def test_a_randomised_hadamard_matrix_depends_on_the_seed_and_mixes_all_channels() -> None:
    turns = [
        ROTATIONS["randomised-hadamard"](64, torch.Generator().manual_seed(seed)).apply(
            torch.eye(64, dtype=torch.float64)
        )
        for seed in (0, 1)
    ]
    assert not torch.equal(*turns)
    for turn in turns:
        assert torch.allclose(turn.abs(), torch.full_like(turn, 1 / 8), atol=1e-12)


@pytest.mark.parametrize(
    ("width", "sizes"),
    [(80, (20, 4)), (1536, None), (11008, (172, 64)), (13696, (107 * 4, 32)), (14336, None)],
)
def test_widths_whose_factors_have_no_hadamard_matrix_are_split_elsewhere(
    width: int, sizes: tuple[int, int] | None
) -> None:
    geometry = Geometry(hidden=64, intermediate=width, heads=4, kv_heads=4, head_dim=16)
    kinds = {Site.MLP_OUT: "whole-hadamard", Site.V_HEAD: "whole-hadamard"}
    splits = online_splits(kinds, geometry)
    assert splits == ({} if sizes is None else {Site.MLP_OUT: sizes})
    generator = torch.Generator()
    frozen = TRANSFORMS["whole-hadamard"](Site.MLP_OUT, geometry, generator).freeze()
    assert frozen.left is not None and frozen.right is not None
    assert (len(frozen.left), len(frozen.right)) == (sizes or kronecker_split(width))
    for factor in (frozen.left, frozen.right):  # entries ±1/√n: a Hadamard matrix each
        assert torch.allclose(factor.abs(), torch.full_like(factor, len(factor) ** -0.5))
    plan = QuantizationPlan(
        scheme=flatquant.Scheme.parse("W4A4"), sites=frozenset(kinds), splits=splits
    )
    assert QuantizationPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def merged_by_hand(model: PreTrainedModel, turn: Tensor) -> dict[str, Tensor]:
    """QuaRot's weights of block 0 with R1 = turn, dense products in float64."""
    config, block = model.config, model.model.layers[0]
    heads, width = hadamard_matrix(config.num_attention_heads), hadamard_matrix(config.head_dim)
    base = hadamard_matrix(20)
    assert heads is not None and width is not None and base is not None
    down = torch.kron(base, sylvester(4).double())  # 80 = 8·10, but 10 has no Hadamard matrix
    heads, width, down = (h / len(h) ** 0.5 for h in (heads, width, down))
    values = torch.block_diag(*[width] * config.num_key_value_heads)
    attention, mlp = block.self_attn, block.mlp
    before = torch.diag(block.input_layernorm.weight.double()) @ turn
    after = torch.diag(block.post_attention_layernorm.weight.double()) @ turn
    return {
        "self_attn.q_proj": attention.q_proj.weight.double() @ before,
        "self_attn.k_proj": attention.k_proj.weight.double() @ before,
        "self_attn.v_proj": values.T @ attention.v_proj.weight.double() @ before,
        "self_attn.o_proj": turn.T @ attention.o_proj.weight.double() @ torch.kron(heads, width),
        "mlp.gate_proj": mlp.gate_proj.weight.double() @ after,
        "mlp.up_proj": mlp.up_proj.weight.double() @ after,
        "mlp.down_proj": turn.T @ mlp.down_proj.weight.double() @ down,
    }


def rounded_by_hand(weight: Tensor) -> Tensor:
    """4-bit rows, each with the ratio 1, 0.99, ..., 0.21 of least Σ|ŵ − w|^2.4 (QuaRot's code)."""
    rows = []
    for row in weight.float():
        best, error = row, torch.inf
        for step in range(80):
            scale = row.abs().max() * (1 - step / 100) / 7
            value = (row / scale).round().clamp(-8, 7) * scale
            now = float((value - row).abs().pow(2.4).sum())
            if now < error:
                best, error = value, now
        rows.append(best)
    return torch.stack(rows)


@torch.no_grad()
def test_quarot_equals_an_independent_writing() -> None:
    """R1 is read off the embedding, E' = E·R1, and its consequences are computed by hand."""
    model = build_tiny_model("llama", intermediate_size=80)
    result = flatquant.calibrate(model, "quarot", "W4A4KV4", progress=False)
    embedding = model.model.embed_tokens.weight.double()
    turned = result.outer["model.embed_tokens.weight"].double()
    turn = torch.linalg.lstsq(embedding, turned).solution
    assert torch.allclose(turn @ turn.T, torch.eye(64, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(turn.abs(), torch.full_like(turn, 1 / 8), atol=1e-5)
    turn = turn.sign() / 8
    gamma = torch.diag(model.model.norm.weight.double())
    head = model.lm_head.weight.double() @ gamma @ turn
    assert torch.allclose(result.outer["lm_head.weight"].double(), head, atol=1e-6)
    assert torch.equal(result.outer["model.norm.weight"], torch.ones(64))
    block = result.blocks[0]
    for name, weight in merged_by_hand(model, turn).items():
        codes = fq.packing.unpack_nibbles(block[f"{name}.weight_packed"], weight.shape[1], True)
        ours = codes.float() * block[f"{name}.weight_scale"][:, None]
        assert torch.allclose(ours, rounded_by_hand(weight), atol=1e-5), name
    for name in ("input_layernorm", "post_attention_layernorm"):
        assert torch.equal(block[f"{name}.weight"], torch.ones(64))
        assert torch.equal(block[f"{name}.clip_ratio"], torch.full((2,), 0.9))
    keys = block["self_attn.kv_quantizer.k_trans"]
    assert torch.allclose(keys.abs(), torch.full((16, 16), 0.25))
    for part in ("k_clip", "v_clip"):
        clip = block[f"self_attn.kv_quantizer.{part}"]
        assert torch.allclose(clip, torch.full((2,), 0.95))


@pytest.mark.parametrize("method", ["quarot", "quarot-gptq"])
@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_rotated_models_obey_law_two_and_survive_the_disk(
    method: str, family: str, tied: bool, token_ids: Tensor, tmp_path: Path
) -> None:
    model = build_tiny_model(
        family,
        bias=family != "mistral",
        tie_word_embeddings=tied,
        intermediate_size=80 if tied else 96,  # 80 is split as 20·4, 96 as usual
    )
    flatquant.quantize(model, method, "W4A4KV4", CALIBRATION, progress=False)
    integer = logits(model, token_ids)
    with flatquant.fake_quantized(model):
        assert torch.equal(integer, logits(model, token_ids))
    assert not model.config.tie_word_embeddings
    assert model.flatquant_plan.splits == ({Site.MLP_OUT: (20, 4)} if tied else {})
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = flatquant.load(tmp_path)
    assert not loaded.config.tie_word_embeddings
    assert torch.equal(logits(loaded, token_ids), integer)
    assert torch.equal(logits(copy.deepcopy(loaded), token_ids), integer)


def test_a_rotated_model_decodes_as_one_op(token_ids: Tensor) -> None:
    model = flatquant.quantize(build_tiny_model(), "quarot", "W4A4KV4", progress=False)
    assert flatquant.report(model).decoding == "all blocks as one op"
    fast = logits(model, token_ids[:, :8])
    flatquant.fast_path(model, False)
    assert torch.equal(fast, logits(model, token_ids[:, :8]))


def test_results_of_rotations_round_trip_and_a_tied_head_is_freed(
    token_ids: Tensor, tmp_path: Path
) -> None:
    model = build_tiny_model(tie_word_embeddings=True)
    result = flatquant.calibrate(model, "quarot", "W4A4KV4", progress=False)
    assert (
        model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight
    )
    result.save(tmp_path)
    loaded = flatquant.CalibrationResult.load(tmp_path)
    assert loaded.plan == result.plan and Site.RESIDUAL in loaded.plan.sites
    models = [
        flatquant.replace_linear(copy.deepcopy(model), transform=found)
        for found in (result, loaded)
    ]
    assert torch.equal(*(logits(found, token_ids) for found in models))
    embedding, head = models[0].model.embed_tokens.weight, models[0].lm_head.weight
    assert head is not embedding and not torch.equal(head, embedding)
    (tmp_path / "outer.safetensors").unlink()
    with pytest.raises(ValueError, match=r"outer.safetensors is missing"):
        flatquant.CalibrationResult.load(tmp_path)
    other = build_tiny_model(hidden_size=32, num_attention_heads=2, head_dim=16)
    with pytest.raises(ValueError, match=r"model.model.embed_tokens.weight: the result has shape"):
        result.apply(other)


def test_an_8_bit_head_is_rounded_after_the_rotation(token_ids: Tensor, tmp_path: Path) -> None:
    model = build_tiny_model(tie_word_embeddings=True)
    flatquant.quantize(model, "quarot", "W8A8KV8-head8", progress=False)
    plain = flatquant.quantize(
        build_tiny_model(tie_word_embeddings=True), "quarot", "W8A8KV8", progress=False
    )
    integer = logits(model, token_ids)
    reference = logits(plain, token_ids)
    assert float((integer - reference).norm() / reference.norm()) < 0.02
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(flatquant.load(tmp_path), token_ids), integer)


def test_linears_that_are_left_alone_turn_with_the_rest(token_ids: Tensor) -> None:
    model = build_tiny_model("qwen2", bias=True)
    before = logits(model, token_ids)
    ignore = ("re:model\\.layers\\.\\d\\.(self_attn|mlp)\\..*",)
    flatquant.quantize(model, "quarot", "W4A4", ignore=ignore, progress=False)
    after = logits(model, token_ids)
    assert torch.allclose(after, before, rtol=1e-3, atol=1e-3)
    assert torch.equal(model.model.layers[0].input_layernorm.weight, torch.ones(64))


def test_the_model_itself_stays_as_it_was_and_seeds_matter(token_ids: Tensor) -> None:
    model = build_tiny_model(tie_word_embeddings=True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first, again, other = (
        flatquant.calibrate(model, "quarot", "W4A4KV4", seed=seed, progress=False)
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    name = "model.embed_tokens.weight"
    assert torch.equal(first.outer[name], again.outer[name])
    assert not torch.equal(first.outer[name], other.outer[name])


def test_resuming_a_rotated_run_gives_the_same_model(tmp_path: Path) -> None:
    model = build_tiny_model()
    whole, first = (
        flatquant.calibrate(
            model, "quarot-gptq", "W4A4KV4", CALIBRATION, work_dir=folder, progress=False
        )
        for folder in (None, tmp_path)
    )
    (tmp_path / "block-00001.safetensors").unlink()
    resumed = flatquant.calibrate(
        model, "quarot-gptq", "W4A4KV4", CALIBRATION, work_dir=tmp_path, resume=True, progress=False
    )
    for found in (first, resumed):
        for ours, theirs in zip(
            (*whole.blocks, whole.outer), (*found.blocks, found.outer), strict=True
        ):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_what_is_no_rotation_is_refused_for_the_residual_stream() -> None:
    recipe = flatquant.Recipe(
        method="bent", scheme=flatquant.Scheme(), transforms={Site.RESIDUAL: "kronecker-svd"}
    )
    with pytest.raises(ValueError, match=r"'residual'.*'kronecker-svd' must be a rotation, one of"):
        flatquant.calibrate(build_tiny_model(), recipe, "W4A4", progress=False)


def test_sites_follow_the_scheme() -> None:
    def sites(scheme: str) -> set[Site]:
        return set(flatquant.METHODS["quarot"](flatquant.Scheme.parse(scheme)).transforms)

    merged = {Site.RESIDUAL, Site.V_HEAD, Site.ATTN_OUT, Site.MLP_OUT}
    assert sites("W4A4KV4") == {*merged, Site.QK_HEAD}
    assert sites("W3A16-g128") == merged
    assert sites("KV4") == {Site.V_HEAD, Site.QK_HEAD}
    assert sites("K16V4") == {Site.V_HEAD}
