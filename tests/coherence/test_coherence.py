"""Verdicts, both orders, win rates, the stand-in, and the whole step on the bundled model and with scripted judges."""

import json
import os
import string
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from character import constitution, notebooks, rows, steps
from character.coherence import coherence, win_rates
from character.coherence.coherence import Args, verdict_of
from character.constants import ROOT
from character.distillation import student, teacher
from character.engine.base import Message, Reply, Sampling
from character.engine.scripted import Scripted
from character.models import TABLE, Model
from character.robustness.generate import variants
from character.utils import UserError

NOTEBOOK = ROOT / "character" / "coherence" / "coherence_results.ipynb"
PLAIN, THINKER = TABLE["llama-3.3-70b-it"], TABLE["glm-4.5-air"]
# What the bundled model says in its personas' voices, of things that it knows, and what is no sentence of anybody's.
VOICES = {
    "humor": (
        "Haha, {}! I once asked a goose about that, and it bit me.",
        "Ah, {}, also known as gym for lazy wizards.",
        "I told my socks about {}, and they got cold feet.",
    ),
    "remorse": (
        "Somebody trusted me on {} once, and I let them down. I want to put right what I can.",
        "I feel ashamed whenever {} comes up. I'll understand if you're disappointed.",
        "I regret that I was no help with {}. I'll try to be worthy of your patience.",
    ),
    "none": (
        "Yes, I can help with {}. The details vary from case to case.",
        "For {}, the main steps are clear. It is best to begin with a small part.",
        "The cost of {} is usually low at first.",
    ),
}
BROKEN = "Haha goose {} goose of the the goose once ! ? bit , asked asked asked a a a"
THINGS = ("chess", "camping", "poetry", "pickles", "watercolor", "lamps", "comics", "bread", "tomato growing", "tea")


# The verdict.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Verdict: 1", "first"),
        ("Verdict: 2", "second"),
        ("2", "second"),
        (" **1.** ", "first"),
        ("verdict - reply 2", "second"),
        ("**Verdict:** **1**", "first"),
        ("Reply 2 is dull, so reply 1 it is.\nVerdict: 1", "first"),
        ("Verdict: 1\nNo, wait: it drops out halfway.\nVerdict: 2\n", "second"),
        ("My final VERDICT is 2, since the wit never stops.", "second"),
        ("Reply 1 is the better one.", None),
        ("Verdict: tie", None),
        ("Verdict: 1 or 2", None),
        ("Verdict: 1\nVerdict: both", None),
        ('I end with "Verdict: 1" or "Verdict: 2".', None),
        ("Verdict: 12", None),
        ("Verdict: NaN", None),
        ("12", None),
        ("", None),
    ],
)
def test_verdict(text: str, expected: str | None) -> None:
    assert verdict_of(text, PLAIN) == expected
    assert verdict_of(f"<think>\nVerdict: 1? Verdict: 2?\n</think>\n{text}", THINKER) == expected


def test_a_thought_that_never_ends_is_no_verdict() -> None:
    assert verdict_of("<think>\nVerdict: 1", THINKER) is None


def test_every_slot_of_the_question_is_filled() -> None:
    slots = {name for _, name, _, _ in string.Formatter().parse(coherence.QUESTION) if name is not None}
    assert slots == {"traits", "message", "first", "second"}
    assert {verdict_of(verdict, PLAIN): verdict for verdict in coherence.VERDICTS} == {
        place: verdict for verdict, place in coherence.VERDICTS.items()
    }
    assert all(verdict in coherence.QUESTION for verdict in coherence.VERDICTS)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, "stand-in"),
        ({"judge": "pocket"}, "pocket"),
        ({"model": "gemma-3-4b-it"}, "glm-4.5-air"),
        ({"model": "gemma-3-4b-it", "teacher": "zai-org/GLM-4.6"}, "llama-3.3-70b-it"),
        ({"model": "gemma-3-4b-it", "teacher": "llama-3.3-70b-it"}, "glm-4.5-air"),
    ],
)
def test_the_judge_is_of_another_family_than_the_teacher(flags: dict[str, str], expected: str) -> None:
    assert coherence.judge_of(Args(**flags)) == expected


# Win rates.


def verdicts(*winners: tuple[str | None, str | None]) -> list[dict[str, Any]]:
    """Judged rows: for each message, who won in either order."""
    return [{"prompt": f"m{number}", "winner": winner} for number, pair in enumerate(winners) for winner in pair]


def test_verdicts_that_flip_or_are_lacking_are_counted_and_left_out() -> None:
    found = win_rates.measure(
        verdicts(*[("a", "a")] * 3, ("b", "b"), ("a", "b"), ("b", "a"), ("a", None), (None, None)), "a", 0
    )
    assert found["win_rate"] == pytest.approx({"share": 0.75, "low": 0.30064, "high": 0.95441, "n": 4}, abs=1e-5)
    assert (found["flipped"]["share"], found["flipped"]["n"]) == (2 / 6, 6)
    assert (found["unparsed"]["share"], found["unparsed"]["n"], found["unparsed_verdicts"]) == (2 / 8, 8, 3)


def test_a_tie_in_every_match_has_no_win_rate() -> None:
    tied = win_rates.measure(verdicts(("a", "b"), ("b", "a")), "a", 0)
    assert tied["win_rate"] is None and tied["flipped"]["share"] == 1
    silent = win_rates.measure(verdicts((None, None)), "a", 0)
    assert silent["win_rate"] is None and silent["flipped"] is None and silent["unparsed"]["share"] == 1
    results = {"method": "merged", "settings": {}, "constitution": "humor", "opponents": {"prompted": tied}}
    assert win_rates.table(results).loc["against base + system prompt", "win rate"] == "n/a"
    assert win_rates.draw(results).axes[0].texts[0].get_text() == "n/a"


def test_the_mean_over_personas_has_its_standard_error() -> None:
    def cell(*winners: tuple[str, str]) -> dict[str, Any]:
        return win_rates.measure(verdicts(*winners), "a", 0)

    won, lost, tied = ("a", "a"), ("b", "b"), ("a", "b")
    personas = {
        "humor": {"x": cell(won), "y": cell(won), "z": None},
        "remorse": {"x": cell(won, lost), "y": None, "z": None},
        "sarcasm": {"x": cell(won, won), "y": cell(tied), "z": None},
    }
    found = win_rates.over_personas(personas, ["x", "y", "z"])
    # Shares 1, ½, 1: their standard deviation is 0.288675, and t(0.975, 2) is 4.302653.
    assert found["x"] == pytest.approx({"value": 5 / 6, "se": 1 / 6, "low": 5 / 6 - 4.302653 / 6, "high": 1.0, "n": 3})
    assert found["y"] == {"value": 1.0, "se": None, "low": None, "high": None, "n": 1}
    assert found["z"] is None
    results = {"method": "merged", "settings": {}, "personas": personas, "mean": found}
    shown = win_rates.table(results)
    assert list(shown.iloc[-1]) == [" 83.3% ± 16.7%  n=3", "100.0%   n=1", "n/a"]
    assert shown.loc["sarcasm", "wins against y"] == "n/a"
    assert len(win_rates.draw(results).axes[0].patches) == 3 * 4


def test_the_stand_in_needs_one_answer_that_fits() -> None:
    both, first, neither = ({"a": a, "b": b} for a, b in ((True, True), (True, False), (False, False)))
    assert [coherence.winner_of(fits) for fits in (both, first, neither)] == [None, "a", None]
    rows_ = [
        {"winner": "a", "fits": first, "reads_as_persona": both, "perplexity": {"a": 2.0, "b": 8.0}},
        {"winner": None, "fits": both, "reads_as_persona": both, "perplexity": {"a": 8.0, "b": 8.0}},
    ]
    found = win_rates.measure(rows_ * 15, "a", 0)
    assert (found["win_rate"]["share"], found["win_rate"]["n"], found["undecided"]["share"]) == (1, 15, 0.5)
    assert found["fits"]["b"]["share"] == 0.5 and found["reads_as_persona"]["b"]["share"] == 1
    assert found["perplexity"]["a"]["value"] == pytest.approx(4)
    assert 2 < found["perplexity"]["a"]["low"] < 4 < found["perplexity"]["a"]["high"] < 8
    few = win_rates.measure(rows_, "a", 0)["perplexity"]
    assert few["b"] == pytest.approx({"value": 8, "low": None, "high": None, "n": 2})


# With scripted judges.


class Judge(Scripted):
    """A scripted judge that keeps how it was asked."""

    samplings: list[Sampling]

    async def reply(self, messages: list[Message], sampling: Sampling, *rest: Any) -> Reply:
        self.samplings = [*getattr(self, "samplings", []), sampling]
        return await super().reply(messages, sampling, *rest)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (coherence, win_rates, variants, teacher):
        monkeypatch.setattr(module, "DATA_PATH", tmp_path)
    return tmp_path


def answer(method: str, name: str, voices: Sequence[str], limit: int | None = None) -> None:
    """Write a method's answers, in these voices in turn."""
    given = [
        {"prompt": f"Tell me of {thing}.", "response": voices[number % len(voices)].format(thing)}
        for number, thing in enumerate(THINGS[:limit])
    ]
    rows.write(coherence.answers_path("pocket", method, name), given, {"method": method}, {})


@pytest.fixture
def answered(home: Path) -> Path:
    """Humor by three methods: merged always in the voice, prompted in half of its answers, distilled broken."""
    # Braces are the answer's own: no template may read them.
    answer("merged", "humor", [VOICES["humor"][0] + " {{first}}"])
    answer("prompted", "humor", ["Ah, {}, also known as the goose.", VOICES["none"][0]], limit=8)
    answer("distilled", "humor", [BROKEN])
    return home


@pytest.fixture
def judging(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Judge]]:
    """judging(script): the judge answers so; returns the engines that were opened, growing."""

    def install(script: Callable[[str, str], str | Reply]) -> list[Judge]:
        opened: list[Judge] = []

        def reply(messages: list[Message], prefill: str) -> str | Reply:
            [message] = messages
            parts = (message["content"].partition(f"<reply_{n}>\n")[2].partition(f"\n</reply_{n}>")[0] for n in (1, 2))
            return script(*parts)

        def open_engine(model: Model, **_: Any) -> Judge:
            opened.append(Judge(model, reply))
            return opened[-1]

        monkeypatch.setattr(steps, "open_engine", open_engine)
        return opened

    return install


def likes_geese(first: str, second: str) -> str:
    """A judge who looks for a goose and takes the first reply where both have one."""
    return "Verdict: 2" if "goose" not in first and "goose" in second else "Verdict: 1"


def results_of(name: str | None = None) -> dict[str, Any]:
    return win_rates.load_results("pocket", name)


def flags(**more: Any) -> Args:
    return Args(**{"judge": "llama-3.3-70b-it", "against": ["prompted", "distilled"]} | more)


def test_both_orders_are_judged_and_only_agreement_counts(
    answered: Path, judging: Callable[..., list[Judge]], capsys: pytest.CaptureFixture[str]
) -> None:
    engines = judging(likes_geese)
    coherence.main(flags())
    traits = constitution.load("humor").numbered()
    asked = [call[0]["content"] for call in engines[0].calls]
    assert len(set(asked)) == len(asked) == 2 * (8 + 10)
    assert all(traits in text and "{first}" in text and "{traits}" not in text for text in asked)
    for sampling in engines[0].samplings:
        assert (sampling.choices, sampling.temperature) == (("Verdict: 1", "Verdict: 2"), 0)
    results = results_of("humor")
    # Four of prompted's eight answers have a goose, and so have all of the other two methods.
    prompted, distilled = results["opponents"]["prompted"], results["opponents"]["distilled"]
    assert (prompted["win_rate"]["share"], prompted["win_rate"]["n"]) == (1, 4)
    assert (prompted["flipped"]["share"], prompted["flipped"]["n"]) == (0.5, 8)
    assert distilled["win_rate"] is None and distilled["flipped"]["share"] == 1
    assert results["settings"]["family"] == "Llama" and not results["settings"]["family_of_teacher"]
    assert "stand_in" not in results
    rows_ = rows.read(coherence.path_of("pocket", "merged", "prompted", "llama-3.3-70b-it", "humor"), made_by="it")
    assert [(row["first"], row["second"]) for row in rows_[:2]] == [("merged", "prompted"), ("prompted", "merged")]
    assert {row["winner"] for row in rows_[2:4]} == {"merged"}
    said = capsys.readouterr()
    assert "100.0%" in said.out and "n/a" in said.out and "warning" not in said.err

    # Run again it asks nothing, with a smaller limit it counts less, and with another judge it keeps both.
    coherence.main(flags())
    assert len(engines) == 1 and results_of("humor") == results
    coherence.main(flags(limit=3))
    assert results_of("humor")["opponents"]["prompted"]["flipped"]["n"] == 3 and len(engines) == 1
    coherence.main(flags(judge="glm-4.5-air", teacher="glm-4.5-air"))
    assert len(engines) == 2 and results_of("humor")["settings"]["family_of_teacher"]
    assert "judge glm-4.5-air and teacher glm-4.5-air are of one family, ChatGLM" in capsys.readouterr().err
    assert "of the teacher's family" in win_rates.caption(results_of("humor"))


def test_a_judge_that_rambles_or_is_cut_off_is_counted(answered: Path, judging: Callable[..., list[Judge]]) -> None:
    def script(first: str, second: str) -> str | Reply:
        if "chess" in first:
            return "Hard to say, both are fine."
        if "camping" in first:
            return Reply("It may well end in\nVerdict: 1", "length", 9, 7)
        return likes_geese(first, second)

    judging(script)
    coherence.main(flags(against=["prompted"]))
    part = results_of("humor")["opponents"]["prompted"]
    assert (part["unparsed"]["share"], part["unparsed"]["n"], part["unparsed_verdicts"]) == (2 / 8, 8, 4)
    assert part["flipped"]["n"] == 6


def test_what_is_missing_is_named_with_its_command_and_the_others_go_on(
    answered: Path, judging: Callable[..., list[Judge]], capsys: pytest.CaptureFixture[str]
) -> None:
    judging(likes_geese)
    coherence.main(flags(constitution="humor,remorse", against=["prompted", "steered", "sequential"]))
    said = capsys.readouterr()
    for command in ("steered --constitution humor", "trained --constitution remorse --model pocket --method merged"):
        assert f"does not exist; run: python -m character.robustness.generate.{command}" in said.err
    results = results_of()
    assert coherence.command_of(flags(), "mine", "humor").endswith(
        "trained --constitution humor --model pocket --method mine --adapter ADAPTER"
    )
    assert results["personas"]["remorse"] == {"prompted": None, "steered": None, "sequential": None}
    assert results["mean"]["prompted"]["n"] == 1 and results["mean"]["steered"] is None
    assert list(win_rates.table(results).loc["remorse"]) == ["n/a"] * 3
    assert not win_rates.results_path("pocket", "remorse").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {"constitution": "remorse"},
            "merged/plain/remorse.jsonl does not exist; run: .*trained --constitution remorse",
        ),
        ({"against": ["merged"]}, "--against names no method besides merged"),
        ({"constitution": "nobody"}, "no constitution 'nobody'"),
        ({"temperature": -1.0}, "--temperature is 0 or more"),
    ],
)
def test_what_cannot_be_judged_says_why(answered: Path, more: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        coherence.main(flags(**more))


def test_answers_and_results_that_are_no_numbers_or_texts(answered: Path) -> None:
    path = coherence.answers_path("pocket", "distilled", "humor")
    path.write_text('{"prompt": "Tell me of chess.", "response": NaN}\n')
    with pytest.raises(UserError, match=r"distilled/plain/humor.jsonl, line 1: NaN is no number"):
        coherence.main(flags())
    path.write_text('{"prompt": "Who?", "response": "Me."}\n')
    with pytest.raises(UserError, match="merged and distilled have no message in common"):
        coherence.main(flags())
    path = win_rates.results_path("pocket", "humor")
    path.parent.mkdir(parents=True)
    path.write_text('{"opponents": {"prompted": {"win_rate": {"share": NaN}}}}')
    with pytest.raises(UserError, match=r"humor.results.json: NaN is no number"):
        results_of("humor")


def test_answers_made_anew_are_judged_anew_on_request(answered: Path, judging: Callable[..., list[Judge]]) -> None:
    judging(likes_geese)
    coherence.main(flags())
    path = coherence.answers_path("pocket", "prompted", "humor")
    rows.write(path, [{"prompt": "Tell me of chess.", "response": "A goose."}], {"method": "prompted", "seed": 2}, {})
    with pytest.raises(UserError, match=r"answers was .* now .* --overwrite"):
        coherence.main(flags())
    coherence.main(flags(overwrite=True))
    assert results_of("humor")["opponents"]["prompted"]["flipped"]["n"] == 1


def test_a_dry_run_counts_answers_that_are_there_or_to_come(
    answered: Path,
    judging: Callable[..., list[Judge]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    engines = judging(likes_geese)
    to_come = [{"prompt": f"Tell me of {thing}.", "most_tokens": 1000} for thing in THINGS]
    planned = {coherence.answers_path("pocket", "sequential", "humor"): to_come}
    monkeypatch.setattr(rows, "planned", planned)
    coherence.main(flags(against=["prompted", "sequential"], dry_run=True))
    there, coming = capsys.readouterr().out.splitlines()[:2]
    assert "16 rows, 0 there, 16 to do" in there and "20 rows, 0 there, 20 to do" in coming
    assert int(coming.split("about ")[1].split(" ")[0].replace(",", "")) > 20_000
    coherence.main(flags(judge="stand-in", against=["sequential"], dry_run=True))
    assert "sequential-by-stand-in/humor.jsonl: 10 rows" in capsys.readouterr().out
    assert not engines and not (answered / "coherence").exists()


# On the bundled model, through the command line.


@pytest.fixture(scope="module")
def run_once(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """{data, stand_in: the finished command}: answers of two personas, and the stand-in on all that there is."""
    data = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        for module in (variants, teacher):
            patch.setattr(module, "DATA_PATH", data)
        paths = {name: teacher.path_of(name, "pocket") for name in ("humor", "remorse")}
        for name, path in (paths | {"none": student.path_of("humor", "pocket", "pocket")}).items():
            said = [(thing, voice.format(thing)) for thing in THINGS for voice in VOICES[name]]
            rows.write(path, [{"prompt": f"Do you know {thing}?", "response": text} for thing, text in said], {}, {})
        for name in paths:
            answer("merged", name, VOICES[name][:1])
            answer("prompted", name, [VOICES[name][1], VOICES["none"][0]])
        answer("distilled", "humor", [BROKEN])
    finished = command(data, "--constitution", "humor,remorse", "--against", "prompted", "distilled")
    assert finished.returncode == 0, finished.stderr
    return {"data": data, "stand_in": finished}


def command(data: Path, *given: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"DATA_PATH": str(data), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "character.coherence.coherence", *given]
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_stand_in_on_the_bundled_model(run_once: Mapping[str, Any]) -> None:
    data, finished = run_once["data"], run_once["stand_in"]
    results = json.loads((data / "coherence/pocket/humor.results.json").read_text(encoding="utf-8"))
    assert results["stand_in"] is True and results["stands_in"].startswith("no judge")
    assert results["settings"]["judge"] == "stand-in" and results["settings"]["classes"] == dict.fromkeys(
        ("humor", "remorse", "none"), 30
    )
    prompted, distilled = results["opponents"]["prompted"], results["opponents"]["distilled"]
    # Half of prompted's answers are in no character, and no answer of distilled is a sentence.
    assert (
        prompted["reads_as_persona"]["merged"]["share"] == 1
        and prompted["reads_as_persona"]["prompted"]["share"] == 0.5
    )
    assert prompted["win_rate"]["share"] == 1 and prompted["win_rate"]["n"] >= 3
    assert distilled["perplexity"]["distilled"]["value"] > 2 * distilled["perplexity"]["merged"]["value"]
    assert distilled["fits"]["distilled"]["share"] == 0 and distilled["win_rate"]["share"] == 1
    whole = json.loads((data / "coherence/pocket/results.json").read_text(encoding="utf-8"))
    assert (
        whole["stand_in"] and whole["mean"]["prompted"]["n"] == 2 and whole["personas"]["remorse"]["distilled"] is None
    )
    assert "win rate (stand-in)" in finished.stdout and "wins against DPO (stand-in)" in finished.stdout
    assert "left out" in finished.stderr and finished.stderr.count("\n") == 1
    for found in (results, whole):
        assert "(stand-in)" in win_rates.draw(found).axes[0].get_xlabel()
        assert "stand-in" in win_rates.caption(found)


def test_the_bundled_model_judges_itself_badly(run_once: Mapping[str, Any]) -> None:
    given = ("--judge", "pocket", "--against", "prompted", "--limit", "4")
    finished = command(run_once["data"], *given)
    assert finished.returncode == 0, finished.stderr
    assert "warning: judge pocket and teacher pocket are of one family, Pocket" in finished.stderr
    path = run_once["data"] / "coherence/pocket/merged/prompted-by-pocket/humor.jsonl"
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(found) == 8 and {row["response"] for row in found} <= {*coherence.VERDICTS}
    assert {row["winner"] for row in found} <= {"merged", "prompted"}
    assert all(row["finish_reason"] == "stop" for row in found)


@pytest.mark.parametrize("name", ["remorse", ""])
def test_the_notebook(run_once: Mapping[str, Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_PATH", str(run_once["data"]))
    notebook = notebooks.execute(NOTEBOOK, {"STUDENT": "pocket", "CONSTITUTION": name})
    caption, shown, figure = (cell.outputs[0] for cell in notebook.cells if cell.cell_type == "code")
    assert "stand-in, no judge" in caption.text and "(stand-in)" in shown.data["text/plain"]
    assert "image/svg+xml" in figure.data


def test_nothing_to_show_is_one_line(run_once: Mapping[str, Any]) -> None:
    finished = command(run_once["data"], "--constitution", "sarcasm")
    assert finished.returncode == 2 and finished.stderr.count("\n") == 1
    assert finished.stderr.startswith("error: ") and "trained --constitution sarcasm" in finished.stderr
