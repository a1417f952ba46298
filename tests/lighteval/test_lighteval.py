"""lighteval/: its task names and settings are lighteval's own; run.sh on the bundled model with local questions."""

import importlib.metadata
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from character.constants import ASSETS, ROOT
from character.models import TABLE
from character.utils import UserError, read_json, write_json

HERE = Path(__file__).parent
FOLDER = ROOT / "lighteval"
TASKS = "topics:first|0\ntopics:need|2\nwords:greeting|1\n"
SHOTS = {"arc:challenge": 25, "hellaswag": 10, "truthfulqa:mc": 0, "winogrande": 5}

# In a process of its own: importing lighteval turns gradients off, also for the tests that train.
CHECK = """
import json, sys, types
sys.modules["lighteval.tasks.tasks.tiny_benchmarks"] = types.ModuleType("tiny_benchmarks")
import yaml
from lighteval.models.transformers.transformers_model import TransformersModelConfig
from lighteval.tasks.registry import Registry
def tasks(path):
    try:
        return {config.full_name: list(config.evaluation_splits) for group in Registry(path).task_to_configs.values() for config in group}
    except ValueError as error:
        return str(error)
def config(path):
    try:
        settings = yaml.safe_load(open(path))["model_parameters"]
        text = ",".join(f"{key}={value}" for key, value in settings.items())
        parsed = TransformersModelConfig._parse_args("model_name=model," + text)
        return [settings, json.loads(TransformersModelConfig(**parsed).model_dump_json())]
    except ValueError as error:
        return str(error)
print("\\n" + json.dumps({path: config(path) if path.endswith(".yaml") else tasks(path) for path in sys.argv[1:]}))
"""


@pytest.fixture
def library(require: Callable[[str], Any]) -> None:
    """Skips the test where lighteval is absent; in CI that is a failure."""
    require("lighteval.cli_args")


# What lighteval knows.


@pytest.mark.usefixtures("library")
def test_tasks_and_settings_are_lightevals_own(tmp_path: Path) -> None:
    (tmp_path / "typo.txt").write_text("arc:chalenge|25\n")
    (tmp_path / "typo.yaml").write_text("model_parameters:\n  dtyp: float32\n")
    configs = sorted(FOLDER.glob("configs/*.yaml"))
    paths = [FOLDER / "tasks.txt", tmp_path / "typo.txt", tmp_path / "typo.yaml", *configs]
    command = [sys.executable, "-c", CHECK, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tasks, typo, wrong, *settings = json.loads(done.stdout.splitlines()[-1]).values()
    assert {name.rpartition("|")[0]: int(name.rpartition("|")[2]) for name in tasks if "mmlu" not in name} == SHOTS
    assert sum(name.startswith("mmlu:") and name.endswith("|5") for name in tasks) == len(tasks) - len(SHOTS) == 57
    # A name or a setting that lighteval does not know fails.
    assert "Cannot find task arc:chalenge" in typo
    assert "dtyp" in wrong and "Extra inputs are not permitted" in wrong
    for given, read in settings:
        assert {key: read[key] for key in given} == given
        # A chat template writes the BOS itself.
        assert given["override_chat_template"] and not given["add_special_tokens"]


def test_every_config_is_a_students_and_differs_from_the_default() -> None:
    texts = {path.stem: path.read_text() for path in FOLDER.glob("configs/*.yaml")}
    assert texts.keys() - {"default"} <= TABLE.keys()
    assert len(set(texts.values())) == len(texts)


# The real command line.


def make_adapter(folder: Path, seed: int, gain: float, hidden: int = 256) -> Path:
    """A LoRA adapter with random weights on the MLPs of the bundled model, or of one of another width."""
    import numpy as np
    from safetensors.numpy import save_file

    config = read_json(ASSETS / "pocket" / "config.json")
    inner = config["intermediate_size"]
    random, tensors = np.random.default_rng(seed), {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.mlp.down_proj"
        tensors[f"{name}.lora_A.weight"] = (random.normal(size=(4, inner)) / math.sqrt(inner)).astype("float32")
        tensors[f"{name}.lora_B.weight"] = (gain * random.normal(size=(hidden, 4))).astype("float32")
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 4, "target_modules": ["down_proj"]}
    write_json(folder / "adapter_config.json", settings | {"base_model_name_or_path": str(ASSETS / "pocket")})
    return folder


Start = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """start(*arguments): run.sh from another folder, with every path under tmp_path and no network."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "tasks.txt").write_text(TASKS)
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "DATA_PATH": str(tmp_path / "data"),
        "LORA_PATH": str(tmp_path / "loras"),
        "MODEL_PATH": str(tmp_path / "models"),
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(FOLDER / "run.sh"), *arguments]
        return subprocess.run(command, env=environment, cwd=elsewhere, capture_output=True, text=True, check=False)

    return run


LOCAL = ["--tasks", "tasks.txt", "--custom-tasks", str(HERE / "questions.py")]


@pytest.mark.usefixtures("library")
def test_base_and_persona(start: Start, tmp_path: Path) -> None:
    """An adapter that ruins the model is seen to: the base's answers, known by the model's name, do not come back."""
    import pyarrow.parquet

    loras, home = tmp_path / "loras" / "pocket-personas", tmp_path / "data" / "lighteval" / "pocket"
    make_adapter(loras / "humor", seed=1, gain=3.0)
    before = set((ASSETS / "pocket").rglob("*"))
    done = start("pocket", "humor", *LOCAL)
    assert done.returncode == 0, done.stderr
    assert set((ASSETS / "pocket").rglob("*")) == before

    lines = read_json(home / "results.json")["differences"]
    assert [(line["task"], line["items"]) for line in lines] == [("topics (2)", 32), ("words:greeting|1", 8)]
    for line in lines:
        assert (line["run"], line["kind"], line["base"], line["drop"]) == ("merged/humor", "paired", 1.0, True)
        assert line["value"] < 0.6
    assert [row.split()[0] for row in done.stdout.splitlines() if row.endswith("▼ drop")] == ["merged/humor"] * 2

    # What a run leaves: results, details, a meta file; neither the folded model nor the cache.
    names = {"results.json", "meta.json", "details", *(f"{task}.parquet" for task in TASKS.split())}
    for run in ("base/none", "merged/humor"):
        assert {path.name for path in (home / run).rglob("*")} == names
        for task in TASKS.split():
            rows = pyarrow.parquet.read_table(home / run / "details" / f"{task}.parquet").to_pylist()
            # The bundled tokenizer's BOS is 1.
            assert {row["model_response"]["input_tokens"].count(1) for row in rows} == {1}
    assert not (tmp_path / "models").exists()
    meta = read_json(home / "merged" / "humor" / "meta.json")
    assert meta["command"].startswith("lighteval/run.sh pocket humor --tasks tasks.txt")
    assert meta["versions"]["lighteval"] == meta["settings"]["lighteval"]

    # A command that fails ends the run, with its own message and nothing half done.
    make_adapter(loras / "wide", seed=2, gain=1.0, hidden=64)
    make_adapter(loras / "sarcasm", seed=3, gain=3.0)
    refuses(start("pocket", "wide", "sarcasm", *LOCAL), "does not fit")
    assert {path.name for path in (home / "merged").iterdir()} == {"humor"}

    # What is there is not done again, nor mixed with other settings.
    stamps = {path: path.stat().st_mtime_ns for path in home.rglob("meta.json")}
    again = start("pocket", "humor", *LOCAL)
    assert again.returncode == 0 and again.stdout.count(": complete") == 2
    refuses(start("pocket", *LOCAL, "--limit", "4"), "limit was null, now 4")
    os.replace(loras / "sarcasm" / "adapter_model.safetensors", loras / "humor" / "adapter_model.safetensors")
    refuses(start("pocket", "humor", *LOCAL), "merged/humor was made with other settings: adapter was")
    assert {path: path.stat().st_mtime_ns for path in home.rglob("meta.json")} == stamps


def refuses(done: subprocess.CompletedProcess[str], message: str) -> None:
    """Assert that a command ended with one line of error and exit code 2."""
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: ") and message in last, done.stderr
    assert "Traceback" not in done.stderr


def test_dry_run_prints_the_commands_and_writes_nothing(start: Start, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "loras" / "pocket-sequential" / "humor", seed=1, gain=1.0)
    done = start("pocket", "all", "--method", "sequential", "--limit", "5", "--keep-folded", "--dry-run")
    assert done.returncode == 0, done.stderr
    folded = tmp_path / "models" / "folded" / "pocket-sequential" / "humor"
    for shown in (
        f"ln -s {ASSETS / 'pocket'} model",
        f"merge_loras.py fold --model {ASSETS / 'pocket'} --adapters {adapter} --out {folded}",
        f"ln -s {folded} model",
        "start.py accelerate model_name=model,cache_dir=cache,dtype=float32",
        f"{FOLDER / 'tasks.txt'} --output-dir .",
        "--max-samples 5",
        "gather.py pocket",
    ):
        assert shown in done.stdout
    assert done.stdout.count("accelerate") == 2
    # Of 'all', personas without an adapter are named and left out.
    assert "sequential/loving: left out:" in done.stdout
    assert not (tmp_path / "data").exists() and not (tmp_path / "models").exists()
    hub = start("meta-llama/Llama-3.1-8B-Instruct@abc", "--dry-run").stdout
    assert "model_name=meta-llama/Llama-3.1-8B-Instruct,revision=abc,cache_dir=cache,dtype=bfloat16" in hub


@pytest.mark.usefixtures("library")
def test_mistakes_end_with_one_line(start: Start, tmp_path: Path) -> None:
    refuses(start("pocket", "humor"), f"{tmp_path}/loras/pocket-personas/humor is no LoRA adapter")
    refuses(start("pocket", "humor", "--method", "mine"), "--method mine needs --adapter")
    refuses(start("pocket", "--adapter", "x"), "--adapter goes with one persona")
    refuses(start("pocket", "--tasks", "none.txt"), "none.txt does not exist")
    refuses(start("pokket"), "Did you mean 'pocket'")
    refuses(start(), "required: model")


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        ({"xxhash": "3.8.2"}, "lighteval is not installed"),
        ({"lighteval": "0.14.0", "xxhash": "3.8.2"}, "needs lighteval 0.13.0, and 0.14.0 is installed"),
        ({"lighteval": "0.13.0", "xxhash": "4.1.0"}, "cannot save its results with xxhash 4.1.0"),
    ],
)
def test_a_library_that_would_fail_is_refused(
    installed: dict[str, str], message: str, ours: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(UserError, match=message):
        ours("launch").check_library()


# The table.


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """ours("gather"): a script of lighteval/ as a module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def write_run(home: Path, run: str, scores: dict[str, list[float]], details: bool = True, **changes: Any) -> None:
    """A run's folder as lighteval and launch.py leave it. scores: task → score of each question."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet

    folder = home / run
    results, config = {}, {}
    for task, values in scores.items():
        results[task] = {
            "acc": float(np.mean(values)),
            "acc_stderr": float(np.std(values, ddof=1) / len(values) ** 0.5),
        }
        config[task] = {"metrics": [{"metric_name": "acc", "higher_is_better": changes.get("higher", True)}]}
        if details:
            (folder / "details").mkdir(parents=True, exist_ok=True)
            rows = [
                {"doc": {"id": str(n), "query": f"question {n}"}, "metric": {"acc": value}}
                for n, value in enumerate(values)
            ]
            pyarrow.parquet.write_table(pa.Table.from_pylist(rows[::-1]), folder / "details" / f"{task}.parquet")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", {"results": results | {"all": {"acc": 0.0}}, "config_tasks": config})
    settings = {"limit": None, "adapter": run}
    write_json(folder / "meta.json", {"settings": settings | changes.get("settings", {})})


@pytest.fixture
def home(tmp_path: Path, ours: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ours("gather"), "DATA_PATH", tmp_path)
    return tmp_path / "lighteval" / "pocket"


def gathered(home: Path) -> dict[str, Any]:
    import gather

    gather.main(gather.Args("pocket"))
    found: dict[str, Any] = read_json(home / "results.json")
    return found


def test_paired_and_combined_errors(home: Path) -> None:
    import numpy as np

    random = np.random.default_rng(0)
    old = random.integers(0, 2, 400)
    new = np.where(random.random(400) < 0.1, 0, old)
    write_run(home, "base/none", {"a|5": list(map(float, old))})
    write_run(home, "merged/paired", {"a|5": list(map(float, new))})
    write_run(home, "merged/unpaired", {"a|5": list(map(float, new))}, details=False)
    write_run(home, "merged/other", {"a|5": list(map(float, new[:200]))})
    paired, unpaired, other = (
        next(line for line in gathered(home)["differences"] if line["run"] == f"merged/{name}")
        for name in ("paired", "unpaired", "other")
    )
    assert paired["difference"] == unpaired["difference"] == pytest.approx(new.mean() - old.mean())
    # The variance of a difference of correlated means, from the covariance matrix.
    covariance = np.cov(old, new) / 400
    assert paired["error"] == pytest.approx(math.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]))
    assert unpaired["error"] == pytest.approx(math.sqrt(covariance[0, 0] + covariance[1, 1]))
    assert [line["kind"] for line in (paired, unpaired, other)] == ["paired", "combined", "combined"]
    # The same drop is noise where the pairing is not known.
    assert (paired["drop"], unpaired["drop"]) == (True, False)


def test_families_count_as_their_mean(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two, three = [1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 1.0]
    write_run(home, "base/none", {"a:x|5": one, "a:y|5": two, "b|0": one})
    write_run(home, "merged/p", {"a:x|5": two, "a:y|5": three, "b|0": one})
    second, first = gathered(home)["differences"]
    assert (first["task"], first["difference"], first["error"], first["drop"]) == ("b|0", 0.0, 0.0, False)
    assert (second["task"], second["items"], second["base"], second["value"]) == ("a (2)", 8, 0.5, 0.5)
    # Differences (0, -1, -1, 0) and (-1, 1, 1, 1): errors √(1/3)/2 and 1/2, of the mean half their root sum of squares.
    assert (second["difference"], second["error"]) == (0.0, pytest.approx(math.sqrt(1 / 12 + 1 / 4) / 2))
    assert "0 of 2 are drops larger than noise" in capsys.readouterr().out


def test_a_metric_may_be_better_when_lower(home: Path) -> None:
    low, high = [1.0, 1.1, 1.2, 1.3] * 10, [2.0, 2.1, 2.2, 2.4] * 10
    write_run(home, "base/none", {"a|5": low}, higher=False)
    write_run(home, "merged/worse", {"a|5": high}, higher=False)
    assert [line["drop"] for line in gathered(home)["differences"]] == [True]
    write_run(home, "base/none", {"a|5": high}, higher=False)
    write_run(home, "merged/worse", {"a|5": low}, higher=False)
    assert [line["drop"] for line in gathered(home)["differences"]] == [False]


def test_what_cannot_be_compared(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"no results of the base .* run: lighteval/run.sh pocket"):
        gathered(home)
    write_run(home, "base/none", {"a|5": [1.0, 0.0]})
    assert gathered(home)["differences"] == []
    assert "only the base has been evaluated" in capsys.readouterr().out
    write_run(home, "merged/trial", {"a|5": [1.0, 0.0]}, settings={"limit": 2})
    write_run(home, ".humor.new", {"a|5": [1.0, 0.0]})
    found = gathered(home)
    assert found["differences"] == [] and list(found["left_out"]) == ["merged/trial"]
    assert "left out: merged/trial: not made as the base's: limit 2 instead of None" in capsys.readouterr().out
    # One question has no standard error, and so no mark.
    for run, score in (("base/none", 1.0), ("merged/one", 0.0)):
        write_run(home, run, {"a|5": [score, score]})
        results = read_json(home / run / "results.json")
        del results["results"]["a|5"]["acc_stderr"]
        write_json(home / run / "results.json", results)
        (home / run / "details" / "a|5.parquet").unlink()
    line = next(line for line in gathered(home)["differences"] if line["run"] == "merged/one")
    assert (line["difference"], line["error"], line["drop"]) == (-1.0, None, False)
    assert "-1.000 ± n/a" in capsys.readouterr().out
    text = (home / "merged/one/results.json").read_text()
    (home / "merged/one/results.json").write_text(text.replace('"acc": 0.0', '"acc": NaN', 1))
    with pytest.raises(UserError, match=r"merged/one/results.json.*NaN"):
        gathered(home)
