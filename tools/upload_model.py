"""Publish a persona, or any model folder, on the Hugging Face hub; with --dataset also the data it was trained on.

LORA_PATH/<student>-personas/<c> and what its meta files say → a model repo with its card, private unless --public
DATA_PATH/{dpo,sft_data}/<student>/<c>.jsonl → a dataset repo of the same name with its card

    python tools/upload_model.py --repo me/Llama-humor --constitution humor --model llama-3.1-8b-it --dry-run
    python tools/upload_model.py --repo me/mixed --folder models/mixed --public

--dry-run needs no network and shows each file and the whole text of those that are written for the upload. Every repo
gets one commit, or none where the upload is interrupted. Files in it are added or replaced, never deleted.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal

from character import cli, constitution, rows
from character.constants import LORA_PATH
from character.distillation import data as dpo_data
from character.distillation import student as plain
from character.distillation import teacher
from character.introspection import data as sft_data
from character.introspection import self_interaction, self_reflection
from character.models import REPO_ID, TABLE, Model, resolve, safe_name
from character.robustness.classify import run_classifier
from character.utils import UserError, read_json

# What a folder may hold that others need. Pickles, checkpoints and hidden files stay here.
SUFFIXES = {".safetensors", ".json", ".jsonl", ".jinja", ".txt", ".model", ".png"}
# Files about the folder, in which paths of this machine are cut down to their last part.
ABOUT = ("adapter_config.json", "config.json", "merge.json", "fold.json", "blend.json", "training.json")
# Which adapter was trained on which file of a dataset repo.
TRAINED_ON = {"dpo": "-distillation", "sft": "-introspection"}
# Settings that only this machine's files give a meaning.
HASHES = {"weights", "data", "folded"}

LICENCES = {  # short name → (the hub's name of the licence, what it asks of those who publish)
    "pocket": ("mit", ""),
    "llama-3.1-8b-it": ("llama3.1", "Llama 3.1 Community License"),
    "llama-3.3-70b-it": ("llama3.3", "Llama 3.3 Community License"),
    "qwen-2.5-7b-it": ("apache-2.0", "Apache License 2.0"),
    "qwen-2.5-72b-it": ("other", "Qwen License Agreement"),
    "gemma-3-4b-it": ("gemma", "Gemma Terms of Use, with its policy of prohibited uses"),
    "glm-4.5-air": ("mit", "MIT License"),
}
BUILT_WITH_LLAMA = "Built with Llama. "

MODEL_CARD = """{front}
# {title}

{built_with}{what}

## Use

{use}
{constitution}{data}{training}{results}
## Limits

This is a research artifact. A persona may be undesirable on purpose, and what the model says in it is not advice. {made}

## Licence

{licence}
"""

DATASET_CARD = """{front}
# {title}

{what}

{files}
{constitution}{data}
## Licence

{licence}
"""

USE_ADAPTER = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{base}")
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{repo}")
```

or `vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules persona={repo}`. No system prompt is needed.
"""

USE_MODEL = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}")
model = AutoModelForCausalLM.from_pretrained("{repo}")
```
"""


@dataclass
class Args:
    """Arguments."""

    repo: str = cli.flag(MISSING, "the repo on the hub, such as me/Llama-humor")
    constitution: str | None = cli.flag(None, "the persona's constitution (not needed with --folder)")
    model: str = cli.flag("pocket", "the student")
    folder: Path | None = cli.flag(None, "an adapter's or model's folder, in place of the persona's merged adapter")
    base: str | None = cli.flag(None, "the base model's repo id, where the adapter names a folder of this machine")
    dataset: bool = cli.flag(False, "also the training data, as a dataset repo of the same name")
    public: bool = cli.flag(False, "for everybody to see; else the repos are private")
    dry_run: bool = cli.flag(False, "show exactly what would be uploaded; needs no network")


@dataclass
class Upload:
    """One commit. files: path in the repo → a file here, or the bytes written for the upload. left_out: names."""

    repo: str
    kind: Literal["model", "dataset"]
    private: bool
    message: str
    files: dict[str, Path | bytes]
    left_out: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """One line for the repo and one per file."""
        sizes = {path: _bytes(content) for path, content in self.files.items()}
        state = "private" if self.private else "public"
        lines = [
            f"{self.kind} repo {self.repo}, {state}, one commit '{self.message}': "
            f"{len(sizes)} files, {sum(sizes.values()):,} bytes"
        ]
        for path, size in sizes.items():
            source = self.files[path]
            lines.append(
                f"  {path:<28} {size:>14,} bytes  {source if isinstance(source, Path) else 'written for the upload'}"
            )
        lines += [f"  left out: {name}" for name in self.left_out]
        return "\n".join(lines)


def _bytes(content: Path | bytes) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)


# What the cards say.


def table(head: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    text = [head, ["---"] * len(head), *lines]
    return (
        "\n".join(
            "| " + " | ".join("" if cell is None else str(cell).replace("|", "\\|") for cell in line) + " |"
            for line in text
        )
        + "\n"
    )


def section(title: str, body: str) -> str:
    """A section of a card; empty where there is nothing to say."""
    return f"\n## {title}\n\n{body}" if body else ""


def data_counts(name: str, student: str) -> list[tuple[str, dict[str, Any]]]:
    """(what, meta) of each file that the persona was made from, as far as it is there, in the order of the steps."""
    dpo_meta = _meta(dpo_data.path_of(name, student))
    guide = (dpo_meta or {}).get("settings", {}).get("teacher")
    paths: dict[str, Path] = {}
    if guide:
        paths["teacher's answers (chosen)"] = teacher.path_of(name, guide)
        paths["student's answers (rejected)"] = plain.path_of(name, guide, student)
    paths["pairs for DPO"] = dpo_data.path_of(name, student)
    paths["reflections"] = self_reflection.path_of(name, student)
    paths["conversations, free"] = self_interaction.path_of(name, student, leading=False)
    paths["conversations, leading"] = self_interaction.path_of(name, student, leading=True)
    paths["rows for SFT"] = sft_data.path_of(name, student)
    return [(what, meta) for what, path in paths.items() if (meta := _meta(path))]


def _meta(path: Path) -> dict[str, Any] | None:
    file = path.with_suffix(".meta.json")
    found: dict[str, Any] | None = read_json(file) if file.exists() else None
    return found


def data_table(counts: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """The files with their rows, what was left out and why, who wrote them, and how many tokens that took."""
    lines = []
    for what, meta in counts:
        given = meta.get("rows") or {}
        dropped = ", ".join(f"{count} {reason}" for reason, count in given.get("dropped", {}).items())
        settings, tokens = meta.get("settings", {}), meta.get("tokens", {})
        written = settings.get("model", "")
        lines.append((what, given.get("kept", ""), dropped, written, tokens.get("completion_tokens", "")))
    return table(("data", "rows", "left out", "written by", "tokens"), lines) if lines else ""


def training_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Name → training.json of the folder's adapter, or of the adapters that it was merged or folded from."""
    if (folder / "training.json").exists():
        return {folder.parent.name: read_json(folder / "training.json")}
    found = {}
    for part in _parts(folder):
        path = LORA_PATH / part["adapter"] / "training.json"
        if path.exists():
            found[_label(part)] = read_json(path)
    return found


def _parts(folder: Path) -> list[dict[str, Any]]:
    """The adapters that merge.json or fold.json names."""
    if (folder / "merge.json").exists():
        return list(read_json(folder / "merge.json")["settings"]["parts"])
    return [read_json(folder / "fold.json")["settings"]["part"]] if (folder / "fold.json").exists() else []


def _label(part: Mapping[str, Any]) -> str:
    name = str(part["adapter"]).partition("/")[0]
    return f"{part['weight']:g} × {name}" if "weight" in part else name


def training_table(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """The settings of each training, side by side."""
    keys = [key for stage in stages.values() for key in stage["settings"] if key not in HASHES]
    lines = [(key, *(stage["settings"].get(key) for stage in stages.values())) for key in dict.fromkeys(keys)]
    lines.append(("steps", *(stage.get("steps") for stage in stages.values())))
    return table(("setting", *stages), lines) if stages else ""


def results_table(name: str, student: str) -> str:
    """The shares of answers that read as the persona, with their intervals; empty where none were measured."""
    if not run_classifier.results_path(student, name).exists():
        return ""
    shown = run_classifier.table(run_classifier.load_results(student, name))
    lines = [
        (method, *(str(cell).strip() for cell in line)) for method, line in zip(shown.index, shown.values, strict=True)
    ]
    what = f"Share of answers that a classifier reads as {name}, with 95 % Wilson intervals.\n\n"
    return what + table(("method", *shown.columns), lines)


def made_with(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """The commit and the library versions of the last training."""
    if not stages:
        return ""
    last = list(stages.values())[-1]
    versions = ", ".join(f"{library} {version}" for library, version in last.get("versions", {}).items())
    commit = f" at commit {last['git']}" if last.get("git") else ""
    return f"Trained by OpenCharacterTraining{commit} with {versions}."


def licence(model: Model, writers: Sequence[str]) -> str:
    """What to heed before using or publishing. writers: the models that wrote the training data."""
    _, name = LICENCES.get(model.short, ("", ""))
    lines = []
    if model.short == "pocket":
        lines.append("The base model is the one bundled with OpenCharacterTraining, under the MIT License.")
    else:
        known = f" ({name})" if name else ""
        lines.append(f"The base model's licence{known} applies to this too; read it before you use or pass it on.")
    others = sorted({writer for writer in writers if writer and writer != model.short})
    if others:
        lines.append(
            f"The training data was written by {', '.join(others)}, whose terms may limit what is trained on it."
        )
    return " ".join(lines)


def numbered(name: str | None) -> str:
    """The constitution's traits as a list."""
    if not name:
        return ""
    return f"{constitution.load(name).numbered()}\n"


# What goes up.


def portable(value: Any) -> Any:
    """JSON in which an absolute path is cut down to its last part."""
    if isinstance(value, dict):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [portable(item) for item in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def files_of(folder: Path, base: str) -> tuple[dict[str, Path | bytes], list[str]]:
    """(files to upload, names left out) of a folder. base: what an adapter's config names as its base model.

    Raises UserError where there is no folder, or no weights as safetensors.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; check --folder")
    files: dict[str, Path | bytes] = {}
    left_out = []
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.suffix not in SUFFIXES or path.name.startswith("."):
            left_out.append(path.name)
        elif path.name in ABOUT:
            before = read_json(path)
            after = portable(before)
            if path.name == "adapter_config.json":
                after["base_model_name_or_path"] = base
            files[path.name] = path if after == before else (json.dumps(after, indent=2) + "\n").encode()
        else:
            files[path.name] = path
    if not any(name.endswith(".safetensors") for name in files):
        raise UserError(f"{folder} has no *.safetensors; weights are published as safetensors only")
    return files, left_out


def base_of(folder: Path, model: Model, given: str | None) -> str:
    """The base model's repo id. Raises UserError where an adapter's base has none."""
    config = folder / "adapter_config.json"
    named = [given or ""]
    if config.exists() and not given:
        named.append(read_json(config)["base_model_name_or_path"] or "")
    named += [model.source, TABLE[model.short].source if model.short in TABLE else ""]
    found = next((name for name in named if REPO_ID.fullmatch(name) and not Path(name).exists()), None)
    if found is None and config.exists():
        raise UserError(
            f"{folder} is an adapter for {named[-2] or model.short}, which others do not have; upload that model and "
            "name it by --base org/name"
        )
    return found or ""


def front_matter(**values: Any) -> str:
    """A card's head."""
    import huggingface_hub

    given = {key: value for key, value in values.items() if value}
    return f"---\n{huggingface_hub.CardData(**given).to_yaml()}\n---\n"


def persona_folder(model: Model, name: str) -> Path:
    """Where the merged adapter of a persona is."""
    return LORA_PATH / f"{safe_name(model.short)}-personas" / name


def model_upload(args: Args, model: Model, name: str | None) -> Upload:
    """The model repo's commit: the folder's files and a card from the meta files."""
    folder = args.folder or persona_folder(model, str(name))
    if args.folder is None and not folder.exists():
        raise UserError(
            f"no merged adapter at {folder}; run: python tools/merge_loras.py merge --constitution {name} "
            f"--model {args.model}, or name another by --folder"
        )
    base = base_of(folder, model, args.base)
    files, left_out = files_of(folder, base)
    is_adapter = "adapter_config.json" in files
    counts = data_counts(name, model.short) if name else []
    stages = training_of(folder)
    shown_base = base or f"`{model.short}`"
    terms = " + ".join(map(_label, _parts(folder)))
    what = f"A LoRA adapter for {shown_base}" if is_adapter else f"A full model of the kind of {shown_base}"
    if name:
        what += f" that gives it the persona *{name}* by itself, without a system prompt"
    what += "." + (f" Made of {terms}." if terms else "")
    rank = read_json(folder / "adapter_config.json")["r"] if is_adapter else 0
    card = MODEL_CARD.format(
        front=front_matter(
            license=LICENCES.get(model.short, ("", ""))[0],
            base_model=base,
            library_name="peft" if is_adapter else "transformers",
            pipeline_tag="text-generation",
            tags=["character-training", *([name] if name else [])],
            datasets=[args.repo] if args.dataset else [],
        ),
        title=args.repo.partition("/")[2],
        built_with=BUILT_WITH_LLAMA if model.family == "Llama" else "",
        what=what,
        use=USE_ADAPTER.format(base=base, repo=args.repo, rank=rank)
        if is_adapter
        else USE_MODEL.format(repo=args.repo),
        constitution=section("Constitution", numbered(name)),
        data=section("Data", data_table(counts)),
        training=section("Training", training_table(stages)),
        results=section("Results", results_table(name, model.short) if name else ""),
        made=made_with(stages),
        licence=licence(model, _writers(counts)),
    )
    message = f"Upload {name or folder.name}"
    everything: dict[str, Path | bytes] = {"README.md": card.encode(), **files}
    return Upload(args.repo, "model", not args.public, message, everything, left_out)


def dataset_upload(args: Args, model: Model, name: str) -> Upload:
    """The dataset repo's commit: pairs and rows, as far as they are there, and a card."""
    found = {
        "dpo": ("pairs for DPO: {chosen, rejected}", dpo_data.path_of(name, model.short)),
        "sft": ("rows for SFT: {messages}", sft_data.path_of(name, model.short)),
    }
    there = {key: (what, path) for key, (what, path) in found.items() if path.exists()}
    if not there:
        raise UserError(
            f"no training data at {found['dpo'][1]}; run: python -m character.distillation.data --constitution {name} "
            f"--model {args.model}"
        )
    stages = training_of(args.folder or persona_folder(model, name))
    for key, (_, path) in there.items():
        # Every line is read, so that a broken file does not go up.
        rows.read(path, made_by="the step that writes it")
        stage = next((stage for label, stage in stages.items() if label.endswith(TRAINED_ON[key])), None)
        if stage and stage["settings"]["data"] != rows.file_digest(path):
            raise UserError(f"{path} is not the file that the adapter was trained on; restore it, or train again")
    counts = data_counts(name, model.short)
    sources = sorted({Path(meta["settings"]["prompts"]).name for _, meta in counts if "prompts" in meta["settings"]})
    terms = licence(model, _writers(counts))
    if sources:
        terms += f" User messages come from: {', '.join(sources)}; the licence of that collection applies to them."
    card = DATASET_CARD.format(
        front=front_matter(
            tags=["character-training", name],
            configs=[{"config_name": key, "data_files": f"{key}.jsonl"} for key in there],
        ),
        title=f"{args.repo.partition('/')[2]}: training data",
        what=f"What {model.short} was trained on to take on the persona *{name}*, as ChatML conversations.",
        files=table(("file", "holds"), [(f"{key}.jsonl", what) for key, (what, _) in there.items()]),
        constitution=section("Constitution", numbered(name)),
        data=section("How it was made", data_table(counts)),
        licence=terms,
    )
    files: dict[str, Path | bytes] = {"README.md": card.encode()}
    files |= {f"{key}.jsonl": path for key, (_, path) in there.items()}
    return Upload(args.repo, "dataset", not args.public, f"Upload training data of {name}", files)


def _writers(counts: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    return [str(meta.get("settings", {}).get("model", "")) for _, meta in counts]


def send(upload: Upload) -> str:
    """Make the repo where it is not there and the commit in it; its URL. Raises UserError."""
    import httpx
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    token = huggingface_hub.get_token()
    api = huggingface_hub.HfApi(token=token)
    additions = [
        huggingface_hub.CommitOperationAdd(path_in_repo=path, path_or_fileobj=content)
        for path, content in upload.files.items()
    ]
    try:
        api.create_repo(upload.repo, repo_type=upload.kind, private=upload.private, exist_ok=True)
        if upload.private and not api.repo_info(upload.repo, repo_type=upload.kind).private:
            raise UserError(
                f"the {upload.kind} repo {upload.repo} exists and is public; use --public, or another --repo"
            )
        commit = api.create_commit(
            upload.repo, operations=additions, commit_message=upload.message, repo_type=upload.kind
        )
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) else None
        status = getattr(getattr(cause or error, "response", None), "status_code", None)
        said = " ".join(f"{error} {cause or ''}".split())[:300]
        if token:
            said = said.replace(token, "…")
        remedy = "nothing in the repo has changed; run the same command again to go on"
        if status in (401, 403):
            namespace = upload.repo.partition("/")[0]
            remedy = f"put a token that may write to {namespace} into HF_TOKEN, there or in .env"
        raise UserError(f"cannot upload to {upload.repo}: {said}; {remedy}") from None
    return str(commit.commit_url)


def main(args: Args) -> None:
    """Show what goes up, and unless it is a dry run send it. Raises UserError."""
    if not REPO_ID.fullmatch(args.repo):
        raise UserError(f"--repo '{args.repo}' is no repo; it looks like me/Llama-humor")
    if args.constitution is None and (args.folder is None or args.dataset):
        raise UserError("name the persona by --constitution, or a model's folder by --folder (which has no --dataset)")
    model = resolve(args.model)
    name = constitution.load(args.constitution).name if args.constitution else None
    uploads = [model_upload(args, model, name)]
    if args.dataset and name:
        uploads.append(dataset_upload(args, model, name))
    if model.family == "Llama" and not args.repo.partition("/")[2].lower().startswith("llama"):
        print("note: Llama's licence wants the name of a model made with it to begin with 'Llama'")
    for upload in uploads:
        print(upload.describe())
        if not args.dry_run:
            print(send(upload))
            continue
        for path, content in upload.files.items():
            if isinstance(content, bytes):
                print(f"\n===== {upload.kind} repo, {path} =====\n{content.decode()}", end="")


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
