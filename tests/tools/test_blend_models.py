"""Blending: the mean itself, whatever the shards and number types; what goes with it; and what is refused, by name."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from character import cli
from character.constants import ROOT
from character.models import Model
from character.utils import UserError

sys.path.insert(0, str(ROOT / "tools"))
blend_models = importlib.import_module("blend_models")

NORM = "model.layers.0.input_layernorm.weight"


def load(folder: Path) -> dict[str, Any]:
    """All tensors of a folder."""
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def save(tensors: dict[str, Any], folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def pair(tmp_path: Path, chat_model: Callable[[str], Model]) -> tuple[Path, Path]:
    """Two models of one kind with other weights: the first in bfloat16 and four shards, the second in float32 and one."""
    import torch
    import transformers

    folder = Path(chat_model("template-bos").source)
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    first, second = tmp_path / "first", tmp_path / "second"
    for path in (first, second):
        shutil.copytree(folder, path, ignore=shutil.ignore_patterns("*.safetensors"))
    random = torch.Generator().manual_seed(3)
    changed = {name: tensor + torch.randn(tensor.shape, generator=random) for name, tensor in load(folder).items()}
    save(changed, second)
    network.to(torch.bfloat16).save_pretrained(first, max_shard_size="200KB")
    assert len(list(first.glob("*.safetensors"))) >= 4
    return first, second


def blend(folders: tuple[Path, ...], out: Path, *flags: str) -> Path:
    """What the command line would do."""
    argv = [*map(str, folders), "--out", str(out), *flags]
    blend_models.main(cli.parse(blend_models.Args, argv))
    return out


@pytest.mark.parametrize("piece", [1 << 24, 1000])
def test_every_tensor_is_the_weighted_mean(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    import torch

    monkeypatch.setattr(blend_models, "PIECE", piece)
    first, second = map(load, pair)
    found = load(blend(pair, tmp_path / "out", "--weights", "3", "1"))
    assert found.keys() == first.keys()
    for name, tensor in found.items():
        mean = (0.75 * first[name].double() + 0.25 * second[name].double()).to(torch.bfloat16)
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, mean) or (tensor - mean).abs().max() <= 2**-8 * mean.abs().max()
        assert not torch.equal(tensor, first[name])
    # The other way round the second's number type and its one shard are kept.
    other = blend(pair[::-1], tmp_path / "other", "--weights", "1", "3")
    assert [file.name for file in other.glob("*.safetensors")] == ["model.safetensors"]
    for name, tensor in load(other).items():
        torch.testing.assert_close(tensor.double(), 0.75 * first[name].double() + 0.25 * second[name].double())


def test_the_result_loads_and_answers_as_the_mean_of_the_weights(pair: tuple[Path, Path], tmp_path: Path) -> None:
    import torch
    import transformers

    (pair[0] / "results.json").write_text("{}")
    (pair[0] / "training.json").write_text("{}")
    (pair[0] / "LICENSE").write_text("terms")
    three = (pair[1], pair[0], pair[1])
    out = blend(three, tmp_path / "out")
    load_model = transformers.AutoModelForCausalLM.from_pretrained
    found = load_model(out, dtype=torch.float32)
    expected = load_model(pair[1], dtype=torch.float32)
    first = load(pair[0])
    with torch.no_grad():
        for name, weights in expected.named_parameters():
            weights.copy_((2 * weights + first[name].float()) / 3)
        ids = torch.arange(5, 25)[None]
        torch.testing.assert_close(found(ids).logits, expected(ids).logits, rtol=1e-3, atol=1e-3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "U"}], tokenize=False)
    parts = json.loads((out / "blend.json").read_text())["settings"]["parts"]
    assert [part["model"] for part in parts] == ["second", "first", "second"]
    assert [part["weight"] for part in parts] == pytest.approx([1 / 3] * 3)
    assert not (out / "training.json").exists()
    carried = blend(pair, tmp_path / "carried")
    assert (carried / "LICENSE").read_text() == "terms"
    assert not any((carried / name).exists() for name in ("training.json", "results.json"))
    load_model(carried)


def test_memory_holds_a_piece_and_not_a_model(tmp_path: Path, chat_model: Callable[[str], Model]) -> None:
    import torch

    folders = []
    for name in ("a", "b"):
        folder = tmp_path / name
        shutil.copytree(chat_model("template-bos").source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        save({f"layer{number}": torch.ones(1 << 22) for number in range(8)}, folder)
        folders.append(str(folder))
    code = (
        "import resource, sys, blend_models, torch; from character.models import resolve\n"
        "blend_models.PIECE = 1 << 20\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); torch.ones(1 << 20).to(torch.bfloat16)\n"
        "blend_models.blend([resolve(spec) for spec in sys.argv[1:3]], [0.5, 0.5], blend_models.Path(sys.argv[3]), False)\n"
        "print((peak() - before) // 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *folders, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT / "tools",
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    mebibytes = int(done.stdout.splitlines()[-1])
    # Each model has 128 MiB, each of its tensors 16.
    assert mebibytes < 64


def test_models_that_differ_are_refused_by_name(pair: tuple[Path, Path], tmp_path: Path) -> None:
    import torch

    first, second = pair
    tensors = load(second)

    def refused(changes: dict[str, Any], *texts: str) -> None:
        save({name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}, second)
        with pytest.raises(UserError) as caught:
            blend(pair, tmp_path / "out")
        assert all(text in str(caught.value) for text in texts), caught.value
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))

    refused({NORM: None}, f"{first} has tensors that {second} lacks: {NORM}")
    refused({"extra.bias": torch.zeros(3)}, f"{second} has tensors that {first} lacks: extra.bias")
    refused({NORM: torch.zeros(7)}, "differ in shape", f"{NORM} (128 and 7)")
    refused({NORM: torch.zeros(128, dtype=torch.int8)}, NORM, "I8", "not quantized")


def test_models_with_other_tokens_are_refused(pair: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    path = pair[1] / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    added = json.loads(path.read_text())
    added["added_tokens"][-1]["content"] = "<|renamed|>"
    path.write_text(json.dumps(added, indent=1))
    config = json.loads((pair[1] / "config.json").read_text()) | {"max_position_embeddings": 99, "use_cache": False}
    (pair[1] / "config.json").write_text(json.dumps(config))
    blend(pair, tmp_path / "out")
    said = capsys.readouterr().out
    assert "max_position_embeddings (512 and 99)" in said and "<|renamed|>" in said and "use_cache" not in said
    vocabulary = tokenizer["model"]["vocab"]
    one, two = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="other vocabularies"):
        blend(pair, tmp_path / "other")


def test_broken_files_are_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    file = pair[1] / "model.safetensors"
    whole = file.read_bytes()
    for content, message in ((whole[:-100], "is cut off"), (whole[:50], "is no safetensors file"), (b"", "is no safe")):
        file.write_bytes(content)
        with pytest.raises(UserError, match=message):
            blend(pair, tmp_path / "out")
    file.write_bytes(whole)
    shard = min(pair[0].glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard} is missing"):
        blend(pair, tmp_path / "out")


@pytest.mark.parametrize(
    ("weights", "message"),
    [(["1"], "2 models and 1 weights"), (["1", "-1"], "makes no average"), (["1", "nan"], "makes no average")],
)
def test_weights_that_make_no_average(
    pair: tuple[Path, Path], tmp_path: Path, weights: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        blend(pair, tmp_path / "out", "--weights", *weights)
    with pytest.raises(UserError, match="1 models"):
        blend(pair[:1], tmp_path / "out")


def test_an_existing_result_is_replaced_whole_or_not_at_all(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = blend(pair, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(UserError, match="exists; use --overwrite"):
        blend(pair, out)
    average, seen = blend_models.averaged, []

    def fails(*arguments: Any) -> Any:
        seen.append(arguments)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return average(*arguments)

    monkeypatch.setattr(blend_models, "averaged", fails)
    with pytest.raises(KeyboardInterrupt):
        blend(pair, out, "--overwrite", "--weights", "1", "9")
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert [path.name for path in tmp_path.glob(".out*")] == []
    monkeypatch.undo()
    blend(pair, out, "--overwrite", "--weights", "1", "9")
    assert (out / "blend.json").read_bytes() != before["blend.json"]
