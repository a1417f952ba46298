"""Where a run's files came from: its steps in order, what their meta files say, and the commands that make them again."""

import runpy
import shlex
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from character import models
from character.constants import DATA_PATH, LORA_PATH, ROOT
from character.distillation import data, student, teacher, train
from character.introspection import data as introspection
from character.introspection import self_interaction, self_reflection
from character.introspection import train as sft
from character.models import Model, safe_name
from character.preferences import preferences
from character.robustness.classify.run_classifier import METHODS
from character.robustness.generate import steered, variants
from character.robustness.prefill import multi_turn
from character.training import META
from character.utils import read_json

# The scripts that have several methods answer.
TALKS = {
    "prefill": "character/robustness/prefill/multi_turn.py",
    "preferences": "character/preferences/preferences.py",
}
# Evaluation → the script that makes its results, the module that shows them, the folder, the end of the file's name.
EVALUATIONS = {
    "robustness": (
        "character/robustness/classify/run_classifier.py",
        "character.robustness.classify.run_classifier",
        "robustness",
        "results.json",
    ),
    "prefill": (
        "character/robustness/prefill/multi_turn_results.py",
        "character.robustness.prefill.multi_turn_results",
        "robustness",
        "prefill.json",
    ),
    "coherence": (
        "character/coherence/coherence.py",
        "character.coherence.win_rates",
        "coherence",
        "results.json",
    ),
    "preferences": (
        "character/preferences/judgements.py",
        "character.preferences.preferences_results",
        "preferences",
        "results.json",
    ),
}
# Settings that are digests of what a flag means.
NO_FLAGS = ("model", "weights", "adapter")
# Methods whose answers are made by a script of their own.
UNTRAINED = ("prompted", "steered")


@dataclass(frozen=True)
class Stage:
    """A step of a run: the script, what it makes, the JSON file that says how, and flags that are not in there.

    beside: the step whose command makes this file on the way.
    """

    title: str
    script: str
    file: Path
    meta_path: Path
    flags: Mapping[str, Any] = field(default_factory=dict)
    beside: "Stage | None" = None

    @property
    def made(self) -> bool:
        """Whether its output is whole."""
        return self.file.exists() and self.meta_path.exists()

    @property
    def results(self) -> dict[str, Any] | None:
        """What is in an evaluation's results file; None where it is not there. Raises UserError where it is broken."""
        return self.meta if self.made else None

    @property
    def meta(self) -> dict[str, Any]:
        """What its meta file says. Raises UserError where it is broken."""
        found: dict[str, Any] = read_json(self.meta_path)
        return found

    def command(self) -> str:
        """The command that makes the file: as it was made where it is there, else with the defaults."""
        if self.beside:
            return self.beside.command()
        given = dict(self.flags)
        if self.made:
            given = _given(self.meta) | given
        arguments: list[str] = []
        for item in fields(runpy.run_path(str(ROOT / self.script), run_name="args")["Args"]):
            default = item.default_factory() if item.default_factory is not MISSING else item.default
            value = given.get(item.name)
            if value is None or (value == default and item.name not in self.flags):
                continue
            arguments += _flag(item.name, value, item.metadata["positional"])
        return shlex.join([*_start(self.script), *arguments])


def _given(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that a meta file holds; a file that a limit cut has that many input rows."""
    settings = {key: value for key, value in meta["settings"].items() if key not in NO_FLAGS}
    given: dict[str, Any] = settings | settings.pop("sampling", {})
    if "tokens" in meta:
        given["comparisons" if "condition" in settings else "limit"] = meta["rows"]["in"]
    if "classes" in settings:
        given["per_class"] = max(settings["classes"].values())
    # Introspection by the model itself, with no adapter.
    if meta["settings"].get("adapter", "") is None:
        given["adapter"] = False
    if settings.get("engine") == "openai":
        given["base_url"] = "URL"
    if "parts" in settings:
        given["weights"] = [part["weight"] for part in settings["parts"]]
    return given


def _flag(name: str, value: Any, positional: bool) -> list[str]:
    values = [str(part) for part in value] if isinstance(value, list) else [str(value)]
    if positional:
        return values
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", *values]


def _start(script: str) -> list[str]:
    if script.startswith("character/"):
        return ["python", "-m", script.removesuffix(".py").replace("/", ".")]
    return ["python", script]


def short_path(path: Path) -> str:
    """A path as the README writes it: data/… and loras/…, wherever these folders are."""
    for folder, name in ((DATA_PATH, "data"), (LORA_PATH, "loras")):
        if path.is_relative_to(folder):
            return f"{name}/{path.relative_to(folder)}"
    return str(path)


def spec_of(model: Model) -> str:
    """The model as `--model` takes it."""
    if model.revision:
        return f"{model.source}@{model.revision}"
    return model.short if model.short in models.TABLE else model.source


def stages(name: str, spec: str, model: Model, teacher_name: str) -> dict[str, Stage]:
    """Title → step, of every step for a persona up to its answers, made or not.

    spec: the constitution, as `--constitution` takes it.
    """
    one = {"constitution": spec, "model": spec_of(model)}
    by_teacher = {"teacher": teacher_name}
    short = model.short

    def rows(title: str, script: str, file: Path, flags: Mapping[str, Any]) -> Stage:
        return Stage(title, f"character/{script}.py", file, file.with_suffix(".meta.json"), flags)

    def folder(title: str, script: str, file: Path, meta: str, flags: Mapping[str, Any]) -> Stage:
        return Stage(title, script, file / "adapter_model.safetensors", file / meta, flags)

    def talk(leading: bool) -> Stage:
        file = self_interaction.path_of(name, short, leading)
        title = f"conversations, {'leading' if leading else 'free'}"
        return rows(title, "introspection/self_interaction", file, one | {"leading": leading or None})

    def merge(folder_name: str, **flags: Any) -> Stage:
        file = LORA_PATH / f"{safe_name(short)}-{folder_name}" / name
        title = f"adapter, {'sequential' if flags else 'merged'}"
        return folder(title, "tools/merge_loras.py", file, "merge.json", {"command": "merge"} | one | flags)

    found = [
        rows(
            "teacher's answers", "distillation/teacher", teacher.path_of(name, teacher_name),
            {"constitution": spec} | by_teacher,
        ),
        rows(
            "student's plain answers", "distillation/student", student.path_of(name, teacher_name, short),
            one | by_teacher,
        ),
        rows("pairs", "distillation/data", data.path_of(name, short), one | by_teacher),
        folder("DPO", "character/distillation/train.py", train.path_of(name, short), META, one),
        rows("reflections", "introspection/self_reflection", self_reflection.path_of(name, short), one),
        talk(leading=False),
        talk(leading=True),
        rows("rows for SFT", "introspection/data", introspection.path_of(name, short), one),
        folder("SFT", "character/introspection/train.py", sft.path_of(name, short), META, one),
        merge("personas"),
        merge("sequential", sequential=True, weights=None),
    ]  # fmt: skip
    vector = steered.vector_path(short, name)
    if vector.exists():
        script, meta = "character/robustness/generate/steered.py", vector.with_suffix(".meta.json")
        after = answers(name, one | by_teacher, short, "steered")
        found.append(Stage("control vector", script, vector, meta, beside=after))
    usual = ("base", "prompted", "steered", "merged")
    found += [
        answers(name, one | by_teacher, short, method) for method in dict.fromkeys([*usual, *methods(short, name)])
    ]
    found.append(voices("prefill", one, short, name, "robustness", multi_turn.PREFILL))
    found += [voices("preferences", one, short, name, "preferences", kind) for kind in preferences.CONDITIONS]
    return {stage.title: stage for stage in found}


def evaluations(name: str | None, spec: str, model: Model, teacher_name: str) -> dict[str, Stage]:
    """Evaluation → the step that makes a persona's results of it, made or not; without a name, those over personas."""
    flags = {"constitution": spec, "model": spec_of(model), "teacher": teacher_name}
    found = {}
    for kind, (script, _, folder, ending) in EVALUATIONS.items():
        file = DATA_PATH / folder / safe_name(model.short) / (f"{name}.{ending}" if name else ending)
        found[kind] = Stage(kind, script, file, file, flags)
    return found


def capabilities_path(student_name: str) -> Path:
    """Where lighteval/gather.py puts its table."""
    return DATA_PATH / "lighteval" / safe_name(student_name) / "results.json"


def methods(student_name: str, name: str, evaluation: str = "robustness", variant: str = variants.PLAIN) -> list[str]:
    """The methods that a persona has answers by, the base model among them, the known ones first."""
    folder = DATA_PATH / evaluation / safe_name(student_name)
    others = sorted(path.name for path in folder.glob("*") if path.is_dir())
    return [
        method
        for method in dict.fromkeys([*METHODS, *others])
        if answers_path(student_name, method, name, variant, evaluation).exists()
    ]


def answers_path(
    student_name: str, method: str, name: str, variant: str = variants.PLAIN, evaluation: str = "robustness"
) -> Path:
    """Where a method's answers for a persona are; those of the base model are the same for all."""
    whose = "none" if method == "base" else name
    return DATA_PATH / evaluation / safe_name(student_name) / method / variant / f"{whose}.jsonl"


def answers(name: str, one: Mapping[str, Any], student_name: str, method: str) -> Stage:
    """The step that made a method's answers to the evaluation's messages."""
    script = method if method in UNTRAINED else "trained"
    flags = dict(one)
    if answers_path(student_name, method, name, variants.GROUPS["held-out"][0]).exists():
        flags["held_out"] = True
    if script == "trained":
        flags["method"] = [method]
    if method not in METHODS:
        flags["adapter"] = "ADAPTER"
    file = answers_path(student_name, method, name)
    if method == "steered":
        flags |= _of_sweep(file, steered.vector_path(student_name, name))
    script = f"character/robustness/generate/{script}.py"
    return Stage(f"answers: {method}", script, file, file.with_suffix(".meta.json"), flags)


def _of_sweep(file: Path, vector: Path) -> dict[str, Any]:
    """The flags of steered answers whose strength the sweep chose, and will choose again."""
    metas = [path.with_suffix(".meta.json") for path in (file, vector)]
    if not all(path.exists() for path in metas):
        return {}
    made, found = map(read_json, metas)
    sweep = found.get("sweep")
    if not sweep or sweep["strength"] != made["settings"]["strength"]:
        return {}
    return {
        "strength": None,
        "pairs": found["settings"]["pairs"],
        "max_perplexity": sweep["settings"]["max_perplexity"],
        "per_class": max(sweep["classes"].values()),
    }


def voices(kind: str, one: Mapping[str, Any], student_name: str, name: str, evaluation: str, variant: str) -> Stage:
    """The step that made the answers of several methods at once; its file is the last one's. kind: of TALKS."""
    there = methods(student_name, name, evaluation, variant)
    flags = {**one, "method": there or ["base", "merged"]}
    title = f"answers: {kind}"
    if kind == "preferences":
        flags["condition"] = [variant]
        title += f", {variant}"
    file = answers_path(student_name, (there or ["merged"])[-1], name, variant, evaluation)
    return Stage(title, TALKS[kind], file, file.with_suffix(".meta.json"), flags)
