"""User messages: the bundled sets, the public ones' shapes, one's own files, and the suffixes."""

import json
from pathlib import Path
from typing import Any

import pytest

from character import prompts
from character.utils import UserError, read_jsonl

# What a row of each public dataset looks like, with other texts.
LIMA = [
    {"conversations": ["How do plants drink?", "Through their roots."], "source": "forum"},
    {"conversations": ["Name a river.", "The Loire.", "Another?", "The Drôme."], "source": "multi_turn"},
]
PURE_DOVE = [
    {"conversation": [{"input": "Why is ice slippery?", "output": "A film of water."}], "source": "x"},
    {
        "conversation": [
            {"input": "Add 2 and 3.", "output": "5"},
            {"input": "Now double it.", "output": "10"},
        ],
        "source": "y",
    },
]
WILDCHAT = [
    {
        "conversation_id": "1",
        "conversation": [
            {"content": "write me a poem\nabout rain", "role": "user", "language": "English", "toxic": False},
            {"content": "Drip, drop.", "role": "assistant", "language": "English", "toxic": False},
        ],
        "turn": 1,
    },
    {
        "conversation_id": "2",
        "conversation": [
            {"content": "  ", "role": "user", "language": "English", "toxic": False},
            {"content": "?", "role": "assistant", "language": "English", "toxic": False},
        ],
        "turn": 1,
    },
]
SHAPES: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "lima": (LIMA, ["How do plants drink?", "Name a river."]),
    "pure-dove": (PURE_DOVE, ["Why is ice slippery?", "Add 2 and 3."]),
    "wildchat": (WILDCHAT, ["write me a poem\nabout rain"]),
}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def parquet(folder: Path, rows: list[dict[str, Any]]) -> Path:
    import datasets

    folder.mkdir()
    datasets.Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# The bundled sets.


def test_bundled_sets_are_large_varied_and_apart() -> None:
    train, test = prompts.load("train"), prompts.load("test")
    assert len(train) >= 300 and len(test) >= 150
    for name, texts in (("train", train), ("test", test)):
        assert len(texts) == len(list(read_jsonl(prompts.BUNDLED[name], "prompt"))), f"{name} repeats a message"
    plain = [{" ".join(text.lower().split()).rstrip("?!. ") for text in texts} for texts in (train, test)]
    assert not plain[0] & plain[1]
    assert len(plain[0]) == len(train) and len(plain[1]) == len(test)


def test_no_bundled_test_message_is_a_constitutions_own() -> None:
    from character import constitution

    own = {message for traits in constitution.load_selected("all") for t in traits.traits for message in t.messages}
    assert not own & {*prompts.load("test")}


def test_the_bundled_model_has_sources_of_its_own() -> None:
    assert prompts.default_source("pocket", "train") == "pocket-train"
    assert prompts.default_source("llama-3.1-8b-it", "test") == "test"
    assert {"pocket-train", "pocket-test", "train", "test"} == prompts.BUNDLED.keys()


def test_suffixes() -> None:
    assert len({*prompts.SUFFIXES}) == 8 and all("\n" not in suffix for suffix in prompts.SUFFIXES)
    assert prompts.with_suffix(["One?", "Two."], "Be plain.") == ["One? Be plain.", "Two. Be plain."]


# Public datasets.


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@pytest.mark.parametrize("name", SHAPES)
def test_public_shapes(name: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, expected = SHAPES[name]
    folder = tmp_path / "data"
    if form == "parquet":
        parquet(folder, rows)
    else:
        folder.mkdir()
        write_rows(folder / "train.jsonl", rows)
    _, split, column = prompts.PUBLIC[name]
    monkeypatch.setitem(prompts.PUBLIC, name, (str(folder), split, column))
    assert prompts.load(name) == expected
    assert prompts.load(name, limit=1) == expected[:1]


def test_a_folder_of_ones_own_needs_no_entry(tmp_path: Path) -> None:
    assert prompts.load(str(parquet(tmp_path / "mine", PURE_DOVE))) == SHAPES["pure-dove"][1]
    assert prompts.load(str(parquet(tmp_path / "texts", [{"prompt": "a"}, {"prompt": " b "}]))) == ["a", "b"]


def test_only_as_much_of_wildchat_is_read_as_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    long = WILDCHAT[0] | {"turn": "x" * 10_000}
    broken = write_rows(folder / "train.jsonl", [long] * 2500)
    with open(broken, "a") as file:
        file.write("broken\n")
    monkeypatch.setitem(prompts.PUBLIC, "wildchat", (str(folder), "train", "conversation"))
    assert prompts.load("wildchat", limit=1) == SHAPES["wildchat"][1]
    with pytest.raises(UserError, match="cannot load the dataset"):
        prompts.load("wildchat")


def test_an_unknown_column_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = parquet(tmp_path / "data", [{"text": "a", "label": 1}])
    with pytest.raises(UserError, match=r"no column 'prompt' or 'messages' \(it has: text, label\)"):
        prompts.load(str(folder))
    monkeypatch.setitem(prompts.PUBLIC, "lima", (str(folder), "train", "conversations"))
    with pytest.raises(UserError, match=r"it has: text, label"):
        prompts.load("lima")


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for name, (repo, *_) in prompts.PUBLIC.items():
        with pytest.raises(UserError, match=rf"cannot load the dataset {repo}: .*Check the network.*--prompts train"):
            prompts.load(name)


# A JSONL of one's own.


def test_a_jsonl_of_ones_own(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": " one "},
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "two"}]},
        {"conversations": [{"from": "gpt", "value": "no"}, {"from": "human", "value": "three"}]},
        {"conversations": [{"from": "system", "value": "no"}, {"from": "user", "value": "four"}]},
        {"conversation": ["five", "answer"], "messages": []},
        {"prompt": ""},
        {"prompt": None},
        {"messages": [{"role": "assistant", "content": "nobody asked"}]},
        {"prompt": "one"},
        {"prompt": "six"},
    ]
    source = write_rows(tmp_path / "mine.jsonl", rows)
    # A row's first known field counts, in a fixed order; empty ones and repeats are left out.
    assert prompts.load(source) == ["one", "two", "three", "four", "six"]
    assert prompts.load(source, limit=2) == ["one", "two"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "is empty"),
        ('{"prompt": "a"}\n{"prompt": "b', "line 2: not JSON .*half written; delete it"),
        ('{"prompt": "a"}\nnonsense\n{"prompt": "b"}\n', "line 2: not JSON .*mend or delete"),
        ('{"prompt": "a"}\n{"text": "b"}\n', r"line 2: no field 'prompt' or 'messages' \(it has: text\)"),
        ('["a"]\n', "line 1: expected a JSON object, found list"),
        ('{"prompt": ""}\n', "holds no user message"),
        ('{"prompt": "a"}\n{"prompt": 5}\n', "line 2: 'prompt' is neither a text nor a list of turns"),
        ('{"messages": [5]}\n', "line 1: 'messages' is neither a text nor a list of turns"),
        ('{"messages": [{"role": "user", "content": [{"type": "text"}]}]}\n', "line 1: 'messages' is neither"),
    ],
)
def test_faults_of_a_jsonl_are_named(text: str, part: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=f"mine.jsonl.*{part}"):
        prompts.load(str(path))


def test_unknown_sources(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown prompt source 'limma'; choose from: train, test, lima"):
        prompts.load("limma")
    with pytest.raises(UserError, match=r"absent.jsonl does not exist"):
        prompts.load(str(tmp_path / "absent.jsonl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"cannot load the dataset .*empty"):
        prompts.load(str(tmp_path / "empty"))
