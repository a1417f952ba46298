"""What both training steps share: settings, the LoRA on the student, the Trainer's arguments, and what is kept of a run."""

import contextlib
import functools
import importlib.util
import inspect
import json
import logging
import math
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from character import cli, rows
from character.models import Model, fingerprint, shape_of, weight_bytes
from character.steps import duration
from character.utils import UserError, git_commit, new_folder, read_json, versions, write_json

META = "training.json"
METRICS = "metrics.jsonl"
# Of a GPU's free memory, what rows may fill once weights, adapter and optimizer have theirs; the rest is fragments.
MEMORY_SHARE = 0.92
# Bytes for what does not grow with the rows: the driver, workspaces, a tile of logits.
MEMORY_APART = 2e9
# Fewer tokens at once do not keep a GPU busy, so that recomputing activations to have more is faster; more than the
# second number bring nothing.
MIN_TOKENS, MAX_TOKENS = 4096, 16384
# Cards that a dry run speaks of, by their GB.
CARDS = (24, 48, 80, 141)
CPU_MICRO_BATCH = 2
# Rows come and go in many lengths, which tears the GPU's memory into pieces of fixed size.
ALLOCATOR = "expandable_segments:True"


@dataclass
class TrainArgs(cli.StepArgs):
    """Settings of both training steps; the defaults are the method's."""

    model: str = cli.flag("pocket", "the student")
    name: str | None = cli.flag(None, "the student's family name, where it cannot be read off the model's id")
    rank: int = cli.flag(64, "LoRA rank")
    alpha: int = cli.flag(128, "LoRA alpha")
    learning_rate: float = cli.flag(5e-5, "peak learning rate")
    warmup_ratio: float = cli.flag(0.1, "share of the steps that warm up")
    min_lr_ratio: float = cli.flag(0.1, "where the cosine ends, as a share of the peak")
    adam_beta1: float = cli.flag(0.9, "Adam's first beta")
    adam_beta2: float = cli.flag(0.98, "Adam's second beta")
    max_grad_norm: float = cli.flag(1.0, "the gradient's norm is clipped at this")
    epochs: float = cli.flag(1.0, "passes over the data")
    batch_size: int = cli.flag(32, "rows per optimizer step, over all GPUs")
    micro_batch_size: int | None = cli.flag(
        None, f"rows per GPU at once (default: as many tokens as its memory takes; {CPU_MICRO_BATCH} on a CPU)"
    )
    gradient_checkpointing: bool | None = cli.flag(
        None, "recompute activations on a GPU: slower, much less memory (default: where the memory demands it)"
    )
    tokens_per_second: float | None = cli.flag(None, "of your machine; --dry-run then tells the time")
    report_to: Literal["none", "wandb", "trackio", "tensorboard"] = cli.flag("none", "where else metrics go")


def world_size() -> int:
    """How many processes train together (accelerate and torchrun say so in the environment)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0


@dataclass(frozen=True)
class AtOnce:
    """What a process has in memory at once: so many rows, or of so many rows as many as have so many tokens."""

    rows: int
    tokens: int | None = None
    recomputed: bool = False


def trainer_arguments(args: TrainArgs, at_once: AtOnce, folder: Path, rows_in: int) -> dict[str, Any]:
    """Arguments that transformers' Trainer and TRL's share. at_once: what `micro_batch_of` gives."""
    import torch

    if args.report_to != "none":
        if importlib.util.find_spec(args.report_to) is None:
            raise UserError(f"{args.report_to} is not installed; pip install {args.report_to}, or --report-to none")
        # .env has one name for the key, wandb's library another.
        if os.environ.get("WANDB_TOKEN"):
            os.environ.setdefault("WANDB_API_KEY", os.environ["WANDB_TOKEN"])
    cuda = torch.cuda.is_available()
    fused = cuda and fused_kernels()
    if fused:
        _silence_liger()
    steps = max(1, math.ceil(rows_in * args.epochs / args.batch_size))
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": at_once.rows,
        "gradient_accumulation_steps": args.batch_size // (at_once.rows * world_size()),
        "num_train_epochs": args.epochs,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": args.min_lr_ratio},
        "warmup_steps": math.ceil(steps * args.warmup_ratio),
        "adam_beta1": args.adam_beta1,
        "adam_beta2": args.adam_beta2,
        "weight_decay": 0.0,
        "max_grad_norm": args.max_grad_norm,
        "bf16": cuda,
        "use_cpu": not cuda,
        "gradient_checkpointing": at_once.recomputed,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "dataloader_pin_memory": cuda,
        # Every LoRA weight is used in every pass.
        "ddp_find_unused_parameters": False,
        "use_liger_kernel": fused,
        "seed": args.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": max(1, steps // 5),
        "save_total_limit": 1,
        "report_to": args.report_to,
        "disable_tqdm": True,
    }


def on_one_gpu(config: Any) -> Any:
    """A Trainer's arguments, for one GPU per process, however many there are."""
    config._n_gpu = min(1, config.n_gpu)
    return config


def on_gpu(network: Any) -> Any:
    """The network on this process's own GPU, where there is one."""
    import torch

    if torch.cuda.is_available():
        os.environ.setdefault("PYTORCH_ALLOC_CONF", ALLOCATOR)
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        network.to("cuda")
    return network


def micro_batch_of(args: TrainArgs, model: Model, network: Any, row_tokens: int, packed: bool = False) -> AtOnce:
    """What is in memory at once: as the flags say, or what the GPU's memory takes.

    network: on the GPU, where there is one. row_tokens: of the longest row. packed: every row is that long.
    Raises UserError where the batch does not divide or not even one row fits.
    """
    import torch

    processes = world_size()
    at_once = AtOnce(args.micro_batch_size or CPU_MICRO_BATCH)
    if torch.cuda.is_available():
        free, whole = torch.cuda.mem_get_info()
        # Packed rows are counted alike by all processes, whose GPUs may be filled unequally.
        memory = whole if packed and processes > 1 else free + torch.cuda.memory_reserved()
        need = memory_need(network.config.get_text_config(), network.get_memory_footprint(), args.rank, fused_kernels())
        try:
            tokens, recomputed = fitting(memory, need, row_tokens, args.micro_batch_size, args.gradient_checkpointing)
        except UserError as error:
            raise UserError(
                f"{model.source}: {error}; this GPU has {memory / 1e9:.0f} of {whole / 1e9:.0f} GB free; use another, or a smaller model"
            ) from None
        most = max(1, args.batch_size // processes)
        if packed:
            fit = max(rows for rows in range(1, most + 1) if most % rows == 0 and rows * row_tokens <= tokens)
            at_once = AtOnce(args.micro_batch_size or fit, None, recomputed)
        elif args.micro_batch_size:
            at_once = AtOnce(args.micro_batch_size, None, recomputed)
        else:
            at_once = AtOnce(most, tokens, recomputed)
    if args.batch_size % (at_once.rows * processes):
        raise UserError(
            f"--batch-size {args.batch_size} is no multiple of {at_once.rows * processes} "
            f"({at_once.rows} rows at once on {processes} processes); change it, --micro-batch-size or the number of processes"
        )
    return at_once


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that LoRA training holds on a GPU: apart from the rows, and per token with and without recomputation."""

    held: float
    token: float
    token_recomputed: float


def memory_need(config: Any, weights: float, rank: int, fused: bool) -> MemoryNeed:
    """What a network of this (text) config needs. weights: its bytes. fused: whether liger-kernel's layers are used."""
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    width = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries = config.num_attention_heads * width
    keys = config.num_key_value_heads * width
    # Float32 weights, gradients and Adam's two moments of A and B on the seven linear layers.
    adapter = 16 * rank * layers * (7 * hidden + 2 * queries + 2 * keys + 3 * inner)
    # Values that a layer keeps for its gradient, in bf16: norms' and LoRA's inputs, attention's, the gated product's.
    kept = 4 * hidden + 3 * queries + 3 * keys + 3 * inner + (0 if fused else 4 * hidden + inner)
    # The reference's forward pass, or the layer that is computed anew, comes on top of what all layers keep.
    one = 2 * (8 * hidden + 3 * queries + 3 * keys + 4 * inner)
    return MemoryNeed(weights + adapter, 2 * layers * kept + one, 2 * layers * hidden + one)


def fitting(
    memory: float,
    need: MemoryNeed,
    row_tokens: int,
    micro_batch: int | None = None,
    checkpointing: bool | None = None,
) -> tuple[int, bool]:
    """(tokens at once, whether activations are recomputed) on a GPU of so many bytes; the longest row fits.

    Recomputing comes in where too few tokens fit without it. micro_batch, checkpointing: as asked for. Raises UserError.
    """
    room = MEMORY_SHARE * memory - MEMORY_APART - need.held
    plain, recomputed = (int(room / token) for token in (need.token, need.token_recomputed))
    asked = micro_batch * row_tokens if micro_batch else 0
    if checkpointing is None:
        checkpointing = plain < (asked or max(row_tokens, MIN_TOKENS))
    # Who names a micro-batch may try it, whatever is estimated here.
    tokens = asked or min(recomputed if checkpointing else plain, max(MAX_TOKENS, row_tokens))
    if tokens < row_tokens:
        least = need.token_recomputed if checkpointing else need.token
        gigabytes = (need.held + row_tokens * least + MEMORY_APART) / MEMORY_SHARE / 1e9
        raise UserError(f"training needs a GPU with {gigabytes:.0f} GB free for rows of {row_tokens} tokens")
    return tokens, checkpointing


def fused_kernels() -> bool:
    """Whether liger-kernel is there."""
    return importlib.util.find_spec("liger_kernel") is not None


def _silence_liger() -> None:
    """Keep from the user that liger-kernel lacks other machines' libraries, and what TRL's next major version drops."""
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="`use_liger_kernel=True` is deprecated", category=FutureWarning)


def leave() -> None:
    """End this process's part in a training of several processes, once all is trained."""
    if world_size() == 1:
        return
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class ByLength:
    """A random order of rows in which those of one optimizer step stand by length, so that little is padding.

    Which rows a step has is left to chance, so what is learned stays the same. lengths: of each row, in tokens.
    hands: processes that a step's rows are dealt to, like cards; each then has as many long ones as the next.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int, hands: int = 1):
        self.lengths = lengths
        self.batch = batch
        self.seed = seed
        self.hands = hands

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called at the beginning of every epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = list(range(len(self.lengths)))
        random.Random(f"{self.seed} {self.epoch}").shuffle(order)
        for start in range(0, len(order), self.batch):
            step = sorted(order[start : start + self.batch], key=lambda row: -self.lengths[row])
            for hand in range(self.hands):
                yield from step[hand :: self.hands]

    epoch = 0


def speed_up(trainer: Any, lengths: Sequence[int], batch: int, tokens: int | None = None, sides: int = 1) -> None:
    """Leave out what costs a GPU time and changes no result.

    lengths: of the trainer's rows, in tokens. tokens: how many are in memory at once; then a process is given its rows
    of a whole step. sides: sequences per row.
    """
    from character.engine.transformers import attends_plainly

    sampler = ByLength(lengths, batch, trainer.args.seed, world_size() if tokens else 1)
    trainer._get_train_sampler = lambda _dataset=None: sampler
    fuse_lora(trainer.model)
    network = trainer.model.get_base_model()
    unpadded = attends_plainly(network)
    if unpadded:
        Unpadded(network)
    if tokens:
        trainer.training_step = Parts(trainer, tokens, sides, padded=not unpadded)


class Parts:
    """A Trainer's step over all rows that a process has of it, a part at a time: as many rows as have `tokens` tokens.

    The gradient is that of all rows at once. padded: a row takes as many tokens as the longest in its part. Of several
    processes, the one with the least memory says how many tokens.
    """

    def __init__(self, trainer: Any, tokens: int, sides: int, padded: bool):
        import torch

        accelerator = trainer.accelerator
        self.trainer = trainer
        self.tokens = int(accelerator.gather(torch.tensor([tokens], device=accelerator.device)).min())
        self.sides = sides
        self.padded = padded

    def __call__(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """The step's loss. Each value of inputs: (sides × rows, length), one side after the other."""
        trainer = self.trainer
        model.train()
        inputs = trainer._prepare_inputs(inputs)
        lengths = inputs["attention_mask"].sum(dim=1).unflatten(0, (self.sides, -1)).T.contiguous()
        parts = self._divided(trainer.accelerator.gather(lengths).unflatten(0, (-1, len(lengths))).tolist())
        own = lengths.tolist()
        weights = self._weights(parts, inputs, by_tokens=num_items_in_batch is not None)
        whole = 0.0
        for number, part in enumerate(parts):
            longest = max(max(own[row]) for row in part)
            given = {
                name: value.unflatten(0, (self.sides, -1))[:, part, :longest].flatten(0, 1)
                for name, value in inputs.items()
            }
            last = number == len(parts) - 1
            with contextlib.nullcontext() if last else trainer.accelerator.no_sync(model):
                with trainer.compute_loss_context_manager():
                    loss = trainer.compute_loss(model, given, num_items_in_batch=num_items_in_batch)
                if num_items_in_batch is None:
                    loss = loss * (len(part) / len(lengths))
                trainer.accelerator.backward(loss)
            whole += loss.detach()
        for values in trainer._metrics["train"].values():
            if len(values) == len(parts):
                values[:] = [sum(value * weight for value, weight in zip(values, weights, strict=True))]
        return whole

    def _weights(self, parts: list[list[int]], inputs: dict[str, Any], by_tokens: bool) -> list[float]:
        """Each part's share of the step's rows, or of its trained tokens in all processes, as the loss is weighted."""
        counts = [len(part) for part in parts]
        if by_tokens:
            trained = (inputs["labels"][:, 1:] != -100).sum(dim=1)
            everyone = self.trainer.accelerator.gather(trained).unflatten(0, (-1, len(trained))).sum(dim=0).tolist()
            counts = [sum(everyone[row] for row in part) for part in parts]
        return [count / max(1, sum(counts)) for count in counts]

    def _divided(self, lengths: list[list[list[int]]]) -> list[list[int]]:
        """The rows of each part, the same in every process: what is told of a part is gathered, which takes one shape.

        lengths: of each process, row and side.
        """
        parts = self._filled(lengths, self.tokens)
        # A small last part would not keep a GPU busy: as few parts, of about one size.
        share = self._taken(lengths, range(len(lengths[0]))) / len(parts)
        for limit in (share * tenths / 10 for tenths in range(10, 20)):
            even = self._filled(lengths, min(limit, self.tokens))
            if len(even) == len(parts):
                return even
        return parts

    def _filled(self, lengths: list[list[list[int]]], limit: float) -> list[list[int]]:
        """The rows of each part where every part takes what fits."""
        parts: list[list[int]] = [[]]
        for row in range(len(lengths[0])):
            if parts[-1] and self._taken(lengths, [*parts[-1], row]) > limit:
                parts.append([])
            parts[-1].append(row)
        return parts

    def _taken(self, lengths: list[list[list[int]]], rows: Sequence[int]) -> int:
        """Tokens that rows take together, in the process where they take most."""
        each = [[length for row in rows for length in process[row]] for process in lengths]
        return max(len(own) * max(own) if self.padded else sum(own) for own in each)


@contextlib.contextmanager
def switched_off(layers: Sequence[Any]) -> Iterator[None]:
    """Within the block these layers of PEFT leave their adapters out.

    `disable_adapter` of the whole network looks at every weight first, a tenth of a second in which a GPU waits.
    """
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def fuse_lora(network: Any) -> None:
    """Have the adapter on each linear layer added within its matrix products: the same values, fewer passes over memory.

    network: of PEFT, with one LoRA adapter as `lora_config` makes it.
    """
    import peft
    import torch

    for module in network.modules():
        if isinstance(module, peft.tuners.lora.Linear) and type(module.base_layer) is torch.nn.Linear:
            module.forward = functools.partial(_lora_linear, _fused_lora(), module)


def _lora_linear(function: Any, module: Any, x: Any) -> Any:
    """What PEFT's LoRA layer gives. function: `_fused_lora`'s."""
    if module.disable_adapters:
        return module.base_layer(x)
    (name,) = module.active_adapters
    base, a, b = module.base_layer, module.lora_A[name], module.lora_B[name]
    return function.apply(x, base.weight, base.bias, a.weight, b.weight, module.scaling[name])


@functools.cache
def _fused_lora() -> Any:
    """The autograd function of a frozen linear layer with LoRA: x Wᵀ + bias + scaling · (x Aᵀ) Bᵀ."""
    import torch

    class FusedLora(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, weight: Any, bias: Any, a: Any, b: Any, scaling: float) -> Any:
            kind = x.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
            x, weight = x.to(dtype), weight.to(dtype)
            flat = x.reshape(-1, x.shape[-1])
            small, large = a.to(dtype), (scaling * b).to(dtype)
            inner = flat @ small.T
            out = torch.nn.functional.linear(flat, weight, None if bias is None else bias.to(dtype))
            out.addmm_(inner, large.T)
            ctx.save_for_backward(flat, inner, weight, small, large)
            ctx.scaling, ctx.shape, ctx.types = scaling, x.shape, (a.dtype, b.dtype)
            return out.view(*x.shape[:-1], -1)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            flat, inner, weight, small, large = ctx.saved_tensors
            gradient = gradients[0].reshape(-1, weight.shape[0])
            through = gradient @ large
            to_a = (through.T @ flat).to(ctx.types[0])
            to_b = ctx.scaling * (gradient.T @ inner).to(ctx.types[1])
            to_x = None
            if ctx.needs_input_grad[0]:
                to_x = (gradient @ weight).addmm_(through, small).view(ctx.shape)
            return to_x, None, None, to_a, to_b, None

    return FusedLora


class Unpadded:
    """Runs a network on a batch's tokens without its padding, on the right of each row.

    network: a causal language model of transformers; it gets batches with an attention mask from now on.
    """

    def __init__(self, network: Any):
        import torch
        import transformers
        from torch.nn.attention.varlen import varlen_attn

        # An older torch has no such argument: there keys and values may have fewer heads unasked.
        self.asked: dict[str, Any] = (
            {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
        )
        # FlashAttention's generation of GPUs.
        self.kernel = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
        transformers.AttentionInterface.register("unpadded", self._attention)
        transformers.AttentionMaskInterface.register("unpadded", lambda *_, **__: None)
        network.set_attn_implementation("unpadded")
        network.base_model.register_forward_pre_hook(self._enter, with_kwargs=True)
        network.base_model.register_forward_hook(self._leave)

    def _enter(self, _module: Any, words: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        import torch

        mask = named["attention_mask"]
        self.shape = mask.shape
        self.places = mask.flatten().nonzero()[:, 0]
        self.borders = torch.nn.functional.pad(mask.sum(dim=1).cumsum(dim=0), (1, 0)).int()
        positions = (mask.cumsum(dim=1) - 1).flatten()[self.places]
        ids = named["input_ids"].flatten()[self.places]
        return words, named | {"input_ids": ids[None], "position_ids": positions[None], "attention_mask": None}

    def _leave(self, _module: Any, _words: Any, output: Any) -> Any:
        output.last_hidden_state = self._padded(output.last_hidden_state[0])
        return output

    def _padded(self, tokens: Any) -> Any:
        """(tokens, …) as (rows, length, …), zero where there is padding."""
        rows, length = self.shape
        whole = tokens.new_zeros(rows * length, *tokens.shape[1:])
        return whole.index_copy(0, self.places, tokens).view(rows, length, *tokens.shape[1:])

    def _attention(self, _module: Any, *parts: Any, scaling: float | None = None, **_: Any) -> tuple[Any, None]:
        """Attention within each row. parts: query, key, value, of (1, heads, tokens, width), and a mask.

        Keys and values may have fewer heads.
        """
        import torch

        query, key, value = (part[0].transpose(0, 1) for part in parts[:3])
        kernel = self.kernel and query.dtype != torch.float32
        return (self._by_borders if kernel else self._by_rows)(query, key, value, scaling)[None], None

    def _by_borders(self, query: Any, key: Any, value: Any, scaling: float | None) -> Any:
        """Through a kernel that takes tokens and where each row begins."""
        from torch.nn.attention.varlen import varlen_attn

        ends, length = self.borders, self.shape[1]
        return varlen_attn(
            query, key, value, ends, ends, length, length, scale=scaling, window_size=(-1, 0), **self.asked
        )

    def _by_rows(self, query: Any, key: Any, value: Any, scaling: float | None) -> Any:
        """On rows with their padding."""
        import torch

        query, key, value = (self._padded(part).transpose(1, 2) for part in (query, key, value))
        found = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return found.transpose(1, 2).flatten(0, 1)[self.places]


def lora_config(model: Model, args: TrainArgs) -> Any:
    """LoRA on every linear layer of the network (of a multi-modal model's language part alone)."""
    import peft

    return peft.LoraConfig(
        r=args.rank, lora_alpha=args.alpha, target_modules=model.lora, lora_dropout=0.0, task_type="CAUSAL_LM"
    )


@dataclass(frozen=True)
class Amount:
    """What a dry run tells of a training: such as "DPO on {} pairs", their file, and the tokens of each.

    longest: tokens that a row may have.
    """

    doing: str
    source: Path
    lengths: Sequence[int]
    longest: int


def finish(
    args: TrainArgs,
    model: Model,
    output: Path,
    settings: Mapping[str, Any],
    amount: Amount,
    make: Callable[[Path], Any],
) -> None:
    """Train the adapter at `output`, unless it is there; with `--dry-run`, say what would be done.

    make: the folder for checkpoints → the Trainer.
    """
    there = already_trained(output, settings, args.overwrite)
    if not is_main() and (there or args.dry_run):
        return
    if there:
        print(f"{output}: complete")
    elif args.dry_run:
        count, tokens = len(amount.lengths), sum(amount.lengths)
        known, most = ("about", "") if settings["data"] else ("at most", "at most ")
        time = duration(tokens * args.epochs, args.tokens_per_second)
        print(
            f"{output}: {amount.doing.format(f'{most}{count}')} of {amount.source}, "
            f"{known} {tokens:,} tokens and {-(-count // args.batch_size)} steps an epoch{time}"
        )
        print("    computed from the model's shape: " + footprint(args, model, amount.longest))
        rows.plan(output / "adapter_model.safetensors", [])
    else:
        train(make(output.with_name(f".{output.name}.checkpoints")), output, settings, args.overwrite)


def footprint(args: TrainArgs, model: Model, longest: int) -> str:
    """What training takes on a GPU (see MemoryNeed) and on disk, as text. longest: tokens of a row."""
    shape, weights = shape_of(model), weight_bytes(model)
    if shape is None or weights is None:
        return f"not before {model.source} is a local folder with its config.json"
    need = memory_need(shape, weights, args.rank, fused_kernels())

    def gigabytes(at_once: int, token: float) -> str:
        return f"{math.ceil((need.held + at_once * longest * token + MEMORY_APART) / MEMORY_SHARE / 1e9)} GB"

    if args.micro_batch_size:
        each = args.micro_batch_size
        rest = f"{each} at once take {gigabytes(each, need.token)}, or {gigabytes(each, need.token_recomputed)} recomputing"
    else:
        fits = []
        for card in CARDS:
            try:
                tokens, again = fitting(1e9 * card, need, longest, None, args.gradient_checkpointing)
            except UserError:
                fits.append(f"{card} GB none")
            else:
                fits.append(f"{card} GB {tokens:,}{' recomputing' if again else ''}")
        rest = f"tokens that a card takes at once: {', '.join(fits)} (from {gigabytes(1, need.token_recomputed)} on)"
    # In float32 the adapter has 4 of the 16 bytes that it has on the GPU; a checkpoint has Adam's two moments too, and the
    # one before goes when the next is whole.
    adapter = (need.held - weights) / 4
    without = "" if fused_kernels() else " (without liger-kernel)"
    return (
        f"{need.held / 1e9:.1f} GB of GPU memory{without} for weights, adapter and optimizer; rows of up to {longest:,} tokens: {rest}; "
        f"disk {weights / 1e9:.1f} GB for the model, {adapter / 1e9:.2f} GB for the adapter, "
        f"{6 * adapter / 1e9:.1f} GB for checkpoints until it is done"
    )


def already_trained(output: Path, settings: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether `output` holds an adapter of these settings. Raises UserError where its settings are others."""
    if overwrite or not output.exists():
        return False
    if not (output / META).exists():
        raise UserError(f"{output} is there but was not made by this step; move it away or use --overwrite")
    rows.check_settings(output, read_json(output / META)["settings"], settings)
    return True


def train(trainer: Any, output: Path, settings: Mapping[str, Any], overwrite: bool) -> None:
    """Run a Trainer, from its last checkpoint where there is one of the same settings, and put its adapter at `output`.

    The folder is complete or not there: adapter, settings and versions (training.json), metrics.jsonl and loss.png.
    Raises UserError.
    """
    with _room_on_disk(output.parent):
        _train(trainer, output, settings, overwrite)


@contextlib.contextmanager
def _room_on_disk(folder: Path) -> Iterator[None]:
    """Turn what the libraries raise on a full disk, each in its own way, into one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # The second is torch's, whose message otherwise depends on how far it came.
        if not any(sign in str(error) for sign in ("No space left", "enforce fail at inline_container")):
            raise
        raise UserError(f"the disk is full: {folder}; free some space and run the same command to go on") from None


def _train(trainer: Any, output: Path, settings: Mapping[str, Any], overwrite: bool) -> None:
    import torch
    import transformers

    checkpoints = Path(trainer.args.output_dir)
    resume = _resumable(checkpoints, settings, overwrite)
    if is_main():
        write_json(checkpoints / META, settings)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(_watch())
    try:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    except torch.OutOfMemoryError:
        tokens = getattr(trainer.training_step, "tokens", None)
        rows_at_once = f"--micro-batch-size {trainer.args.per_device_train_batch_size}; lower it"
        taken = f"{tokens:,} tokens at once; set --micro-batch-size" if tokens else rows_at_once
        raise UserError(f"the GPU's memory is too small for {taken}, or use --gradient-checkpointing") from None
    if not is_main():
        return
    steps = trainer.state.global_step
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    with new_folder(output, overwrite) as fresh:
        trainer.save_model(str(fresh))
        for extra in ("README.md", "training_args.bin"):
            (fresh / extra).unlink(missing_ok=True)
        (fresh / METRICS).write_text("".join(json.dumps(entry) + "\n" for entry in history), encoding="utf-8")
        draw_losses(history, fresh / "loss.png")
        meta = {"settings": dict(settings), "git": git_commit(), "versions": versions(), "steps": steps}
        meta["device"] = device_of(trainer)
        write_json(fresh / META, meta | {"written": datetime.now(UTC).isoformat(timespec="seconds")})
    shutil.rmtree(checkpoints)
    print(f"{output}: {steps} steps, loss {history[0]['loss']:.4f} → {history[-1]['loss']:.4f}")


def device_of(trainer: Any) -> dict[str, Any]:
    """What a Trainer runs on, and the settings that were chosen for it; memory in bytes."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "name": torch.cuda.get_device_name() if cuda else "cpu",
        "processes": world_size(),
        "micro_batch_size": trainer.args.per_device_train_batch_size,
        "tokens_at_once": getattr(trainer.training_step, "tokens", None),
        "gradient_checkpointing": trainer.args.gradient_checkpointing,
        "liger_kernel": trainer.args.use_liger_kernel,
        "peak_memory": torch.cuda.max_memory_allocated() if cuda else None,
    }


def _resumable(checkpoints: Path, settings: Mapping[str, Any], overwrite: bool) -> Path | None:
    """The last whole checkpoint of a run with these settings; those of another run are cleared by --overwrite only."""
    if overwrite:
        if is_main():
            shutil.rmtree(checkpoints, ignore_errors=True)
        # Another process might still see what is being removed.
        return None
    # A checkpoint's trainer_state.json is written last.
    whole = [file.parent for file in checkpoints.glob("checkpoint-*/trainer_state.json")]
    if not whole or not (checkpoints / META).exists():
        return None
    rows.check_settings(checkpoints, read_json(checkpoints / META), settings)
    return max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]))


def _watch() -> Any:
    """A callback that shows one line of progress and stops a run whose loss is no number."""
    from tqdm import tqdm
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", desc="training", disable=None
            )

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            loss = (logs or {}).get("loss")
            if loss is None:
                return
            if not math.isfinite(loss):
                raise UserError(f"the loss is {loss} at step {state.global_step}; lower --learning-rate")
            self.bar.n = state.global_step
            self.bar.set_postfix(loss=f"{loss:.3f}")

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar.close()

    return Watch()


def draw_losses(history: list[dict[str, float]], path: Path) -> None:
    """Loss over steps, and the reward margin and accuracy where the trainer logged them, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [key for key in ("loss", "rewards/margins", "rewards/accuracies") if key in history[0]]
    figure, axes = plt.subplots(1, len(shown), figsize=(4 * len(shown), 3), squeeze=False, layout="constrained")
    for axis, key in zip(axes[0], shown, strict=True):
        axis.plot([entry["step"] for entry in history], [entry[key] for entry in history], color="black")
        axis.set(xlabel="step", title=key)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def settings_of(args: TrainArgs, model: Model, data: Path) -> dict[str, Any]:
    """What an adapter remembers of how it was trained."""
    left_out = {"constitution", "limit", "overwrite", "dry_run", "tokens_per_second", "report_to", "model", "name"}
    # How a batch is divided changes nothing that is learned.
    left_out |= {"micro_batch_size", "gradient_checkpointing"}
    chosen = {key: value for key, value in asdict(args).items() if key not in left_out}
    source = {"model": model.short, "weights": fingerprint(model)}
    return source | {"lora": model.lora, "data": rows.file_digest(data), "limit": args.limit} | chosen
