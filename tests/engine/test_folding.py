"""Folding against PEFT's own merge, and which adapters are left apart."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from character.engine.folding import foldable, with_adapter
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
    after = dict(with_adapter(iter(before.items()), adapter, "cpu"))
    assert after.keys() == before.keys()
    for name, weight in after.items():
        torch.testing.assert_close(weight, expected[name])
        assert ("proj" in name) != (weight is before[name]), name


def test_a_sum_is_not_rounded(folder: Path, adapters: Any) -> None:
    import torch

    exact = dict(with_adapter(iter(checkpoint(folder).items()), adapters.large, "cpu"))
    halves = {name: weight.bfloat16() for name, weight in checkpoint(folder).items()}
    for name, weight in with_adapter(iter(halves.items()), adapters.large, "cpu"):
        if "proj" in name:
            change = exact[name] - checkpoint(folder)[name]
            torch.testing.assert_close(weight, halves[name].float() + change, rtol=1e-5, atol=1e-5)
        else:
            assert weight is halves[name]


def test_an_adapter_is_folded_where_each_module_is_a_tensor(folder: Path, adapters: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    assert foldable(folder, adapters.small)
    changes = [
        ("model.layers", "model.text.layers"),
        ("lora_B", "lora_magnitude"),
        ("base_model.", ""),
        # vLLM leaves the head's tensor out where it is the embedding.
        ("layers.1.mlp.up_proj", "lm_head"),
    ]
    for number, change in enumerate(changes):
        path = shutil.copytree(adapters.small, tmp_path / str(number))
        tensors = load_file(path / "adapter_model.safetensors")
        save_file({name.replace(*change): each for name, each in tensors.items()}, path / "adapter_model.safetensors")
        assert not foldable(folder, path), change


def test_a_language_model_within_another_has_other_names_in_its_checkpoint(
    folder: Path, adapters: Any, tmp_path: Path
) -> None:
    """As Gemma 3's from 4 billion parameters on, which read pictures too."""
    from safetensors.torch import load_file, save_file

    inner = {name.replace("model.", "language_model.model.", 1): each for name, each in checkpoint(folder).items()}
    save_file(inner, tmp_path / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path)
    adapter = shutil.copytree(adapters.large, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    renamed = {name.replace("model.layers", "model.language_model.layers"): each for name, each in tensors.items()}
    save_file(renamed, adapter / "adapter_model.safetensors")
    assert foldable(tmp_path, adapter)
    assert not foldable(tmp_path, adapters.large) and not foldable(folder, adapter)
    plain = dict(with_adapter(iter(checkpoint(folder).items()), adapters.large, "cpu"))
    for name, weight in with_adapter(iter(inner.items()), adapter, "cpu"):
        assert (weight == plain[name.replace("language_model.model.", "model.", 1)]).all()


def test_what_is_left_over_is_an_error(folder: Path, adapters: Any) -> None:
    weights = {name: each for name, each in checkpoint(folder).items() if "layers.0" not in name}
    with pytest.raises(RuntimeError, match=r"the weights lack what adapter .* changes: .*layers\.0\.mlp\.down_proj"):
        list(with_adapter(iter(weights.items()), adapters.large, "cpu"))


def test_weights_that_are_no_plain_sum_are_left_as_they_are(folder: Path, adapters: Any, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    eight = {name: weight.to(torch.float8_e4m3fn) for name, weight in checkpoint(folder).items()}
    save_file(eight, tmp_path / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path)
    assert not foldable(tmp_path, adapters.small)
    quantized = shutil.copytree(folder, tmp_path / "quantized")
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert not foldable(quantized, adapters.small)
    turned = shutil.copytree(adapters.small, tmp_path / "turned")
    config = json.loads((turned / "adapter_config.json").read_text())
    (turned / "adapter_config.json").write_text(json.dumps(config | {"fan_in_fan_out": True}))
    assert not foldable(folder, turned)


def test_files_beside_the_index_do_not_count(folder: Path, adapters: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    whole = list(checkpoint(folder).items())
    parts = {"model-1.safetensors": dict(whole[::2]), "model-2.safetensors": dict(whole[1::2])}
    for name, tensors in parts.items():
        save_file(tensors, tmp_path / name)
    names = {name: file for file, tensors in parts.items() for name in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (tmp_path / "consolidated.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    shutil.copy(folder / "config.json", tmp_path)
    assert foldable(tmp_path, adapters.small)


def test_a_checkpoint_that_was_cut_off(folder: Path, adapters: Any, tmp_path: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(UserError, match="cut off"):
        foldable(tmp_path, adapters.small)
