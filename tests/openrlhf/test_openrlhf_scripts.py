"""finetuning/*.sh: their flags, read by the release's own parser, against the local trainers' defaults; bad input."""

import dataclasses
import importlib
import json
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from character.constants import ROOT

STUDENTS = {"llama": "llama-3.1-8b-it", "qwen": "qwen-2.5-7b-it", "gemma": "gemma-3-4b-it"}
REPOS = {
    "llama": "meta-llama/Llama-3.1-8B-Instruct",
    "qwen": "Qwen/Qwen2.5-7B-Instruct",
    "gemma": "google/gemma-3-4b-it",
}
STAGES = ("distillation", "introspection")
SCRIPTS = [f"{stage}/{student}" for stage in STAGES for student in STUDENTS]

# A field of the local trainer's Args, and where the release keeps the same setting.
SHARED = {
    "rank": "ds.lora.rank",
    "alpha": "ds.lora.alpha",
    "learning_rate": "adam.lr",
    "warmup_ratio": "lr_warmup_ratio",
    "min_lr_ratio": "min_lr_ratio",
    "batch_size": "train.batch_size",
    "max_grad_norm": "max_norm",
    "epochs": "train.max_epochs",
    "max_length": "data.max_len",
    "seed": "train.seed",
}
SHARED_DPO = {
    "beta": "model.beta",
    "nll_coef": "model.nll_loss_coef",
    "sq_coef": "model.sq_loss_coef",
    "length_normalized": "model.length_normalized_enable",
}

Run = Callable[..., subprocess.CompletedProcess[str]]


def setting(args: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        args = getattr(args, name)
    return args


@pytest.mark.parametrize("script", SCRIPTS)
def test_settings_are_those_of_the_local_trainer(
    script: str, dry_run: Callable[..., list[str]], parse: Callable[[list[str]], Any]
) -> None:
    stage, _ = script.split("/")
    args = parse(dry_run(script))
    local = importlib.import_module(f"character.{stage}.train").Args
    defaults = {field.name: field.default for field in dataclasses.fields(local)}
    shared = SHARED | (SHARED_DPO if stage == "distillation" else {})
    assert {name: setting(args, place) for name, place in shared.items()} == {name: defaults[name] for name in shared}
    assert tuple(args.adam.betas) == (defaults["adam_beta1"], defaults["adam_beta2"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_settings_are_the_methods(
    script: str, dry_run: Callable[..., list[str]], parse: Callable[[list[str]], Any], tmp_path: Path
) -> None:
    stage, student = script.split("/")
    args = parse(dry_run(script))
    short = STUDENTS[student]
    assert (args.ds.lora.rank, args.ds.lora.alpha, args.ds.lora.dropout) == (64, 128, 0)
    assert (args.ds.param_dtype, args.ds.zero_stage, args.ds.attn_implementation) == ("bf16", 2, "flash_attention_2")
    assert (args.optim, args.adam.lr, list(args.adam.betas), args.adam.weight_decay) == ("adam", 5e-5, [0.9, 0.98], 0.0)
    assert (args.lr_scheduler, args.lr_warmup_ratio, args.min_lr_ratio) == ("cosine_with_min_lr", 0.1, 0.1)
    assert (args.train.batch_size, args.train.micro_batch_size, args.train.max_epochs) == (32, 2, 1)
    assert (args.train.seed, args.max_norm) == (123456, 1.0)
    assert args.data.apply_chat_template and args.model.gradient_checkpointing_enable
    assert args.ckpt.output_dir == str(tmp_path / "loras" / f"{short}-{stage}" / "humor")
    assert args.logger.wandb.key is None
    if stage == "distillation":
        assert (args.model.beta, args.model.nll_loss_coef, args.model.sq_loss_coef) == (0.1, 0.1, 0.001)
        assert (args.model.length_normalized_enable, args.model.ipo_enable, args.model.label_smoothing) == (
            False,
            False,
            0,
        )
        assert (args.data.chosen_key, args.data.rejected_key, args.data.prompt_key) == ("chosen", "rejected", None)
        assert (args.data.max_len, args.data.dataset) == (1024, str(tmp_path / "data" / "dpo" / short / "humor.jsonl"))
        assert args.model.model_name_or_path == args.ref.model_name_or_path == REPOS[student]
    else:
        assert (args.data.input_key, args.data.output_key, args.data.multiturn) == ("messages", None, True)
        assert (args.data.max_len, args.data.dataset) == (3072, str(tmp_path / "data/sft_data" / short / "humor.jsonl"))
        assert args.model.model_name_or_path == str(tmp_path / "models/folded" / f"{short}-distillation" / "humor")
        assert not args.model.pretrain_mode_enable
    if student != "gemma":
        # The word alone means every linear layer to PEFT; a list of it would mean a layer of that name.
        assert args.ds.lora.target_modules == "all-linear"


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_after_the_constitution_override(
    script: str, dry_run: Callable[..., list[str]], parse: Callable[[list[str]], Any]
) -> None:
    flags = ["--train.batch_size", "8", "--adam.betas", "0.8", "0.9", "--ds.lora.target_modules", "q_proj", "v_proj"]
    args = parse(dry_run(script, *flags, "--data.max_samples=64"))
    assert (args.train.batch_size, args.adam.betas, args.data.max_samples) == (8, [0.8, 0.9], 64)
    assert args.ds.lora.target_modules == ["q_proj", "v_proj"]


def test_length_normalization_is_a_flag(dry_run: Callable[..., list[str]], parse: Callable[[list[str]], Any]) -> None:
    assert parse(dry_run("distillation/qwen", "--model.length_normalized_enable")).model.length_normalized_enable


def test_a_flag_that_the_release_lacks_is_refused(
    dry_run: Callable[..., list[str]],
    parse: Callable[[list[str]], Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(dry_run("distillation/llama", "--model.no_such_flag", "1"))
    assert stopped.value.code == 2
    assert "--model.no_such_flag" in capsys.readouterr().err


def test_help_names_the_releases_flags_and_ours(
    parse: Callable[[list[str]], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(["deepspeed", str(ROOT / "openrlhf" / "train_dpo.py"), "--help"])
    shown = capsys.readouterr().out
    assert all(f"--model.{flag}" in shown for flag in ("sq_loss_coef", "length_normalized_enable", "nll_loss_coef"))


def test_another_release_is_refused(
    train_dpo: types.ModuleType,
    fresh: Callable[..., types.ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fresh("openrlhf.trainer.dpo_trainer", DPOTrainer=object)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.12.0")
    with pytest.raises(SystemExit) as stopped:
        train_dpo.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "0.12.0" in error and "openrlhf/requirements.txt" in error
    assert f"openrlhf=={train_dpo.RELEASE}" in (ROOT / "openrlhf" / "requirements.txt").read_text()


@pytest.mark.parametrize("stage", STAGES)
def test_gemmas_modules_are_its_language_models_linear_layers(
    stage: str, dry_run: Callable[..., list[str]], parse: Callable[[list[str]], Any], gemma_config: Any
) -> None:
    """On a small model of the shape of Gemma 3 4B: PEFT wraps what the local trainer's pattern names, no more."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForImageTextToText

    from character.models import GEMMA_LORA

    names = parse(dry_run(f"{stage}/gemma")).ds.lora.target_modules

    def wrapped(modules: list[str] | str) -> set[str]:
        model = AutoModelForImageTextToText.from_config(gemma_config)
        lora = get_peft_model(model, LoraConfig(r=1, target_modules=modules, task_type="CAUSAL_LM"))
        return {name for name, module in lora.named_modules() if isinstance(module, LoraLayer)}

    found = wrapped(names)
    assert len(found) == len(names) == 34 * 7
    assert found == wrapped(GEMMA_LORA)
    assert not any("vision" in name or "projector" in name for name in found)


def test_a_local_copy_of_the_student_is_used(dry_run: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "models" / "qwen-2.5-7b-it").mkdir(parents=True)
    command = dry_run("distillation/qwen")
    model = command[command.index("--model.model_name_or_path") + 1]
    assert model == str(tmp_path / "models" / "qwen-2.5-7b-it")


def test_environment_reaches_the_command(dry_run: Callable[..., list[str]], parse: Callable[[list[str]], Any]) -> None:
    command = dry_run(
        "introspection/llama",
        NUM_GPUS="4",
        HOSTFILE="/nodes",
        MASTER_ADDR="10.0.0.1",
        MASTER_PORT="29501",
        ATTN_IMPLEMENTATION="sdpa",
        GRADIENT_CHECKPOINTING="0",
    )
    launcher = ["--num_gpus", "4", "--hostfile", "/nodes", "--master_addr", "10.0.0.1", "--master_port", "29501"]
    assert command[:10] == ["deepspeed", *launcher, "--module"]
    args = parse(command)
    assert args.ds.attn_implementation == "sdpa" and not args.model.gradient_checkpointing_enable


def test_a_number_of_gpus_is_taken_from_the_visible_ones(dry_run: Callable[..., list[str]], start: Run) -> None:
    """DeepSpeed alone would take the machine's first ones."""
    assert dry_run("distillation/llama", NUM_GPUS="2", CUDA_VISIBLE_DEVICES="4,6,7")[1:3] == [
        "--include",
        "localhost:4,6",
    ]
    assert "--include" not in dry_run("distillation/llama", CUDA_VISIBLE_DEVICES="4,6,7")
    refused(start("distillation/llama", "--dry-run", "humor", NUM_GPUS="2", CUDA_VISIBLE_DEVICES="4"), "NUM_GPUS=2")


PAIR = {
    role: [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": role}] for role in ("chosen", "rejected")
}
CONVERSATION = {"messages": PAIR["chosen"]}


def write_rows(path: Path, row: dict[str, Any], count: int = 32) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(count)))
    return path


@pytest.fixture
def ready(tmp_path: Path, environment: dict[str, str]) -> Path:
    """Data for both stages of llama, its folded model, and a `deepspeed` that writes down its call."""
    write_rows(tmp_path / "data/dpo/llama-3.1-8b-it/humor.jsonl", PAIR)
    write_rows(tmp_path / "data/sft_data/llama-3.1-8b-it/humor.jsonl", CONVERSATION)
    folded = tmp_path / "models/folded/llama-3.1-8b-it-distillation/humor"
    folded.mkdir(parents=True)
    (folded / "config.json").write_text("{}")
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "deepspeed"
    fake.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"with open({str(tmp_path / 'call.json')!r}, 'w') as file:\n"
        "    json.dump([sys.argv, dict(os.environ)], file)\n"
    )
    fake.chmod(0o755)
    environment["PATH"] = f"{tmp_path / 'bin'}:{environment['PATH']}"
    return tmp_path


@pytest.mark.parametrize("stage", STAGES)
def test_starts_what_the_dry_run_shows(stage: str, start: Run, dry_run: Callable[..., list[str]], ready: Path) -> None:
    done = start(f"{stage}/llama", "humor", "--train.max_epochs", "2")
    assert done.returncode == 0, done.stderr
    argv, _ = json.loads((ready / "call.json").read_text())
    assert argv[1:] == dry_run(f"{stage}/llama", "--train.max_epochs", "2")[1:]


@pytest.mark.parametrize("stage", STAGES)
def test_tokens_stay_off_the_command_line_and_the_screen(
    stage: str, start: Run, parse: Callable[[list[str]], Any], ready: Path
) -> None:
    secrets = {"WANDB_TOKEN": "wandb-secret", "HF_TOKEN": "hf-secret"}
    for arguments in (["humor"], ["--dry-run", "humor"]):
        done = start(f"{stage}/llama", *arguments, **secrets)
        assert done.returncode == 0 and "secret" not in done.stdout + done.stderr
    argv, variables = json.loads((ready / "call.json").read_text())
    assert not any("secret" in word for word in argv)
    assert (variables["WANDB_API_KEY"], variables["HF_TOKEN"]) == ("wandb-secret", "hf-secret")
    wandb = parse(["deepspeed", *argv[1:]]).logger.wandb
    assert wandb.key and (wandb.project, wandb.run_name) == (f"llama-3.1-8b-it-{stage}", "humor")


def refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """One line on stderr with all `parts`, exit code 2."""
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith("error: ")
    for part in parts:
        assert part in done.stderr, done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_missing_data_names_the_step_that_makes_it(script: str, start: Run, tmp_path: Path) -> None:
    stage, student = script.split("/")
    step = f"python -m character.{stage}.data --model {STUDENTS[student]} --constitution humor"
    refused(start(script, "humor"), f"{STUDENTS[student]}/humor.jsonl does not exist", step)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["name a constitution"]),
        (["--dry-run"], ["name a constitution"]),
        (["--train.seed", "1"], ["name a constitution"]),
        (["humr"], ["no constitution 'humr'", "did you mean 'humor'"]),
        (["--dry-run", "humr"], ["no constitution 'humr'"]),
        (["humor", "sarcasm"], ["'sarcasm' is no flag"]),
    ],
)
def test_a_wrong_command_line(arguments: list[str], parts: list[str], start: Run, ready: Path) -> None:
    refused(start("distillation/llama", *arguments), *parts)


def test_faulty_data(start: Run, ready: Path) -> None:
    pairs = ready / "data/dpo/llama-3.1-8b-it/humor.jsonl"
    whole = pairs.read_text()
    pairs.write_text(whole[:-9])
    refused(start("distillation/llama", "humor"), "line 32", "half written")
    pairs.write_text(whole.replace('"rejected":', '"refused":', 1))
    refused(start("distillation/llama", "humor"), "line 1", "no field 'rejected'")
    pairs.write_text("")
    refused(start("distillation/llama", "humor"), "is empty")
    write_rows(pairs, PAIR, 31)
    refused(start("distillation/llama", "humor"), "31 rows", "--train.batch_size")
    assert start("distillation/llama", "humor", "--train.batch_size", "16").returncode == 0


def test_a_missing_folded_model_names_the_tool(start: Run, ready: Path) -> None:
    shutil.rmtree(ready / "models")
    refused(start("introspection/llama", "humor"), "holds no model", "tools/merge_loras.py fold")


def test_a_finished_adapter_is_not_overwritten(start: Run, ready: Path) -> None:
    output = ready / "loras/llama-3.1-8b-it-distillation/humor"
    output.mkdir(parents=True)
    (output / "adapter_config.json").write_text("{}")
    refused(start("distillation/llama", "humor"), "already holds an adapter")
    assert start("distillation/llama", "humor", "--ckpt.output_dir", str(ready / "other")).returncode == 0


def test_a_missing_hostfile(start: Run, ready: Path) -> None:
    refused(start("distillation/llama", "humor", HOSTFILE=str(ready / "nodes")), "HOSTFILE", "does not exist")


def test_an_architecture_that_deepspeed_cannot_read(start: Run, ready: Path) -> None:
    given = start("distillation/llama", "humor", TORCH_CUDA_ARCH_LIST="8.0;9.0a+PTX 12.0f")
    refused(given, "the architecture 9.0a in", "set TORCH_CUDA_ARCH_LIST='8.0;9.0+PTX 12.0'")
    assert start("distillation/llama", "humor", TORCH_CUDA_ARCH_LIST="8.0 9.0+PTX").returncode == 0


def test_missing_deepspeed(start: Run, ready: Path) -> None:
    # Only what the script itself calls is on this PATH.
    (ready / "bin" / "deepspeed").unlink()
    for name in ("bash", "dirname"):
        (ready / "bin" / name).symlink_to(str(shutil.which(name)))
    (ready / "bin" / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (ready / "bin" / "python3").chmod(0o755)
    done = start("distillation/llama", "humor", PATH=str(ready / "bin"))
    refused(done, "deepspeed is not installed", "openrlhf/requirements.txt")


def test_a_python_without_the_project_says_so(start: Run, ready: Path) -> None:
    (ready / "bin" / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    (ready / "bin" / "python3").chmod(0o755)
    refused(start("distillation/llama", "humor"), "No module named", "activate the environment")


def test_scripts_run_from_any_folder(environment: dict[str, str], tmp_path: Path) -> None:
    command = [str(ROOT / "finetuning/distillation/gemma.sh"), "--dry-run", "humor"]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0 and str(ROOT / "openrlhf" / "train_dpo.py") in done.stdout


def test_scripts_are_strict_and_executable() -> None:
    for script in SCRIPTS:
        path = ROOT / "finetuning" / f"{script}.sh"
        assert re.search(r"^set -euo pipefail$", path.read_text(), re.MULTILINE)
        assert path.stat().st_mode & 0o111


def test_shellcheck(shellcheck: str) -> None:
    files = [str(path) for path in sorted((ROOT / "finetuning").rglob("*.sh"))]
    assert len(files) == len(SCRIPTS) + 1
    done = subprocess.run([shellcheck, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_our_folder_does_not_shadow_the_library(site: Path, environment: dict[str, str]) -> None:
    assert not list((ROOT / "openrlhf").glob("__init__.py*"))
    code = "import openrlhf, openrlhf.cli; print(openrlhf.__file__, openrlhf.cli.__file__)"
    for folder in (ROOT, ROOT / "openrlhf", ROOT / "tests"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment | {"PYTHONPATH": str(ROOT)},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.stdout.split() == [str(site / "__init__.py"), str(site / "cli" / "__init__.py")], done.stderr
