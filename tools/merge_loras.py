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
import re
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal

from character import cli, constitution, rows
from character.constants import LORA_PATH, MODEL_PATH
from character.distillation import train as dpo
from character.engine.base import adapter_config, check_adapter, tensor_shapes
from character.engine.chat import loading
from character.introspection import train as sft
from character.models import Model, resolve, safe_name
from character.utils import UserError, new_folder, read_json, write_json

# The ranks that vLLM makes room for.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
WEIGHTS = [1.0, 0.25]
WEIGHTS_FILE = "adapter_model.safetensors"
FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_[AB]\.weight")


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
    dry_run: bool = cli.flag(False, "say what would be done (rows, tokens, files); load no model")


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
        if base_of(config) != base_of(first):
            raise UserError(
                f"{adapters[0]} was trained on {base_of(first)}, {adapter} on {base_of(config)}; "
                "merge adapters of one base model"
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
    total = sum(config["r"] for config in configs)
    if method == "cat" and total > RANKS[-1]:
        raise UserError(f"the ranks add up to {total}, more than vLLM's {RANKS[-1]}; use --method svd")
    _check_tensors(adapters)
    return configs


def base_of(config: dict[str, Any]) -> str:
    """The model an adapter belongs to; one trained on a folded model belongs to the model that was folded."""
    base: str = config["base_model_name_or_path"] or ""
    folded = Path(base) / "fold.json"
    return read_json(folded)["settings"]["base"] if folded.exists() else base


def _targets(config: dict[str, Any]) -> Any:
    targets = config["target_modules"]
    return targets if isinstance(targets, str) else sorted(targets)


def _check_tensors(adapters: list[Path]) -> None:
    """Raise UserError where an adapter holds more than pairs of factors, or two adapters' modules differ in width."""
    found: dict[str, tuple[int, Path]] = {}
    for adapter in adapters:
        for name, shape in tensor_shapes(adapter / WEIGHTS_FILE).items():
            if not FACTOR.fullmatch(name):
                raise UserError(f"{adapter} holds {name}, which a merge would lose; fold it instead")
            width = shape[1] if ".lora_A." in name else shape[0]
            before, other = found.setdefault(name, (width, adapter))
            if before != width:
                raise UserError(
                    f"{other} and {adapter} belong to models of other sizes: {name} is for {before} and {width} units"
                )


def load_factors(adapter: Path) -> dict[str, Any]:
    """Tensor name → tensor of an adapter, in float32."""
    from safetensors.torch import load_file

    return {name: tensor.float() for name, tensor in load_file(adapter / WEIGHTS_FILE).items()}


def concatenate(adapters: list[Path], configs: list[dict[str, Any]], weights: list[float]) -> dict[str, Any]:
    """The exact sum Σ weightᵢ · scalingᵢ · Bᵢ·Aᵢ as one pair of factors per module, to be used with scaling 1.

    A: (rank, in), B: (out, rank), where rank is the sum of the adapters' ranks, padded with zeros to one vLLM takes.
    """
    import torch

    total = sum(config["r"] for config in configs)
    rank = next(allowed for allowed in RANKS if allowed >= total)
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

    check_fits(adapters, model)
    network, _ = load_network(model)
    network = peft.PeftModel.from_pretrained(network.float(), str(adapters[0]), adapter_name="part0")
    names = ["part0"]
    for number, adapter in enumerate(adapters[1:], 1):
        names.append(f"part{number}")
        network.load_adapter(str(adapter), adapter_name=names[-1])
    network.add_weighted_adapter(names, weights, "merged", combination_type=method, svd_full_matrices=False)
    network.save_pretrained(str(folder), selected_adapters=["merged"])
    (folder / "README.md").unlink(missing_ok=True)
    for file in (folder / "merged").iterdir():
        file.rename(folder / file.name)
    (folder / "merged").rmdir()


def check_fits(adapters: list[Path], model: Model) -> Any:
    """The model's text config, after comparing the adapters with it. Raises UserError where one is another model's."""
    import transformers

    with loading(model):
        config = transformers.AutoConfig.from_pretrained(model.source, revision=model.revision).get_text_config()
    for adapter in adapters:
        check_adapter(adapter, config.hidden_size, config.num_hidden_layers, model.source)
    return config


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
        norm += float(exact.square().sum())
    return math.sqrt(difference / norm) if norm else 0.0


def complete(out: Path, file: str, settings: dict[str, Any], overwrite: bool) -> bool:
    """Whether `out` was made with these settings. Raises UserError, naming the difference, where with others."""
    if overwrite or not (out / file).exists():
        return False
    rows.check_settings(out, read_json(out / file)["settings"], settings)
    print(f"{out}: complete")
    return True


def merge(adapters: list[Path], weights: list[float], method: str, model: Model, out: Path, overwrite: bool) -> None:
    """Write the merged adapter to `out`: a flat folder that PEFT and vLLM load."""
    from safetensors.torch import save_file

    configs = check(adapters, weights, method)
    settings = {
        "method": method,
        "parts": [_part(adapter) | {"weight": w} for adapter, w in zip(adapters, weights, strict=True)],
    }
    if complete(out, "merge.json", settings, overwrite):
        return
    with new_folder(out, overwrite) as folder:
        if method == "cat":
            factors = concatenate(adapters, configs, weights)
            save_file(factors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
            rank = next(tensor.shape[0] for name, tensor in factors.items() if ".lora_A." in name)
            write_json(folder / "adapter_config.json", _merged_config(configs, rank, list(factors)))
        else:
            merged_by_peft(adapters, weights, method, model, folder)
        difference = relative_difference(folder, adapters, weights)
        write_json(folder / "merge.json", {"settings": settings, "relative_difference": difference})
    print(f"{out}: {terms(adapters, weights)} by {method}, off the exact sum by {difference:.1e}")


def terms(adapters: list[Path], weights: list[float]) -> str:
    """The weighted sum as text."""
    return " + ".join(f"{w:g} × {a.parent.name}/{a.name}" for a, w in zip(adapters, weights, strict=True))


def _part(adapter: Path) -> dict[str, Any]:
    folder = adapter.resolve()
    weights = rows.file_digest(folder / WEIGHTS_FILE)
    return {"adapter": f"{folder.parent.name}/{folder.name}", "weights": weights}


def _merged_config(configs: list[dict[str, Any]], rank: int, factors: list[str]) -> dict[str, Any]:
    merged = configs[0] | {"base_model_name_or_path": base_of(configs[0])}
    merged |= {"r": rank, "lora_alpha": rank, "use_rslora": False}
    if any(_targets(config) != _targets(configs[0]) for config in configs):
        # Adapters of other modules: those that have factors, by their whole names.
        modules = {match[1] for name in factors if (match := FACTOR.fullmatch(name))}
        merged |= {"target_modules": sorted(modules), "layers_to_transform": None, "exclude_modules": None}
    return merged


def fold(adapter: Path, model: Model, out: Path, overwrite: bool) -> None:
    """Write the full model with the adapter folded in, in the base's own number type, with its tokenizer."""
    import peft
    import torch

    from character.engine.transformers import load_network

    adapter_config(adapter)
    settings = {"base": model.source, "revision": model.revision, "part": _part(adapter)}
    if complete(out, "fold.json", settings, overwrite):
        return
    stored = check_fits([adapter], model).dtype or torch.bfloat16
    with new_folder(out, overwrite) as folder:
        network, tokenizer = load_network(model)
        network = peft.PeftModel.from_pretrained(network.float(), str(adapter)).merge_and_unload()
        network.to(stored).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / "fold.json", {"settings": settings})
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
    if args.command == "fold" and len(args.adapters) > 1:
        raise UserError("fold takes one adapter; merge several first")
    for name in ["custom"] if args.adapters else personas(args, model):
        trained = [dpo.path_of(name, model.short), sft.path_of(name, model.short)]
        if args.command == "fold":
            adapters = args.adapters or trained[:1]
            out = args.out or MODEL_PATH / "folded" / f"{student}-distillation" / name
        else:
            adapters = args.adapters or trained
            out = args.out or LORA_PATH / f"{student}-{'sequential' if args.sequential else 'personas'}" / name
        for adapter in adapters:
            _there(adapter, name, args.model)
        if args.dry_run:
            foresee(args, adapters, weights, model, out)
        elif args.command == "fold":
            fold(adapters[0], model, out, args.overwrite)
        else:
            merge(adapters, weights, args.method, model, out, args.overwrite)


def foresee(args: Args, adapters: list[Path], weights: list[float], model: Model, out: Path) -> None:
    """Say what would be written to `out`; adapters that are there already are checked."""
    if args.command == "fold":
        print(f"{out}: {model.source} with {adapters[0]}")
        return
    if not any(rows.is_planned(adapter / WEIGHTS_FILE) for adapter in adapters):
        check(adapters, weights, args.method)
    print(f"{out}: {terms(adapters, weights)} by {args.method}")
    rows.plan(out / WEIGHTS_FILE, [])


def _there(adapter: Path, name: str, model: str) -> None:
    if not (adapter.exists() or rows.is_planned(adapter / WEIGHTS_FILE)):
        step = "introspection" if adapter.parent.name.endswith("-introspection") else "distillation"
        raise UserError(
            f"no adapter at {adapter}; run: python -m character.{step}.train --constitution {name} --model {model}"
        )


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
