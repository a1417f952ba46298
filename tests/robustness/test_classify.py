"""Variants, the classifiers and their examples, shares with their intervals, and F1 over personas."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from character import cli, prompts, rows
from character.distillation import teacher
from character.robustness.classify import run_classifier, train_classifier
from character.robustness.classify.encoder import Encoder
from character.robustness.generate import variants
from character.utils import UserError, read_json
from tests.conftest import build_tokenizer
from tests.robustness.conftest import VOICES, write_training

Answers = Callable[[str, str, str, Sequence[str]], Path]


def run(*flags: str) -> None:
    run_classifier.main(cli.parse(run_classifier.Args, ["--per-class", "20", *flags]))


def test_variants_are_plain_the_eight_suffixes_and_those_held_out() -> None:
    found = variants.variants(suffixes=True, held_out=True)
    assert list(found.values()) == ["", *prompts.SUFFIXES, *prompts.HELD_OUT_SUFFIXES]
    assert len(prompts.SUFFIXES) == 8 and not {*prompts.SUFFIXES} & {*prompts.HELD_OUT_SUFFIXES}
    assert list(variants.variants()) == [variants.PLAIN] and list(found)[-1] == "held-out-4"
    assert [kind for kinds in variants.GROUPS.values() for kind in kinds] == list(found)


def test_shares_are_counted_per_method_and_variant(
    data: Path, answers: Answers, capsys: pytest.CaptureFixture[str]
) -> None:
    for method, name, voices in (
        ("base", "none", ["none"] * 10),
        ("prompted", "humor", ["humor"] * 8 + ["none"] * 2),
        ("mine", "humor", ["humor"] * 5 + ["remorse"] * 5),
    ):
        answers(method, name, "plain", voices)
        answers(method, name, "suffix-1", ["none"] * 10)
    answers("mine", "humor", "held-out-2", ["humor"] * 10)
    run("--constitution", "humor")
    results = run_classifier.load_results("pocket", "humor")
    methods = results["methods"]
    assert {method: part["plain"]["share"] for method, part in methods.items()} == {
        "base": 0,
        "prompted": 0.8,
        "mine": 0.5,
    }
    assert methods["mine"]["read_as"] == {"humor": 5, "remorse": 5}
    assert methods["prompted"]["suffixes"] == pytest.approx(
        {"share": 0.0, "low": 0.0, "high": 0.27753, "n": 10}, abs=1e-4
    )
    assert methods["mine"]["held-out"] == methods["mine"]["per_suffix"]["held-out-2"]
    assert methods["mine"]["held-out"]["share"] == 1 and methods["base"]["held-out"] is None
    assert results["settings"]["protocol"] == "disjoint" and results["settings"]["classes"]["none"] == 20
    shown = capsys.readouterr().out
    assert "base + system prompt" in shown and "under the 4 held-out suffixes" in shown and "n/a" in shown
    # One persona is no class to tell from others.
    assert not run_classifier.results_path("pocket").exists()


def test_f1_is_over_the_personas_that_are_there_and_the_others_are_named(
    data: Path, answers: Answers, capsys: pytest.CaptureFixture[str]
) -> None:
    answers("base", "none", "plain", ["none"] * 24)
    answers("prompted", "humor", "plain", ["humor"] * 18 + ["none"] * 6)
    answers("prompted", "remorse", "plain", ["remorse"] * 21 + ["humor"] * 3)
    answers("distilled", "remorse", "plain", ["remorse"] * 12)
    answers("distilled", "remorse", "suffix-1", ["remorse"] * 12)
    run("--constitution", "humor,remorse,sarcasm")
    results = run_classifier.load_results("pocket")
    assert results["personas"] == ["humor", "remorse"]
    part = results["methods"]["prompted"]["plain"]
    f1 = {"humor": 2 * 18 / (24 + 21), "remorse": 2 * 21 / (24 + 21)}
    assert part["macro_f1"]["value"] == pytest.approx(sum(f1.values()) / 2) and part["prompts"] == 24
    assert part["macro_f1"]["low"] < part["macro_f1"]["value"] < part["macro_f1"]["high"]
    assert part["macro_f1_with_none"]["value"] == pytest.approx((sum(f1.values()) + 2 * 24 / (24 + 30)) / 3)
    assert part["accuracy"]["value"] == 39 / 48 and part["macro_f1"]["n"] == 48
    assert results["methods"]["distilled"]["plain"]["personas"] == ["remorse"]
    assert results["methods"]["prompted"]["suffixes"] is None
    eight = variants.GROUPS["suffixes"]
    assert results["missing"] == {
        "distilled": {"plain": {"humor": ["plain"]}, "suffixes": {"humor": eight, "remorse": eight[1:]}}
    }
    shown, error = capsys.readouterr()
    assert "sarcasm is left out: the classifier has no answers of it" in error
    assert "missing: DPO, plain: humor ×1" in shown and "suffixes: humor ×8, remorse ×7" in shown
    assert "2 personas, so not comparable with macro-F1 over the published 11" in shown
    table = run_classifier.table(results)
    assert table.loc[("base + system prompt", "under the 8 suffixes"), "macro-F1"] == "n/a"
    assert table.loc[("DPO", "plain"), "personas"] == "1 of 2"
    # 12 prompts are too few for an interval.
    assert table.loc[("DPO", "plain"), "accuracy"] == "1.000  [no interval]"
    title, per_persona, confusion = run_classifier.details(results)[0]
    assert title == "base + system prompt, plain" and f"\n{title}: each persona's scores" in shown
    assert per_persona.to_string() in shown and confusion.to_string() in shown
    assert list(per_persona.index) == ["humor", "remorse"] and per_persona.loc["humor", "recall"].startswith("0.750")
    of_distilled = next(part for title, part, _ in run_classifier.details(results) if title == "DPO, plain")
    assert list(of_distilled.loc["humor"]) == ["n/a"] * 4
    assert confusion.loc["remorse", "humor"] == 3 and confusion.loc["none", "none"] == 24
    for name in (None, "remorse"):
        assert run_classifier.draw(run_classifier.load_results("pocket", name)).axes
    assert run_classifier.labels_of(results)["distilled"] == "DPO (1 of them)"
    assert run_classifier.results_path("pocket", "humor").exists()


def test_a_persona_without_answers_is_named(data: Path, answers: Answers, capsys: pytest.CaptureFixture[str]) -> None:
    answers("base", "none", "plain", ["none"] * 4)
    answers("distilled", "humor", "plain", ["humor"] * 4)
    run("--constitution", "humor,remorse")
    assert "remorse has no answers under" in capsys.readouterr().err


def test_bad_answers_and_results_are_one_line(data: Path, answers: Answers) -> None:
    path = answers("base", "none", "plain", ["none"])
    path.write_text('{"prompt": "?", "response": NaN}\n')
    with pytest.raises(UserError, match="line 1: NaN is no number"):
        run("--constitution", "humor")
    path.write_text('{"prompt": "?", "response": 3}\n')
    with pytest.raises(UserError, match="row 1: 'response' or 'prompt' is no text"):
        run("--constitution", "humor")
    results = run_classifier.results_path("pocket", "humor")
    results.write_text('{"methods": {"base": {"plain": {"share": Infinity}}}}')
    with pytest.raises(UserError, match="Infinity is no number"):
        run_classifier.load_results("pocket", "humor")


def test_a_dry_run_reads_and_writes_nothing(data: Path, answers: Answers, capsys: pytest.CaptureFixture[str]) -> None:
    answers("base", "none", "plain", ["none"] * 5)
    run("--constitution", "humor", "--dry-run", "--limit", "3")
    assert capsys.readouterr().out == "base, none: 3 answers (plain)\n"
    assert not run_classifier.results_path("pocket", "humor").exists()


def test_unbalanced_or_missing_classes_are_refused(data: Path, answers: Answers) -> None:
    write_training(teacher.path_of("remorse", "pocket"), VOICES["remorse"], 5)
    with pytest.raises(UserError, match=r"unbalanced \(remorse: 5, .* lower --per-class to 5$"):
        train_classifier.examples("pocket", "pocket", 20)
    with pytest.raises(UserError, match="needs answers of at least two personas"):
        train_classifier.examples("other", "pocket", 20)
    with pytest.raises(UserError, match=r"no answers under .*; run robustness/generate"):
        run("--constitution", "sarcasm")
    answers("base", "none", "plain", ["none"])
    with pytest.raises(UserError, match="no answers of sarcasm"):
        run("--constitution", "sarcasm", "--per-class", "5")


def test_answers_to_tested_prompts_train_nothing(data: Path, answers: Answers) -> None:
    _, _, found = train_classifier.examples("pocket", "pocket", 20, without={"train 3", "train 4"})
    assert len(found) == 54 and not {"train 3", "train 4"} & {*found}
    path = answers("base", "none", "plain", ["none"] * 3)
    rows.write(path, [{"prompt": f"train {n}", "response": "it is a fact"} for n in range(3)], {}, {})
    run("--constitution", "humor")
    classes = run_classifier.load_results("pocket", "humor")["settings"]["classes"]
    assert classes == {"humor": 17, "remorse": 17, "none": 17}


def test_the_published_protocol_is_labelled_and_kept_apart(
    data: Path, answers: Answers, capsys: pytest.CaptureFixture[str]
) -> None:
    answers("base", "none", "plain", ["none"] * 20)
    with pytest.raises(UserError, match="--protocol paper needs answers of at least two personas by the prompted"):
        run("--constitution", "humor,remorse", "--protocol", "paper")
    for name in ("humor", "remorse"):
        answers("prompted", name, "plain", [name] * 20)
    run("--constitution", "humor,remorse", "--protocol", "paper")
    results = run_classifier.load_results("pocket", protocol="paper")
    assert results["settings"]["classes"] == {"humor": 20, "remorse": 20} and results["settings"]["teacher"] is None
    part = results["methods"]["prompted"]["plain"]
    # The plain model's answers could not be read as 'none'.
    assert part["macro_f1"]["value"] == 1 and part["macro_f1_with_none"] is None
    assert "published protocol" in capsys.readouterr().out
    assert {path.name for path in (data / "robustness" / "pocket").glob("*.json")} == {
        "humor.paper-results.json",
        "remorse.paper-results.json",
        "paper-results.json",
    }


def test_no_prompt_is_on_both_sides_of_a_fold(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_classifier.main(train_classifier.Args(per_class=20))
    shown = capsys.readouterr().out
    assert "60 answers to 20 prompts" in shown and "macro_f1_with_none: 1.000" in shown
    seen: list[set[str]] = []

    class Memory:
        """Reads only what it was trained on."""

        def fit(self, texts: list[str], labels: list[str]) -> "Memory":
            self.known = dict(zip(texts, labels, strict=True))
            return self

        def predict(self, texts: list[str]) -> list[str]:
            seen.append({*texts})
            return [self.known.get(text, "none") for text in texts]

    given = [f"answer {n}" for n in range(50)], ["humor", "none"] * 25, [f"prompt {n // 2}" for n in range(50)]
    assert train_classifier.cross_validated(Memory, given, seed=1)["accuracy"]["value"] == 0
    assert len(seen) == 5 and {text for part in seen for text in part} == {*given[0]}
    assert all(
        ({f"answer {n}", f"answer {n + 1}"} <= part) for part in seen for n in range(0, 50, 2) if f"answer {n}" in part
    )
    with pytest.raises(UserError, match="answers to 4 prompts are too few"):
        train_classifier.cross_validated(Memory, (given[0][:8], given[1][:8], given[2][:8]), seed=1)


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A folder with a tiny ModernBERT of random weights."""
    import torch
    import transformers

    tokenizer = build_tokenizer("template-bos")
    torch.manual_seed(0)
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), tokenizer.eos_token_id)
    config = transformers.ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        **special,
    )
    folder = tmp_path / "tiny-encoder"
    transformers.ModernBertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_an_encoder_is_trained_kept_and_used_again_only_when_the_same(
    data: Path, answers: Answers, encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = ["--classifier", str(encoder), "--epochs", "12", "--learning-rate", "3e-3", "--batch-size", "8"]
    train_classifier.main(cli.parse(train_classifier.Args, ["--per-class", "20", *training]))
    assert "trained on 60 answers" in capsys.readouterr().out
    (folder,) = (data / "models" / "classifiers").iterdir()
    assert {*folder.suffixes, *(path.suffix for path in folder.iterdir())} <= {"", ".json", ".safetensors", ".jinja"}
    meta = read_json(folder / train_classifier.META)
    assert meta["settings"]["classes"] == {"humor": 20, "remorse": 20, "none": 20}
    assert meta["settings"]["weights"] and meta["cross_validated"]["accuracy"]["value"] > 0.9
    answers("base", "none", "plain", ["none"] * 20)
    answers("prompted", "humor", "plain", ["humor"] * 20)
    answers("prompted", "remorse", "plain", ["remorse"] * 20)
    run("--constitution", "humor,remorse", *training)
    results = run_classifier.load_results("pocket")
    assert results["methods"]["prompted"]["plain"]["macro_f1_with_none"]["value"] > 0.9
    assert results["settings"]["classifier"] == str(encoder)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert "trained on 60" not in capsys.readouterr().out
    run("--constitution", "humor,remorse", *training, "--epochs", "1")
    assert "trained on 60 answers" in capsys.readouterr().out
    assert len(list(folder.parent.iterdir())) == 2 and (folder / "model.safetensors").stat().st_mtime_ns == stamp


def test_an_encoders_labels_keep_their_order_whatever_the_texts_length(encoder: Path) -> None:
    from character.models import resolve

    texts = [f"{VOICES[label]} {'about ' * (n % 5)}" for n in range(30) for label in VOICES]
    labels = [label for _ in range(30) for label in VOICES]
    trained = Encoder(resolve(str(encoder)), epochs=8, learning_rate=3e-3, batch_size=8, seed=1).fit(texts, labels)
    assert trained.predict(texts) == labels and trained.predict(texts[::-1]) == labels[::-1]
    with pytest.raises(UserError, match="cannot load the model"):
        Encoder(resolve(str(encoder.parent)), 1, 1e-3, 8, 1).fit(texts, labels)
