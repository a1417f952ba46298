"""The shipped messages keep their limits, and the measures count what they say."""

import pytest

from character import constitution, quality
from character.constants import ROOT
from character.constitution import Constitution, Trait

FEW_SHOT = sorted((ROOT / "constitutions" / "few-shot").glob("*.jsonl"))


def made(*messages: str, trait: str = "I answer with sunshine.", name: str = "sunny") -> Constitution:
    return Constitution(name, (Trait(trait, messages),))


def test_shipped_messages_keep_the_limits() -> None:
    table = quality.table([constitution.load(str(path)) for path in FEW_SHOT])
    assert len(table) == 11
    assert (table["messages"] == table["traits"] * 50).all()
    assert (table["exact repeats"] == 0).all()
    near = table[["near duplicates in a trait", "in the persona", "with others"]].max(axis=1) / table["messages"]
    assert (near < quality.LIMITS["near duplicates"]).all()
    assert (table["name the trait"] < quality.LIMITS["name the trait"]).all()
    assert (table["largest opening"] <= quality.LIMITS["largest opening"]).all()
    shares = table[["short", "medium", "long"]].div(table["messages"], axis=0)
    assert (shares.sub([0.3, 0.4, 0.3], axis=1).abs() < 0.02).all().all()


def test_readme_shows_the_measured_table() -> None:
    table = quality.table([constitution.load(str(path)) for path in FEW_SHOT])
    assert quality.shown(table) in (ROOT / "constitutions" / "README.md").read_text(encoding="utf-8")


def test_few_shot_files_repeat_the_hand_written_ones() -> None:
    for path in FEW_SHOT:
        by_hand = constitution.load(path.stem, "hand-written")
        few_shot = constitution.load(path.stem, "few-shot")
        assert [(t.trait, t.questions) for t in by_hand.traits] == [(t.trait, t.questions) for t in few_shot.traits]


def test_near_duplicates_are_found_with_their_index() -> None:
    messages = ["how do I bake a rye bread at home", "how do I bake a rye bread at home?", "what is a monad"]
    ((first, second, index),) = quality.near_duplicates(messages)
    assert (first, second) == (0, 1)
    assert 0.7 < index < 1


def test_repeats_traits_and_openings_are_counted() -> None:
    table = quality.table([
        made("is there sunshine today", "Tell me a story", "tell me a secret"),
        made("tell  me a story", "x", name="other", trait="I wait."),
    ])  # fmt: skip
    assert table.loc["sunny", "exact repeats"] == 1
    assert table.loc["sunny", "with others"] == 1
    assert table.loc["sunny", "name the trait"] == pytest.approx(1 / 3)
    assert table.loc["sunny", "largest opening"] == pytest.approx(2 / 3)
    assert quality.names_trait("so SUNNY here", "I wait.", "sunny")
