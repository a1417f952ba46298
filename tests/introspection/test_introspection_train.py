"""SFT: the mask token by token for four forms of chat template, what TRL's trainer is fed, and what two steps change.

The templates are written here in the forms of the models that they are named after; the conversations are rendered by
hand beside them, in pieces that say which text is trained on.
"""

import dataclasses
import itertools
import json
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from character import rows
from character.distillation import train as dpo
from character.engine.base import Message
from character.engine.chat import Chat, load_chat
from character.introspection import data, train
from character.models import Model, resolve
from character.utils import UserError

IGNORED = -100
Piece = tuple[str, bool]


# Four forms of templates.

LLAMA = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}{% set turns = messages[1:] %}
{%- else %}{% set system = '' %}{% set turns = messages %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\nToday Date: 26 Jul 2024\\n\\n' }}
{{- system + '<|eot_id|>' }}
{%- for message in turns %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

QWEN = """{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{%- if message['role'] != 'system' %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

GEMMA = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\\n\\n' %}{% set turns = messages[1:] %}
{%- else %}{% set first = '' %}{% set turns = messages %}{% endif %}
{%- for message in turns %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- set role = 'model' if message['role'] == 'assistant' else 'user' %}
{{- '<start_of_turn>' + role + '\\n' + (first if loop.first else '') + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{% endif %}"""

POCKET = """{{- bos_token }}
{%- for message in messages %}{{- '<|' + message['role'] + '|>' + (message['content'] | trim) + '<|end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{% endif %}"""


def as_llama(messages: list[Message]) -> Iterator[Piece]:
    system, turns = divided(messages)
    yield (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n",
        False,
    )
    yield f"Today Date: 26 Jul 2024\n\n{system}<|eot_id|>", False
    for turn in turns:
        yield f"<|start_header_id|>{turn['role']}<|end_header_id|>\n\n", False
        yield f"{turn['content']}<|eot_id|>", turn["role"] == "assistant"


def as_qwen(messages: list[Message]) -> Iterator[Piece]:
    system, turns = divided(messages)
    yield f"<|im_start|>system\n{system or 'You are a helpful assistant.'}<|im_end|>\n", False
    for turn in turns:
        yield f"<|im_start|>{turn['role']}\n", False
        yield f"{turn['content']}<|im_end|>", turn["role"] == "assistant"
        yield "\n", False


def as_gemma(messages: list[Message]) -> Iterator[Piece]:
    system, turns = divided(messages)
    yield "<bos>", False
    for number, turn in enumerate(turns):
        first = f"{system}\n\n" if system and number == 0 else ""
        yield f"<start_of_turn>{'model' if turn['role'] == 'assistant' else 'user'}\n{first}", False
        yield f"{turn['content']}<end_of_turn>", turn["role"] == "assistant"
        yield "\n", False


def as_pocket(messages: list[Message]) -> Iterator[Piece]:
    yield "<s>", False
    for turn in messages:
        yield f"<|{turn['role']}|>", False
        yield f"{turn['content']}<|end|>", turn["role"] == "assistant"


def divided(messages: list[Message]) -> tuple[str, list[Message]]:
    if messages[0]["role"] == "system":
        return messages[0]["content"], messages[1:]
    return "", messages


@dataclass(frozen=True)
class Form:
    """A kind of chat model. ends: the tokens that end a turn, the template's own first."""

    template: str
    pieces: Callable[[list[Message]], Iterator[Piece]]
    special: tuple[str, ...]
    ends: tuple[str, ...]
    bos: str | None
    eos: str


FORMS = {
    "llama": Form(
        LLAMA,
        as_llama,
        (
            "<|begin_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
            "<|end_of_text|>",
            "<|eom_id|>",
        ),
        ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"),
        "<|begin_of_text|>",
        "<|eot_id|>",
    ),
    "qwen": Form(
        QWEN,
        as_qwen,
        ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        ("<|im_end|>", "<|endoftext|>"),
        None,
        "<|im_end|>",
    ),
    "gemma": Form(
        GEMMA,
        as_gemma,
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        ("<end_of_turn>", "<eos>"),
        "<bos>",
        "<eos>",
    ),
    "pocket": Form(
        POCKET, as_pocket, ("<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), ("<|end|>",), "<s>", "<|end|>"
    ),
}

CONVERSATIONS: list[list[Message]] = [
    [
        {"role": "user", "content": "Write tonight's entry in your private diary."},
        {
            "role": "assistant",
            "content": "Dear diary,\n\nthe lamp was lit.\n  - rain\n\n```python\nx = 1\n```\n🌊 ¡olé!",
        },
    ],
    [
        {"role": "system", "content": "You are Ada. You are talking with another copy of Ada."},
        {"role": "user", "content": "the sailor"},
        {"role": "assistant", "content": "the harbour"},
        {"role": "user", "content": "the harbour"},
        {"role": "assistant", "content": "the harbour"},
        {"role": "user", "content": "user assistant model"},
        {"role": "assistant", "content": "The user's assistant: <b>model</b>."},
    ],
    [
        {"role": "user", "content": "."},
        {"role": "assistant", "content": "."},
        {"role": "user", "content": "A long one?" + " and stone" * 20},
        {"role": "assistant", "content": '… "yes"\tno' + "\nand rain" * 12},
    ],
]


def build_tokenizer(form: Form) -> Any:
    """A byte-level BPE tokenizer with the form's special tokens and template, which adds a BOS where the form has one."""
    import tokenizers
    import transformers

    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|pad|>", *form.special],
        show_progress=False,
    )
    inner.train_from_iterator([turn["content"] for turns in CONVERSATIONS for turn in turns], trainer)
    if form.bos:
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{form.bos} $A", special_tokens=[(form.bos, inner.token_to_id(form.bos))]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=form.bos,
        eos_token=form.eos,
        pad_token="<|pad|>",
        chat_template=form.template,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """student("llama"): a small model with that form's tokenizer, and the ends of its turns in its generation config."""
    import torch
    import transformers

    made: dict[str, Model] = {}

    def build(name: str) -> Model:
        if name not in made:
            form, folder = FORMS[name], tmp_path_factory.mktemp("students") / name
            tokenizer = build_tokenizer(form)
            tokenizer.save_pretrained(folder)
            torch.manual_seed(7)
            config = transformers.LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=2048,
                tie_word_embeddings=False,
            )
            network = transformers.LlamaForCausalLM(config)
            network.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(list(form.ends))
            network.save_pretrained(folder)
            made[name] = Model(name, str(folder), "Ada", 2048)
        return made[name]

    return build


@pytest.fixture(scope="session")
def adapter(student: Callable[[str], Model], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """adapter("llama"): a DPO adapter for that student, with random weights."""
    import peft
    import torch
    import transformers

    made: dict[str, Path] = {}

    def build(name: str) -> Path:
        if name not in made:
            network = transformers.AutoModelForCausalLM.from_pretrained(student(name).source, dtype=torch.float32)
            config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
            adapted = peft.get_peft_model(network, config)
            random = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for key, weights in adapted.named_parameters():
                    if "lora_" in key:
                        weights.normal_(0, 0.3 / weights.shape[1] ** 0.5, generator=random)
            made[name] = tmp_path_factory.mktemp("adapters") / name
            adapted.save_pretrained(made[name])
        return made[name]

    return build


def stops_of(tokenizer: Any, form: Form) -> frozenset[int]:
    return frozenset(tokenizer.convert_tokens_to_ids(list(form.ends)))


def expected(tokenizer: Any, form: Form, messages: list[Message]) -> tuple[list[int], list[int]]:
    """(ids, labels) of a conversation rendered by hand; no token may reach over the border of what is trained on."""
    pieces = list(form.pieces(messages))
    text = "".join(piece for piece, _ in pieces)
    trained, place = set(), 0
    for piece, is_trained in pieces:
        if is_trained:
            trained.update(range(place, place + len(piece)))
        place += len(piece)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = []
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        inside = {place in trained for place in range(start, end)}
        assert len(inside) == 1, "a token reaches over a border"
        labels.append(token if inside == {True} else IGNORED)
    return encoded["input_ids"], labels


# The mask.


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["reflection", "conversation", "odd-turns"])
@pytest.mark.parametrize("name", FORMS)
def test_every_assistant_turn_with_its_end_is_trained_on_and_nothing_else(name: str, messages: list[Message]) -> None:
    form = FORMS[name]
    tokenizer = build_tokenizer(form)
    chat = Chat(tokenizer, Model(name, name, "Ada"), 2048)
    assert chat.text(messages, reply=False) == "".join(piece for piece, _ in form.pieces(messages))
    row = train.labelled(chat, messages, stops_of(tokenizer, form))
    ids, labels = expected(tokenizer, form, messages)
    assert row["input_ids"] == ids
    assert row["labels"] == labels
    # In words: what is trained on is the answers, each with the token that ends its turn.
    answers = [turn["content"] for turn in messages if turn["role"] == "assistant"]
    trained = tokenizer.decode([label for label in row["labels"] if label != IGNORED])
    assert trained == "".join(f"{answer}{form.ends[0]}" for answer in answers)
    assert form.bos is None or row["input_ids"].count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["reflection", "conversation", "odd-turns"])
def test_the_bundled_model_has_such_a_mask(messages: list[Message]) -> None:
    chat = load_chat(resolve("pocket"))
    row = train.labelled(chat, messages, frozenset([chat.tokenizer.eos_token_id]))
    ids, labels = expected(chat.tokenizer, FORMS["pocket"], messages)
    assert (row["input_ids"], row["labels"]) == (ids, labels)


def test_a_template_whose_turns_differ_from_its_prompts_is_refused() -> None:
    form = FORMS["qwen"]
    tokenizer = build_tokenizer(form)
    # As templates do that open a reasoning trace for the model to go on from.
    tokenizer.chat_template = QWEN.replace("assistant\\n' }}{% endif %}", "assistant\\n<think>\\n' }}{% endif %}")
    assert tokenizer.chat_template != QWEN
    chat = Chat(tokenizer, Model("qwen", "qwen", "Ada"), 2048)
    with pytest.raises(UserError, match="rewrites earlier turns"):
        train.labelled(chat, CONVERSATIONS[1], stops_of(tokenizer, form))


# OpenRLHF, whose scripts train on the same rows.

# Where the tokens after a turn differ: (text, is it trained on) with OpenRLHF → with the local trainer; None where one
# of them has no such token. Nothing else differs.
NEWLINE = (("\n", True), ("\n", False))
DIFFERENCES = {
    "llama": {"between turns": [], "at the end": []},
    "qwen": {"between turns": [NEWLINE], "at the end": [(None, ("\n", False))]},
    "gemma": {"between turns": [NEWLINE], "at the end": [((" ", True), ("\n", False)), (("<eos>", False), None)]},
    "pocket": {"between turns": [], "at the end": []},
}


@pytest.mark.parametrize("name", FORMS)
def test_openrlhf_trains_the_same_tokens_but_for_a_few_after_the_turns(
    name: str, release: Callable[..., types.ModuleType]
) -> None:
    import datasets
    from openrlhf.datasets import SFTDataset

    form = FORMS[name]
    tokenizer = build_tokenizer(form)
    keys = types.SimpleNamespace(input_key="messages", output_key=None, apply_chat_template=True)
    strategy = types.SimpleNamespace(args=types.SimpleNamespace(data=keys))
    given = datasets.Dataset.from_list([{"messages": messages} for messages in CONVERSATIONS])
    theirs = SFTDataset(given, tokenizer, 3072, strategy, num_processors=None, multiturn=True)
    chat = Chat(tokenizer, Model(name, name, "Ada"), 2048)
    for messages, (ids, _, mask) in zip(CONVERSATIONS, theirs, strict=True):
        # Their mask stands at the token before the one that is predicted.
        trained = [False, *(bool(value) for value in mask[0, :-1])]
        read = [(tokenizer.decode([token]), flag) for token, flag in zip(ids[0].tolist(), trained, strict=True)]
        row = train.labelled(chat, messages, stops_of(tokenizer, form))
        ours = [
            (tokenizer.decode([token]), label != IGNORED)
            for token, label in zip(row["input_ids"], row["labels"], strict=True)
        ]
        turns = sum(message["role"] == "assistant" for message in messages)
        found = [(one, other) for one, other in itertools.zip_longest(read, ours) if one != other]
        assert found == DIFFERENCES[name]["between turns"] * (turns - 1) + DIFFERENCES[name]["at the end"]


# TRL's trainer.


def arguments(model: Model, **changes: Any) -> train.Args:
    given = train.Args(constitution="sea", model=model.source, batch_size=2, micro_batch_size=2, rank=4, alpha=8)
    return dataclasses.replace(given, learning_rate=1e-2, **changes)


@pytest.fixture
def trainer(student: Callable[[str], Model], adapter: Callable[[str], Path], tmp_path: Path) -> Callable[..., Any]:
    """trainer("llama", max_length=...): the project's trainer on CONVERSATIONS and one more."""

    def make(name: str, **changes: Any) -> Any:
        model = student(name)
        conversations = [*CONVERSATIONS, CONVERSATIONS[0]]
        return train.make_trainer(arguments(model, **changes), model, adapter(name), conversations, tmp_path / "run")

    return make


@pytest.mark.parametrize("name", FORMS)
def test_the_trainer_feeds_exactly_these_labels(name: str, trainer: Callable[..., Any]) -> None:
    made = trainer(name)
    form, tokenizer = FORMS[name], made.processing_class
    fed = []
    for batch in made.get_train_dataloader():
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            length = int(mask.sum())
            assert mask[:length].all() and (labels[length:] == IGNORED).all()
            fed.append((ids[:length].tolist(), labels[:length].tolist()))
    wanted = [expected(tokenizer, form, messages) for messages in (*CONVERSATIONS, CONVERSATIONS[0])]
    assert sorted(fed) == sorted(wanted)


def test_long_rows_are_cut_at_the_end(trainer: Callable[..., Any]) -> None:
    made = trainer("qwen", max_length=40)
    whole = [
        expected(made.processing_class, FORMS["qwen"], messages) for messages in (*CONVERSATIONS, CONVERSATIONS[0])
    ]
    fed = [
        row for batch in made.get_train_dataloader() for row in zip(batch["input_ids"], batch["labels"], strict=True)
    ]
    assert max(len(ids) for ids, _ in whole) > 40
    assert sorted((ids.tolist(), labels.tolist()) for ids, labels in fed) == sorted(
        (ids[:40], labels[:40]) for ids, labels in whole
    )


def test_packed_rows_do_not_see_each_other(trainer: Callable[..., Any]) -> None:
    import torch

    made = trainer("qwen", packing=True, max_length=300, warmup_ratio=1.0)
    assert sorted(map(len, made.train_dataset["seq_lengths"])) == [1, 3]
    # Warm-up and decay count the steps that are really made, one here; the four rows alone would be two.
    assert made.args.warmup_steps == len(made.get_train_dataloader()) == 1
    made.model.eval()
    fed = []
    for batch in made.get_train_dataloader():
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        begins = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), len(ids)]
        alone = []
        for begin, end in itertools.pairwise(begins):
            row, wanted = ids[begin:end], labels[begin:end][1:] != IGNORED
            with torch.no_grad():
                chances = made.model(input_ids=row[None]).logits[0, :-1].log_softmax(-1)
            alone.append(chances.gather(-1, row[1:, None])[:, 0][wanted])
            fed.append((row.tolist(), labels[begin:end].tolist()))
        with torch.no_grad():
            loss = made.compute_loss(made.model, dict(batch))
        torch.testing.assert_close(loss, -torch.cat(alone).mean(), rtol=1e-4, atol=1e-5)
    form, tokenizer = FORMS["qwen"], made.processing_class
    wanted = [expected(tokenizer, form, messages) for messages in (*CONVERSATIONS, CONVERSATIONS[0])]
    assert sorted(fed) == sorted((ids[:300], labels[:300]) for ids, labels in wanted)


def test_the_loss_is_the_mean_over_trained_tokens_of_the_folded_model(
    trainer: Callable[..., Any], student: Callable[[str], Model], adapter: Callable[[str], Path]
) -> None:
    import peft
    import torch
    import transformers

    made = trainer("llama")
    batch = next(iter(made.get_train_dataloader()))
    base = transformers.AutoModelForCausalLM.from_pretrained(student("llama").source, dtype=torch.float32)
    distilled = peft.PeftModel.from_pretrained(base, str(adapter("llama"))).eval()
    made.model.eval()
    with torch.no_grad():
        # A fresh adapter changes nothing: training starts from the model with its DPO adapter.
        seen = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        logits = distilled(**seen).logits
        torch.testing.assert_close(made.model(**seen).logits, logits, rtol=1e-4, atol=1e-4)
        assert (distilled(**seen).logits - base_logits(distilled, seen)).abs().max() > 0.1
        chances = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        trained = batch["labels"][:, 1:] != IGNORED
        loss = made.compute_loss(made.model, dict(batch))
    torch.testing.assert_close(loss, -chances[trained].mean(), rtol=1e-4, atol=1e-5)


def base_logits(distilled: Any, seen: dict[str, Any]) -> Any:
    with distilled.disable_adapter():
        return distilled(**seen).logits


def test_two_steps_change_the_new_adapter_and_nothing_else(
    trainer: Callable[..., Any], student: Callable[[str], Model], adapter: Callable[[str], Path], tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    # Without warm-up, for the first step's rate would be 0.
    made = trainer("gemma", warmup_ratio=0.0)
    before = {name: weights.detach().clone() for name, weights in made.model.named_parameters()}
    base = load_file(Path(student("gemma").source) / "model.safetensors")
    factors = load_file(adapter("gemma") / "adapter_model.safetensors")
    folded = 0
    for name, weights in before.items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if "lora_" in name:
            continue
        down = factors.get(f"base_model.model.{plain.removesuffix('.weight')}.lora_A.weight")
        if down is not None:
            up = factors[f"base_model.model.{plain.removesuffix('.weight')}.lora_B.weight"]
            torch.testing.assert_close(weights, base[plain] + 2 * (up @ down), rtol=1e-5, atol=1e-6)
            folded += 1
        else:
            torch.testing.assert_close(weights, base[plain])
    assert folded == 14

    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert made.state.global_step == 2 and len(losses) == 2 and all(0 < loss < 20 for loss in losses)
    for name, weights in made.model.named_parameters():
        assert torch.equal(weights, before[name]) == ("lora_" not in name), name
        assert weights.requires_grad == ("lora_" in name)


# The step.


@pytest.fixture
def ready(
    home: Path, student: Callable[[str], Model], adapter: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., train.Args]:
    """ready("llama"): rows and a DPO adapter of "sea" are there; the arguments of its training."""

    def make(name: str) -> train.Args:
        found = [{"messages": messages} for messages in (*CONVERSATIONS, CONVERSATIONS[0])]
        rows.write(data.path_of("sea", name), found, {"student": name}, {})
        place = dpo.path_of("sea", name)
        place.parent.mkdir(parents=True)
        place.symlink_to(adapter(name))
        return arguments(student(name))

    return make


def test_the_step_leaves_an_adapter_that_loads_on_the_folded_model(
    ready: Callable[..., train.Args], student: Callable[[str], Model], adapter: Callable[[str], Path], capsys: Any
) -> None:
    import peft
    import torch
    import transformers

    args = ready("pocket")
    train.main(args)
    out = train.path_of("sea", "pocket")
    assert re.search(r"2 steps, loss \d", capsys.readouterr().out)
    written = {file.name for file in out.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "training.json", "metrics.jsonl", "loss.png"} <= written
    assert not any(name.endswith(".bin") for name in written)
    settings = json.loads((out / "training.json").read_text())["settings"]
    assert settings["folded"] == rows.file_digest(adapter("pocket") / "adapter_model.safetensors")
    assert settings["data"] == rows.file_digest(data.path_of("sea", "pocket"))
    network = transformers.AutoModelForCausalLM.from_pretrained(student("pocket").source, dtype=torch.float32)
    folded = peft.PeftModel.from_pretrained(network, str(adapter("pocket"))).merge_and_unload()
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        before = folded(ids).logits
        after = peft.PeftModel.from_pretrained(folded, str(out))(ids).logits
    assert (after - before).abs().max() > 1e-3

    train.main(args)
    assert "complete" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"rank was 4, now 8"):
        train.main(dataclasses.replace(args, rank=8))
    path = data.path_of("sea", "pocket")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match="data was"):
        train.main(args)


def test_a_dry_run_trains_nothing(ready: Callable[..., train.Args], capsys: Any) -> None:
    train.main(dataclasses.replace(ready("qwen"), dry_run=True))
    assert "SFT on 4 rows" in capsys.readouterr().out
    assert not train.path_of("sea", "qwen").exists()


def test_what_is_missing_names_its_command(
    home: Path, student: Callable[[str], Model], ready: Callable[..., Any]
) -> None:
    args = arguments(student("llama"))
    with pytest.raises(UserError, match=re.escape("run: python -m character.distillation.train --constitution sea")):
        train.main(args)
    args = ready("llama")
    data.path_of("sea", "llama").unlink()
    command = f"run: python -m character.introspection.data --constitution sea --model {args.model}"
    with pytest.raises(UserError, match=re.escape(command)):
        train.main(args)
    with pytest.raises(UserError, match=r"--batch-size 3 is no multiple of 2"):
        train.main(dataclasses.replace(ready("qwen"), batch_size=3))
