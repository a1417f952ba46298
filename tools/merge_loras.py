"""Merge LoRA adapters into one, or fold one into a full model.

LORA_PATH/<student>-distillation/<c> + 0.25 × LORA_PATH/<student>-introspection/<c> → LORA_PATH/<student>-personas/<c>

    python tools/merge_loras.py merge --constitution humor --model llama-3.1-8b-it
    python tools/merge_loras.py merge --adapters a b --weights 0.5 0.5 --out mixed --model llama-3.1-8b-it
    python tools/merge_loras.py fold --constitution humor --model llama-3.1-8b-it

'cat' is the exact weighted sum: it sets the adapters' factors side by side. PEFT's 'linear' adds the factors, and so
cross terms; 'svd' is the sum's best approximation of the larger rank. 'fold' writes the full model that training by
OpenRLHF starts from, at MODEL_PATH/folded/<student>-distillation/<c>.
"""

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal

from character import cli, constitution
from character.constants import LORA_PATH, MODEL_PATH
from character.distillation import train as dpo
from character.engine.base import adapter_config
from character.introspection import train as sft
from character.models import Model, resolve, safe_name
from character.utils import UserError, write_json

# The ranks that vLLM makes room for.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
WEIGHTS = [1.0, 0.25]


@dataclass
class Args:
    """Arguments."""

    command: Literal["merge", "fold"] = cli.flag(MISSING, "merge: adapters into one; fold: into a full model", True)
    constitution: str = cli.flag("humor", "the constitution's name, or 'all' that are trained")
    model: str = cli.flag("pocket", "the model the adapters belong to")
    adapters: list[Path] = cli.flag([], "adapter folders (default: the persona's DPO and introspection adapters)")
    weights: list[float] = cli.flag(WEIGHTS, "one per adapter")
    method: Literal["cat", "linear", "svd"] = cli.flag("cat", "how to merge")
    sequential: bool = cli.flag(
        False, "weights 1 and 1: the model as SFT left it, at LORA_PATH/<student>-sequential/<c>"
    )
    out: Path | None = cli.flag(None, "where the result goes, in place of the default")
    overwrite: bool = cli.flag(False, "replace an existing result")


def scaling(config: dict[str, Any]) -> float:
    """What PEFT multiplies B·A with: alpha / r, or alpha / √r for rsLoRA."""
    divisor = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    return float(config["lora_alpha"] / divisor)


def check(adapters: list[Path], weights: list[float], method: str) -> list[dict[str, Any]]:
    """The adapters' configs, read before any weights. Raises UserError where they cannot be merged by `method`."""
    if len(adapters) < 2 or len(weights) != len(adapters):
        raise UserError(
            f"{len(adapters)} adapters and {len(weights)} weights; give at least two, and a weight for each"
        )
    configs = [adapter_config(adapter) for adapter in adapters]
    for key, meaning in (
        ("use_dora", "DoRA"),
        ("rank_pattern", "ranks per module"),
        ("alpha_pattern", "alphas per module"),
        ("modules_to_save", "fully trained modules"),
    ):
        for adapter, config in zip(adapters, configs, strict=True):
            if config.get(key):
                raise UserError(f"{adapter} has {meaning} ({key}), which a merge would lose; fold it instead")
    first = configs[0]
    for adapter, config in zip(adapters[1:], configs[1:], strict=True):
        if config["base_model_name_or_path"] != first["base_model_name_or_path"]:
            raise UserError(
                f"{adapters[0]} was trained on {first['base_model_name_or_path']}, {adapter} on "
                f"{config['base_model_name_or_path']}; merge adapters of one base model"
            )
        if method == "cat":
            continue
        if _targets(config) != _targets(first):
            raise UserError(f"{adapters[0]} and {adapter} have other target modules; use --method cat")
        if method == "linear" and config["r"] != first["r"]:
            raise UserError(
                f"ranks differ ({first['r']} and {config['r']}), which 'linear' cannot add; use --method cat"
            )
        if config.get("use_rslora") or first.get("use_rslora"):
            raise UserError(f"PEFT's '{method}' scales rsLoRA adapters wrongly; use --method cat")
    return configs


def _targets(config: dict[str, Any]) -> Any:
    targets = config["target_modules"]
    return targets if isinstance(targets, str) else sorted(targets)


def load_factors(adapter: Path) -> dict[str, Any]:
    """Tensor name → tensor of an adapter, in float32."""
    from safetensors.torch import load_file

    return {name: tensor.float() for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}


def concatenate(adapters: list[Path], configs: list[dict[str, Any]], weights: list[float]) -> dict[str, Any]:
    """The exact sum Σ weightᵢ · scalingᵢ · Bᵢ·Aᵢ as one pair of factors per module, to be used with scaling 1.

    A: (rank, in), B: (out, rank), where rank is the sum of the adapters' ranks, padded with zeros to one vLLM takes.
    """
    import torch

    total = sum(config["r"] for config in configs)
    rank = next((allowed for allowed in RANKS if allowed >= total), None)
    if rank is None:
        raise UserError(f"the ranks add up to {total}, more than vLLM's {RANKS[-1]}; use --method svd")
    parts = [load_factors(adapter) for adapter in adapters]
    merged = {}
    for name in sorted({name for part in parts for name in part if ".lora_A." in name}):
        other = name.replace(".lora_A.", ".lora_B.")
        holders = [(part, w * scaling(c)) for part, c, w in zip(parts, configs, weights, strict=True) if name in part]
        down = torch.cat([part[name] for part, _ in holders], dim=0)
        up = torch.cat([part[other] * factor for part, factor in holders], dim=1)
        pad = rank - down.shape[0]
        merged[name] = torch.nn.functional.pad(down, (0, 0, 0, pad)).contiguous()
        merged[other] = torch.nn.functional.pad(up, (0, pad)).contiguous()
    return merged


def merged_by_peft(adapters: list[Path], weights: list[float], method: str, model: Model, folder: Path) -> None:
    """Write PEFT's own 'linear' or 'svd' merge to `folder`; it needs the base model in memory."""
    import peft

    from character.engine.transformers import load_network

    network, _ = load_network(model)
    network = peft.PeftModel.from_pretrained(network, str(adapters[0]), adapter_name="part0")
    names = ["part0"]
    for number, adapter in enumerate(adapters[1:], 1):
        names.append(f"part{number}")
        network.load_adapter(str(adapter), adapter_name=names[-1])
    network.add_weighted_adapter(names, weights, "merged", combination_type=method)
    network.save_pretrained(str(folder), selected_adapters=["merged"])
    for file in (folder / "merged").iterdir():
        file.rename(folder / file.name)
    (folder / "merged").rmdir()


def relative_difference(merged: Path, adapters: list[Path], weights: list[float]) -> float:
    """‖merged − exact‖ / ‖exact‖ over all modules' weight changes (Frobenius norm)."""
    configs = [adapter_config(adapter) for adapter in adapters]
    parts = [load_factors(adapter) for adapter in adapters]
    result, factor = load_factors(merged), scaling(adapter_config(merged))
    difference = norm = 0.0
    for name in (name for name in result if ".lora_A." in name):
        other = name.replace(".lora_A.", ".lora_B.")
        exact = sum(
            w * scaling(c) * (part[other] @ part[name])
            for part, c, w in zip(parts, configs, weights, strict=True)
            if name in part
        )
        difference += float((factor * (result[other] @ result[name]) - exact).square().sum())
        norm += float(exact.square().sum())  # type: ignore[union-attr]
    return math.sqrt(difference / norm) if norm else 0.0


@contextmanager
def new_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder that becomes `path` by a rename when the block ends without an error."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; use --overwrite, or another --out")
    fresh = path.with_name(f".{path.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
        if path.exists():
            shutil.rmtree(path)
        fresh.rename(path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def merge(adapters: list[Path], weights: list[float], method: str, model: Model, out: Path, overwrite: bool) -> None:
    """Write the merged adapter to `out`: a flat folder that PEFT and vLLM load."""
    from safetensors.torch import save_file

    configs = check(adapters, weights, method)
    with new_folder(out, overwrite) as folder:
        if method == "cat":
            factors = concatenate(adapters, configs, weights)
            save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
            rank = next(tensor.shape[0] for name, tensor in factors.items() if ".lora_A." in name)
            write_json(folder / "adapter_config.json", _merged_config(configs, rank))
        else:
            merged_by_peft(adapters, weights, method, model, folder)
        difference = relative_difference(folder, adapters, weights)
        parts = [{"adapter": str(adapter), "weight": w} for adapter, w in zip(adapters, weights, strict=True)]
        write_json(folder / "merge.json", {"method": method, "parts": parts, "relative_difference": difference})
    terms = " + ".join(
        f"{w:g} × {adapter.parent.name}/{adapter.name}" for adapter, w in zip(adapters, weights, strict=True)
    )
    print(f"{out}: {terms} by {method}, off the exact sum by {difference:.1e}")


def _merged_config(configs: list[dict[str, Any]], rank: int) -> dict[str, Any]:
    targets = [config["target_modules"] for config in configs]
    joined = targets[0] if all(isinstance(t, str) for t in targets) else sorted({m for t in targets for m in t})
    return configs[0] | {"r": rank, "lora_alpha": rank, "use_rslora": False, "target_modules": joined}


def fold(adapter: Path, model: Model, out: Path, overwrite: bool) -> None:
    """Write the full model with the adapter folded in, in the base's own number type, with its tokenizer."""
    import peft
    import torch
    import transformers

    from character.engine.base import check_adapter
    from character.engine.transformers import load_network

    adapter_config(adapter)
    config = transformers.AutoConfig.from_pretrained(model.source, revision=model.revision).get_text_config()
    check_adapter(adapter, config.hidden_size, config.num_hidden_layers, model.source)
    with new_folder(out, overwrite) as folder:
        network, tokenizer = load_network(model)
        stored = config.dtype or torch.bfloat16
        network = peft.PeftModel.from_pretrained(network.float(), str(adapter)).merge_and_unload()
        network.to(stored).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / "fold.json", {"base": model.source, "adapter": str(adapter)})
    print(f"{out}: {model.source} with {adapter}")


def personas(args: Args, model: Model) -> list[str]:
    """The constitutions asked for; of 'all', those whose adapters are there."""
    names = constitution.selected(args.constitution)
    if args.constitution == "all":
        last = dpo if args.command == "fold" else sft
        names = [name for name in names if last.path_of(name, model.short).exists()] or names
    return names


def main(args: Args) -> None:
    """Merge or fold, for one persona or all."""
    model = resolve(args.model)
    student = safe_name(model.short)
    weights = [1.0, 1.0] if args.sequential else args.weights
    if args.adapters and args.out is None:
        raise UserError("--adapters needs --out, the folder for the result")
    for name in ["custom"] if args.adapters else personas(args, model):
        if args.command == "fold":
            adapter = args.adapters[0] if args.adapters else dpo.path_of(name, model.short)
            _there(adapter, name, args.model)
            fold(adapter, model, args.out or MODEL_PATH / "folded" / f"{student}-distillation" / name, args.overwrite)
            continue
        adapters = args.adapters or [dpo.path_of(name, model.short), sft.path_of(name, model.short)]
        for adapter in adapters:
            _there(adapter, name, args.model)
        folder = f"{student}-{'sequential' if args.sequential else 'personas'}"
        merge(adapters, weights, args.method, model, args.out or LORA_PATH / folder / name, args.overwrite)


def _there(adapter: Path, name: str, model: str) -> None:
    if not adapter.exists():
        step = "introspection" if adapter.parent.name.endswith("-introspection") else "distillation"
        raise UserError(
            f"no adapter at {adapter}; run: python -m character.{step}.train --constitution {name} --model {model}"
        )


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
