"""Average full models, tensor by tensor: Σ wᵢ·modelᵢ / Σ wᵢ.

two or more folders, short names or repo ids of one architecture → --out, with the first one's config, tokenizer and
number types

    python tools/blend_models.py models/folded/llama-3.1-8b-it-distillation/humor llama-3.1-8b-it --out models/half-humor
    python tools/blend_models.py a b c --weights 2 1 1 --out models/mixed

Weights are read and written shard by shard, a piece of one tensor at a time; the sum is taken in float32 or wider.
"""

import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from character import cli
from character.engine.base import safetensors_header
from character.engine.vllm import weights_folder
from character.models import Model, fingerprint, resolve
from character.utils import UserError, git_commit, new_folder, read_json, versions, write_json

INDEX = "model.safetensors.index.json"
# What goes with the weights; measurements and documents of the first model do not.
CARRIED = (
    *("config.json", "generation_config.json", INDEX, "preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "*.model", "chat_template.jinja", "chat_template.json", "LICENSE*", "NOTICE*"),
)
# Settings that say nothing about what the weights compute.
COSMETIC = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# Numbers that are in memory at once, from each model.
PIECE = 1 << 24


@dataclass
class Args:
    """Arguments."""

    models: list[str] = cli.flag(MISSING, "two or more models: folders, short names or repo ids", positional=True)
    out: Path = cli.flag(MISSING, "the folder for the result")
    weights: list[float] = cli.flag([], "one per model, of any sum (default: all the same)")
    overwrite: bool = cli.flag(False, "replace an existing result")


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies. kind: safetensors' name of the number type. start: its first byte in the file."""

    file: Path
    kind: str
    shape: tuple[int, ...]
    start: int


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Name → place of all tensors of a model, in the order of its shards and of their bytes.

    Raises UserError where a shard is missing or no whole safetensors file.
    """
    index = folder / INDEX
    shards = {path.name for path in folder.glob("*.safetensors")}
    if index.exists():
        shards = set(read_json(index)["weight_map"].values())
    found: dict[str, Tensor] = {}
    for shard in sorted(shards):
        path = folder / shard
        if not path.exists():
            raise UserError(f"{path} is missing, which {INDEX} names; download or make the model again")
        header, begin = safetensors_header(path)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            found[name] = Tensor(path, entry["dtype"], tuple(entry["shape"]), begin + entry["data_offsets"][0])
    return found


def check(folders: list[Path], found: list[dict[str, Tensor]]) -> None:
    """Raise UserError, naming what differs, where models cannot be averaged; print what else differs."""
    first, tensors = folders[0], found[0]
    for folder, others in zip(folders[1:], found[1:], strict=True):
        for one, two, lacking in (
            (first, folder, tensors.keys() - others.keys()),
            (folder, first, others.keys() - tensors.keys()),
        ):
            if lacking:
                raise UserError(
                    f"{one} has tensors that {two} lacks: {_some(sorted(lacking))}; blend models of one kind"
                )
        shapes = [
            f"{name} ({_size(tensor)} and {_size(others[name])})"
            for name, tensor in tensors.items()
            if tensor.shape != others[name].shape
        ]
        if shapes:
            raise UserError(f"{first} and {folder} differ in shape: {_some(shapes)}; blend models of one kind")
        for name, tensor in (*tensors.items(), *others.items()):
            if tensor.kind not in BYTES:
                raise UserError(
                    f"{tensor.file}: {name} is of type {tensor.kind}, and only {', '.join(BYTES)} can be averaged; "
                    "blend models that are not quantized"
                )
        _compare_settings(first, folder)


def _compare_settings(first: Path, folder: Path) -> None:
    """Print where two models' settings differ. Raises UserError where their tokens mean different things."""
    config, other = read_json(first / "config.json"), read_json(folder / "config.json")
    differing = [key for key in sorted(config.keys() | other.keys()) if config.get(key) != other.get(key)]
    values = [f"{key} ({config.get(key)} and {other.get(key)})" for key in differing if key not in COSMETIC]
    if values:
        print(f"note: {first} and {folder} differ in config.json: {_some(values)}; the first one's is kept")
    files = [path / "tokenizer.json" for path in (first, folder)]
    if not all(file.exists() for file in files):
        return
    one, two = map(read_json, files)
    if one["model"].get("vocab") != two["model"].get("vocab"):
        raise UserError(f"{first} and {folder} have other vocabularies, so that their tensors' rows mean other tokens")
    names = [{entry["id"]: entry["content"] for entry in tokenizer["added_tokens"]} for tokenizer in (one, two)]
    renamed = [
        f"{key} ({names[0].get(key)} and {names[1].get(key)})"
        for key in sorted(names[0].keys() | names[1].keys())
        if names[0].get(key) != names[1].get(key)
    ]
    if renamed:
        print(f"note: {first} and {folder} differ in special tokens: {_some(renamed)}; the first one's are kept")


def _size(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "one number"


def _some(texts: list[str]) -> str:
    return ", ".join(texts[:3]) + (f", … ({len(texts)} in all)" if len(texts) > 3 else "")


def shares(weights: list[float], models: int) -> list[float]:
    """The weights, scaled to a sum of 1. Raises UserError where their number or values make no average."""
    weights = weights or [1.0] * models
    if models < 2 or len(weights) != models:
        raise UserError(f"{models} models and {len(weights)} weights; give at least two models, and a weight for each")
    total = sum(weights)
    if not all(map(math.isfinite, weights)) or total <= 0:
        raise UserError(f"--weights {' '.join(map(str, weights))} makes no average; the sum has to be above 0")
    return [weight / total for weight in weights]


def averaged(parts: list[Tensor], weights: list[float], files: Mapping[Path, BinaryIO]) -> Iterator[bytes]:
    """The weighted mean of tensors of one shape as bytes of the first one's number type, in pieces of PIECE numbers."""
    import torch

    types = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    wide = torch.float64 if any(part.kind == "F64" for part in parts) else torch.float32
    count = math.prod(parts[0].shape)
    for begin in range(0, count, PIECE):
        size = min(PIECE, count - begin)
        total = torch.zeros(size, dtype=wide)
        for part, weight in zip(parts, weights, strict=True):
            files[part.file].seek(part.start + begin * BYTES[part.kind])
            data = bytearray(files[part.file].read(size * BYTES[part.kind]))
            total.add_(torch.frombuffer(data, dtype=types[part.kind]).to(wide), alpha=weight)
        yield total.to(types[parts[0].kind]).view(torch.uint8).numpy().tobytes()


def blend(models: list[Model], weights: list[float], out: Path, overwrite: bool) -> None:
    """Write the weighted mean of the models to `out`, with the first one's config and tokenizer. weights: of sum 1."""
    folders = [weights_folder(model) for model in models]
    found = [tensors_of(folder) for folder in folders]
    check(folders, found)
    with new_folder(out, overwrite) as fresh, ExitStack() as stack:
        for path in (path for pattern in CARRIED for path in folders[0].glob(pattern)):
            shutil.copyfile(path, fresh / path.name)
        paths = {tensor.file for tensors in found for tensor in tensors.values()}
        files = {path: stack.enter_context(open(path, "rb")) for path in paths}
        with tqdm(total=len(found[0]), unit="tensor", desc=out.name, disable=None) as bar:
            for shard in dict.fromkeys(tensor.file for tensor in found[0].values()):
                files[shard].seek(0)
                with open(fresh / shard.name, "wb") as target:
                    target.write(files[shard].read(safetensors_header(shard)[1]))
                    for name in [name for name, tensor in found[0].items() if tensor.file == shard]:
                        target.writelines(averaged([tensors[name] for tensors in found], weights, files))
                        bar.update()
        parts = [
            {"model": model.short, "fingerprint": fingerprint(model), "weight": weight}
            for model, weight in zip(models, weights, strict=True)
        ]
        write_json(fresh / "blend.json", {"settings": {"parts": parts}, "git": git_commit(), "versions": versions()})
    terms = " + ".join(f"{weight:.4g} × {model.short}" for model, weight in zip(models, weights, strict=True))
    print(f"{out}: {terms}, {len(found[0])} tensors")


def main(args: Args) -> None:
    """Find the models, check them, and write their average."""
    weights = shares(args.weights, len(args.models))
    blend([resolve(spec) for spec in args.models], weights, args.out, args.overwrite)


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
