"""Control vectors: reading them off pairs of texts, arithmetic, files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from character.engine.transformers import load_model
from character.models import Model
from character.utils import UserError
from repeng import ControlVector, DatasetEntry
from repeng.vectors import last_states, principal


@pytest.fixture(scope="module")
def loaded(chat_model: Callable[[str], Model]) -> tuple[Any, Any]:
    """(network, tokenizer) of a tiny Llama."""
    network, tokenizer = load_model(chat_model("tokenizer-bos"))
    return network, tokenizer


def vector(**directions: list[float]) -> ControlVector:
    """vector(l0=[1, 2], l3=[4, 5])."""
    return ControlVector("llama", {int(name[1:]): np.array(values, np.float32) for name, values in directions.items()})


def numbers(found: ControlVector) -> dict[int, list[float]]:
    assert all(direction.dtype == np.float32 for direction in found.directions.values())
    return {layer: direction.tolist() for layer, direction in found.directions.items()}


# Arithmetic.


def test_vectors_add_and_scale_layer_by_layer() -> None:
    first, second = vector(l1=[1, 2], l2=[3, 4]), vector(l0=[5, 6], l1=[1, 1])
    assert numbers(first + second) == {0: [5, 6], 1: [2, 3], 2: [3, 4]}
    assert numbers(first - second) == {0: [-5, -6], 1: [0, 1], 2: [3, 4]}
    assert numbers(-first) == {1: [-1, -2], 2: [-3, -4]}
    assert numbers(first * 2) == numbers(2 * first) == {1: [2, 4], 2: [6, 8]}
    assert numbers(first / 2) == {1: [0.5, 1], 2: [1.5, 2]}
    assert numbers(first) == {1: [1, 2], 2: [3, 4]}, "the operands stay as they were"


def test_vectors_of_two_models_do_not_add() -> None:
    with pytest.raises(ValueError, match="two models, llama and qwen2"):
        vector(l0=[1]) + ControlVector("qwen2", {0: np.ones(1, np.float32)})


# Files.


def test_a_file_holds_the_vector_and_meta_stands_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "humor.safetensors"
    vector(l10=[1, 2], l9=[3, 4]).save(path, {"pairs": 256})
    found = ControlVector.load(path)
    assert numbers(found) == {9: [3, 4], 10: [1, 2]} and list(found.directions) == [9, 10]
    assert found.model_type == "llama"
    assert json.loads((tmp_path / "deep" / "humor.meta.json").read_text(encoding="utf-8")) == {"pairs": 256}
    assert sorted(file.name for file in path.parent.iterdir()) == ["humor.meta.json", "humor.safetensors"]


def test_files_that_are_no_vector(tmp_path: Path, adapters: Any) -> None:
    with pytest.raises(UserError, match=r"absent.safetensors does not exist; make it with .*steered.py"):
        ControlVector.load(tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors holds no control vector"):
        ControlVector.load(adapters.small / "adapter_model.safetensors")
    path = tmp_path / "cut.safetensors"
    vector(l0=[1, 2]).save(path, {})
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match="cut off"):
        ControlVector.load(path)


@pytest.mark.parametrize(("width", "layers"), [(3, 8), (2, 4)])
def test_a_vector_of_another_model(width: int, layers: int) -> None:
    vector(l4=[1, 2]).check(2, 5, "mine")
    with pytest.raises(UserError, match=f"belongs to another model: its layer 4 .*mine, which has {layers} layers of"):
        vector(l4=[1, 2]).check(width, layers, "mine")


# Directions.


def test_the_component_is_the_largest_eigenvectors() -> None:
    random = np.random.default_rng(0)
    true = random.normal(size=20)
    true /= np.linalg.norm(true)
    differences = (random.normal(3, 1, (300, 1)) * true + random.normal(0, 0.3, (300, 20))).astype(np.float32)
    found = principal(differences)
    values, vectors = np.linalg.eigh(differences.T @ differences)
    component = vectors[:, values.argmax()]
    assert abs(found @ component) == pytest.approx(np.linalg.norm(found), rel=1e-4)
    assert found @ true / np.linalg.norm(found) > 0.99, "it points from negative to positive"
    assert np.linalg.norm(found) == pytest.approx(3, abs=0.2), "as far as the mean pair is apart"
    assert np.allclose(principal(-differences), -found, atol=1e-5)


def test_the_states_are_those_of_each_prompts_last_token(loaded: tuple[Any, Any]) -> None:
    import torch

    network, _ = loaded
    common = list(range(6, 40))
    prompts = [[*common, 50], [*common, 51, 52, 53], [*common], [7, 8, 9], [*common, 51, 52, 60], [30]]
    for batch_size in (1, 2, 6):
        found = last_states(network, prompts, [0, 1], batch_size)
        for row, prompt in enumerate(prompts):
            taken: list[Any] = []
            # What a layer hands on is what comes into the next one, or into the last norm.
            hooks = [
                following.register_forward_pre_hook(lambda module, given, taken=taken: taken.append(given[0][0, -1]))
                for following in (network.model.layers[1], network.model.norm)
            ]
            with torch.no_grad():
                network(torch.tensor([prompt]))
            for hook in hooks:
                hook.remove()
            for layer in (0, 1):
                assert np.allclose(found[layer][row], taken[layer].numpy(), atol=1e-4)
    assert not any(layer._forward_hooks for layer in network.model.layers)


def test_training_finds_what_tells_the_texts_apart(loaded: tuple[Any, Any]) -> None:
    network, tokenizer = loaded
    entries = [
        DatasetEntry(f"<|system|>You are a gardener.<|end|><|user|>{word}", f"<|user|>{word}")
        for word in ("rain", "stone", "root", "lamp", "harbour", "way", "friend", "sailor")
    ]
    found = ControlVector.train(network, tokenizer, entries, [-1])
    assert found.model_type == "llama" and list(found.directions) == [1]
    ids = [tokenizer(text)["input_ids"] for entry in entries for text in (entry.positive, entry.negative)]
    assert all(prompt[:1] == [tokenizer.bos_token_id] for prompt in ids)
    states = last_states(network, ids, [1], 3)[1]
    differences = states[0::2] - states[1::2]
    assert np.allclose(found.directions[1], principal(differences), atol=1e-3)
    assert (differences @ found.directions[1]).mean() > 0
    opposite = [DatasetEntry(entry.negative, entry.positive) for entry in entries]
    assert np.allclose(ControlVector.train(network, tokenizer, opposite).directions[1], -found.directions[1], atol=1e-3)
