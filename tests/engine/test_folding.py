"""Folding against PEFT's own merge, and which adapters are left apart."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from character.engine.folding import foldable, folded
from character.models import Model
from character.utils import UserError


@pytest.fixture
def folder(chat_model: Callable[[str], Model]) -> Path:
    return Path(chat_model("template-bos").source)


def checkpoint(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("rslora", [False, True])
def test_weights_are_those_that_peft_merges(folder: Path, adapters: Any, tmp_path: Path, rslora: bool) -> None:
    import peft
    import torch
    import transformers

    adapter = shutil.copytree(adapters.large, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": rslora}))
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = peft.PeftModel.from_pretrained(network, str(adapter)).merge_and_unload().state_dict()
    before = checkpoint(folder)
    after = dict(folded(iter(before.items()), adapter, "cpu"))
    assert after.keys() == before.keys()
    for name, weight in after.items():
        torch.testing.assert_close(weight, expected[name])
        assert ("proj" in name) != (weight is before[name]), name


def test_a_sum_is_rounded_once(folder: Path, adapters: Any) -> None:
    import torch

    exact = dict(folded(iter(checkpoint(folder).items()), adapters.large, "cpu"))
    halves = {name: weight.bfloat16() for name, weight in checkpoint(folder).items()}
    rounded = dict(folded(iter(halves.items()), adapters.large, "cpu"))
    change = {name: exact[name] - weight for name, weight in checkpoint(folder).items()}
    for name, weight in rounded.items():
        assert weight.dtype == torch.bfloat16
        torch.testing.assert_close(weight, (halves[name].float() + change[name]).bfloat16(), rtol=2**-8, atol=1e-6)


def test_an_adapter_is_folded_where_each_module_is_a_tensor(folder: Path, adapters: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    assert foldable(folder, adapters.small)
    changes: list[tuple[str, str]] = [
        # As a model that reads pictures too has it, whose checkpoint has other names than its network.
        ("layers", "language_model.layers"),
        ("lora_B", "lora_magnitude"),
        ("base_model.", ""),
    ]
    for number, change in enumerate(changes):
        path = shutil.copytree(adapters.small, tmp_path / str(number))
        tensors = load_file(path / "adapter_model.safetensors")
        save_file({name.replace(*change): each for name, each in tensors.items()}, path / "adapter_model.safetensors")
        assert not foldable(folder, path), change


def test_weights_in_eight_bits_are_left_as_they_are(folder: Path, adapters: Any, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    eight = {name: weight.to(torch.float8_e4m3fn) for name, weight in checkpoint(folder).items()}
    save_file(eight, tmp_path / "model.safetensors")
    assert not foldable(tmp_path, adapters.small)


def test_a_checkpoint_that_was_cut_off(folder: Path, adapters: Any, tmp_path: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(UserError, match="cut off"):
        foldable(tmp_path, adapters.small)
