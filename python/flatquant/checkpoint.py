"""Save and load quantized models as ordinary Hugging Face folders.

A folder holds safetensors, config.json (whose `quantization_config` carries the plan and a
sha256 per shard), the generation config, a README and, if given, the tokenizer. It is written
beside its place and swapped in, so that a full disk or a kill leaves the old folder intact.
Nothing is ever pickled.
"""

from __future__ import annotations

import json
import re
import types
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from flatquant import shards
from flatquant.folder import replacing
from flatquant.integrations.hf_config import METHOD, FlatQuantConfig
from flatquant.plan import QuantizationPlan
from flatquant.runtime.kv import KVQuantizer

_MARK = "<!-- written by flatquant -->"
# weights of an earlier save into the same folder, quantized or not
_OLD_WEIGHTS = re.compile(
    r"(model|pytorch_model)(\.[\w-]+)?(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?"
)
# arguments of save_pretrained that have no meaning for a model of fixed format
_IGNORED = {"safe_serialization", "token", "save_peft_format", "save_original_format"}


def save(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a quantized model to a folder that `from_pretrained` reads.

    Files of an existing folder that are no weights (a tokenizer, notes) are kept.

    Raises:
        ValueError: the model is not quantized, a tensor holds NaN or Inf, or the folder is one
            that cannot be replaced (see `flatquant.folder.replacing`).
        OSError: writing failed; an existing folder is unchanged.
    """
    plan = getattr(model, "flatquant_plan", None)
    if not isinstance(plan, QuantizationPlan):
        raise ValueError("save: the model is not quantized (it has no flatquant_plan)")
    _refuse_bad_values(model)
    target = Path(directory)
    try:
        with replacing(target, _is_old_weight) as staging:
            # the class's method: the instance's own is the wrapper that calls this function
            type(model).save_pretrained(model, str(staging), max_shard_size=max_shard_size)
            if tokenizer is not None:
                tokenizer.save_pretrained(str(staging))
            _write_config(staging / "config.json", _describe(model, plan, staging))
            _write_card(staging, target, plan)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"save: writing {target} failed ({error}); what was there before is unchanged"
        ) from error


def load(
    directory: str | Path,
    dtype: torch.dtype | str | None = None,
    device_map: str | dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Load a folder that `save` wrote.

    Args:
        directory: a local folder (for a hub name use `AutoModelForCausalLM.from_pretrained`).
        dtype: of what is not quantized; None takes what was saved.
        device_map: as in `from_pretrained`.

    Raises:
        FileNotFoundError: the folder, its config.json or a shard is missing.
        ValueError: it is not a flatquant folder, or is damaged, changed or newer.
    """
    from flatquant.integrations import hf  # it imports this module

    hf.register()
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"load: {folder} is not a folder")
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"load: {folder} has no config.json")
    block = _read_json(config_file).get("quantization_config")
    method = block.get("quant_method") if isinstance(block, dict) else None
    if not isinstance(block, dict) or method != METHOD:
        raise ValueError(
            f"load: {config_file} has quant_method {method!r}, expected {METHOD!r}; load other "
            "models with AutoModelForCausalLM.from_pretrained"
        )
    config = FlatQuantConfig.from_dict(block)
    config.read_plan()
    shards.read_headers({name: folder / name for name in config.sha256})
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=dtype or "auto", device_map=device_map
    )
    return model


def attach(model: PreTrainedModel) -> None:
    """Let `model.save_pretrained(directory)` do what `save` does; idempotent."""
    # a bound method, because copy.deepcopy(model) rebinds those to the copy
    model.save_pretrained = types.MethodType(_save_pretrained, model)


def _save_pretrained(
    model: PreTrainedModel,
    save_directory: str | Path,
    is_main_process: bool = True,
    max_shard_size: int | str = "5GB",
    **kwargs: Any,
) -> None:
    """`save_pretrained` of a quantized model; see `flatquant.checkpoint.save`.

    Raises:
        ValueError: an argument that would make another format, or push to the hub.
    """
    asked = {name for name, value in kwargs.items() if value} - _IGNORED
    if asked or kwargs.get("safe_serialization") is False:
        raise ValueError(
            f"save_pretrained: {sorted(asked) or 'safe_serialization=False'} is not supported for "
            "a flatquant model; save to a folder and upload that"
        )
    if is_main_process:
        save(model, save_directory, max_shard_size=max_shard_size)


def _refuse_bad_values(model: PreTrainedModel) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.device.type != "meta":
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                raise ValueError(
                    f"save: {name} holds {bad} values that are NaN or Inf: a model must be finite"
                )


def _describe(model: PreTrainedModel, plan: QuantizationPlan, folder: Path) -> FlatQuantConfig:
    """The quantization_config of a model whose shards are in `folder`."""
    quantizers = (m for m in model.modules() if isinstance(m, KVQuantizer))
    return FlatQuantConfig(
        plan=plan.to_dict(),
        sha256={path.name: shards.sha256(path) for path in sorted(folder.glob("*.safetensors"))},
        attend_unquantized_prefill=any(q.attend_unquantized_prefill for q in quantizers),
        producer=_producer(),
    )


def _producer() -> str:
    try:
        return f"flatquant {version('flatquant')}"
    except PackageNotFoundError:
        return "flatquant (not installed)"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"checkpoint: {path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint: {path} holds a {type(content).__name__}, not an object")
    return content


def _write_config(path: Path, block: FlatQuantConfig) -> None:
    content = _read_json(path) | {"quantization_config": block.to_dict()}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_card(staging: Path, target: Path, plan: QuantizationPlan) -> None:
    """A short model card, unless the folder has one that somebody wrote."""
    old = target / "README.md"
    if old.is_file() and _MARK not in old.read_text(encoding="utf-8", errors="replace"):
        return
    (staging / "README.md").write_text(
        f"---\nlibrary_name: transformers\ntags: [flatquant, quantized]\n---\n{_MARK}\n\n"
        f"# A model quantized to {plan.scheme}\n\n"
        f"Method: `{plan.method}`. It needs the `flatquant` package; without it transformers "
        "warns about an unknown quantization type and loads random weights.\n\n"
        "```python\nimport flatquant\nfrom transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("<this folder>", dtype="auto")\n```\n',
        encoding="utf-8",
    )


def _is_old_weight(name: str) -> bool:
    return _OLD_WEIGHTS.fullmatch(name) is not None


__all__ = ["attach", "load", "save"]
