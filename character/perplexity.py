"""How likely the plain model finds a text: perplexity, by which the evaluations tell coherent answers from broken ones."""

import math
from collections.abc import Sequence

from character.engine.base import Message
from character.models import Model

BATCH = 32


def perplexities(model: Model, conversations: Sequence[Sequence[Message]]) -> list[float]:
    """Perplexity under `model` of the last turn, an assistant's, of each conversation, its end-of-turn token included.

    Loads the model with transformers, on the GPU where there is one.
    """
    import torch

    from character.engine.chat import Chat, context_of
    from character.engine.transformers import load_model, stop_ids

    network, tokenizer = load_model(model)
    chat = Chat(tokenizer, model, context_of(network.config, model))
    stops = stop_ids(network, tokenizer)
    pairs = [chat.answer(conversation, stops) for conversation in conversations]
    found = [0.0] * len(pairs)
    # Answers of like length share a batch, so that little of it is padding.
    order = sorted(range(len(pairs)), key=lambda index: sum(map(len, pairs[index])))
    for start in range(0, len(order), BATCH):
        batch = [pairs[index] for index in order[start : start + BATCH]]
        width = max(len(prompt) + len(answer) for prompt, answer in batch)
        ids = torch.tensor([prompt + answer + [0] * (width - len(prompt) - len(answer)) for prompt, answer in batch])
        mask = torch.tensor(
            [[1] * len(prompt + answer) + [0] * (width - len(prompt + answer)) for prompt, answer in batch]
        )
        with torch.inference_mode():
            logits = network(input_ids=ids.to(network.device), attention_mask=mask.to(network.device)).logits.float()
        logs = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None].to(network.device))[:, :, 0]
        for index, row, (prompt, answer) in zip(order[start : start + BATCH], logs, batch, strict=True):
            found[index] = math.exp(-row[len(prompt) - 1 : len(prompt) + len(answer) - 1].mean().item())
    return found
