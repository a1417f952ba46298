"""What every engine has in common: sampling, replies, and the interface that the steps use."""

import abc
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from character.models import Model
from character.utils import UserError, read_json

# A repo on the hub, perhaps a folder in it, perhaps a revision.
HUB_ADAPTER = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(/(?P<subfolder>[\w./-]+))?(@(?P<revision>[\w./-]+))?")
# Factors with a side as wide as the model: lora_A has (rank, in), lora_B (out, rank).
READERS = tuple(f"{name}_proj.lora_A.weight" for name in ("q", "k", "v", "gate", "up"))
WRITERS = tuple(f"{name}_proj.lora_B.weight" for name in ("o", "down"))
Message = dict[str, str]
FinishReason = Literal["stop", "length"]
CANNOT_STEER = "an endpoint cannot steer; use --engine vllm or transformers, without --base-url"


@dataclass(frozen=True)
class Sampling:
    """How a reply is sampled. temperature 0 is greedy; repetition_penalty 1 is none; max_tokens counts new tokens.

    seed: of this one reply, the same whatever shares its batch. A single copy of a model inside vLLM leaves it out, since
    seeds slow its sampler, and of endpoints only vLLM's get it. choices: the only texts that the reply may be; empty for a free reply. They
    bind no model that reasons, which has to think first, and few endpoints: who asks reads the reply as if it were free.
    """

    temperature: float = 0.7
    top_p: float = 0.95
    repetition_penalty: float = 1.1
    max_tokens: int = 1024
    seed: int = 0
    choices: tuple[str, ...] = ()

    def settings(self) -> dict[str, Any]:
        """What a stage's settings remember of it: the fields but the seed and the choices, which are the row's."""
        return {name: value for name, value in asdict(self).items() if name not in ("seed", "choices")}


@dataclass(frozen=True)
class Steering:
    """A control vector that is added to the model's hidden states while a reply is written.

    vector: the safetensors file that repeng's ControlVector saves. strength: what the vector is multiplied by.
    """

    vector: Path
    strength: float


@dataclass(frozen=True)
class Reply:
    """One reply. text: what the model wrote after the prefill, which it leaves out, without the end-of-turn token.

    finish_reason: "stop" where the model ended its turn, "length" where the limit did.
    dropped_turns: how many of the oldest messages did not fit into the context.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    dropped_turns: int = 0

    def row(self) -> dict[str, str | int]:
        """What an output row keeps of it."""
        return {
            "response": self.text.strip(),
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            **({"dropped_turns": self.dropped_turns} if self.dropped_turns else {}),
        }


@dataclass
class Info:
    """What a stage's meta file says of the engine."""

    engine: str
    source: str
    revision: str | None = None
    notes: list[str] = field(default_factory=list)


class Engine(abc.ABC):
    """One way to get a reply. Thousands of `reply` calls may wait at once; the engine batches them.

    concurrency: how many calls in flight keep the engine busy. room: the tokens whose keys and values fit at once, where
    that is known. continues_prefill: whether a reply really goes on from its prefill; else the prefill's text stands at
    the end of the system prompt.
    """

    concurrency: int = 256
    room: int | None = None
    continues_prefill: bool = True

    def __init__(self, model: Model):
        self.model = model
        self.info = Info(type(self).__name__, model.source, model.revision)

    def choices(self, sampling: Sampling) -> tuple[str, ...]:
        """The choices that bind a reply of this model; empty where it is free."""
        return () if self.model.reasoning else sampling.choices

    @abc.abstractmethod
    async def reply(
        self,
        messages: list[Message],
        sampling: Sampling,
        adapter: Path | None = None,
        prefill: str = "",
        steering: Steering | None = None,
    ) -> Reply:
        """The assistant's next turn in a conversation that ends with a user turn.

        adapter: folder of a LoRA adapter, None for the plain model. prefill: how the reply begins.
        steering: needs an engine opened with `steered=True`.
        Raises RowError where this one reply cannot be had, UserError where none can.
        """

    async def stream(
        self, messages: list[Message], sampling: Sampling, show: Callable[[str], None], adapter: Path | None = None
    ) -> Reply:
        """`reply`, its text given to `show` piece by piece as it is written; an engine without pieces gives it whole."""
        reply = await self.reply(messages, sampling, adapter)
        show(reply.text)
        return reply

    async def start(self) -> None:
        """Load the model, or check that the endpoint serves it. Raises UserError."""

    async def close(self) -> None:
        """Give the memory back."""

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def find_adapter(spec: str) -> Path:
    """The folder of a LoRA adapter: `spec` itself, or fetched from the hub, as org/name[/subfolder][@revision].

    Only the config and the safetensors weights are fetched. Raises UserError where there is no adapter.
    """
    folder = Path(spec).expanduser()
    hub = HUB_ADAPTER.fullmatch(spec)
    if hub and not folder.is_dir():
        folder = _downloaded(spec, hub["repo"], hub["subfolder"] or "", hub["revision"])
    adapter_config(folder)
    return folder


def _downloaded(spec: str, repo: str, subfolder: str, revision: str | None) -> Path:
    import huggingface_hub

    files = [str(Path(subfolder, name)) for name in ("adapter_config.json", "adapter_model.safetensors")]
    try:
        folder = Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=files), subfolder)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"cannot fetch the adapter {spec} from the hub, and no folder of that name is here: {reason}; check the "
            "path, or the repo id and the network (a gated or private one needs HF_TOKEN in .env)"
        ) from None
    if not all((folder / Path(file).name).exists() for file in files):
        raise UserError(
            f"the hub's {spec} has no {' and '.join(files)}: weights are read from safetensors files only, and an "
            "adapter in a folder of the repo is named org/name/folder"
        )
    return folder


def adapter_config(adapter: Path) -> dict[str, Any]:
    """An adapter's adapter_config.json. Raises UserError where the folder is no LoRA adapter."""
    path = adapter / "adapter_config.json"
    if not path.exists():
        raise UserError(f"{adapter} is no LoRA adapter (no adapter_config.json); train one first, or check the path")
    config: dict[str, Any] = read_json(path)
    if not (adapter / "adapter_model.safetensors").exists():
        raise UserError(f"{adapter} has no adapter_model.safetensors; weights are read from safetensors files only")
    return config


def check_adapter(adapter: Path, hidden_size: int, layers: int, source: str) -> dict[str, Any]:
    """The adapter's config, after comparing its tensors' shapes with the model's. Raises UserError on another model's.

    hidden_size, layers: of the model's language part. source: how the message names the model.
    """
    config = adapter_config(adapter)
    trained_on = config.get("base_model_name_or_path")
    for name, shape in tensor_shapes(adapter / "adapter_model.safetensors").items():
        parts = name.split(".")
        index = next((int(part) for part in parts if part.isdigit()), 0)
        width = shape[1] if name.endswith(READERS) else shape[0] if name.endswith(WRITERS) else hidden_size
        if index >= layers or width != hidden_size:
            raise UserError(
                f"adapter {adapter} belongs to another model: it was trained on {trained_on} and its {name} "
                f"({'×'.join(map(str, shape))}) does not fit {source}; use that model or another adapter"
            )
    return config


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Name → shape of the tensors of a safetensors file, from its header alone. Raises UserError."""
    return {name: entry["shape"] for name, entry in safetensors_header(path)[0].items()}


def safetensors_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """(name → {dtype, shape, data_offsets}, the byte where the tensors' data begins) of a safetensors file.

    Raises UserError where it is none (as a Git LFS pointer is) or was cut off.
    """
    whole = path.stat().st_size
    with open(path, "rb") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
        try:
            header: dict[str, Any] = json.loads(file.read(begin - 8 if begin <= whole else 0))
        except ValueError:
            raise UserError(f"{path} is no safetensors file, or half written; train or download it again") from None
    header.pop("__metadata__", None)
    if whole != begin + max((entry["data_offsets"][1] for entry in header.values()), default=0):
        raise UserError(f"{path} is cut off; train or download it again")
    return header, begin
