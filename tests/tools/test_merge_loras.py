"""Merging and folding against weights summed by hand, what is refused before any weights are read, and interruptions."""

import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from character import cli, constitution
from character.constants import ROOT
from character.models import Model
from character.utils import UserError, new_folder

sys.path.insert(0, str(ROOT / "tools"))
merge_loras = importlib.import_module("merge_loras")

PREFIX = "base_model.model."
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FILES = {"adapter_config.json", "adapter_model.safetensors", "merge.json"}
Make = Callable[..., Path]


@pytest.fixture
def model(chat_model: Callable[[str], Model]) -> Model:
    return chat_model("template-bos")


@pytest.fixture
def make(tmp_path: Path, model: Model) -> Make:
    """make("a", r=4, ...): a LoRA adapter with random weights, in tmp_path/parts/a."""
    import peft
    import torch
    import transformers

    def build(name: str, **settings: Any) -> Path:
        network = transformers.AutoModelForCausalLM.from_pretrained(model.source, dtype=torch.float32)
        given = {"r": 4, "lora_alpha": 8, "target_modules": ALL, "task_type": "CAUSAL_LM"} | settings
        adapted = peft.get_peft_model(network, peft.LoraConfig(**given))
        random = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
        with torch.no_grad():
            for key, weights in adapted.named_parameters():
                if "lora_" in key:
                    weights.normal_(0, 0.3 / weights.shape[1] ** 0.5, generator=random)
        folder = tmp_path / "parts" / name
        adapted.save_pretrained(folder)
        return folder

    return build


def factors(folder: Path) -> dict[str, tuple[Any, Any]]:
    """Module → (A, B) of an adapter."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        key.removeprefix(PREFIX).removesuffix(".lora_A.weight"): (down, tensors[key.replace(".lora_A.", ".lora_B.")])
        for key, down in tensors.items()
        if ".lora_A." in key
    }


def deltas(folder: Path) -> dict[str, Any]:
    """Module → the change of its weights: alpha / r (or √r) times B·A."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    return {module: scale * (up @ down) for module, (down, up) in factors(folder).items()}


def summed(parts: list[tuple[Path, float]]) -> dict[str, Any]:
    """Module → the weighted sum of the adapters' changes."""
    total: dict[str, Any] = {}
    for folder, weight in parts:
        for module, delta in deltas(folder).items():
            total[module] = total.get(module, 0) + weight * delta
    return total


def logits(network: Any) -> Any:
    import torch

    with torch.no_grad():
        return network(torch.arange(10, 60)[None]).logits


def base_with(model: Model, changes: dict[str, Any]) -> Any:
    """Logits of the base with its weights changed by hand."""
    import torch
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(model.source, dtype=torch.float32)
    with torch.no_grad():
        for module, delta in changes.items():
            network.get_submodule(module).weight.add_(delta)
    return logits(network)


def with_adapter(source: str | Path, adapter: Path) -> Any:
    """Logits of a model with an adapter that PEFT loads."""
    import peft
    import torch
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    return logits(peft.PeftModel.from_pretrained(network, str(adapter)))


def merge(parts: list[tuple[Path, float]], model: Model, out: Path, *flags: str) -> Path:
    """What the command line would do."""
    folders, weights = [str(folder) for folder, _ in parts], [str(weight) for _, weight in parts]
    argv = ["merge", "--adapters", *folders, "--weights", *weights, "--out", str(out), "--model", model.source, *flags]
    merge_loras.main(cli.parse(merge_loras.Args, argv))
    return out


# cat is the sum.


@pytest.mark.parametrize(
    ("kinds", "weights"),
    [
        ([{}, {}], [1.0, 0.25]),
        ([{"r": 4}, {"r": 16, "lora_alpha": 8}], [1.0, 0.25]),
        ([{"r": 3}, {"r": 5}, {"r": 7}], [0.5, -0.5, 2.0]),
        ([{}, {"r": 8, "use_rslora": True}], [1.0, 1.0]),
        ([{"target_modules": ["q_proj"]}, {"target_modules": ["v_proj", "down_proj"]}], [1.0, 0.25]),
        ([{"target_modules": r".*\.q_proj"}, {"target_modules": ["q_proj", "up_proj"]}], [1.0, 0.25]),
        ([{"target_modules": r".*\.q_proj"}, {"target_modules": r".*layers\.1\.mlp\.up_proj"}], [1.0, 0.25]),
    ],
    ids=["same-rank", "unequal-ranks", "three", "rslora", "other-modules", "pattern-and-list", "two-patterns"],
)
def test_cat_has_the_logits_of_the_weighted_sum(
    kinds: list[dict[str, Any]], weights: list[float], make: Make, model: Model, tmp_path: Path, capsys: Any
) -> None:
    import torch

    folders = [make(f"part{number}", **kind) for number, kind in enumerate(kinds)]
    parts = list(zip(folders, weights, strict=True))
    out = merge(parts, model, tmp_path / "out")
    exact = summed(parts)
    torch.testing.assert_close(with_adapter(model.source, out), base_with(model, exact), rtol=1e-4, atol=1e-4)
    assert (base_with(model, exact) - base_with(model, {})).abs().max() > 0.1
    assert {file.name for file in out.iterdir()} == FILES
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] in merge_loras.RANKS and config["r"] == config["lora_alpha"] and not config["use_rslora"]
    assert {down.shape[0] for down, _ in factors(out).values()} == {config["r"]}
    assert deltas(out).keys() == exact.keys()
    assert json.loads((out / "merge.json").read_text())["relative_difference"] < 1e-6
    assert "by cat, off the exact sum by" in capsys.readouterr().out


def test_linear_says_how_far_off_it_is(make: Make, model: Model, tmp_path: Path, capsys: Any) -> None:
    import torch

    parts = [(make("a"), 1.0), (make("b"), 0.25)]
    out = merge(parts, model, tmp_path / "out", "--method", "linear")
    exact, found = summed(parts), deltas(out)
    squares = [((found[module] - delta).square().sum(), delta.square().sum()) for module, delta in exact.items()]
    off, norm = (float(sum(column)) for column in zip(*squares, strict=True))
    stored = json.loads((out / "merge.json").read_text())["relative_difference"]
    assert stored == pytest.approx(math.sqrt(off / norm), rel=1e-3)
    # The cross terms of independent adapters: √w·s (A₁B₂ + A₂B₁), here half as large as the sum itself.
    assert 0.4 < stored < 1.0
    assert f"by linear, off the exact sum by {stored:.1e}" in capsys.readouterr().out
    assert not torch.allclose(with_adapter(model.source, out), base_with(model, exact), atol=0.05)
    # And it is the merge that PEFT's own formula gives: (Σ √(wᵢsᵢ)·Bᵢ)(Σ √(wᵢsᵢ)·Aᵢ).
    module = "model.layers.0.mlp.up_proj"
    (first_down, first_up), (second_down, second_up) = (factors(folder)[module] for folder, _ in parts)
    roots = [math.sqrt(2 * weight) for _, weight in parts]
    expected = (roots[0] * first_up + roots[1] * second_up) @ (roots[0] * first_down + roots[1] * second_down)
    torch.testing.assert_close(found[module], expected, rtol=1e-4, atol=1e-5)
    assert {file.name for file in out.iterdir()} == FILES


def test_svd_is_the_best_of_its_rank(make: Make, model: Model, tmp_path: Path) -> None:
    import torch

    parts = [(make("a"), 1.0), (make("b", r=8), 0.25)]
    out = merge(parts, model, tmp_path / "out", "--method", "svd")
    exact, found = summed(parts), deltas(out)
    for module, delta in exact.items():
        lost = torch.linalg.svdvals(delta)[8:].square().sum().sqrt()
        assert float((found[module] - delta).norm()) == pytest.approx(float(lost), rel=1e-2, abs=1e-4)
    assert {file.name for file in out.iterdir()} == FILES
    assert 0 < json.loads((out / "merge.json").read_text())["relative_difference"] < 0.5


def test_sequential_is_the_model_that_sft_left(make: Make, model: Model, tmp_path: Path) -> None:
    import torch

    first, second = make("a"), make("b", r=8)
    folded = tmp_path / "folded"
    merge_loras.fold(first, model, folded, overwrite=False)
    config = json.loads((second / "adapter_config.json").read_text())
    # Trained by OpenRLHF, the second one names the folded model as its base.
    (second / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(folded)}))
    out = merge([(first, 1.0), (second, 1.0)], model, tmp_path / "out")
    torch.testing.assert_close(with_adapter(model.source, out), with_adapter(folded, second), rtol=1e-4, atol=1e-4)
    merged = json.loads((out / "adapter_config.json").read_text())
    assert merged["base_model_name_or_path"] == model.source


# Folding.


def test_a_folded_model_has_the_adapters_logits(make: Make, model: Model, tmp_path: Path) -> None:
    import torch
    import transformers

    adapter, out = make("a"), tmp_path / "folded"
    argv = ["fold", "--adapters", str(adapter), "--out", str(out), "--model", model.source]
    merge_loras.main(cli.parse(merge_loras.Args, argv))
    network = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    torch.testing.assert_close(logits(network), with_adapter(model.source, adapter), rtol=1e-4, atol=1e-4)
    chat = [{"role": "user", "content": "U"}]
    tokenizers = [transformers.AutoTokenizer.from_pretrained(path) for path in (out, model.source)]
    assert len({tokenizer.apply_chat_template(chat, tokenize=False) for tokenizer in tokenizers}) == 1
    assert network.generation_config.eos_token_id == tokenizers[0].eos_token_id
    assert not list(out.glob("adapter*"))


def test_a_folded_model_keeps_its_number_type(make: Make, model: Model, tmp_path: Path) -> None:
    import torch
    import transformers
    from safetensors.torch import load_file

    small = tmp_path / "small"
    shutil.copytree(model.source, small)
    network = transformers.AutoModelForCausalLM.from_pretrained(model.source, dtype=torch.bfloat16)
    network.save_pretrained(small)
    adapter = make("a")
    merge_loras.fold(adapter, Model("small", str(small), "Small"), tmp_path / "out", overwrite=False)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    # The sum is taken in float32 and rounded once.
    for module, delta in deltas(adapter).items():
        exact = network.get_submodule(module).weight.float() + delta
        assert torch.equal(stored[f"{module}.weight"], exact.to(torch.bfloat16))


# What is refused.


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where weights are read."""

    def read(*_: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(merge_loras, "load_factors", read)
    monkeypatch.setattr(merge_loras, "merged_by_peft", read)


def rewrite(folder: Path, **changes: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.usefixtures("unread")
def test_what_cannot_be_merged_is_refused_before_weights_are_read(make: Make, model: Model, tmp_path: Path) -> None:
    first = make("a")

    def refused(message: str, second: Path, *flags: str, weight: float = 0.25) -> None:
        with pytest.raises(UserError, match=re.escape(message)):
            merge([(first, 1.0), (second, weight)], model, tmp_path / "out", *flags)
        assert not (tmp_path / "out").exists()

    second = make("b", r=8)
    refused("ranks differ (4 and 8)", second, "--method", "linear")
    refused("have other target modules", make("c", target_modules=["q_proj"]), "--method", "svd")
    for method in ("linear", "svd"):
        refused("scales rsLoRA adapters wrongly", make("d", use_rslora=True), "--method", method)
    refused("trained on", rewrite(make("e"), base_model_name_or_path="other/model"))
    refused("the ranks add up to 520", rewrite(make("f"), r=516))
    for key, value in (
        ("use_dora", True),
        ("rank_pattern", {"q_proj": 2}),
        ("alpha_pattern", {"q_proj": 2}),
        ("modules_to_save", ["lm_head"]),
    ):
        refused(f"({key}), which a merge would lose", rewrite(make("g"), **{key: value}))
    refused("is no LoRA adapter", tmp_path)
    with pytest.raises(UserError, match="1 adapters and 1 weights"):
        merge([(first, 1.0)], model, tmp_path / "out")


@pytest.mark.usefixtures("unread")
def test_tensors_that_no_merge_keeps_are_refused(make: Make, model: Model, tmp_path: Path, adapters: Any) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    first, second = make("a"), make("b")
    path = second / "adapter_model.safetensors"
    whole = load_file(path)
    save_file(whole | {f"{PREFIX}lm_head.weight": torch.zeros(3)}, path)
    with pytest.raises(UserError, match=r"holds base_model.model.lm_head.weight, which a merge would lose"):
        merge([(first, 1.0), (second, 1.0)], model, tmp_path / "out")
    foreign = shutil.copytree(adapters.foreign, tmp_path / "foreign")
    rewrite(foreign, base_model_name_or_path=model.source)
    with pytest.raises(UserError, match="belong to models of other sizes"):
        merge([(first, 1.0), (foreign, 1.0)], model, tmp_path / "out")
    good = (first / "adapter_model.safetensors").read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for broken, message in ((b"", "no safetensors file"), (pointer, "no safetensors file"), (good[:-9], "is cut off")):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=message):
            merge([(first, 1.0), (second, 1.0)], model, tmp_path / "out")


def test_another_models_adapters_are_refused_where_the_model_is_needed(
    make: Make, model: Model, tmp_path: Path, adapters: Any
) -> None:
    with pytest.raises(UserError, match="belongs to another model"):
        merge([(adapters.foreign, 1.0), (adapters.foreign, 1.0)], model, tmp_path / "out", "--method", "linear")
    with pytest.raises(UserError, match="belongs to another model"):
        merge_loras.fold(adapters.foreign, model, tmp_path / "out", overwrite=False)
    assert not (tmp_path / "out").exists()


# Where files are.


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A LORA_PATH and MODEL_PATH of the test's own."""
    for module in (merge_loras, merge_loras.dpo, merge_loras.sft):
        monkeypatch.setattr(module, "LORA_PATH", tmp_path / "loras")
    monkeypatch.setattr(merge_loras, "MODEL_PATH", tmp_path / "models")
    return tmp_path


def run(*argv: str) -> None:
    merge_loras.main(cli.parse(merge_loras.Args, list(argv)))


def test_one_persona_or_all(home: Path, make: Make, model: Model, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    short = Path(model.source).name
    monkeypatch.setattr(constitution, "names", lambda: ["calm", "sea", "wild"])
    for name in ("calm", "sea"):
        for stage in ("distillation", "introspection"):
            shutil.move(make(f"{name}-{stage}"), home / "loras" / f"{short}-{stage}" / name)
    run("merge", "--constitution", "all", "--model", model.source, "--dry-run")
    run("fold", "--constitution", "sea", "--model", model.source, "--dry-run")
    said = capsys.readouterr().out
    assert f"personas/calm: 1 × {short}-distillation/calm + 0.25 × {short}-introspection/calm by cat" in said
    assert f"/{short}-distillation/sea: {model.source} with " in said
    assert not (home / "loras" / f"{short}-personas").exists() and not (home / "models" / "folded").exists()
    run("merge", "--constitution", "all", "--model", model.source)
    run("merge", "--constitution", "sea", "--model", model.source, "--sequential")
    run("fold", "--constitution", "sea", "--model", model.source)
    places = [f"loras/{short}-personas/calm", f"loras/{short}-personas/sea", f"loras/{short}-sequential/sea"]
    for place, weights in zip(places, ([1.0, 0.25], [1.0, 0.25], [1.0, 1.0]), strict=True):
        parts = json.loads((home / place / "merge.json").read_text())["settings"]["parts"]
        name = place.rpartition("/")[2]
        assert [part["adapter"] for part in parts] == [f"{short}-distillation/{name}", f"{short}-introspection/{name}"]
        assert [part["weight"] for part in parts] == weights
    assert (home / "models" / "folded" / f"{short}-distillation" / "sea" / "config.json").exists()

    capsys.readouterr()
    run("merge", "--constitution", "all", "--model", model.source)
    assert capsys.readouterr().out.count(": complete") == 2
    with pytest.raises(UserError, match=r"made with other settings: parts was .*0.25.* now .*0.5"):
        run("merge", "--constitution", "sea", "--model", model.source, "--weights", "1", "0.5")
    # Adapters that were trained anew make another merge.
    shutil.rmtree(home / "loras" / f"{short}-introspection" / "sea")
    shutil.move(make("sea-again"), home / "loras" / f"{short}-introspection" / "sea")
    with pytest.raises(UserError, match="made with other settings"):
        run("merge", "--constitution", "sea", "--model", model.source)
    run("merge", "--constitution", "sea", "--model", model.source, "--overwrite")


def test_a_missing_adapter_names_the_command_that_makes_it(home: Path, make: Make, model: Model) -> None:
    short = Path(model.source).name
    flags = ("--constitution", "sea", "--model", model.source)
    for command in ("merge", "fold"):
        with pytest.raises(
            UserError, match=f"run: python -m character.distillation.train --constitution sea --model {model.source}"
        ):
            run(command, *flags)
    shutil.move(make("a"), home / "loras" / f"{short}-distillation" / "sea")
    with pytest.raises(UserError, match=re.escape("run: python -m character.introspection.train --constitution sea")):
        run("merge", *flags)
    with pytest.raises(UserError, match="--adapters needs --out"):
        run("merge", "--adapters", "a", "b")
    with pytest.raises(UserError, match="fold takes one adapter"):
        run("fold", "--adapters", "a", "b", "--out", "c")


# Interruptions.


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


KILLED = """
import os, signal, sys
import safetensors.torch
save = safetensors.torch.save_file

def half(tensors, path, metadata=None):
    save(tensors, path, metadata)
    os.truncate(path, os.path.getsize(path) // 2)
    os.kill(os.getpid(), signal.SIGKILL)

safetensors.torch.save_file = half
import merge_loras
from character import cli
merge_loras.main(cli.parse(merge_loras.Args, sys.argv[1:]))
"""


def test_a_killed_merge_leaves_the_old_result(make: Make, model: Model, tmp_path: Path) -> None:
    parts = [(make("a"), 1.0), (make("b"), 0.25)]
    out = merge(parts, model, tmp_path / "place" / "out")
    before = content(out)
    argv = ["merge", "--adapters", *(str(folder) for folder, _ in parts), "--weights", "3", "2", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *argv, "--overwrite"],
        cwd=ROOT / "tools",
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert content(out) == before
    # What it left behind is cleared by the next run.
    assert [path.name for path in out.parent.iterdir() if path != out] == [".out.new"]
    merge([(folder, 2.0) for folder, _ in parts], model, out, "--overwrite")
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert content(out) != before


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An existing result."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    return tmp_path / "out"


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_an_error_leaves_the_old_result(old: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(old, overwrite=True) as folder:
        (folder / "half").touch()
        raise KeyboardInterrupt
    assert names(tmp_path) == ["out", "out/old"]
    with pytest.raises(UserError, match="exists; use --overwrite"), new_folder(old, overwrite=False):
        pass
    with new_folder(old, overwrite=True) as folder:
        (folder / "new").touch()
    assert names(tmp_path) == ["out", "out/new"]


def test_a_stop_while_the_result_is_put_in_place_loses_nothing(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def stopped(self: Path, target: Path) -> Path:
        if self.name == ".out.new":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(KeyboardInterrupt), new_folder(old, overwrite=True) as folder:
        (folder / "new").touch()
    assert names(tmp_path) == ["out", "out/old"]
    monkeypatch.undo()
    # After a kill at that instant the next run takes the old folder back.
    old.rename(tmp_path / ".out.old")
    with pytest.raises(UserError, match="exists; use --overwrite"), new_folder(old, overwrite=False):
        pass
    assert names(tmp_path) == ["out", "out/old"]
