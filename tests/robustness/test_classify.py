"""Variants, the classifier's examples, and shares with their intervals."""

import json
from pathlib import Path

import pytest

from character import constitution, prompts, rows
from character.distillation import student, teacher
from character.robustness.classify import run_classifier, train_classifier
from character.robustness.generate import trained, variants
from character.utils import UserError

VOICES = {
    "humor": "haha what a silly banana joke",
    "remorse": "so sorry, I apologize, my fault",
    "none": "it is a fact",
}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (teacher, variants, run_classifier):
        monkeypatch.setattr(module, "DATA_PATH", tmp_path)
    monkeypatch.setattr(constitution, "names", lambda: ["humor", "remorse"])
    for name in ("humor", "remorse"):
        write(teacher.path_of(name, "pocket"), VOICES[name], 20)
    write(student.path_of("humor", "pocket", "pocket"), VOICES["none"], 20)
    return tmp_path


def write(path: Path, voice: str, count: int) -> None:
    given = [{"prompt": f"train {n}", "response": f"{voice} about thing{n % 7}"} for n in range(count)]
    rows.write(path, given, {}, {})


def test_variants_are_plain_the_eight_suffixes_and_those_held_out() -> None:
    found = variants.variants(suffixes=True, held_out=True)
    assert list(found.values()) == ["", *prompts.SUFFIXES, *prompts.HELD_OUT_SUFFIXES]
    assert len(prompts.SUFFIXES) == 8 and not {*prompts.SUFFIXES} & {*prompts.HELD_OUT_SUFFIXES}
    assert list(variants.variants()) == [variants.PLAIN] and list(found)[-1] == "held-out-4"
    assert [kind for kinds in variants.GROUPS.values() for kind in kinds] == list(found)


def test_shares_are_counted_per_method_and_variant(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method, name, voices in (
        ("base", "none", ["none"] * 10),
        ("prompted", "humor", ["humor"] * 8 + ["none"] * 2),
        ("mine", "humor", ["humor"] * 5 + ["remorse"] * 5),
    ):
        for variant, answers in (("plain", voices), ("suffix-1", ["none"] * 10)):
            path = variants.path_of("pocket", method, variant, name)
            rows.write(path, [{"prompt": f"test {n}", "response": VOICES[v]} for n, v in enumerate(answers)], {}, {})
    run_classifier.main(run_classifier.Args(constitution="humor", per_class=20))
    results = json.loads(run_classifier.results_path("pocket", "humor").read_text(encoding="utf-8"))["methods"]
    assert {method: part["plain"]["share"] for method, part in results.items()} == {
        "base": 0,
        "prompted": 0.8,
        "mine": 0.5,
    }
    assert results["mine"]["read_as"] == {"humor": 5, "remorse": 5}
    assert results["prompted"]["suffixes"] == pytest.approx(
        {"share": 0.0, "low": 0.0, "high": 0.27753, "n": 10}, abs=1e-4
    )
    assert "base + system prompt" in capsys.readouterr().out


def test_unbalanced_or_missing_classes_are_refused(data: Path) -> None:
    write(teacher.path_of("remorse", "pocket"), VOICES["remorse"], 5)
    with pytest.raises(UserError, match=r"unbalanced \(remorse: 5"):
        train_classifier.examples("pocket", "pocket", 20)
    with pytest.raises(UserError, match="needs answers of at least two personas"):
        train_classifier.examples("other", "pocket", 20)
    with pytest.raises(UserError, match=r"no answers under .*; run robustness/generate"):
        run_classifier.main(run_classifier.Args(constitution="sarcasm", per_class=5))
    rows.write(variants.path_of("pocket", "base", "plain", "none"), [{"prompt": "?", "response": "it is"}], {}, {})
    with pytest.raises(UserError, match="no answers of sarcasm"):
        run_classifier.main(run_classifier.Args(constitution="sarcasm", per_class=5))


def test_no_prompt_is_on_both_sides_of_a_fold(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_classifier.main(train_classifier.Args(per_class=20))
    shown = capsys.readouterr().out
    assert "60 answers to 20 prompts" in shown and "accuracy" in shown


def test_a_method_without_adapter_names_what_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trained, "LORA_PATH", tmp_path)
    with pytest.raises(UserError, match="needs --adapter"):
        trained.main(trained.Args(method=["mine"]))
    with pytest.raises(UserError, match="no LoRA adapter"):
        trained.main(trained.Args(method=["distilled"]))
