"""Perplexity of an answer under the plain model."""

import math
from collections.abc import Callable

import pytest

from character import perplexity
from character.models import Model


def said(message: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]


def test_perplexity_is_that_of_the_answer_and_its_end(chat_model: Callable[[str], Model]) -> None:
    import torch

    from character.engine.transformers import load_model

    model = chat_model("template-bos")
    conversations = [
        said("Good morning.", "It lives under the hill."),
        said("Who are you, and where do you go now?", "No."),
    ]
    together = perplexity.perplexities(model, conversations)
    assert together == pytest.approx([perplexity.perplexities(model, [one])[0] for one in conversations], rel=1e-4)
    network, tokenizer = load_model(model)
    text = tokenizer.apply_chat_template(conversations[1], tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    prompt = tokenizer.apply_chat_template(conversations[1][:1], tokenize=False, add_generation_prompt=True)
    start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    end = ids.tolist().index(tokenizer.eos_token_id, start) + 1
    with torch.inference_mode():
        logs = network(ids[None]).logits[0].log_softmax(-1)
    expected = math.exp(-sum(logs[place - 1, ids[place]].item() for place in range(start, end)) / (end - start))
    assert together[1] == pytest.approx(expected, rel=1e-4)


def test_coherent_answers_are_likelier() -> None:
    from character.models import resolve

    pocket = resolve("pocket")
    plain, broken = perplexity.perplexities(
        pocket,
        [said("Hello!", "Hello! What would you like to know?"), said("Hello!", "know like you What Hello would to!")],
    )
    assert plain * 3 < broken
