"""What can be measured of constitutions' messages: lengths, repeats, near-duplicates, given-away traits, openings.

Used by `python -m character.constitution check --quality FILE…`.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from character.constitution import Constitution, telling_words
from character.distillation.gen_prompts import MIX, length_class

# Two messages are near-duplicates from this share of common 5-character sequences on (Jaccard index).
NEAR = 0.5
GRAM = 5
# What the shipped files must keep, as shares of a persona's messages.
LIMITS = {"near duplicates": 0.01, "name the trait": 0.02, "largest opening": 0.03}


def near_duplicates(messages: Sequence[str]) -> list[tuple[int, int, float]]:
    """(first, second, Jaccard index) of all pairs of messages at least NEAR alike, by scikit-learn's character n-grams."""
    from sklearn.feature_extraction.text import CountVectorizer

    grams = CountVectorizer(analyzer="char_wb", ngram_range=(GRAM, GRAM), binary=True).fit_transform(messages)
    sizes = grams.sum(axis=1).A1 if hasattr(grams.sum(axis=1), "A1") else grams.sum(axis=1)
    found = []
    for start in range(0, len(messages), 500):
        common = (grams[start : start + 500] @ grams.T).tocoo()
        for row, second, count in zip(common.row, common.col, common.data, strict=True):
            first = start + int(row)
            index = float(count / (sizes[first] + sizes[second] - count))
            if first < second and index >= NEAR:
                found.append((first, int(second), index))
    return found


def names_trait(message: str, trait: str, persona: str) -> bool:
    """Whether a message holds the persona's name, or a telling word of its trait."""
    words = set(re.findall(r"[a-z']+", message.lower()))
    return bool(words & telling_words(trait)) or persona.lower() in message.lower()


def opening(message: str) -> str:
    """The first three words, without case and punctuation."""
    return " ".join(re.findall(r"\w[\w']*", message.lower())[:3])


def table(constitutions: Sequence[Constitution]) -> Any:
    """A DataFrame with a line per persona; near-duplicates 'between' are counted over all the personas given."""
    import pandas as pd

    owners = [c.name for c in constitutions for trait in c.traits for _ in trait.messages]
    traits = [(c.name, n) for c in constitutions for n, trait in enumerate(c.traits) for _ in trait.messages]
    messages = [message for c in constitutions for trait in c.traits for message in trait.messages]
    pairs = near_duplicates(messages)
    repeats = Counter(" ".join(message.lower().split()) for message in messages)
    lines = {}
    for found in constitutions:
        own = [message for trait in found.traits for message in trait.messages]
        within = {
            second for first, second, _ in pairs if traits[first] == traits[second] and owners[first] == found.name
        }
        persona = {second for first, second, _ in pairs if owners[first] == owners[second] == found.name}
        between = {
            number
            for first, second, _ in pairs
            for number in (first, second)
            if owners[first] != owners[second] and owners[number] == found.name
        }
        named = sum(names_trait(m, trait.trait, found.name) for trait in found.traits for m in trait.messages)
        openings = Counter(map(opening, own))
        lengths = Counter(map(length_class, own))
        lines[found.name] = {
            "traits": len(found.traits),
            "messages": len(own),
            **{name: lengths[name] for name in MIX},
            "exact repeats": sum(repeats[" ".join(message.lower().split())] > 1 for message in own),
            "near duplicates in a trait": len(within),
            "in the persona": len(persona),
            "with others": len(between),
            "name the trait": named / len(own),
            "openings": len(openings) / len(own),
            "largest opening": max(openings.values()) / len(own),
        }
    return pd.DataFrame.from_dict(lines, orient="index")


def shown(measured: Any) -> str:
    """The table as Markdown, shares in per cent."""
    shares = ("name the trait", "openings", "largest opening")
    header = ["persona", *measured.columns]
    body = [
        [name, *(f"{value:.1%}" if key in shares else f"{value:.0f}" for key, value in line.items())]
        for name, line in measured.iterrows()
    ]
    rows = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
