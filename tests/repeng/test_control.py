"""Steering a network: what its layers hand on, and that it is left as it was."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from character.engine.transformers import load_model
from character.models import Model
from repeng import ControlModel, ControlVector
from repeng.control import decoder_layers

VECTOR = ControlVector("llama", {0: np.full(128, 0.5, np.float32), 1: np.linspace(-1, 1, 128, dtype=np.float32)})


@pytest.fixture
def network(chat_model: Callable[[str], Model]) -> Any:
    return load_model(chat_model("template-bos"))[0]


def states(network: Any) -> tuple[Any, Any]:
    """(what the first layer hands on to the second for a few tokens, the logits)."""
    import torch

    taken: list[Any] = []
    hook = network.model.layers[1].register_forward_pre_hook(lambda layer, given: taken.append(given[0]))
    with torch.no_grad():
        logits = network(torch.tensor([[5, 6, 7]])).logits
    hook.remove()
    return taken[0], logits


def test_a_layer_hands_on_its_state_and_the_vector(network: Any) -> None:
    import torch

    before = states(network)
    control = ControlModel(network, [0])
    control.set_control(VECTOR, 2)
    assert torch.allclose(states(network)[0], before[0] + 2 * 0.5)
    control.set_control(VECTOR, -1)
    assert torch.allclose(states(network)[0], before[0] - 0.5), "in place of the earlier one, not on top of it"
    control.reset()
    assert all(map(torch.equal, states(network), before))


def test_a_network_is_left_as_it_was(network: Any) -> None:
    import torch

    before = states(network)
    control = ControlModel(network, [-1, 0])
    assert control.layer_ids == [0, 1]
    control.set_control(VECTOR)
    assert not torch.equal(states(network)[-1], before[-1])
    assert control.unwrap() is network
    assert all(map(torch.equal, states(network), before))
    assert not any(layer._forward_hooks for layer in network.model.layers)


def test_it_answers_for_the_network(network: Any) -> None:
    import torch

    control = ControlModel(network, [0, 1])
    ids = torch.tensor([[5, 6, 7]])
    plain = control.generate(ids, max_new_tokens=8, do_sample=False)
    control.set_control(VECTOR, 3)
    assert control.config is network.config
    assert torch.equal(control(ids).logits, network(ids).logits)
    assert not torch.equal(control.generate(ids, max_new_tokens=8, do_sample=False), plain)


def test_the_order_of_two_parts_is_vllms() -> None:
    """vLLM's layers return (what they add, the state before): the sum is the state."""
    import torch

    class Layer(torch.nn.Module):
        def forward(self, hidden: Any, residual: Any) -> Any:
            return hidden, residual

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([Layer()])
            self.config = Text(1)

    network = Network()
    control = ControlModel(network, [0])
    control.set_control(VECTOR, 1)
    hidden, residual = network.layers[0](torch.ones(3, 128), torch.full((3, 128), 7.0))
    assert torch.equal(hidden, torch.full((3, 128), 1.5)) and torch.equal(residual, torch.full((3, 128), 7.0))


def test_vectors_and_layers_that_do_not_fit(network: Any) -> None:
    with pytest.raises(ValueError, match="no layer 2: the model has 2 layers"):
        ControlModel(network, [0, 2])
    control = ControlModel(network, [0, 1])
    with pytest.raises(ValueError, match="no direction for layer 1"):
        control.set_control(ControlVector("llama", {0: VECTOR.directions[0]}))


class Text:
    """A config of so many layers."""

    def __init__(self, layers: int):
        self.num_hidden_layers = layers

    def get_text_config(self) -> "Text":
        return self


def test_layers_are_the_language_models() -> None:
    import torch

    def stack(count: int) -> Any:
        return torch.nn.ModuleList(torch.nn.Identity() for _ in range(count))

    model = torch.nn.Module()
    model.vision_tower = torch.nn.Module()
    model.vision_tower.layers = stack(3)
    model.language_model = torch.nn.Module()
    model.language_model.layers = stack(3)
    model.config = Text(3)
    assert decoder_layers(model) is model.language_model.layers
    model.config = Text(4)
    with pytest.raises(ValueError, match="no list of 4 decoder layers"):
        decoder_layers(model)
