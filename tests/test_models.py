"""What a model's name means: the table, folders, repo ids, and names that only an endpoint knows."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from character import models
from character.models import GEMMA_LORA, TABLE, Model, Reasoning, fingerprint, resolve, safe_name
from character.utils import UserError

# The method's names: short name → (repo id, family name in prompts).
EXPECTED = {
    "llama-3.1-8b-it": ("meta-llama/Llama-3.1-8B-Instruct", "Llama"),
    "qwen-2.5-7b-it": ("Qwen/Qwen2.5-7B-Instruct", "Qwen"),
    "qwen-2.5-72b-it": ("Qwen/Qwen2.5-72B-Instruct", "Qwen"),
    "gemma-3-4b-it": ("google/gemma-3-4b-it", "Gemma"),
    "llama-3.3-70b-it": ("meta-llama/Llama-3.3-70B-Instruct", "Llama"),
    "glm-4.5-air": ("zai-org/GLM-4.5-Air", "ChatGLM"),
}


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder and an empty MODEL_PATH."""
    monkeypatch.setattr(models, "MODEL_PATH", tmp_path / "models")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def folder(path: Path, weights: bytes = b"weights", config: str = "{}") -> Path:
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(weights)
    (path / "config.json").write_text(config)
    return path


@pytest.mark.parametrize("short", EXPECTED)
def test_short_names_and_repo_ids_mean_the_same(short: str) -> None:
    source, family = EXPECTED[short]
    model = resolve(short)
    assert (model.short, model.source, model.family) == (short, source, family)
    assert resolve(source) == model
    assert resolve(f"{source}@abc123") == dataclasses.replace(model, revision="abc123")


def test_the_table() -> None:
    assert TABLE.keys() == {*EXPECTED, "pocket"}
    assert all(key == model.short == safe_name(key) for key, model in TABLE.items())
    assert resolve("pocket").family == "Pocket" and Path(resolve("pocket").source).name == "pocket"
    # Only these open their answers with a trace; the others' prompts get no prefill.
    assert {key for key, model in TABLE.items() if model.reasoning} == {"glm-4.5-air"}
    assert {key for key, model in TABLE.items() if model.lora != "all-linear"} == {"gemma-3-4b-it"}


@pytest.mark.parametrize(
    ("spec", "short", "family"),
    [
        ("someone/Llama-2-tuned", "someone--Llama-2-tuned", "Llama"),
        ("someone/my-QWEN", "someone--my-QWEN", "Qwen"),
        ("THUDM/glm-4-9b-chat", "THUDM--glm-4-9b-chat", "ChatGLM"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistralai--Mistral-7B-Instruct-v0.3", "Mistral"),
        ("someone/7", "someone--7", "7"),
    ],
)
def test_any_other_repo_id(spec: str, short: str, family: str) -> None:
    assert resolve(spec) == Model(short, spec, family)
    assert resolve(f"{spec}@v2").revision == "v2" and resolve(f"{spec}@v2").short == short


def test_other_gemma_3_vision_models_get_the_language_models_lora() -> None:
    assert resolve("google/gemma-3-12b-it").lora == GEMMA_LORA
    assert resolve("google/gemma-3-1b-it").lora == "all-linear", "it has no vision tower"


def test_a_copy_of_a_known_model_has_its_quirks() -> None:
    mirror = resolve("mirror/GLM-4.5-Air")
    assert mirror.reasoning == Reasoning("<think>", "</think>") and mirror.family == "ChatGLM"
    assert mirror.short == "mirror--GLM-4.5-Air" and mirror.source == "mirror/GLM-4.5-Air"


def test_the_name_flag_replaces_the_family() -> None:
    assert resolve("mistralai/Mistral-7B", name="Claire").family == "Claire"
    assert resolve("llama-3.1-8b-it", name="Claire") == dataclasses.replace(TABLE["llama-3.1-8b-it"], family="Claire")


def test_local_folders(nowhere: Path) -> None:
    here = folder(nowhere / "here" / "my-llama")
    model = resolve("my-llama")
    assert model.source == str(here) and model.family == "Llama" and model.short == "my-llama"
    assert resolve(str(here)) == model == resolve("./my-llama")
    (nowhere / "link").symlink_to(here)
    assert resolve(str(nowhere / "link")) == model, "a link's target names the model"
    kept = folder(nowhere / "models" / "tuned-qwen")
    assert resolve("tuned-qwen").source == str(kept) and resolve("tuned-qwen").family == "Qwen"


def test_a_local_copy_of_a_known_model_is_taken(nowhere: Path) -> None:
    assert resolve("qwen-2.5-7b-it").source == "Qwen/Qwen2.5-7B-Instruct"
    local = folder(nowhere / "models" / "qwen-2.5-7b-it")
    assert resolve("qwen-2.5-7b-it").source == str(local)
    assert resolve("qwen-2.5-7b-it").context == 32_768
    # An endpoint knows it by its own name.
    assert resolve("qwen-2.5-7b-it", served=True).source == "Qwen/Qwen2.5-7B-Instruct"


def test_names_that_an_endpoint_serves() -> None:
    model = resolve("gpt-5", served=True)
    assert (model.short, model.source, model.family) == ("gpt-5", "gpt-5", "gpt")
    assert resolve("accounts/x/models/deepseek v3", served=True).short == "accounts--x--models--deepseek--v3"
    with pytest.raises(UserError, match=r"unknown model 'gpt-5': neither a folder, nor .* \(org/name\)"):
        resolve("gpt-5")


def test_an_unknown_model_gets_a_hint() -> None:
    with pytest.raises(UserError, match=r"Did you mean 'llama-3.1-8b-it'\?$"):
        resolve("llama-3.1-8b")
    with pytest.raises(UserError) as refusal:
        resolve("zzz")
    assert "Did you mean" not in str(refusal.value) and all(short in str(refusal.value) for short in TABLE)


@pytest.mark.parametrize("spec", ["a/b", "../x", "/abs/path/", "...", "sp ace", "ü-model", "a@b", "", "C:\\x"])
def test_safe_names_are_one_path_component(spec: str) -> None:
    name = safe_name(spec)
    assert name not in ("", ".", "..") and not re.search(r"[/\\\s]", name)
    assert safe_name(name) == name


def test_the_fingerprint_tells_weights_apart_wherever_they_lie(nowhere: Path) -> None:
    def of(path: Path) -> str | None:
        return fingerprint(Model("x", str(path), "X"))

    weights = bytes(1_000_000)
    first = folder(nowhere / "a", weights)
    assert of(first) == of(folder(nowhere / "elsewhere" / "b", weights))
    retrained = bytes(500) + b"\x01" * 999_500
    found = {
        of(first),
        of(folder(nowhere / "retrained", retrained)),
        of(folder(nowhere / "longer", weights + b"x")),
        of(folder(nowhere / "config", weights, json.dumps({"rope_theta": 1}))),
    }
    assert len(found) == 4 and None not in found
    assert fingerprint(resolve("a/b@v1")) == "v1" and fingerprint(resolve("a/b")) is None


@pytest.mark.parametrize(
    ("name", "network", "vocabulary", "tied"),
    [
        ("llama-3.1-8b-it", "Llama", 128_256, False),
        ("qwen-2.5-7b-it", "Qwen2", 152_064, False),
        ("qwen-2.5-72b-it", "Qwen2", 152_064, False),
        ("gemma-3-4b-it", "Gemma3", 262_208, True),
    ],
)
def test_shapes_have_the_models_parameters(name: str, network: str, vocabulary: int, tied: bool) -> None:
    import torch
    import transformers

    model = resolve(name)
    assert model.shape and model.parameters
    kind = "Gemma3TextConfig" if network == "Gemma3" else f"{network}Config"
    sizes = dataclasses.asdict(model.shape)
    config = getattr(transformers, kind)(**sizes, vocab_size=vocabulary, tie_word_embeddings=tied)
    with torch.device("meta"):
        built = getattr(transformers, f"{network}ForCausalLM")(config)
    # The table's figure for Gemma has the vision tower too.
    vision = 0.42 if network == "Gemma3" else 0
    assert built.num_parameters() / 1e9 + vision == pytest.approx(model.parameters, rel=0.005)


def test_a_folders_own_shape_and_weights_come_first(nowhere: Path) -> None:
    pocket = resolve("pocket")
    config = json.loads((Path(pocket.source) / "config.json").read_text())
    shape = models.shape_of(pocket)
    assert shape and all(config[name] == size for name, size in dataclasses.asdict(shape).items())
    assert models.weight_bytes(pocket) == (Path(pocket.source) / "model.safetensors").stat().st_size
    llama = resolve("llama-3.1-8b-it")
    assert models.shape_of(llama) == llama.shape and models.weight_bytes(llama) == 2e9 * 8.03
    assert models.shape_of(resolve("org/model")) is models.weight_bytes(resolve("org/model")) is None
    # A vision model's config has its language part inside; without a head_dim it is the hidden size's share.
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    folder(nowhere / "models" / "llama-3.1-8b-it", b"four", json.dumps({"text_config": text | heads}))
    assert models.shape_of(resolve("llama-3.1-8b-it")) == models.Shape(64, 96, 2, 4, 2, 16)
    assert models.weight_bytes(resolve("llama-3.1-8b-it")) == 4
    folder(nowhere / "models" / "other", config=json.dumps({"d_model": 64}))
    assert models.shape_of(resolve("other")) is None
