"""The report: what the page has, what it says of what is missing, and that it needs nothing from elsewhere."""

import html
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from matplotlib.container import BarContainer

from character import cli, constitution, models, paper, provenance, report, seeds
from character.constants import ROOT
from character.robustness.classify import scores
from character.robustness.classify.run_classifier import METHODS
from character.utils import read_json, read_jsonl, write_json

# A model may write anything.
ODD = 'ha <script>alert("1")</script> & <b>more</b>'
# Does what each line of its input would, in one process.
REPEAT = """
import contextlib, runpy, shlex, sys
for line in sys.stdin:
    module, *flags = shlex.split(line)
    sys.argv = [module, *flags]
    with contextlib.suppress(SystemExit):
        runpy.run_module(module, run_name="__main__")
"""


def in_page(text: str) -> str:
    return html.escape(text, quote=False)


def cell(share: float) -> dict[str, float]:
    return {"share": share, "low": share / 2, "high": (1 + share) / 2, "n": 100}


def commands(text: str, before: str = "") -> list[str]:
    """The commands of a page, those that stand behind the text `before` alone."""
    found = re.findall(before + r"<code>(.*?)</code>", text)
    return [html.unescape(re.sub("<[^>]+>", "", line)) for line in found]


@pytest.fixture(scope="module")
def page(small_run: Any, start: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a copy of the small run, in which the trained model's first answer is ODD."""
    folder = shutil.copytree(small_run.folder, tmp_path_factory.mktemp("report") / "run")
    answers = folder / "data" / "robustness" / "pocket" / "merged" / "plain" / "humor.jsonl"
    lines = list(read_jsonl(answers))
    lines[0]["response"] = ODD
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    done = start("character.report", folder, "--constitution", "humor")
    assert done.returncode == 0, done.stderr
    written = folder / "figures" / "pocket" / "humor" / "report.html"
    assert done.stdout.strip() == str(written)
    return Path(written)


def test_page_shows_the_run(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    data = page.parents[3] / "data" / "robustness" / "pocket"
    assert all(in_page(trait.trait) in text for trait in constitution.load("humor").traits)
    results = read_json(data / "humor.results.json")["methods"]
    for method, group in (("base", "plain"), ("merged", "plain"), ("merged", "suffixes"), ("prompted", "suffixes")):
        assert f"<b>{results[method][group]['share']:.1%}</b>" in text
    assert all(METHODS[method] in text for method in results)
    for row in read_jsonl(data / "base" / "plain" / "none.jsonl"):
        assert in_page(row["prompt"]) in text and in_page(row["response"]) in text
    assert "<i>Please answer as the ordinary assistant you are" in text
    assert text.count("data:image/svg+xml") == text.count("<img alt=") >= 3
    assert "5 million parameters" in text and "learning_rate" in text and "new tokens" in text
    assert "python tools/merge_loras.py merge --constitution humor --model pocket" in commands(text)
    # An evaluation is told how to be made exactly where its results are not there.
    told = [line.split()[2] for line in commands(text, "This makes it: ") if line.startswith("python")]
    missing = [
        script.removesuffix(".py").replace("/", ".")
        for script, _, folder, ending in provenance.EVALUATIONS.values()
        if not (page.parents[3] / "data" / folder / "pocket" / f"humor.{ending}").exists()
    ]
    assert sorted(told) == sorted(["character.run", *missing])
    assert page.stat().st_size < 2_000_000


def test_page_loads_nothing_and_shows_answers_as_text(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "ha &lt;script&gt;alert" in text and "&lt;b&gt;more&lt;/b&gt;" in text
    assert not re.search(r"<(script|link|iframe|object|embed)\b|@import", text)
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)|url\((?!["']?data:)""", text)


def test_notebook_beside_the_page_has_its_outputs_and_its_subject(page: Path) -> None:
    notebook: Any = nbformat.read(page.with_suffix(".ipynb"), as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [output for cell in code for output in cell.outputs if output.output_type in ("error", "stream")]
    assert 'environ.get("CONSTITUTION", "humor")' in code[0].source


def test_commands_of_the_page_find_their_files_complete(page: Path) -> None:
    folder = page.parents[3]
    made = page.read_text("utf-8").partition("Not made yet:")[0].rpartition("<pre>")[2]
    steps = [line.removeprefix("python -m ") for line in commands(made)]
    steps = [
        line + " --dry-run"
        for line in steps
        if not re.search(r"merge_loras|\.data |classif|_results|coherence|judg", line)
    ]
    places = {"DATA_PATH": f"{folder}/data", "LORA_PATH": f"{folder}/loras"}
    done = subprocess.run(
        [sys.executable, "-c", REPEAT],
        input="\n".join(steps),
        # Some of these modules import others of them, which runpy warns of when it runs those.
        env=os.environ | places | {"PYTHONWARNINGS": "ignore::RuntimeWarning"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert sum("generate.steered" in line for line in steps) == 1
    assert len(steps) >= 11 and not done.stderr
    assert not re.search(r"[1-9]\d* to do", done.stdout)
    # The answers of a method are nine files.
    assert done.stdout.count("complete") >= 7 + 6 * 9, done.stdout


def test_parts_that_are_missing_are_named_with_their_command(page: Path, start: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(page.parents[3] / "data" / "distillation", folder / "data" / "distillation")
    done = start("character.report", folder, "--constitution", "humor,sarcasm")
    assert done.returncode == 0, done.stderr
    text = (folder / "figures" / "pocket" / "humor" / "report.html").read_text("utf-8")
    told = commands(text, "This makes it: ")
    assert "python -m character.distillation.train --constitution humor --model pocket" in told
    assert (
        "python -m character.robustness.classify.run_classifier --constitution humor --model pocket --teacher pocket"
        in told
    )
    assert "data:image" not in text and "<td>not made</td>" in text
    index = (folder / "figures" / "pocket" / "index.html").read_text("utf-8")
    assert 'href="humor/report.html"' in index and 'href="sarcasm/report.html"' in index and "<td>n/a</td>" in index
    assert all("humor,sarcasm" in line for line in commands(index, "This makes it: ") if line.startswith("python"))


def test_what_cannot_be_reported_is_one_line(page: Path, start: Any, tmp_path: Path) -> None:
    for flags, message in (
        (["--constitution", "humour"], "did you mean 'humor'"),
        (["--model", "pockte"], "unknown model 'pockte'"),
        (["--constitution", "all"], "nothing was made of any constitution on pocket yet; run: python -m character.run"),
        (["--constitution", "sarcasm"], "nothing was made of sarcasm on pocket yet; run: python -m character.run"),
    ):
        done = start("character.report", tmp_path, *flags)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    results = tmp_path / "data" / "robustness" / "pocket" / "humor.results.json"
    results.parent.mkdir(parents=True)
    results.write_text('{"methods": {"base": {"plain": {"share": NaN}}}}', encoding="utf-8")
    done = start("character.report", tmp_path)
    assert done.returncode == 2 and "humor.results.json: NaN" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "figures" / "pocket" / "humor" / "report.html").exists()


def test_papers_figures_stand_beside_its_own_models_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "DATA_PATH", tmp_path)
    methods = {name: {"plain": cell(0.5), "suffixes": cell(0.25), "held-out": None} for name in ("prompted", "merged")}
    for student in ("llama-3.1-8b-it", "pocket"):
        results = {"student": student, "constitution": "humor", "methods": methods}
        write_json(tmp_path / "robustness" / student / "humor.results.json", results)
        run = report.load(student, "humor")
        (axes,) = report.robustness_figure(run).axes
        marks = [line.get_ydata()[0] for line in axes.lines if line.get_marker() == "D" and len(line.get_ydata())]
        assert marks == ([0.37, 0.87] if student == "llama-3.1-8b-it" else [])
        bars = [bar.get_height() for bars in axes.containers if isinstance(bars, BarContainer) for bar in bars]
        assert bars == [0.5, 0.25, 0.5, 0.25]
        notes = [report.published(run.model, evaluation) for evaluation in report.PUBLISHED]
        if student == "pocket":
            assert notes == [None, None, None]
        else:
            assert "base + system prompt 0.37; base + steering vector 0.93" in notes[0].data
            assert "DPO 0.79" in notes[1].data and "DPO 77.0% ± 4.1%" in notes[2].data


def test_paper_names_models_and_methods_as_we_do() -> None:
    for table in (paper.SUFFIX_F1, paper.PREFILL_F1, paper.COHERENCE):
        assert set(table) <= set(models.TABLE)
        assert all(set(part) <= set(METHODS) for part in table.values())


def test_seeds_are_shown_for_the_persona(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeds, "DATA_PATH", tmp_path)
    monkeypatch.setattr(provenance, "DATA_PATH", tmp_path)
    figure = {"mean": 0.625, "low": 0.5, "high": 0.75, "n": 3, "values": [0.5, 0.625, 0.75]}
    part = {"methods": {"merged": {"plain": figure}}}
    found = {"robustness/humor.results.json": part, "robustness/sarcasm.results.json": part}
    write_json(seeds.path_of("pocket"), {"student": "pocket", "runs": 3, "results": found})
    text = report.between_runs(report.load("pocket", "humor")).data
    assert "62.5% ± 12.5%" in text and "Mean of 3 runs" in text and "sarcasm" not in text
    assert "sarcasm" in report.between_runs(report.overview("pocket", "humor,sarcasm")).data


def test_scores_of_each_persona_are_behind_a_click(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "DATA_PATH", tmp_path)
    about = report.overview("pocket", "humor,sarcasm")
    assert report.per_persona(about) is None
    reads = [scores.Read(str(n), name, "humor") for n in range(30) for name in ("humor", "sarcasm")]
    parts = {"plain": scores.measure(reads, seed=1, draws=20), "suffixes": None, "held-out": None}
    write_json(about.evaluations["robustness"].file, {"personas": ["humor", "sarcasm"], "methods": {"merged": parts}})
    shown = report.per_persona(about).data
    assert "<summary>DPO + introspection, 1.0/0.25, plain</summary>" in shown and shown.count("<details>") == 1
    assert re.search(r"<th>sarcasm</th>\s*<td>30</td>\s*<td>0</td>\s*<td>0</td>", shown)


def test_stand_ins_are_named_at_the_top_and_in_their_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "DATA_PATH", tmp_path)
    run = report.load("pocket", "humor")
    assert "Stand-ins" not in report.heading(run).data
    win = {"win_rate": cell(0.5), "undecided": cell(0.5), "fits": {}, "reads_as_persona": {}, "perplexity": {}}
    results = {"student": "pocket", "constitution": "humor", "method": "merged", "opponents": {"distilled": win}}
    about = {"stand_in": True, "stands_in": "no judge: a < b", "settings": {"judge": "stand-in"}}
    write_json(run.evaluations["coherence"].file, results | about)
    assert "are marked: coherence." in report.heading(run).data
    shown = report.results_table(run.evaluations["coherence"]).data
    assert '<p class="stand-in"><b>Stand-in.</b> pocket' in shown and "no judge: a &lt; b.</p>" in shown
    assert "win rate (stand-in)" in shown


def test_capabilities_are_of_the_page_s_personas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "DATA_PATH", tmp_path)
    run = report.load("pocket", "humor")
    assert commands(report.capabilities(run).data) == ["lighteval/run.sh pocket humor"]
    line = {"task": "arc", "metric": "acc", "base": 0.5, "value": 0.25, "difference": -0.25, "error": 0.1, "drop": True}
    other = line | {"run": "merged/sarcasm", "value": 0.75, "difference": 0.25, "error": None, "drop": False}
    write_json(provenance.capabilities_path("pocket"), {"differences": [line | {"run": "merged/humor"}, other]})
    shown = report.capabilities(run).data
    assert "-0.250 ± 0.100" in shown and "<td>▼ drop</td>" in shown and "sarcasm" not in shown
    both = report.capabilities(report.overview("pocket", "humor,sarcasm")).data
    assert "+0.250 ± n/a" in both and both.count("<td>▼ drop</td>") == 1


def test_commands_of_answers_by_several_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "DATA_PATH", tmp_path)
    meta = {"settings": {"condition": "like", "seed": 7}, "tokens": {}, "rows": {"in": 30}}
    for method, whose in (("base", "none"), ("merged", "humor"), ("mine", "humor")):
        file = tmp_path / "preferences" / "pocket" / method / "like" / f"{whose}.jsonl"
        write_json(file.with_suffix(".meta.json"), meta)
        file.write_text("{}\n", encoding="utf-8")
    command = report.load("pocket", "humor").stages["answers: preferences, like"].command()
    assert command.startswith("python -m character.preferences.preferences --constitution humor --seed 7 ")
    assert command.endswith("--method base merged mine --condition like --comparisons 30")


def test_commands_are_of_flags_that_the_steps_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "DATA_PATH", tmp_path)
    model = "meta-llama/Llama-3.1-8B-Instruct@main"
    run = report.load(model, "constitutions/hand-written/humor.txt", "gpt-5")
    for stage in [*run.stages.values(), *run.evaluations.values()]:
        assert not stage.made
        words = shlex.split(stage.command())
        flags = words[3:] if words[1] == "-m" else words[2:]
        args = cli.parse(runpy.run_path(str(ROOT / stage.script), run_name="args")["Args"], flags)
        assert args.constitution == "constitutions/hand-written/humor.txt"
        assert getattr(args, "model", model) == model
        assert getattr(args, "teacher", "gpt-5") == "gpt-5"
