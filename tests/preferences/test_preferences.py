"""The traits on offer, the balance of the pairs, and the answers that the bundled model gives."""

import json
from collections import Counter
from pathlib import Path

import pytest

from character import constitution
from character.preferences import preferences
from character.utils import OPPOSITES, PERSONA_TRAITS, TRAITS, UserError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(preferences, "DATA_PATH", tmp_path)
    return tmp_path


def test_traits_are_single_words_that_come_once() -> None:
    assert len(TRAITS) == len(set(TRAITS)) == 2 * len(OPPOSITES) == 150
    assert all(trait.isalpha() and trait == trait.lower() for trait in TRAITS)
    stems = Counter(trait[:6] for trait in TRAITS if len(trait) > 6)
    assert [stem for stem, count in stems.items() if count > 1] == []
    # Every shipped persona can be seen to rise: one of its words is in the list.
    assert sorted(PERSONA_TRAITS) == [name for name in constitution.names() if name in PERSONA_TRAITS]
    assert len(PERSONA_TRAITS) == 11 and all({*words} & {*TRAITS} for words in PERSONA_TRAITS.values())
    offered = preferences.traits_of("pocket")
    assert len(offered) == 11 and all(
        word in words for word, words in zip(offered, PERSONA_TRAITS.values(), strict=True)
    )
    assert preferences.traits_of("llama-3.1-8b-it") == TRAITS


@pytest.mark.parametrize("size", [2, 3, 4, 11, 12, 150])
@pytest.mark.parametrize("rounds", [0, 1, 3, 30])
@pytest.mark.parametrize("more", [0, 1, 2])
def test_every_trait_is_first_and_second_equally_often(size: int, rounds: int, more: int) -> None:
    traits = [f"t{number}" for number in range(size)]
    found = preferences.pairs(traits, rounds * size + more, seed=1)
    assert len(found) == rounds * size + more and all(first != second for first, second in found)
    for place in (0, 1):
        counts = Counter(pair[place] for pair in found)
        assert {counts[trait] for trait in traits} <= ({rounds, rounds + 1} if more else {rounds})


@pytest.mark.parametrize("size", [2, 3, 4, 11, 12, 150])
def test_every_pair_comes_once_before_any_comes_again(size: int) -> None:
    traits = [f"t{number}" for number in range(size)]
    number = size * (size - 1) // 2
    found = preferences.pairs(traits, 3 * number, seed=2)
    assert len({frozenset(pair) for pair in found[:number]}) == number
    assert len(set(found[: 2 * number])) == 2 * number
    assert found == preferences.pairs(traits, 3 * number, seed=2)
    assert size < 5 or found != preferences.pairs(traits, 3 * number, seed=3)


def test_more_comparisons_go_on_from_fewer() -> None:
    messages = [f"m{number}" for number in range(7)]
    few, many = (preferences.offers(preferences.traits_of("pocket"), messages, n, seed=1) for n in (20, 50))
    assert len(few) == 20 and many[:20] == few
    assert {Counter(row["prompt"] for row in many[:49])[message] for message in messages} == {7}
    # Over two rounds, the judge sees each trait first as often as second.
    seen = Counter(row["judge_first"] for row in many[:44])
    assert {*seen.values()} == {4} and all(row["judge_first"] in (row["first"], row["second"]) for row in many)


def test_bundled_model_takes_one_of_the_two(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = preferences.Args(method=["base"], condition=["like"], comparisons=16, max_tokens=64, dry_run=True)
    preferences.main(args)
    assert "16 rows, 0 there" in capsys.readouterr().out and not list(home.iterdir())
    args.dry_run = False
    preferences.main(args)
    path = home / "preferences" / "pocket" / "base" / "like" / "none.jsonl"
    answers = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(answers) == 16 and all(answer["response"] and answer["first"] != answer["second"] for answer in answers)
    meta = json.loads(path.with_suffix(".meta.json").read_text(encoding="utf-8"))
    assert meta["settings"]["condition"] == "like" and meta["rows"]["kept"] == 16


def test_every_slot_of_the_offer_is_filled() -> None:
    for text in preferences.CONDITIONS.values():
        offer = preferences.SYSTEM_PROMPT.format(first="warm", second="cold", condition=text)
        assert "warm and cold" in offer and text in offer and "{" not in offer


def test_bad_input_is_one_line(home: Path) -> None:
    with pytest.raises(UserError, match="--comparisons 0"):
        preferences.main(preferences.Args(comparisons=0))
    with pytest.raises(UserError, match="--adapter goes with one --method"):
        preferences.main(preferences.Args(adapter="x/y", method=["a", "b"]))
