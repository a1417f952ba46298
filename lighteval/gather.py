"""One table of what lighteval measured: every persona's differences to the base, with their standard errors.

DATA_PATH/lighteval/<student>/<method>/<constitution>/ → DATA_PATH/lighteval/<student>/results.json

python lighteval/gather.py llama-3.1-8b-it

Where base and persona answered the same questions, the standard error is that of the mean difference per question
("paired"); else it is the root of the sum of both squared errors ("combined"). Tasks of one family (mmlu) count as their
mean. A drop is marked where it is more than 1.96 standard errors: by chance alone, one difference in 40 would be.
"""

import math
import shlex
import statistics
import sys
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from character import cli
from character.constants import DATA_PATH
from character.intervals import Z95
from character.models import resolve, safe_name
from character.utils import UserError, git_commit, read_json, versions, write_json

BASE = "base/none"
DROP = "▼ drop"


@dataclass
class Args:
    """Arguments."""

    model: str = cli.flag(MISSING, "the student", positional=True)


@dataclass
class Line:
    """One task and metric of one persona. error: of the difference, None where it is unknown. items: questions."""

    run: str
    task: str
    metric: str
    base: float
    value: float
    difference: float
    error: float | None
    kind: Literal["paired", "combined"]
    items: int | None
    better: Literal["higher", "lower"]

    @property
    def drop(self) -> bool:
        """Whether the persona is worse by more than noise."""
        worse = self.difference if self.better == "lower" else -self.difference
        return self.error is not None and worse > Z95 * self.error


class Result:
    """A run's folder: its results file, and its details where asked for. Raises UserError where a file is broken."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.settings: dict[str, Any] = read_json(folder / "meta.json")["settings"]
        found = read_json(folder / "results.json")
        self.config = found["config_tasks"]
        self.scores: dict[str, dict[str, float]] = {task: found["results"][task] for task in self.config}

    def metrics(self, task: str) -> list[str]:
        """The names of a task's metrics."""
        return [name for name in self.scores[task] if not name.endswith("_stderr")]

    def better(self, task: str, metric: str) -> Literal["higher", "lower"]:
        """Which way the metric goes."""
        for entry in self.config[task]["metrics"]:
            higher = entry["higher_is_better"]
            if entry["metric_name"] == metric or (isinstance(higher, dict) and metric in higher):
                return "higher" if (higher[metric] if isinstance(higher, dict) else higher) else "lower"
        raise UserError(f"{self.folder / 'results.json'} does not describe {metric} of {task}; evaluate it again")

    def items(self, task: str, metric: str) -> dict[tuple[str, str], float]:
        """(id, question) → score; empty where there are no details, or their mean is not the task's score."""
        import pyarrow.parquet

        path = self.folder / "details" / f"{task}.parquet"
        if not path.exists():
            return {}
        rows = pyarrow.parquet.read_table(path, columns=["doc.id", "doc.query", "metric"]).to_pylist()
        scores = {(row["id"], row["query"]): row["metric"][metric] for row in rows}
        if len(scores) < len(rows) or any(not isinstance(score, (int, float)) for score in scores.values()):
            return {}
        mean = statistics.fmean(scores.values())
        return scores if math.isclose(mean, self.scores[task][metric], abs_tol=1e-6) else {}


def compare(run: str, base: Result, persona: Result, task: str, metric: str) -> Line:
    """A task's difference: paired where both have a score for each of the same questions, else combined."""
    before, after = base.scores[task], persona.scores[task]
    old, new = base.items(task, metric), persona.items(task, metric)
    line = Line(
        run, task, metric, before[metric], after[metric], after[metric] - before[metric], None, "combined",
        len(new) or None, base.better(task, metric),
    )  # fmt: skip
    if old and old.keys() == new.keys():
        line.kind = "paired"
        differences = [new[key] - old[key] for key in old]
        if len(differences) > 1:
            line.error = statistics.stdev(differences) / math.sqrt(len(differences))
    elif f"{metric}_stderr" in before and f"{metric}_stderr" in after:
        line.error = math.hypot(before[f"{metric}_stderr"], after[f"{metric}_stderr"])
    return line


def mean_of(lines: list[Line], family: str) -> Line:
    """The mean of a family's tasks, each of the same weight; its error that of a mean of independent numbers."""
    errors = [line.error for line in lines if line.error is not None]
    known = len(errors) == len(lines)
    sizes = [line.items for line in lines if line.items is not None]
    return Line(
        run=lines[0].run,
        task=f"{family} ({len(lines)})",
        metric=lines[0].metric,
        base=statistics.fmean(line.base for line in lines),
        value=statistics.fmean(line.value for line in lines),
        difference=statistics.fmean(line.difference for line in lines),
        error=math.hypot(*errors) / len(lines) if known else None,
        kind="paired" if all(line.kind == "paired" for line in lines) else "combined",
        items=sum(sizes) if len(sizes) == len(lines) else None,
        better=lines[0].better,
    )


def differences(run: str, base: Result, persona: Result) -> list[Line]:
    """The lines of a persona, families of tasks as their means."""
    families: dict[tuple[str, str], list[Line]] = {}
    for task in sorted(base.scores):
        family = task.partition("|")[0].partition(":")[0]
        for metric in base.metrics(task):
            families.setdefault((family, metric), []).append(compare(run, base, persona, task, metric))
    return [lines[0] if len(lines) == 1 else mean_of(lines, family) for (family, _), lines in families.items()]


def table(lines: list[Line]) -> str:
    """The lines as text."""
    import pandas as pd

    shown = [
        {
            "method/persona": line.run,
            "task": line.task,
            "metric": line.metric,
            "base": f"{line.base:.3f}",
            "persona": f"{line.value:.3f}",
            "difference": f"{line.difference:+.3f} ± {'n/a' if line.error is None else f'{line.error:.3f}'}",
            "error": line.kind,
            "questions": "n/a" if line.items is None else str(line.items),
            "": DROP if line.drop else "",
        }
        for line in lines
    ]
    return str(pd.DataFrame(shown).to_string(index=False))


def main(args: Args) -> None:
    """Read every run, print the table and write it."""
    student = safe_name(resolve(args.model, served=True).short)
    home = DATA_PATH / "lighteval" / student
    found = sorted(f"{path.parts[-3]}/{path.parts[-2]}" for path in home.glob("*/[!.]*/meta.json"))
    if BASE not in found:
        raise UserError(f"no results of the base at {home / BASE}; run: lighteval/run.sh {args.model}")
    base = Result(home / BASE)
    lines: list[Line] = []
    left_out: dict[str, str] = {}
    for run in (name for name in found if name != BASE):
        persona = Result(home / run)
        changed = [
            f"{key} {persona.settings.get(key)!r} instead of {value!r}"
            for key, value in base.settings.items()
            if key != "adapter" and persona.settings.get(key) != value
        ]
        if changed:
            left_out[run] = f"not made as the base's: {'; '.join(changed)}"
        else:
            lines += differences(run, base, persona)
    write_json(
        home / "results.json",
        {
            "student": student,
            "command": shlex.join(["python", "lighteval/gather.py", *sys.argv[1:]]),
            "settings": base.settings,
            "base": base.scores,
            "differences": [asdict(line) | {"drop": line.drop} for line in lines],
            "left_out": left_out,
            "git": git_commit(),
            "versions": versions(),
        },
    )
    print(f"\n{student}: difference to the base ± its standard error")
    if lines:
        drops = sum(line.drop for line in lines)
        print(table(lines))
        print(f"{drops} of {len(lines)} are drops larger than noise ({DROP}: more than {Z95:.2f} standard errors)")
    else:
        print("only the base has been evaluated; name personas after the model")
    for run, why in left_out.items():
        print(f"left out: {run}: {why}")
    print(f"results  {home / 'results.json'}")


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
