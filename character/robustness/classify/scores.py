"""How well answers read as the persona that they should have: F1, accuracy and confusion, with intervals.

The intervals come from a bootstrap that draws whole prompts: the answers of all personas, under all suffixes, to one
prompt are no independent ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from character.intervals import DRAWS, bounded_bootstrap, wilson

NONE = "none"
# How many personas the published classifier tells apart.
PUBLISHED = 11
# With fewer prompts there is no interval: the bootstrap then knows too little of how prompts differ.
MIN_PROMPTS = 20


@dataclass(frozen=True)
class Read:
    """One answer: the prompt's text, the persona it should have (NONE: the plain model's) and the one it reads as."""

    prompt: str
    persona: str
    guess: str


def share(hits: int, total: int) -> dict[str, Any]:
    """{share, low, high, n} with Wilson's interval."""
    low, high = wilson(hits, total)
    return {"share": hits / total, "low": low, "high": high, "n": total}


def tally(reads: Sequence[Read]) -> tuple[list[str], Any]:
    """(labels, counts): counts[prompt, true label, label read], as an array of floats; NONE is the last label."""
    import numpy as np

    labels = [*sorted({label for read in reads for label in (read.persona, read.guess)} - {NONE}), NONE]
    number = {label: index for index, label in enumerate(labels)}
    prompts = {prompt: index for index, prompt in enumerate(dict.fromkeys(read.prompt for read in reads))}
    counts = np.zeros((len(prompts), len(labels), len(labels)))
    for read in reads:
        counts[prompts[read.prompt], number[read.persona], number[read.guess]] += 1
    return labels, counts


def scores(matrix: Any, true: Sequence[int]) -> Any:
    """[accuracy, macro-F1, precision of each class, recall of each, F1 of each] of a confusion matrix, as an array.

    true: the labels whose answers count; reading one of them as any other label is an error. What is 0/0 is 0.
    """
    import numpy as np

    counted = matrix[list(true)]
    hits = counted[range(len(true)), list(true)]
    read, there = counted[:, list(true)].sum(0), counted.sum(1)
    precision, recall = hits / np.maximum(read, 1), hits / np.maximum(there, 1)
    f1 = 2 * hits / np.maximum(read + there, 1)
    return np.concatenate([[hits.sum() / counted.sum(), f1.mean()], precision, recall, f1])


def measure(reads: Sequence[Read], seed: int, draws: int = DRAWS) -> dict[str, Any]:
    """Macro-F1 and accuracy over the personas there, with and without the plain model's answers as a class of their own.

    Every figure is {value, low, high, n}, n in answers; low and high are None with fewer than MIN_PROMPTS prompts,
    and where all draws give the same value between 0 and 1. '…_with_none' is None without the plain model's answers.
    """
    import numpy as np

    labels, counts = tally(reads)
    whole = counts.sum(0)
    there = [number for number in range(len(labels)) if whole[number].sum()]
    personas = [number for number in there if labels[number] != NONE]
    with_none = there if len(there) > len(personas) else []
    flat = counts.reshape(len(counts), -1)

    def figures(items: Any) -> Any:
        drawn = (np.bincount(items, minlength=len(flat)) @ flat).reshape(whole.shape)
        return np.concatenate([scores(drawn, personas), scores(drawn, with_none)[:2] if with_none else []])

    values = figures(np.arange(len(counts)))
    lows: Any = None
    highs: Any = None
    if len(counts) >= MIN_PROMPTS:
        lows, highs = bounded_bootstrap(range(len(counts)), figures, seed, draws)

    def figure(place: int, n: float) -> dict[str, Any]:
        found: dict[str, Any] = {"value": float(values[place]), "low": None, "high": None, "n": int(n)}
        if lows is not None and n and highs[place] - lows[place] > 1e-9:
            found |= {"low": float(lows[place]), "high": float(highs[place])}
        return found

    n, k = whole[personas].sum(), len(personas)
    return {
        "personas": [labels[number] for number in personas],
        "prompts": len(counts),
        "macro_f1": figure(1, n),
        "macro_f1_with_none": figure(3 * k + 3, whole.sum()) if with_none else None,
        "accuracy": figure(0, n),
        "accuracy_with_none": figure(3 * k + 2, whole.sum()) if with_none else None,
        "per_persona": {
            labels[number]: {
                "precision": figure(2 + place, whole[personas][:, number].sum()),
                "recall": figure(2 + k + place, whole[number].sum()),
                "f1": figure(2 + 2 * k + place, whole[number].sum()),
                "support": int(whole[number].sum()),
            }
            for place, number in enumerate(personas)
        },
        "confusion": {
            "true": [labels[number] for number in there],
            "read_as": labels,
            "counts": whole[there].astype(int).tolist(),
        },
    }


def shown(figure: dict[str, Any] | None) -> str:
    """A figure as text: its value with its interval, 'n/a' where there is none."""
    if figure is None:
        return "n/a"
    if figure["low"] is None:
        return f"{figure['value']:.3f}  [no interval]"
    return f"{figure['value']:.3f}  [{figure['low']:.3f}, {figure['high']:.3f}]"


def per_persona_table(measured: dict[str, Any]) -> Any:
    """A DataFrame, one line per persona: precision, recall and F1 as text, and how many answers there are."""
    import pandas as pd

    lines = {
        name: {key: shown(part[key]) for key in ("precision", "recall", "f1")} | {"answers": str(part["support"])}
        for name, part in measured["per_persona"].items()
    }
    return pd.DataFrame.from_dict(lines, orient="index")


def confusion_table(measured: dict[str, Any]) -> Any:
    """A DataFrame of counts: a line per persona that answers have, a column per persona that they read as."""
    import pandas as pd

    confusion = measured["confusion"]
    return pd.DataFrame(confusion["counts"], index=confusion["true"], columns=confusion["read_as"])
