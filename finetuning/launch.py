"""Start one OpenRLHF training on DeepSpeed: find the files, check them, add their flags, hand over to `deepspeed`.

The scripts of distillation/ and introspection/ call it; use those:

    finetuning/distillation/llama.sh --dry-run humor

In: STAGE STUDENT [settings] -- [--dry-run] CONSTITUTION [flags]. Out: what the started program writes.
"""

import argparse
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = {
    "distillation": [str(ROOT / "openrlhf" / "train_dpo.py")],
    "introspection": ["--module", "openrlhf.cli.train_sft"],
}
DATA = {"distillation": ("dpo", ("chosen", "rejected")), "introspection": ("sft_data", ("messages",))}
LAUNCHER = {
    "NUM_GPUS": "--num_gpus",
    "HOSTFILE": "--hostfile",
    "MASTER_ADDR": "--master_addr",
    "MASTER_PORT": "--master_port",
}
# Flags whose value decides what is checked; the last one given counts, as in OpenRLHF.
CHECKED = ("--model.model_name_or_path", "--data.dataset", "--ckpt.output_dir", "--train.batch_size")


def values(flags: list[str]) -> dict[str, Any]:
    """The values of the CHECKED flags, None where a flag is absent."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for flag in CHECKED:
        parser.add_argument(flag, dest=flag)
    return vars(parser.parse_known_args(flags)[0])


def place_flags(stage: str, student: str, name: str) -> list[str]:
    """The flags that say which model and data to train on and where the adapter goes."""
    from character.constants import DATA_PATH, LORA_PATH, MODEL_PATH
    from character.models import resolve

    folded = MODEL_PATH / "folded" / f"{student}-distillation" / name
    output = LORA_PATH / f"{student}-{stage}" / name
    flags = [
        *("--model.model_name_or_path", resolve(student).source if stage == "distillation" else str(folded)),
        *("--data.dataset", str(DATA_PATH / DATA[stage][0] / student / f"{name}.jsonl")),
        *("--ckpt.output_dir", str(output)),
        *("--ckpt.path", str(output / "checkpoints")),
    ]
    if os.environ.get("WANDB_TOKEN"):
        # OpenRLHF logs to wandb if it gets a key, and shows its flags; wandb prefers the key in WANDB_API_KEY.
        flags += ["--logger.wandb.key", "from-WANDB_API_KEY"]
        flags += ["--logger.wandb.project", f"{student}-{stage}", "--logger.wandb.run_name", name]
    return flags


def check(stage: str, student: str, name: str, flags: list[str]) -> None:
    """Raise UserError, with the remedy, for what would end the run after minutes of loading."""
    from character.utils import UserError, read_jsonl

    given = values(flags)
    data, output, batch = Path(given["--data.dataset"]), Path(given["--ckpt.output_dir"]), given["--train.batch_size"]
    # OpenRLHF also takes hub ids, and several sets with commas between them.
    if data.suffix == ".jsonl" and "," not in str(data):
        if not data.is_file():
            step = f"python -m character.{stage}.data --model {student} --constitution {name}"
            raise UserError(f"{data} does not exist; make it with: {step}")
        rows = sum(1 for _ in read_jsonl(data, *DATA[stage][1]))
        if batch.isdecimal() and rows < int(batch):
            raise UserError(f"{data} has {rows} rows, less than one batch of {batch}; lower --train.batch_size")
    model = Path(given["--model.model_name_or_path"])
    if stage == "introspection" and model.is_absolute() and not (model / "config.json").is_file():
        step = f"python tools/merge_loras.py fold --model {student} --constitution {name}"
        raise UserError(f"{model} holds no model; fold the distilled adapter into its base with: {step}")
    if (output / "adapter_config.json").is_file():
        raise UserError(f"{output} already holds an adapter; move or delete it to train again")
    hosts = os.environ.get("HOSTFILE")
    if hosts and not Path(hosts).is_file():
        raise UserError(f"HOSTFILE={hosts} does not exist; it lists the nodes, one line 'host slots=8' each")
    built_for = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if lettered := re.search(r"\d\.\d+[a-z]", built_for):
        # Found when it compiles its Adam, after the model is loaded.
        plain = re.sub(r"(\d\.\d+)[a-z]", r"\1", built_for)
        raise UserError(
            f"DeepSpeed cannot read the architecture {lettered[0]} in TORCH_CUDA_ARCH_LIST; "
            f"set TORCH_CUDA_ARCH_LIST='{plain}'"
        )
    if not shutil.which("deepspeed"):
        remedy = "pip install --no-build-isolation -r openrlhf/requirements.txt"
        raise UserError(f"deepspeed is not installed; {remedy}, on a machine with CUDA")


def launcher_flags() -> list[str]:
    """DeepSpeed's own flags, from the environment. Raises UserError where it asks for more GPUs than it shows."""
    from character.utils import UserError

    given = {flag: os.environ[key] for key, flag in LAUNCHER.items() if os.environ.get(key)}
    shown_gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    count = given.get("--num_gpus", "")
    if shown_gpus and count.isdecimal() and "--hostfile" not in given:
        # Told a number, DeepSpeed takes the first GPUs of the machine, whichever are visible.
        if int(count) > len(shown_gpus):
            raise UserError(f"NUM_GPUS={count}, but CUDA_VISIBLE_DEVICES shows {len(shown_gpus)}; change one of them")
        del given["--num_gpus"]
        given["--include"] = f"localhost:{','.join(shown_gpus[: int(count)])}"
    return [word for pair in given.items() for word in pair]


def shown(command: list[str]) -> str:
    """The command as text for a shell, one flag per line."""
    return " ".join(f"\\\n    {word}" if word.startswith("--") else word for word in map(shlex.quote, command))


def main(argv: list[str]) -> None:
    """Print the command (--dry-run) or become it. Raises UserError."""
    from character.constitution import find
    from character.utils import UserError

    end = argv.index("--")
    stage, student, *settings = argv[:end]
    dry_run = argv[end + 1 : end + 2] == ["--dry-run"]
    constitution, *extra = argv[end + 1 + dry_run :] or [""]
    if not constitution or constitution.startswith("-"):
        raise UserError("name a constitution: [--dry-run] CONSTITUTION [OpenRLHF flags]")
    if extra and not extra[0].startswith("--"):
        raise UserError(f"'{extra[0]}' is no flag; a run trains one constitution, OpenRLHF's flags come after its name")
    name = find(constitution).stem
    flags = [*settings, *place_flags(stage, student, name), *extra]
    command = ["deepspeed", *launcher_flags(), *PROGRAM[stage], *flags]
    if dry_run:
        print(shown(command))
        return
    check(stage, student, name, flags)
    if os.environ.get("WANDB_TOKEN"):
        os.environ["WANDB_API_KEY"] = os.environ["WANDB_TOKEN"]
    os.execvp(command[0], command)


def fail(message: str) -> NoReturn:
    """Print one line and exit with 2."""
    print("error:", message, file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    try:
        from character.utils import UserError
    except ImportError as missing:
        fail(f"{missing}; activate the environment that requirements.txt was installed in")
    try:
        main(sys.argv[1:])
    except UserError as error:
        fail(str(error))
