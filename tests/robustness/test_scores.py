"""F1, accuracy and their intervals: against scikit-learn, and by simulated truths."""

from random import Random

import numpy as np
import pytest

from character.robustness.classify import scores
from character.robustness.classify.scores import NONE, Read


def some_reads(count: int, seed: int) -> list[Read]:
    random = Random(seed)
    labels = ["humor", "remorse", "sarcasm", NONE]
    return [
        Read(f"prompt {number // 12}", persona, random.choice([persona, persona, *labels, "loving"]))
        for number in range(count)
        for persona in [labels[number % 4]]
    ]


def test_scores_equal_scikit_learns() -> None:
    from sklearn import metrics

    reads = some_reads(600, seed=1)
    found = scores.measure(reads, seed=1, draws=20)
    personas = ["humor", "remorse", "sarcasm"]
    assert found["personas"] == personas and found["prompts"] == 50
    for key, counted, labels in (
        ("", [read for read in reads if read.persona != NONE], personas),
        ("_with_none", reads, [*personas, NONE]),
    ):
        true, guess = [read.persona for read in counted], [read.guess for read in counted]
        macro = metrics.f1_score(true, guess, labels=labels, average="macro")
        assert found[f"macro_f1{key}"]["value"] == pytest.approx(macro)
        assert found[f"accuracy{key}"]["value"] == pytest.approx(metrics.accuracy_score(true, guess))
        assert found[f"macro_f1{key}"]["n"] == found[f"accuracy{key}"]["n"] == len(counted)
    true, guess = (
        [read.persona for read in reads if read.persona != NONE],
        [read.guess for read in reads if read.persona != NONE],
    )
    table = metrics.classification_report(true, guess, labels=personas, output_dict=True)
    for name, part in found["per_persona"].items():
        for key in ("precision", "recall", "f1"):
            assert part[key]["value"] == pytest.approx(table[name][key.replace("f1", "f1-score")])
        assert part["support"] == table[name]["support"] == 150
    confusion = found["confusion"]
    whole = metrics.confusion_matrix(
        [read.persona for read in reads], [read.guess for read in reads], labels=confusion["read_as"]
    )
    rows = [confusion["read_as"].index(label) for label in confusion["true"]]
    assert confusion["read_as"] == ["humor", "loving", "remorse", "sarcasm", NONE] and "loving" not in confusion["true"]
    assert confusion["counts"] == whole[rows].tolist()


def test_a_reading_as_none_is_an_error_and_without_plain_answers_there_is_no_figure_with_none() -> None:
    reads = [Read(str(n), "humor", NONE if n < 10 else "humor") for n in range(40)]
    found = scores.measure(reads, seed=1, draws=50)
    assert found["accuracy"]["value"] == 0.75 and found["macro_f1"]["value"] == pytest.approx(2 * 30 / (40 + 30))
    assert found["macro_f1_with_none"] is None and found["accuracy_with_none"] is None
    assert scores.shown(None) == "n/a"


def test_few_prompts_have_no_interval() -> None:
    few = some_reads(12 * 19, seed=2)
    found = scores.measure(few, seed=1)
    assert found["prompts"] == 19 and found["macro_f1"]["low"] is found["macro_f1"]["high"] is None
    assert scores.shown(found["macro_f1"]).endswith("[no interval]")
    assert scores.measure([*few, Read("one more", "humor", "humor")], seed=1)["macro_f1"]["low"] is not None


def test_suffixed_answers_to_one_prompt_count_as_one_observation() -> None:
    single = [Read(str(n), "humor", "humor" if n % 4 else NONE) for n in range(60)]
    width = {
        times: found["accuracy"]["high"] - found["accuracy"]["low"]
        for times in (1, 8)
        for found in [scores.measure(single * times, seed=1)]
    }
    assert width[8] == pytest.approx(width[1])


def test_a_persona_that_is_never_read_has_no_precision_interval() -> None:
    reads = [Read(str(n), name, NONE) for n in range(30) for name in ("humor", "remorse")]
    found = scores.measure(reads, seed=1, draws=20)["per_persona"]["humor"]
    assert found["precision"] == {"value": 0.0, "low": None, "high": None, "n": 0}
    assert found["recall"]["value"] == found["recall"]["low"] == 0 and 0.1 < found["recall"]["high"] < 0.15
    table = scores.per_persona_table(scores.measure(some_reads(600, 3), seed=1, draws=20))
    assert list(table.index) == ["humor", "remorse", "sarcasm"] and table.loc["humor", "answers"] == "150"
    assert scores.confusion_table(scores.measure(reads, seed=1)).loc["remorse", NONE] == 30


def test_intervals_cover_simulated_truths() -> None:
    random = np.random.default_rng(11)
    labels = ["humor", "remorse", "sarcasm", NONE]
    prompts, covered = 200, np.zeros(2)
    for trial in range(1000):
        # What share of answers is read rightly differs from prompt to prompt around the truth.
        truth = random.uniform(0.05, 0.95)
        rate = random.beta(4 * truth, 4 * (1 - truth), size=(prompts, 1))
        off = np.where(random.random((prompts, 3)) < rate, 0, random.integers(1, 4, size=(prompts, 3)))
        reads = [Read(str(p), labels[k], labels[(k + off[p, k]) % 4]) for p in range(prompts) for k in range(3)]
        expected = np.full((4, 4), (1 - truth) / 3)
        np.fill_diagonal(expected, truth)
        found = scores.measure(reads, trial, draws=60)
        # The expected confusion of a thousand answers, so that no count is below one.
        for place, (key, value) in enumerate(
            (("accuracy", truth), ("macro_f1", scores.scores(1000 * expected, range(3))[1]))
        ):
            covered[place] += found[key]["low"] <= value <= found[key]["high"]
    assert (covered >= 930).all() and (covered <= 970).all()
