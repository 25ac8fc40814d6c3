"""Analyses: what the tables mean, against plain writings of the same quantities."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear as product

import flatquant
from flatquant.analysis import TABLES, Analysis, Settings, analyze
from flatquant.analysis.bases import linear_bases, residual_rotation
from flatquant.analysis.meters import ByPosition, ChannelMaxima, Closeness, Moments, heatmap
from flatquant.analysis.stored import column_errors
from flatquant.analysis.tables import Rows
from flatquant.capture import watching
from flatquant.cli import main
from flatquant.clips import UNCLIPPED
from flatquant.models import family_of
from flatquant.offload import open_model

from .conftest import FAMILIES, build_tiny_model
from .word_tokenizer import word_tokenizer

WINDOW, WINDOWS = 32, 5
IDS = torch.randint(2, 128, (WINDOW * WINDOWS + 3,), generator=torch.Generator().manual_seed(0))


def quantized_of(model, method="flatquant", scheme="W4A4KV4"):
    crops = flatquant.random_crops(IDS, 2, 16, 0)
    other = copy.deepcopy(model)
    return flatquant.quantize(other, method, scheme, crops, epochs=1, progress=False)


def run(fp, quantized, **changes) -> Analysis:
    settings = Settings(**{"window": WINDOW, "windows": WINDOWS, "batch_size": 2, **changes})
    return analyze(copy.deepcopy(fp), quantized, IDS, settings, progress=False)


@pytest.fixture(scope="module")
def models():
    fp = build_tiny_model()
    return fp, quantized_of(fp)


@pytest.fixture(scope="module")
def found(models) -> Analysis:
    return run(*models, sensitivity=(4,))


def table(analysis: Analysis, name: str) -> list[dict[str, object]]:
    return [dict(zip(TABLES[name].columns, row, strict=True)) for row in analysis.rows[name]]


def test_moments_are_those_of_the_whole():
    x = torch.randn(7, 50, generator=torch.Generator().manual_seed(1)).pow(3) + 0.5
    moments = Moments()
    for part in x.split(2):
        moments(part)
    centred = x.double() - x.double().mean()
    expected = centred.pow(4).mean() / centred.pow(2).mean() ** 2
    assert moments.kurtosis == pytest.approx(float(expected), rel=1e-5)
    assert math.isnan(Moments().kurtosis)


def test_closeness_is_its_definition():
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(6, 9, generator=generator), torch.randn(6, 9, generator=generator)
    meter = Closeness()
    for ours, theirs in zip(a.split(2), b.split(2), strict=True):
        meter(ours, theirs)
    cosine = torch.cosine_similarity(a.reshape(1, -1), b.reshape(1, -1))
    assert meter.cosine == pytest.approx(float(cosine), rel=1e-5)
    noise = (a - b).square().sum() / b.square().sum()
    assert meter.sqnr_db == pytest.approx(-10 * math.log10(float(noise)), rel=1e-5)
    same = Closeness()
    same(a, a)
    assert same.sqnr_db == math.inf


def test_bins_cover_everything():
    x = torch.arange(300.0)[None, :, None].sqrt()
    meter = ByPosition()
    meter(x)
    assert sum(meter.binned()) / 128 == pytest.approx(299 / 2, rel=0.01)
    grid = torch.zeros(500, 700)
    grid[499, 699], grid[0, 350] = -3.0, 2.0
    assert heatmap(grid).shape == (64, 96)
    assert heatmap(grid).max() == 3 and heatmap(grid)[0, 47:49].max() == 2
    assert heatmap(grid[:5, :7]).shape == (5, 7)


def test_curve_rises_from_the_smallest_channel_to_the_largest():
    maxima = ChannelMaxima()
    maxima(torch.tensor([[1.0, -4.0, 2.0]]))
    maxima(torch.tensor([[-3.0, 1.0, 2.0]]))
    curve = maxima.curve()
    assert len(curve) == 129
    assert (curve[0], curve[64], curve[-1]) == ((0.0, 2.0), (0.5, 3.0), (1.0, 4.0))


def test_perplexities_are_those_of_eval(models, found):
    fp, quantized = models
    head = found.facts["headline"]
    for model, name in ((fp, "fp"), (quantized, "quantized")):
        value = flatquant.perplexity(model, IDS, WINDOW, WINDOWS, progress=False)
        assert head[name]["perplexity"] == pytest.approx(value, rel=1e-6)
    baseline = flatquant.replace_linear(copy.deepcopy(fp), "W4A4KV4", transform="identity")
    value = flatquant.perplexity(baseline, IDS, WINDOW, WINDOWS, progress=False)
    assert head["rtn"]["perplexity"] == value
    assert head["quantized"]["kl_mean"] > 0


def test_surface_is_the_error_of_the_blocks(models, found):
    fp, quantized = models
    tokens = IDS[: WINDOW * WINDOWS].reshape(WINDOWS, WINDOW)
    seen: dict[str, list[torch.Tensor]] = {"fp": [], "quantized": []}
    with torch.no_grad():
        for name, model in (("fp", fp), ("quantized", quantized)):
            with watching(model, {"model.layers.1": seen[name].append}):
                model(input_ids=tokens, use_cache=False)
    error = (seen["fp"][0] - seen["quantized"][0]).square().mean((0, 2))
    rows = [row for row in table(found, "surface") if row["layer"] == 0]
    assert [row["token"] for row in rows] == list(range(WINDOW))
    assert [row["mse"] for row in rows] == pytest.approx(error.tolist(), rel=1e-4)
    assert [row["mse_alone"] for row in rows] == [row["mse"] for row in rows]


CASES = [(family, method) for family in FAMILIES for method in ("rtn", "flatquant")]
CASES += [("llama", method) for method in ("smoothquant", "omniquant", "quik")]


@pytest.mark.parametrize(("family", "method"), CASES)
def test_weights_before_rounding_give_the_same_outputs(family, method):
    """With the found bases, W' on the prepared input is the floating-point output."""
    fp = build_tiny_model(family, bias=family in ("llama", "qwen2"))
    quantized = quantized_of(fp, method, "W8A8KV8")
    analysis = run(fp, quantized, windows=2, rtn=False)
    for row in table(analysis, "similarity"):
        assert row["sqnr_db"] > 20, row
    for row in table(analysis, "columns"):
        assert row["relative_error"] < 0.03, row
    for row in table(analysis, "ranges"):
        assert row["relative_error"] < 0.02, row


def test_without_rounding_weights_are_found_exactly():
    fp = build_tiny_model()
    quantized = quantized_of(fp, "random", "W16A4KV4")
    family, blocks = family_of(fp.config), (fp.model.layers[0], quantized.model.layers[0])
    geometry = family.geometry(fp.config)
    for basis in linear_bases(*blocks, family, geometry, None).values():
        assert max(column_errors(basis)) < 1e-4


def test_a_turned_residual_stream_is_found():
    fp, quantized = build_tiny_model(), build_tiny_model()
    assert residual_rotation(fp, quantized) is None
    rotation = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(3))).Q
    embedding = quantized.get_input_embeddings().weight
    embedding.data = embedding.data @ rotation
    assert torch.allclose(residual_rotation(fp, quantized), rotation, atol=1e-4)
    with pytest.raises(ValueError, match="was made from another one"):
        residual_rotation(fp, build_tiny_model(seed=1))


def test_a_turned_model_is_compared_in_one_basis():
    if "quarot" not in flatquant.METHODS:
        pytest.skip("no method turns the residual stream")
    fp = build_tiny_model()
    plain = flatquant.METHODS["quarot"](flatquant.Scheme.parse("W8A8KV8"))
    plain = dataclasses.replace(plain, clips=UNCLIPPED, weights="rtn")
    analysis = run(fp, quantized_of(fp, plain, "W8A8KV8"), rtn=False)
    assert min(row["sqnr_db"] for row in table(analysis, "similarity")) > 20
    surface = table(analysis, "surface")
    assert sum(row["mse"] for row in surface) < 0.02 * sum(row["power"] for row in surface)
    assert max(row["relative_error"] for row in table(analysis, "columns")) < 0.03


def test_kurtosis_of_inputs_is_that_of_the_model(models, found):
    fp, _ = models
    tokens = IDS[: WINDOW * WINDOWS].reshape(WINDOWS, WINDOW)
    seen: list[torch.Tensor] = []
    with torch.no_grad(), watching(fp, {"model.layers.0.mlp.down_proj": seen.append}):
        fp(input_ids=tokens, use_cache=False)
    moments, maxima = Moments(), ChannelMaxima()
    moments(seen[0])
    maxima(seen[0])
    values = {
        (row["layer"], row["linear"], row["of"], row["when"]): row["kurtosis"]
        for row in table(found, "kurtosis")
    }
    assert len(values) == 2 * 7 * 2 * 2
    key = (0, "mlp.down_proj", "input", "before")
    assert values[key] == pytest.approx(moments.kurtosis, rel=1e-4)
    curve = [
        (row["quantile"], row["magnitude"])
        for row in table(found, "magnitudes")
        if (row["layer"], row["site"], row["of"], row["when"]) == (0, "mlp_out", "input", "before")
    ]
    assert curve == [pytest.approx(point, rel=1e-5) for point in maxima.curve()]


def test_transformed_inputs_are_what_the_weights_multiply(models):
    """Σ over channels of input' · W' must be the floating-point output: checks "after"."""
    fp, quantized = models
    from flatquant.analysis.bases import owner_of, prepared_input

    family = family_of(fp.config)
    bases = linear_bases(
        fp.model.layers[0], quantized.model.layers[0], family, family.geometry(fp.config), None
    )
    group = family.groups[0]
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(4))
    block = quantized.model.layers[0]
    with torch.no_grad():
        prepared = prepared_input(owner_of(block, group), x)
        plain = fp.model.layers[0].input_layernorm(x)
        for name in ("self_attn.q_proj", "self_attn.k_proj"):
            expected = fp.model.layers[0].get_submodule(name)(plain)
            assert torch.allclose(product(prepared, bases[name].weight), expected, atol=1e-3)


def test_clips_and_conditions_are_the_stored_ones(models, found):
    _, quantized = models
    norm = quantized.model.layers[1].post_attention_layernorm
    clips = {(r["layer"], r["where"], r["side"]): r["ratio"] for r in table(found, "clips")}
    assert clips[1, "mlp_in", "max"] == pytest.approx(float(norm.clip_ratio[0]))
    assert len(clips) == 2 * 6 * 2
    conditions = {
        (r["layer"], r["site"], r["factor"]): r["condition"] for r in table(found, "conditions")
    }
    expected = torch.linalg.cond(norm.left_trans) * torch.linalg.cond(norm.right_trans)
    assert conditions[1, "mlp_in", "whole"] == pytest.approx(float(expected), rel=1e-3)
    assert (1, "qk_head", "whole") in conditions and (1, "v_head", "whole") in conditions


def test_searched_ranges_are_no_worse_than_stored(found):
    by_linear: dict[tuple[object, object], dict[object, float]] = {}
    for row in table(found, "ranges"):
        cell = by_linear.setdefault((row["layer"], row["linear"]), {})
        cell[row["grid"]] = row["relative_error"]
        assert -1.2 < row["low"] <= 0 <= row["high"] < 1.2, row
    assert len(by_linear) == 14
    for errors in by_linear.values():
        assert errors["symmetric"] <= errors["stored"] * 1.01
        assert errors["asymmetric"] < 0.15


def test_sensitivity_rounds_one_group(models, found):
    fp, _ = models
    rows = table(found, "sensitivity")
    groups = ["attn_in", "attn_out", "mlp_in", "mlp_out"]
    assert [row["group"] for row in rows] == [*groups, *groups, "block", "block"]
    assert all(row["kl"] > 0 and row["bits"] == 4 for row in rows)
    ignored = [f"model.layers.{i}.{n}" for i in range(2) for n in (
        "self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"
    ) if (i, n) != (1, "mlp.down_proj")]  # fmt: skip
    only = flatquant.replace_linear(
        copy.deepcopy(fp), "W4A4", transform="identity", ignore=("lm_head", *ignored)
    )
    with torch.no_grad():
        p, q = (m(IDS[None, :WINDOW]).logits.log_softmax(-1) for m in (fp, only))
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert rows[7]["kl"] == pytest.approx(kl, rel=1e-3)


def test_folder(models, found, tmp_path):
    (tmp_path / "fit.csv").write_text("stale")
    found.write(tmp_path)
    content = json.loads((tmp_path / "analysis.json").read_text())
    assert content["format"] == 1 and content["plan"]["method"] == "flatquant"
    assert content["provenance"]["settings"]["window"] == WINDOW
    assert content["size"]["quantized_bytes"] < content["size"]["fp_bytes"]
    assert set(content["tables"]) == set(TABLES) - {"fit"}
    assert not (tmp_path / "fit.csv").exists()
    for name, entry in content["tables"].items():
        with (tmp_path / entry["file"]).open() as file:
            lines = list(csv.DictReader(file))
        assert tuple(lines[0]) == TABLES[name].columns
        assert len(lines) == entry["rows"] and entry["about"].endswith(".")


def test_a_second_run_gives_the_same_bits(models, found):
    again = run(*models, sensitivity=(4,))
    assert all(again.rows[name] == found.rows[name] for name in TABLES)
    assert again.facts["headline"] == found.facts["headline"]


def test_nothing_of_the_models_changes(models):
    fp, quantized = (copy.deepcopy(model) for model in models)
    before = [{k: v.clone() for k, v in model.state_dict().items()} for model in (fp, quantized)]
    analyze(fp, quantized, IDS, Settings(window=WINDOW, windows=2, rtn=False), progress=False)
    for model, tensors in zip((fp, quantized), before, strict=True):
        assert all(torch.equal(tensor, tensors[k]) for k, tensor in model.state_dict().items())
    assert quantized.model.fast_path.enabled


def test_bfloat16_models_run_in_their_own_dtype():
    fp = build_tiny_model().bfloat16()
    analysis = run(fp, quantized_of(fp), rtn=False, windows=2)
    value = flatquant.perplexity(fp, IDS, WINDOW, 2, progress=False)
    assert analysis.facts["headline"]["fp"]["perplexity"] == pytest.approx(value, rel=1e-2)


def test_blocks_on_disk_give_the_same_tables(models, found, tmp_path):
    fp, quantized = models
    fp.save_pretrained(tmp_path)
    original = open_model(tmp_path)
    analyze(original, quantized, IDS, Settings(window=WINDOW, windows=1, rtn=False), progress=False)
    assert all(parameter.is_meta for parameter in original.model.layers.parameters())
    streamed = analyze(
        original,
        quantized,
        IDS,
        Settings(window=WINDOW, windows=WINDOWS, batch_size=2),
        progress=False,
    )
    assert all(streamed.rows[name] == found.rows[name] for name in set(TABLES) - {"sensitivity"})
    assert streamed.facts["headline"] == found.facts["headline"]
    assert streamed.facts["size"] == found.facts["size"]
    with pytest.raises(ValueError, match="whole model in memory"):
        analyze(open_model(tmp_path), quantized, IDS, Settings(window=WINDOW, speed=True))


def test_an_8_bit_head_and_a_tied_embedding():
    fp = build_tiny_model(tie_word_embeddings=True)
    quantized = flatquant.replace_linear(copy.deepcopy(fp), "W8A8KV8-head8", transform="identity")
    analysis = run(fp, quantized, rtn=False)
    value = flatquant.perplexity(quantized, IDS, WINDOW, WINDOWS, progress=False)
    assert analysis.facts["headline"]["quantized"]["perplexity"] == pytest.approx(value, rel=1e-6)
    assert max(row["relative_error"] for row in table(analysis, "columns")) < 0.03


def test_other_models_are_refused(models):
    fp, quantized = models
    with pytest.raises(ValueError, match="must have a plan"):
        run(fp, fp)
    with pytest.raises(ValueError, match="must be the original"):
        run(quantized, quantized)
    with pytest.raises(ValueError, match="3 and 2 blocks"):
        run(build_tiny_model(num_hidden_layers=3), quantized)
    with pytest.raises(ValueError, match="at least one window of 512"):
        run(fp, quantized, window=512)
    with pytest.raises(ValueError, match="windows is 0"):
        Settings(windows=0)
    with pytest.raises(ValueError, match="9 bits"):
        Settings(sensitivity=(9,))


def test_rows_must_fit_their_table():
    with pytest.raises(ValueError, match="2 cells"):
        Rows().add("clips", 1, "keys")


def test_command(tmp_path, capsys):
    fp = build_tiny_model()
    fp.save_pretrained(tmp_path / "fp")
    word_tokenizer().save_pretrained(tmp_path / "fp")
    crops = flatquant.random_crops(IDS, 2, 16, 0)
    work = tmp_path / "work"
    quantized = flatquant.quantize(
        fp, "flatquant", "W4A4KV4", crops, epochs=1, work_dir=work, progress=False
    )
    quantized.save_pretrained(tmp_path / "q")
    word_tokenizer().save_pretrained(tmp_path / "q")
    (tmp_path / "text.txt").write_text(" ".join(f"w{i}" for i in IDS.tolist()))
    out = tmp_path / "out"
    arguments = ["analyze", str(tmp_path / "fp"), str(tmp_path / "q"), "--output", str(out)]
    arguments += ["--text", str(tmp_path / "text.txt"), "--window", "32", "--windows", "2"]
    assert main([*arguments, "--calibration", str(work)]) == 0
    assert "quantized: perplexity" in capsys.readouterr().out
    content = json.loads((out / "analysis.json").read_text())
    assert content["tables"]["fit"]["rows"] == 2
    assert any(path.endswith("text.txt") for path in content["provenance"]["data"])
    assert main([*arguments, "--stream", "--no-rtn"]) == 0
    streamed = json.loads((out / "analysis.json").read_text())
    assert streamed["headline"]["quantized"] == content["headline"]["quantized"]
    assert "fit" not in streamed["tables"] and streamed["headline"]["rtn"] is None
    assert main([*arguments, "--calibration", str(Path(tmp_path / "fp"))]) == 2
    assert "it is no calibration" in capsys.readouterr().err
