"""The parts of benchmarks/gpu/agreement.py that need no GPU."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from character.constants import ROOT
from character.utils import UserError

PAIR = {
    role: [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": role}] for role in ("chosen", "rejected")
}


@pytest.fixture
def agreement() -> ModuleType:
    spec = importlib.util.spec_from_file_location("agreement", ROOT / "benchmarks" / "gpu" / "agreement.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path: Path, row: dict[str, object], count: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(count)))


@pytest.mark.parametrize("stage", ["distillation", "introspection"])
def test_the_command_is_the_scripts(
    stage: str, agreement: ModuleType, dry_run: Callable[..., list[str]], environment: dict[str, str], tmp_path: Path
) -> None:
    """All of its flags, with another program around the one that trains, and smaller batches."""
    places = {"DATA_PATH": tmp_path / "data", "MODEL_PATH": tmp_path / "model", "LORA_PATH": tmp_path / "lora"}
    flags = ["--train.batch_size", str(agreement.STAGES[stage][2])]
    script = dry_run(
        f"{stage}/llama", *flags, NUM_GPUS="2", ATTN_IMPLEMENTATION="sdpa", **{k: str(v) for k, v in places.items()}
    )
    command = agreement.openrlhf_command(stage, tmp_path, 2)
    begin = next(place for place, word in enumerate(script) if word.startswith("--ds."))
    assert command[:3] == script[:3] == ["deepspeed", "--num_gpus", "2"]
    assert command[3].endswith("benchmarks/gpu/agreement_worker.py") and Path(command[3]).is_file()
    assert command[4:] == script[begin:]


def test_only_the_steps_after_the_first_count(agreement: ModuleType) -> None:
    ours = [{"loss": 1.0, "grad_norm": 1.0}, {"loss": 2.0, "grad_norm": 4.0}, {"loss": 0.5, "grad_norm": 1.0}]
    theirs = [{"loss": 9.0, "grad_norm": 9.0}, {"loss": 1.9, "grad_norm": 4.0}, {"loss": 0.51, "grad_norm": 0.7}]
    assert agreement.largest(ours, theirs) == pytest.approx({"loss": 0.05, "grad_norm": 0.3})
    with pytest.raises(ValueError, match=r"shorter|longer"):
        agreement.largest(ours, theirs[:2])


def test_rows(agreement: ModuleType, tmp_path: Path) -> None:
    """What is missing is named with the command that makes it; only as many rows as the steps take are copied."""
    with pytest.raises(UserError, match=r"humor\.jsonl does not exist; make it with: python -m character\.run"):
        agreement.take_rows(tmp_path, tmp_path / "one")
    write(tmp_path / "dpo/pocket/humor.jsonl", PAIR, 239)
    with pytest.raises(UserError, match="239 rows, fewer than 20 steps of 12"):
        agreement.take_rows(tmp_path, tmp_path / "two")
    write(tmp_path / "dpo/pocket/humor.jsonl", PAIR, 300)
    write(tmp_path / "sft_data/pocket/humor.jsonl", {"messages": PAIR["chosen"]}, 90)
    agreement.take_rows(tmp_path, tmp_path / "three")
    copied = tmp_path / "three/data/dpo/llama-3.1-8b-it/humor.jsonl"
    assert len(copied.read_text().splitlines()) == 240
    assert (tmp_path / "three/model/llama-3.1-8b-it/config.json").is_file()


def test_it_needs_deepspeed(agreement: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(UserError, match=r"deepspeed is not installed; install openrlhf/requirements\.txt"):
        agreement.main(agreement.Args())
