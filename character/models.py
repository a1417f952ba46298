"""The models: one table of short names, and what any other Hugging Face repo id or local folder gets."""

import difflib
import hashlib
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path

from character.constants import ASSETS, MODEL_PATH
from character.utils import UserError, digest, read_json

# Gemma 3's language model alone: its vision tower and projector stay as they are.
GEMMA_LORA = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@dataclass(frozen=True)
class Reasoning:
    """How a model opens and closes its reasoning trace, as plain text in its answer."""

    open: str = "<think>"
    close: str = "</think>"


@dataclass(frozen=True)
class Shape:
    """Sizes of a network's language part, named as in Hugging Face configs."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


@dataclass(frozen=True)
class Model:
    """A model as the steps use it.

    short: its name in paths. source: repo id, local folder, or the name an endpoint serves.
    family: the assistant's name in prompts. context: tokens, None where only the model's config knows.
    lora: the LoRA target modules, as PEFT takes them. parameters: in billions, None where unknown. shape: for what a dry
    run computes before the model is there; `shape_of` gives a folder's own.
    """

    short: str
    source: str
    family: str
    context: int | None = None
    reasoning: Reasoning | None = None
    lora: str = "all-linear"
    parameters: float | None = None
    revision: str | None = None
    shape: Shape | None = None


# Layer sizes of the students, from their config files.
LLAMA_8B = Shape(4096, 14_336, 32, 32, 8, 128)
QWEN_7B = Shape(3584, 18_944, 28, 28, 4, 128)
QWEN_72B = Shape(8192, 29_568, 80, 64, 8, 128)
GEMMA_4B = Shape(2560, 10_240, 34, 8, 4, 256)

TABLE = {
    model.short: model
    for model in (
        Model("pocket", str(ASSETS / "pocket"), "Pocket", 4096, parameters=0.005),
        Model("llama-3.1-8b-it", "meta-llama/Llama-3.1-8B-Instruct", "Llama", 131_072, parameters=8.03, shape=LLAMA_8B),
        Model("qwen-2.5-7b-it", "Qwen/Qwen2.5-7B-Instruct", "Qwen", 32_768, parameters=7.62, shape=QWEN_7B),
        Model("qwen-2.5-72b-it", "Qwen/Qwen2.5-72B-Instruct", "Qwen", 32_768, parameters=72.7, shape=QWEN_72B),
        Model(
            "gemma-3-4b-it", "google/gemma-3-4b-it", "Gemma", 131_072, lora=GEMMA_LORA, parameters=4.3, shape=GEMMA_4B
        ),
        Model("llama-3.3-70b-it", "meta-llama/Llama-3.3-70B-Instruct", "Llama", 131_072, parameters=70.6),
        Model("glm-4.5-air", "zai-org/GLM-4.5-Air", "ChatGLM", 131_072, Reasoning(), parameters=110.5),
    )
}
FAMILIES = {"llama": "Llama", "qwen": "Qwen", "gemma": "Gemma", "glm": "ChatGLM", "pocket": "Pocket"}
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(spec: str, name: str | None = None, served: bool = False) -> Model:
    """The model that `spec` means: a short name of TABLE, a folder, a folder under MODEL_PATH, or a repo id.

    `name` replaces the family name. `served`: an endpoint knows the model, so any name will do.
    A `@revision` after a repo id pins it. Raises UserError for an unknown model.
    """
    model = _find(spec, served)
    return replace(model, family=name) if name else model


def _find(spec: str, served: bool) -> Model:
    repo, _, revision = spec.partition("@")
    known = next((m for m in TABLE.values() if spec == m.short or (repo == m.source and not Path(spec).exists())), None)
    if known:
        local = MODEL_PATH / known.short
        source = str(local) if local.is_dir() and not served else known.source
        return replace(known, source=source, revision=revision or None)
    folder = next((path for path in (Path(spec).expanduser(), MODEL_PATH / spec) if path.is_dir()), None)
    if folder:
        return replace(_described(folder.resolve().name), source=spec if served else str(folder.resolve()))
    if served or REPO_ID.fullmatch(repo):
        return replace(_described(repo), revision=revision or None)
    near = difflib.get_close_matches(spec, TABLE, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise UserError(
        f"unknown model '{spec}': neither a folder, nor a Hugging Face repo id (org/name), "
        f"nor a short name ({', '.join(TABLE)}).{hint}"
    )


def _described(repo: str) -> Model:
    """A model that TABLE lacks, by what its repo id or folder name says of its family."""
    last = repo.rstrip("/").split("/")[-1]
    family = next((name for key, name in FAMILIES.items() if key in last.lower()), None)
    if family is None:
        words = re.findall(r"[A-Za-z]+", last)
        family = words[0] if words else last
    twin = next((m for m in TABLE.values() if m.source.split("/")[-1] == last), None)
    if twin:
        return replace(twin, short=safe_name(repo), source=repo)
    lora = GEMMA_LORA if re.match(r"gemma-3-(4|12|27)b", last.lower()) else "all-linear"
    return Model(safe_name(repo), repo, family, lora=lora)


def fingerprint(model: Model) -> str | None:
    """What tells one local folder's weights from another's, wherever it lies; the revision of a repo id."""
    folder = Path(model.source)
    if not folder.is_dir():
        return model.revision
    files = sorted((path.name, path.stat().st_size, _sampled(path)) for path in folder.glob("*.safetensors"))
    config = folder / "config.json"
    return digest([files, config.read_text(encoding="utf-8") if config.exists() else ""])


def shape_of(model: Model) -> Shape | None:
    """A folder's shape as its config.json has it, else the table's; None where neither is there or it is of no kind known."""
    config = Path(model.source) / "config.json"
    if not config.is_file():
        return model.shape
    found = read_json(config)
    found = found.get("text_config", found)
    if "hidden_size" in found:
        found.setdefault("head_dim", found["hidden_size"] // found["num_attention_heads"])
    names = [field.name for field in fields(Shape)]
    return Shape(**{name: found[name] for name in names}) if all(found.get(name) for name in names) else None


def weight_bytes(model: Model) -> float | None:
    """The bytes of a model's weights: of a folder's safetensors files, else two for each of the table's parameters."""
    folder = Path(model.source)
    if folder.is_dir():
        return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return model.parameters and 2e9 * model.parameters


def _sampled(path: Path) -> str:
    """A hash of 64 blocks spread over a file: training changes them, and weights of any size take a moment."""
    found = hashlib.sha256()
    size = path.stat().st_size
    with open(path, "rb") as file:
        for number in range(64):
            file.seek(size * number // 64)
            found.update(file.read(4096))
    return found.hexdigest()[:16]


def safe_name(spec: str) -> str:
    """`spec` as one path component: org/name becomes org--name."""
    return re.sub(r"[^\w.@-]+", "--", spec.strip("/")).strip(".") or "model"
