"""Replies by vLLM inside this process: AsyncLLM, which batches whatever is in flight.

Token ids go in (so exactly one BOS) and come out; a LoRA adapter per request; what prompts begin with is computed once.
Weights that do not fit one GPU are split over as few as hold them; whole copies of the model use the other GPUs.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from character.engine.base import Engine, Message, Reply, Sampling, Steering, check_adapter
from character.engine.chat import Chat, Pieces, context_of, loading
from character.engine.folding import FOLDED, foldable
from character.engine.gpus import batch_graphs, gpu_settings, launching, steered_graphs
from character.engine.steering import MARK, STEERINGS
from character.models import Model
from character.rows import RowError
from character.utils import UserError, versions
from repeng import ControlVector

# Minor versions, the first and the last.
KNOWN_TO_WORK = (26, 29)
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Of a GPU's memory, at most this much for adapters that are in one batch.
ADAPTERS_SHARE = 0.1
MAX_ADAPTERS_IN_BATCH = 16
# Messages from which on a conversation's beginning differs from others': a system prompt and greetings are shared.
LONGER = 4
DEFAULTS = {"VLLM_NO_USAGE_STATS": "1"}
# GiB for keys and values; and no compiler is needed, nor half a minute of compiling before the first sample.
CPU_DEFAULTS = {"VLLM_CPU_KVCACHE_SPACE": "2", "TORCH_COMPILE_DISABLE": "1"}
FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
ERROR = re.compile(r"(?:^|[\]\s])((?:[a-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt)): (.+)")
DIED = re.compile(r"Worker proc \S+ died unexpectedly(?: \(exit code: -?\d+\))?")
HARMLESS = re.compile(r"(?:^|\) )(?:DEBUG|INFO|WARNING) \d\d-\d\d ")
# What vLLM says of a GPU that others use.
TAKEN = re.compile(r"Free memory on device \S+ \(([\d.]+)/([\d.]+) GiB\) on startup .*, ([\d.]+) GiB\)")
# Exceptions that only pass on another process's.
ECHOES = re.compile(r"CalledProcessError|Error raised in subprocess")
START_ERRORS = (RuntimeError, ValueError, TypeError, KeyError, OSError, ImportError, AttributeError, AssertionError)
OUT_OF_MEMORY = "as when the system runs out of memory"


class VLLMEngine(Engine):
    """A model inside vLLM. adapters: the LoRA folders that replies will name; they are loaded at the start.

    steered: whether replies may ask for steering. precision: vLLM's arguments for weights, keys and values in 8 bits.
    folded: whether every reply names the one adapter, which then becomes part of the weights where `foldable`.
    """

    concurrency = 64

    def __init__(
        self,
        model: Model,
        seed: int,
        adapters: Sequence[Path] = (),
        steered: bool = False,
        precision: Mapping[str, str] | None = None,
        folded: bool = False,
    ):
        super().__init__(model)
        self.precision = dict(precision or {})
        self.folded = folded
        # Whether its adapter is folded in, once it is known.
        self._folds = False
        self.seed = seed
        self.adapters = list(dict.fromkeys(adapters))
        self.steered = steered
        # The numbers under which vLLM's processes know the steerings, once they do.
        self._steerings: dict[Steering, asyncio.Task[int]] = {}
        self._llm: Any = None
        self._log: Path | None = None
        self._log_start = 0
        self._failed = False
        # The weights and the GPUs that hold them, for explanations.
        self._sizes = ""
        self._loras: dict[Path, Any] = {}
        self._numbers = itertools.count()

    async def start(self) -> None:
        """Load the model and its adapters, on all GPUs or on the CPU. Raises UserError with the cause."""
        folder = weights_folder(self.model)
        with loading(self.model):
            import transformers

            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        chat = Chat(tokenizer, self.model, 0)
        self._shape = config.hidden_size, config.num_hidden_layers
        ranks = [_rank(adapter, config, self.model) for adapter in self.adapters]
        await asyncio.sleep(0)  # a Ctrl-C so far takes effect here, not after the launch
        await self._launch(folder, config, ranks)
        chat.context = self._context(config)
        self.room = self._room()
        self.chat = chat
        if folder.parent.name == "snapshots":
            self.info.revision = folder.name
        if self._folds:
            self.info.notes.append(f"adapter {self.adapters[0]} folded into the weights")
            return
        for adapter in self.adapters:
            await self._load(adapter)

    async def _launch(self, folder: Path, config: Any, ranks: list[int]) -> None:
        if "VLLM_LOGGING_LEVEL" not in os.environ:
            descriptor, name = tempfile.mkstemp(prefix="vllm-", suffix=".log")
            os.close(descriptor)
            self._log = Path(name)
        _set_defaults(DEFAULTS)
        try:
            with _output_to(self._log), _interruptible():
                import vllm
                from vllm.v1.engine.async_llm import AsyncLLM

                settings = self._settings(folder, config, ranks)
                self._llm = AsyncLLM.from_engine_args(vllm.AsyncEngineArgs(**settings))
        except START_ERRORS as error:
            # Ctrl-C ends vLLM's own processes too: a cancellation that waits here goes first.
            await asyncio.sleep(0)
            raise UserError(self._explained("could not start", error)) from None
        if self._log:
            logging.getLogger("vllm").setLevel(logging.CRITICAL)
        self._skip_log()

    def _settings(self, folder: Path, config: Any, ranks: list[int]) -> dict[str, Any]:
        """vLLM's engine arguments for this machine; sets `concurrency` to what keeps them busy."""
        from vllm.platforms import current_platform

        settings: dict[str, Any] = {
            "model": str(folder),
            "seed": self.seed,
            "max_model_len": -1,  # the model's own, or what the memory for keys and values allows
            "load_format": "safetensors",
            "trust_remote_code": False,
            "enable_prefix_caching": True,
            "language_model_only": True,
            "disable_log_stats": True,
            **self.precision,
        }
        replicas, sequences = 1, 64
        if self.folded and len(ranks) == 1 and (current_platform.is_cpu() or current_platform.is_cuda()):
            self._folds = foldable(folder, self.adapters[0])
        adapters = [] if self._folds else self.adapters
        if current_platform.is_cpu():
            _set_defaults(CPU_DEFAULTS)
            # A request without an adapter gets the last slot's on the CPU, so that one has to stay empty. And each
            # token of a batch gets its own copy of its adapter.
            slots = len(adapters) + 1
            batched = 512 if adapters else 2048
            settings |= {"dtype": "float32", "enforce_eager": True, "max_num_batched_tokens": batched}
        else:
            gpus = 0 if current_platform.is_unspecified() else current_platform.device_count()
            if not gpus:
                raise UserError(
                    "vLLM sees no GPU here; check nvidia-smi and CUDA_VISIBLE_DEVICES, or --engine transformers"
                )
            memory = current_platform.get_device_total_memory()
            weights = _size(folder) // (2 if "quantization" in self.precision else 1)
            chosen = gpu_settings(weights, memory, gpus, config.num_attention_heads, self.model.source)
            self._sizes = (
                f"{weights / 1e9:.3g} GB of weights on {chosen['tensor_parallel_size']} × {memory / 1e9:.0f} GB"
            )
            sequences, replicas = chosen["max_num_seqs"], chosen["data_parallel_size"]
            graphs = steered_graphs if self.steered else batch_graphs
            settings |= chosen | {"compilation_config": graphs(sequences)}
            if current_platform.is_cuda():
                settings |= {"worker_cls": "character.engine.worker.Worker", **launching(replicas)}
            largest = max((_size(adapter) for adapter in adapters), default=1)
            fitting = max(1, int(ADAPTERS_SHARE * memory / largest))
            slots = min(len(adapters), fitting, MAX_ADAPTERS_IN_BATCH)
        if self._folds:
            settings |= {
                "worker_cls": "character.engine.worker.Worker",
                "load_format": FOLDED,
                "model_loader_extra_config": {"adapter": str(self.adapters[0])},
            }
        if adapters:
            settings |= {
                "enable_lora": True,
                "max_lora_rank": next(rank for rank in RANKS if rank >= max(ranks)),
                "max_loras": slots,
                "max_cpu_loras": max(len(adapters), slots),
            }
        if self.steered:
            settings["worker_cls"] = "character.engine.worker.SteeredWorker"
        # A quarter more than fits, so that a finished reply's place is taken at once.
        self.concurrency = sequences * replicas * 5 // 4
        return settings | {"max_num_seqs": sequences}

    def _context(self, config: Any) -> int:
        context = int(self._llm.vllm_config.model_config.max_model_len)
        limit = context_of(config, self.model)
        if context < limit:
            self.info.notes.append(f"context of {context} tokens instead of {limit}: what the memory allows")
        return min(context, limit)

    def _room(self) -> int:
        return int(self._llm.vllm_config.cache_config.kv_cache_size_tokens * self._copies)

    @property
    def _copies(self) -> int:
        """Whole copies of the model, each on GPUs of its own."""
        return int(self._llm.vllm_config.parallel_config.data_parallel_size)

    async def _load(self, adapter: Path) -> None:
        from vllm.lora.request import LoRARequest

        number = len(self._loras) + 1
        request = LoRARequest(lora_name=f"{number}-{adapter.name}", lora_int_id=number, lora_path=str(adapter))
        # As a value, since vLLM passes on what its other process raised as a bare Exception.
        outcome: object
        [outcome] = await asyncio.gather(self._llm.add_lora(request), return_exceptions=True)
        if isinstance(outcome, Exception):
            self._skip_log()
            cause = str(outcome).removeprefix("Call to add_lora method failed: ")
            raise UserError(
                f"vLLM cannot load adapter {adapter}: {_short(cause)}; use another adapter, or --engine transformers"
            )
        self._loras[adapter] = request

    async def close(self) -> None:
        """Stop vLLM's processes. Its log goes with them, unless something failed."""
        if self._llm is not None:
            self._llm.shutdown()
        self._llm = None
        if self._log and not self._failed:
            self._log.unlink(missing_ok=True)

    async def reply(
        self,
        messages: list[Message],
        sampling: Sampling,
        adapter: Path | None = None,
        prefill: str = "",
        steering: Steering | None = None,
    ) -> Reply:
        return await self._reply(messages, sampling, adapter, prefill, steering)

    async def stream(
        self, messages: list[Message], sampling: Sampling, show: Callable[[str], None], adapter: Path | None = None
    ) -> Reply:
        pieces = Pieces(show)
        reply = await self._reply(messages, sampling, adapter, pieces=pieces)
        pieces.finish(reply.text)
        return reply

    async def _reply(
        self,
        messages: list[Message],
        sampling: Sampling,
        adapter: Path | None,
        prefill: str = "",
        steering: Steering | None = None,
        pieces: Pieces | None = None,
    ) -> Reply:
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        if steering is not None and not self.steered:
            raise UserError("the engine was not opened for steering; open it with steered=True")
        if self._folds and [adapter] != self.adapters:
            raise UserError(f"the engine answers with {self.adapters[0]} alone; open it with folded=False")
        if not self._folds and adapter is not None and adapter not in self._loras:
            raise UserError(f"adapter {adapter} was not named when the engine was opened; add it to `adapters`")
        prompt = self.chat.encode(messages, prefill, sampling.max_tokens)
        choices = list(self.choices(sampling))
        parameters = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            repetition_penalty=sampling.repetition_penalty,
            max_tokens=sampling.max_tokens,
            seed=self._seed_of(sampling),
            structured_outputs=StructuredOutputsParams(choice=choices) if choices else None,
            detokenize=False,
            output_kind=RequestOutputKind.CUMULATIVE if pieces else RequestOutputKind.FINAL_ONLY,
        )
        inputs = TokensPrompt(prompt_token_ids=prompt.ids)
        name = str(next(self._numbers))
        try:
            if steering is not None:
                mark = f"{MARK}{await self._steering(steering)}"
                name += mark
                # What the prefix cache holds was computed with one steering, and is reused with this one alone.
                inputs["cache_salt"] = mark
            lora = self._loras.get(adapter) if adapter is not None else None
            answering = self._llm.generate(
                inputs, parameters, name, lora_request=lora, data_parallel_rank=self._replica(messages)
            )
            async for output in answering:
                last = output
                if pieces:
                    pieces.update(self._text(output.outputs[0]))
        except EngineDeadError as error:
            raise UserError(self._explained("stopped", error)) from None
        except EngineGenerateError as error:
            raise RowError(f"vLLM failed on one reply: {_short(str(error.__cause__ or error))}") from error
        completion = last.outputs[0]
        new = list(completion.token_ids)
        if completion.finish_reason not in ("stop", "length"):
            raise RowError(f"vLLM ended a reply with '{completion.finish_reason}'")
        return Reply(self._text(completion), completion.finish_reason, len(prompt.ids), len(new), prompt.dropped_turns)

    def _seed_of(self, sampling: Sampling) -> int | None:
        """The seed of one reply where there are several copies of the model, which all draw the same random numbers."""
        if self._copies == 1:
            return None
        return (self.seed ^ sampling.seed) % 2**31

    def _replica(self, messages: list[Message]) -> int | None:
        """Which copy of the model answers: a longer conversation's own, which has its beginning; else None, the idlest."""
        if self._copies == 1 or len(messages) < LONGER:
            return None
        beginning = "".join(message["content"] for message in messages[: LONGER - 1])
        return zlib.crc32(beginning.encode()) % self._copies

    async def _steering(self, steering: Steering) -> int:
        """The number of a steering, which vLLM's processes learn at its first use. Raises UserError."""
        if steering not in self._steerings:
            number = len(self._steerings) + 1
            if number == STEERINGS:
                raise UserError(
                    f"one run steers by at most {number - 1} control vectors and strengths; name fewer constitutions"
                )
            self._steerings[steering] = asyncio.create_task(self._learn(number, steering))
        # A reply that is cancelled must not take the others' number with it.
        return await asyncio.shield(self._steerings[steering])

    async def _learn(self, number: int, steering: Steering) -> int:
        from vllm.v1.engine.exceptions import EngineDeadError

        ControlVector.load(steering.vector).check(*self._shape, self.model.source)
        call = self._llm.collective_rpc("steer", args=(number, str(steering.vector), steering.strength))
        # As a value, since vLLM passes on what its other process raised as a bare Exception.
        outcome: object
        [outcome] = await asyncio.gather(call, return_exceptions=True)
        if isinstance(outcome, EngineDeadError):
            raise outcome
        if isinstance(outcome, Exception):
            self._skip_log()
            raise UserError(f"vLLM cannot steer {self.model.source}: {_short(str(outcome))}; use --engine transformers")
        return number

    def _text(self, completion: Any) -> str:
        # The token that ends a turn need not be among the special ones.
        new = list(completion.token_ids)
        kept = new[:-1] if completion.finish_reason == "stop" else new
        return self.chat.decode(kept)

    def _skip_log(self) -> None:
        """Leave what the log says so far out of later explanations."""
        if self._log:
            self._log_start = self._log.stat().st_size

    def _explained(self, what: str, error: Exception) -> str:
        """One line: what vLLM did, why as far as its log or the exception says, and what to do. The log is kept."""
        self._failed = True
        found = _cause(self._log.read_bytes()[self._log_start :].decode(errors="replace")) if self._log else None
        cause = found or _short(str(error)) or type(error).__name__
        log = f" (vLLM's log: {self._log})" if self._log else " (see vLLM's log above)"
        version = _version()
        if isinstance(error, ImportError | TypeError | AttributeError) or not _known(version):
            first, last = KNOWN_TO_WORK
            return f"vLLM {version} {what}: {cause}; known to work: 0.{first} to 0.{last}{log}"
        if found is None and what == "stopped":
            cause = f"one of its processes ended without a word, {OUT_OF_MEMORY}"
        remedy = "run the same command again to go on" if what == "stopped" else "see the log, or --engine transformers"
        if taken := TAKEN.search(cause):
            cause = "others use this GPU: {} of {} GiB are free, {} are wanted".format(*taken.groups())
            remedy = "wait, end what nvidia-smi lists or ask whose it is, or name a free GPU in CUDA_VISIBLE_DEVICES"
        elif "memory" in cause.lower():
            remedy = "use a smaller model, more GPUs, or free the memory that other programs hold"
            if self._sizes:
                half = "" if self.precision else ", and --quantization fp8 --kv-cache-dtype fp8 need half"
                remedy += f"; here are {self._sizes}{half}"
            if what == "stopped":
                remedy += "; finished rows are kept"
        return f"vLLM {what} with {self.model.source}: {cause}; {remedy}{log}"


def weights_folder(model: Model) -> Path:
    """The model's folder: its own, or the hub's snapshot, downloaded where it is not in the cache.

    Raises UserError with the remedy where it cannot be had, or holds no safetensors.
    """
    folder = Path(model.source)
    if not folder.is_dir():
        import huggingface_hub

        with loading(model):
            folder = Path(
                huggingface_hub.snapshot_download(
                    model.source,
                    revision=model.revision,
                    allow_patterns=FILES,
                    ignore_patterns=["original/*", "consolidated*"],
                )
            )
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"{model.source} has no *.safetensors; weights are read from safetensors files only")
    return folder


def _size(folder: Path) -> int:
    """Bytes of the weights in a folder."""
    files = list(folder.glob("model*.safetensors")) or list(folder.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files)


def _rank(adapter: Path, config: Any, model: Model) -> int:
    """The adapter's rank. Raises UserError where it is another model's, or of a kind that vLLM would get wrong."""
    settings = check_adapter(adapter, config.hidden_size, config.num_hidden_layers, model.source)
    for feature in ("rank_pattern", "alpha_pattern", "use_dora", "modules_to_save"):
        if settings.get(feature):
            raise UserError(f"adapter {adapter} uses {feature}, which vLLM lacks; use --engine transformers")
    rank: int = settings["r"]
    if rank > RANKS[-1]:
        raise UserError(f"adapter {adapter} has rank {rank}; vLLM takes at most {RANKS[-1]}: use --engine transformers")
    return rank


def _set_defaults(variables: dict[str, str]) -> None:
    for variable, value in variables.items():
        os.environ.setdefault(variable, value)


def _cause(log: str) -> str | None:
    """The first exception in vLLM's log, as "Name: message", or death; those after it are its echoes."""
    for line in log.splitlines():
        if HARMLESS.search(line) or ECHOES.search(line):
            continue
        if death := DIED.search(line):
            return f"{death[0]}, {OUT_OF_MEMORY}"
        if found := ERROR.search(line):
            return f"{found[1].split('.')[-1]}: {_short(found[2])}"
    return None


def _version() -> str:
    installed = versions()
    return installed.get("vllm") or installed.get("vllm-cpu") or "of no known version"


def _known(version: str) -> bool:
    """Whether this version of vLLM is one that works."""
    first, last = KNOWN_TO_WORK
    major, minor, *_ = [int(part) for part in re.findall(r"\d+", version)] or (0, 0)
    return major == 0 and first <= minor <= last


def _short(text: str) -> str:
    """Text on one line, without what pydantic adds, at most 300 characters."""
    text = re.sub(r"^\d+ validation errors? for \w+\s+(Value error, )?", "", " ".join(text.split()))
    return text.split(" [type=")[0][:300].rstrip(" .;")


class _Interrupted(BaseException):
    """Ctrl-C, under a name that vLLM does not swallow."""


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C end a long call that holds the event loop, which would otherwise hear of it only afterwards."""

    here = os.getpid()

    def interrupt(*_: object) -> NoReturn:
        # vLLM's processes that are forked meanwhile know Ctrl-C by its own name.
        raise _Interrupted if os.getpid() == here else KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except _Interrupted:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, former)


@contextlib.contextmanager
def _output_to(path: Path | None) -> Iterator[None]:
    """Send what this process prints to a file; processes that are started meanwhile keep it. None changes nothing."""
    if path is None:
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [(number, os.dup(number)) for number in (1, 2)]
    try:
        with open(path, "ab") as file:
            for number, _ in kept:
                os.dup2(file.fileno(), number)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in kept:
            os.dup2(copy, number)
            os.close(copy)
