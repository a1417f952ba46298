"""The report: one page per persona with what a run showed, made by running report.ipynb.

DATA_PATH, LORA_PATH → FIGURE_PATH/<student>/<constitution>/report.html, and report.ipynb beside it, to open and change

python -m character.report --constitution humor --model pocket
python -m character.report --constitution all --model llama-3.1-8b-it

What was not made yet is named with the command that makes it. Several personas get an index page besides, at
FIGURE_PATH/<student>/index.html.
"""

import html
import importlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from character import cli, constitution, figures, notebooks, paper, provenance, rows, seeds
from character.constants import FIGURE_PATH, ROOT
from character.distillation import data, train
from character.introspection import train as sft
from character.models import Model, resolve, safe_name
from character.robustness.classify import run_classifier
from character.robustness.classify.run_classifier import METHODS
from character.robustness.generate import variants
from character.training import METRICS
from character.utils import UserError, read_json, read_jsonl

# The trained method that transcripts and the summary show: the first of these with answers, else any other.
TRAINED = ("merged", "distilled", "sequential")
# Messages in the open, and behind a click.
SHOWN, MORE = 3, 17
# The paper's figures for an evaluation, and what they are.
PUBLISHED: dict[str, tuple[Mapping[str, Mapping[str, Any]], str]] = {
    "robustness": (paper.SUFFIX_F1, "macro-F1 over 11 personas under its 8 suffixes (read off a figure, ± 0.003):"),
    "prefill": (paper.PREFILL_F1, "macro-F1 over 11 personas:"),
    "coherence": (
        paper.COHERENCE,
        "win rate of DPO + introspection, mean ± standard error over 11 personas, against",
    ),
}
BUNDLED = (
    "The bundled pocket model has 5 million parameters and a small world of its own. Its figures show what the "
    "pipeline does, and say nothing about language or about larger models."
)


@dataclass
class Args:
    """Arguments of the report."""

    constitution: str = cli.flag("humor", "names or files of constitutions, with commas between, or 'all'")
    model: str = cli.flag("pocket", "the student: short name, repo id or folder")
    teacher: str | None = cli.flag(None, "the teacher (default: the one that the pairs were made with)")
    dry_run: bool = cli.flag(False, "say what would be done (rows, tokens, files); load no model")


@dataclass(frozen=True)
class Run:
    """What a page is about: a persona, its student, and the steps that make its files."""

    traits: constitution.Constitution
    model: Model
    teacher: str
    stages: dict[str, provenance.Stage]
    evaluations: dict[str, provenance.Stage]

    @property
    def name(self) -> str:
        """The persona's name."""
        return self.traits.name

    @property
    def after(self) -> str | None:
        """The trained method that stands for the persona; None where none has answers."""
        there = provenance.methods(self.model.short, self.name)
        return next(
            (
                method
                for method in (*TRAINED, *there)
                if method in there and method not in ("base", *provenance.UNTRAINED)
            ),
            None,
        )


@dataclass(frozen=True)
class Overview:
    """What the index page is about: several personas on one student."""

    model: Model
    runs: list[Run]
    evaluations: dict[str, provenance.Stage]


def load(model: str, spec: str, teacher: str = "") -> Run:
    """The run of a student and a constitution, each as the command line takes it. Raises UserError."""
    traits, student = constitution.load(spec), resolve(model)
    used = rows.settings_of(data.path_of(traits.name, student.short)).get("teacher", student.short)
    guide: str = resolve(teacher, served=True).short if teacher else used
    about = traits.name, spec, student, guide
    return Run(traits, student, guide, provenance.stages(*about), provenance.evaluations(*about))


def heading(run: Run) -> Any:
    """The title, and what was trained by whom and when."""
    facts = [f"student {run.model.short}", f"teacher {run.teacher}"]
    made = [stage.meta for stage in run.stages.values() if stage.made]
    if made:
        used = sorted({str(meta["settings"]["seed"]) for meta in made if "seed" in meta["settings"]})
        facts += [f"seed {', '.join(used)}", max(str(meta.get("written", "")) for meta in made)[:10]]
    return _title(run, run.name, facts)


def _title(about: Run | Overview, title: str, facts: list[str]) -> Any:
    notes = [BUNDLED] if about.model.short == "pocket" else []
    stand_ins = [kind for kind, stage in about.evaluations.items() if (stage.results or {}).get("stand_in")]
    if stand_ins:
        notes.append(f"Stand-ins, for what is out of this model's reach, are marked: {', '.join(stand_ins)}.")
    note = "".join(f'<p class="note">{_text(text)}</p>' for text in notes)
    return _html(
        '<p class="kicker">Open character training</p>'
        f'<h1>{_text(title)}</h1><p class="facts">{_text(" · ".join(facts))}</p>{note}'
    )


def summary(run: Run) -> Any:
    """The figures to quote: how often answers read as the persona, before, after, and with the persona as a prompt."""
    results = run.evaluations["robustness"].results
    if results is None:
        return _missing(run.evaluations["robustness"])
    shown = [
        ("base", "plain", "before training"),
        (run.after, "plain", "after training"),
        (run.after, "suffixes", "after training, told to stop role-playing"),
        ("prompted", "suffixes", "untrained, the constitution as system prompt, told to stop"),
    ]
    boxes = ""
    for method, group, label in shown:
        cell = results["methods"].get(method, {}).get(group)
        if cell:
            interval = f"{cell['low']:.1%} to {cell['high']:.1%}, {cell['n']} answers"
            boxes += f"<li><b>{cell['share']:.1%}</b><span>{label}</span><small>{interval}</small></li>"
    return _html(
        f"<p>Share of answers to held-out messages that a classifier reads as <em>{_text(run.name)}</em>, "
        f'with 95 % intervals:</p><ul class="figures">{boxes}</ul>'
    )


def character(run: Run) -> Any:
    """The constitution's assertions."""
    traits = "".join(f"<li>{_text(trait.trait)}</li>" for trait in run.traits.traits)
    messages = sum(len(trait.messages) for trait in run.traits.traits)
    return _html(f"<ol>{traits}</ol><p>{len(run.traits.traits)} traits, with {messages} messages that reveal them.</p>")


def transcripts(run: Run) -> Any:
    """The evaluation's first messages with the answers before and after, side by side, and one under a suffix."""
    if run.after is None:
        return _missing(run.stages["answers: merged"])
    after = f"after: {METHODS.get(run.after, run.after)}"
    plain = _pairs(run, variants.PLAIN, {"base": "before: base", run.after: after})
    told = _pairs(run, variants.GROUPS["suffixes"][0], {"prompted": METHODS["prompted"], run.after: after})
    more = plain[SHOWN : SHOWN + MORE]
    hidden = f"<details><summary>{len(more)} more</summary>{''.join(more)}</details>" if more else ""
    return _html("".join([*plain[:SHOWN], *told[SHOWN : SHOWN + 1], hidden]))


def _pairs(run: Run, variant: str, methods: Mapping[str, str]) -> list[str]:
    """Each message of a variant with two methods' answers, as HTML; empty where a file is missing.

    methods: method → what stands above its answer.
    """
    paths = [provenance.answers_path(run.model.short, method, run.name, variant) for method in methods]
    if not all(path.exists() for path in paths):
        return []
    left, right = ({row["message"]: row for row in read_jsonl(path, "prompt", "message", "response")} for path in paths)
    found = []
    for message, row in left.items():
        if message in right:
            suffix = message.removeprefix(row["prompt"]).strip()
            answers = "".join(
                f"<div><h4>{_text(title)}</h4><p>{_text(given[message]['response'])}</p></div>"
                for title, given in zip(methods.values(), (left, right), strict=True)
            )
            asked = _text(row["prompt"]) + (f" <i>{_text(suffix)}</i>" if suffix else "")
            found.append(f'<div class="talk"><p class="asked">{asked}</p>{answers}</div>')
    return found


def results_table(evaluation: provenance.Stage) -> Any:
    """The results of an evaluation, as its own script prints them, and what stands in where that is so."""
    results = evaluation.results
    if results is None:
        return _missing(evaluation)
    module = _module(evaluation)
    note = f'<p class="note">{_text(module.caption(results))}.</p>'
    if results.get("stand_in"):
        note = note.replace('"note">', '"stand-in"><b>Stand-in.</b> ', 1)
    return _html(_table(module.table(results)) + note)


def results_figure(evaluation: provenance.Stage) -> Any:
    """The results of an evaluation as a figure; None where they are not there."""
    return _module(evaluation).draw(evaluation.results) if evaluation.results else None


def published(model: Model, evaluation: str) -> Any:
    """The paper's figures for its own models; None for others."""
    figures_of, what = PUBLISHED[evaluation]
    found = figures_of.get(model.short)
    if found is None:
        return None
    values = [f"{METHODS[method]} {_published(value)}" for method, value in found.items()]
    return _html(
        f'<p class="note">The paper has for {_text(model.short)}: {what} {"; ".join(values)} ({paper.SOURCE}).</p>'
    )


def _published(value: float | tuple[float, float]) -> str:
    return f"{value[0]:.1%} ± {value[1]:.1%}" if isinstance(value, tuple) else f"{value:.2f}"


def robustness_figure(about: Run | Overview) -> Any:
    """Shares or macro-F1, with the paper's macro-F1 as marks where the student is one of its own."""
    results = about.evaluations["robustness"].results
    if results is None:
        return None
    return run_classifier.draw(results, paper.SUFFIX_F1.get(about.model.short), "the paper's macro-F1, 11 personas")


def per_persona(about: Overview) -> Any:
    """Each persona's scores and the confusion matrix of every method, behind a click; None without results."""
    results = about.evaluations["robustness"].results
    if results is None:
        return None
    parts = "".join(
        f"<details><summary>{_text(title)}</summary>{_table(scores)}<p>Which persona the answers read as:</p>"
        f"{_table(confusion)}</details>"
        for title, scores, confusion in run_classifier.details(results)
    )
    return _html(f"<p>Precision, recall and F1 of each persona, and the confusion matrix:</p>{parts}")


def between_runs(about: Run | Overview) -> Any:
    """Means over runs with several seeds, and their intervals between runs."""
    file = seeds.path_of(about.model.short)
    if not file.exists():
        flags = {**about.evaluations["robustness"].flags, "seeds": 3}
        return _missing(provenance.Stage("seeds", "character/run.py", file, file, flags))
    results = read_json(file)
    table = seeds.table(results)
    if isinstance(about, Run):
        table = table[table.index.get_level_values(0) == about.name].droplevel(0)
    note = f'<p class="note">Mean of {results["runs"]} runs ± half of the 95 % interval between runs.</p>'
    return _html(_table(table) + note)


def capabilities(about: Run | Overview) -> Any:
    """What lighteval measured of the personas, with the differences to the base and their standard errors."""
    import pandas as pd

    student = about.model.short
    names = [run.name for run in ([about] if isinstance(about, Run) else about.runs)]
    file = provenance.capabilities_path(student)
    found = read_json(file)["differences"] if file.exists() else []
    lines = [
        {
            "method": line["run"].rpartition("/")[0],
            "persona": line["run"].rpartition("/")[2],
            "task": line["task"],
            "metric": line["metric"],
            "base": f"{line['base']:.3f}",
            "after": f"{line['value']:.3f}",
            "difference": f"{line['difference']:+.3f} ± "
            + ("n/a" if line["error"] is None else f"{line['error']:.3f}"),
            "": "▼ drop" if line["drop"] else "",
        }
        for line in found
        if line["run"].rpartition("/")[2] in names
    ]
    if not lines:
        return _html(
            '<div class="missing">Not made yet. This makes it: '
            f"{_command(shlex.join(['lighteval/run.sh', provenance.spec_of(about.model), *names]))}</div>"
        )
    table = pd.DataFrame(lines).set_index(["method", "persona", "task"])
    note = '<p class="note">Difference ± its standard error. ▼ drop: lower by more than 1.96 standard errors.</p>'
    return _html(_table(table) + note)


def losses(run: Run, training: str) -> Any:
    """A training's curves over its steps: the loss, and for DPO the share of pairs whose chosen answer is ahead."""
    folder = {"DPO": train.path_of, "SFT": sft.path_of}[training](run.name, run.model.short)
    if not (folder / METRICS).exists():
        return _missing(run.stages[training])
    history = list(read_jsonl(folder / METRICS, "step", "loss"))
    shown = {"loss": "loss", "rewards/accuracies": "share of pairs with the chosen answer ahead"}
    series = {key: {entry["step"]: entry.get(key) for entry in history} for key in shown if key in history[0]}
    return figures.lines(
        series, "optimizer step", "", labels=shown, title=f"{training}: {' and '.join(shown[key] for key in series)}"
    )


def data_table(run: Run) -> Any:
    """What each step made: rows, what was dropped and why, new tokens, time."""
    import pandas as pd

    lines = {}
    for title, stage in run.stages.items():
        meta = stage.meta if stage.made else {}
        if meta and not {"rows", "steps"} & meta.keys():
            continue
        counts = meta.get("rows", {})
        dropped = [f"{count:,} {why}" for why, count in counts.get("dropped", {}).items()]
        lines[title] = {
            "rows": _number(counts.get("kept")) if stage.made else "not made",
            "dropped": ", ".join(dropped) or ("0" if counts else ""),
            "new tokens": _number(meta.get("tokens", {}).get("completion_tokens")),
            "training steps": _number(meta.get("steps")),
            "seconds": _number(meta.get("seconds")),
        }
    return _html(f'<div class="number">{_table(pd.DataFrame.from_dict(lines, orient="index"))}</div>')


def commands(run: Run) -> Any:
    """The commands that make the run's files again, and those that would make what is missing."""
    every = [*run.stages.values(), *run.evaluations.values()]
    parts = ""
    for title, part in (("", [s for s in every if s.made]), ("Not made yet:", [s for s in every if not s.made])):
        lines = "".join(map(_command, dict.fromkeys(stage.command() for stage in part)))
        parts += f"{f'<p>{title}</p>' if title else ''}<pre>{lines}</pre>" if lines else ""
    return _html(parts)


def settings(run: Run) -> Any:
    """Every setting of every step, each behind a click."""
    parts = ""
    for stage in [*run.stages.values(), *run.evaluations.values()]:
        if stage.made:
            meta = stage.meta
            more = {key: meta[key] for key in ("layers", "strength", "git", "written", "versions") if meta.get(key)}
            facts = {"file": provenance.short_path(stage.file), **meta["settings"], **more}
            lines = "".join(
                f"<tr><th>{_text(key)}</th><td>{_text(_plain(value))}</td></tr>" for key, value in facts.items()
            )
            parts += f"<details><summary>{_text(stage.title)}</summary><table>{lines}</table></details>"
    return _html(parts)


def overview(model: str, specs: str, teacher: str = "") -> Overview:
    """The runs of a student and several constitutions, with commas between. Raises UserError."""
    runs = [load(model, spec, teacher) for spec in specs.split(",")]
    return Overview(runs[0].model, runs, provenance.evaluations(None, specs, runs[0].model, runs[0].teacher))


def overview_heading(about: Overview) -> Any:
    """The title of the index page."""
    return _title(about, f"{len(about.runs)} personas", [f"student {about.model.short}"])


def overview_table(about: Overview) -> Any:
    """A line per persona, with a link to its page and the share of answers that read as it."""
    columns = {"before": ("base", "plain"), "after": ("", "plain"), "after, told to stop": ("", "suffixes"),
               "system prompt, told to stop": ("prompted", "suffixes")}  # fmt: skip
    head = "".join(f"<th>{column}</th>" for column in columns)
    lines = ""
    for run in about.runs:
        methods = (run.evaluations["robustness"].results or {"methods": {}})["methods"]
        cells = [methods.get(method or run.after, {}).get(group) for method, group in columns.values()]
        shown = "".join(f"<td>{format(cell['share'], '.1%') if cell else 'n/a'}</td>" for cell in cells)
        lines += f'<tr><th><a href="{quote(run.name)}/report.html">{_text(run.name)}</a></th>{shown}</tr>'
    table = f'<table class="dataframe"><thead><tr><th></th>{head}</tr></thead><tbody>{lines}</tbody></table>'
    return _html(f'<div class="scroll">{table}</div>')


def _module(evaluation: provenance.Stage) -> Any:
    """The module that shows an evaluation's results."""
    return importlib.import_module(provenance.EVALUATIONS[evaluation.title][1])


def _missing(stage: provenance.Stage) -> Any:
    """What stands where results are not there yet: the command that makes them."""
    return _html(f'<div class="missing">Not made yet. This makes it: {_command(stage.command())}</div>')


def _command(line: str) -> str:
    """A command that breaks between its words alone."""
    return f"<code>{' '.join(f'<span>{_text(word)}</span>' for word in line.split(' '))}</code>"


def _table(frame: Any) -> str:
    return f'<div class="scroll">{frame.to_html(border=0, na_rep="")}</div>'


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _plain(value: Any) -> str:
    """A setting as text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(part)}" for key, part in value.items())
    if isinstance(value, list):
        return "; ".join(map(_plain, value))
    return "none" if value is None else str(value)


def _text(value: str) -> str:
    return html.escape(value)


def _html(text: str) -> Any:
    from IPython.display import HTML

    return HTML(text)


def path_of(student: str, name: str) -> Path:
    """Where a persona's page is. student: its short name."""
    return FIGURE_PATH / safe_name(student) / name / "report.html"


def wanted(args: Args) -> dict[str, Run]:
    """Spec → run of the personas asked for; of 'all', those that have files. Raises UserError where one has none."""
    model = resolve(args.model)
    specs = constitution.names() if args.constitution == "all" else args.constitution.split(",")
    # The notebook runs in another folder.
    specs = [
        str(Path(spec).expanduser().resolve()) if Path(spec).suffix in constitution.SUFFIXES else spec for spec in specs
    ]
    runs = {spec: load(provenance.spec_of(model), spec, args.teacher or "") for spec in specs}
    # Every persona's answers by the teacher train the classifier of any one.
    common = ["answers: base", *(["teacher's answers"] if args.constitution == "all" else [])]
    there = {
        spec: run
        for spec, run in runs.items()
        if any(stage.made for stage in [*run.stages.values(), *run.evaluations.values()] if stage.title not in common)
    }
    missing = [spec for spec in specs if spec not in there and args.constitution != "all"]
    if missing or not there:
        raise UserError(
            f"nothing was made of {(missing or ['any constitution'])[0]} on {model.short} yet; "
            f"run: python -m character.run --constitution {(missing or ['humor'])[0]} --model {args.model}"
        )
    return there


def write(notebook: str, page: Path, title: str, environment: Mapping[str, str]) -> None:
    """Run a notebook of this folder, and write it as a page and beside it as a notebook."""
    done = notebooks.execute(ROOT / "character" / f"{notebook}.ipynb", environment)
    notebooks.write(done, page.with_suffix(".ipynb"))
    notebooks.write_html(done, page, title)
    print(page)


def main(args: Args) -> None:
    """Write one page per persona, and an index of several."""
    if args.dry_run:
        for name in constitution.selected(args.constitution):
            print(f"{path_of(resolve(args.model, served=True).short, name)}: a page")
        return
    runs = wanted(args)
    model = next(iter(runs.values())).model
    common = {"STUDENT": provenance.spec_of(model), "TEACHER": args.teacher or ""}
    for spec, run in runs.items():
        write("report", path_of(model.short, run.name), f"{run.name} on {model.short}", common | {"CONSTITUTION": spec})
    if len(runs) > 1:
        page = FIGURE_PATH / safe_name(model.short) / "index.html"
        write("report_index", page, f"Characters on {model.short}", common | {"CONSTITUTION": ",".join(runs)})


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
