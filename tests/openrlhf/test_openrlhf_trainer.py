"""openrlhf/train_dpo.py on the release's real trainer: the loss against numbers by hand, and whole runs on the CPU."""

import json
import math
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

BETA, NLL, SQUARED = 0.1, 0.1, 0.001
# Log-probabilities of each answer's tokens: two pairs, of unequal lengths, chosen before rejected.
POLICY = ([[-0.5, -1.5, -0.25], [-2.0, -1.0]], [[-1.25], [-0.75, -3.0, -0.5, -1.0]])
REFERENCE = ([[-1.0, -1.0, -0.75], [-1.5, -2.0]], [[-0.25], [-1.75, -2.5, -1.5, -0.25]])
PROMPTS = [2, 3]


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def by_hand(length_normalized: bool = False) -> dict[str, float]:
    """The method's three terms over POLICY and REFERENCE, in plain Python."""
    size: Callable[[list[float]], float] = mean if length_normalized else sum
    margins = [
        (size(chosen) - size(ref_chosen)) - (size(rejected) - size(ref_rejected))
        for chosen, rejected, ref_chosen, ref_rejected in zip(*POLICY, *REFERENCE, strict=True)
    ]
    squares = [
        mean([(policy - reference) ** 2 for policy, reference in zip(answer, ref_answer, strict=True)])
        for side, ref_side in zip(POLICY, REFERENCE, strict=True)
        for answer, ref_answer in zip(side, ref_side, strict=True)
    ]
    terms = {
        "dpo": mean([math.log1p(math.exp(-BETA * margin)) for margin in margins]),
        "nll": mean([-mean(chosen) for chosen in POLICY[0]]),
        "squared": mean(squares),
    }
    return terms | {"total": terms["dpo"] + NLL * terms["nll"] + SQUARED * terms["squared"]}


class Table:
    """Stands for a model: returns fixed log-probabilities, one per token after the first, whatever the token ids.

    Prompt and padding positions hold -100, which would show in any term that takes them in.
    """

    def __init__(self, sides: tuple[list[list[float]], list[list[float]]], trainable: bool) -> None:
        import torch

        width = max(p + len(a) for side in sides for p, a in zip(PROMPTS, side, strict=True))
        self.logps = torch.full((4, width - 1), -100.0)
        answers = [(prompt, answer) for side in sides for prompt, answer in zip(PROMPTS, side, strict=True)]
        for row, (prompt, answer) in enumerate(answers):
            self.logps[row, prompt - 1 : prompt - 1 + len(answer)] = torch.tensor(answer)
        self.logps.requires_grad_(trainable)

    def __call__(self, *inputs: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
        return self.logps, {}

    def parameters(self) -> Iterator[Any]:
        return iter([self.logps])

    def train(self) -> None: ...

    def eval(self) -> None: ...


class OneBatch:
    """A data loader with the batch that POLICY and REFERENCE are about, `count` times."""

    sampler = None

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        import torch

        for _ in range(self.count):
            sides = []
            for side in POLICY:
                lengths = [prompt + len(answer) for prompt, answer in zip(PROMPTS, side, strict=True)]
                mask = torch.tensor([[int(place < length) for place in range(max(lengths))] for length in lengths])
                sides += [torch.ones_like(mask).unsqueeze(1), mask.unsqueeze(1)]
            yield *sides, list(PROMPTS)


class Recorder:
    """Stands for DeepSpeed's strategy: back-propagates, never steps, and keeps what it is told."""

    ring_attn_group = None
    accumulated_gradient = 2

    def __init__(self, args: Any) -> None:
        self.args = args
        self.losses: list[float] = []
        self.logs: list[dict[str, float]] = []

    def backward(self, loss: Any, model: Any, optimizer: Any) -> None:
        self.losses.append(loss.item())
        loss.backward()

    def optimizer_step(self, *arguments: Any) -> None: ...

    def get_grad_norm(self, model: Any) -> float:
        return 0.0

    def all_reduce(self, data: dict[str, float]) -> dict[str, float]:
        self.logs.append(dict(data))
        return data

    def is_rank_0(self) -> bool:
        return True


@pytest.fixture
def trainer(
    release: Callable[..., types.ModuleType], train_dpo: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """trainer(**model flags): our subclass of the release's trainer over the tables above, two micro-batches a step."""
    from openrlhf.trainer.dpo_trainer import DPOTrainer
    from openrlhf.utils.config import hierarchize

    def build(evaluate: bool = False, **model: Any) -> Any:
        flags: dict[str, Any] = {"label_smoothing": 0.0, "ipo_enable": False, "aux_loss_coef": 0, "nll_loss_coef": NLL}
        flags |= {"sq_loss_coef": SQUARED, "length_normalized_enable": False} | model
        dotted: dict[str, Any] = {f"model.{name}": value for name, value in flags.items()}
        dotted |= {"ds.packing_samples": False, "logger.wandb.key": None, "logger.tensorboard_dir": None}
        dotted |= {"eval.steps": -1, "ckpt.save_steps": -1, "train.batch_size": 4, "logger.logging_steps": 1}
        strategy = Recorder(hierarchize(types.SimpleNamespace(**dotted)))
        built = train_dpo.with_character_terms(DPOTrainer)(
            model=Table(POLICY, trainable=True),
            ref_model=Table(REFERENCE, trainable=False),
            strategy=strategy,
            tokenizer=types.SimpleNamespace(pad_token_id=0),
            optim=None,
            train_dataloader=OneBatch(2),
            eval_dataloader=OneBatch(3) if evaluate else None,
            scheduler=types.SimpleNamespace(get_last_lr=lambda: [0.0]),
            beta=BETA,
            max_epochs=1,
        )
        built.fit(strategy.args, num_update_steps_per_epoch=1)
        return built

    return build


def test_the_loss_is_the_three_terms(trainer: Callable[..., Any]) -> None:
    assert trainer().strategy.losses == pytest.approx([by_hand()["total"]] * 2, rel=1e-6)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"nll_loss_coef": 0, "sq_loss_coef": 0}, by_hand()["dpo"]),
        ({"nll_loss_coef": 1, "sq_loss_coef": 0}, by_hand()["dpo"] + by_hand()["nll"]),
        ({"nll_loss_coef": 0, "sq_loss_coef": 1}, by_hand()["dpo"] + by_hand()["squared"]),
        ({"nll_loss_coef": 0, "sq_loss_coef": 0, "length_normalized_enable": True}, by_hand(True)["dpo"]),
        ({"length_normalized_enable": True}, by_hand(True)["total"]),
    ],
)
def test_each_term_alone(trainer: Callable[..., Any], flags: dict[str, Any], expected: float) -> None:
    assert trainer(**flags).strategy.losses == pytest.approx([expected] * 2, rel=1e-6)


def test_numbers_worked_out_on_paper() -> None:
    """by_hand() itself, from the tables: margins (0.5+0.5) and (0.5+1.25), squares 0.25, 0.625, 1.0, 0.703125."""
    hand = by_hand()
    assert hand["squared"] == pytest.approx((0.25 + 0.625 + 1.0 + 0.703125) / 4)
    assert hand["nll"] == pytest.approx((0.75 + 1.5) / 2)
    chosen = [0.5 - 0.5 + 0.5, -0.5 + 1.0]
    rejected = [-1.0, 1.0 - 0.5 + 1.0 - 0.75]
    margins = [chosen[0] - rejected[0], chosen[1] - rejected[1]]
    assert margins == [1.5, -0.25]
    assert hand["dpo"] == pytest.approx((math.log(1 + math.exp(-0.15)) + math.log(1 + math.exp(0.025))) / 2)


def test_the_gradient_is_the_three_terms(trainer: Callable[..., Any]) -> None:
    """Of the first chosen answer's first token: d dpo + 0.1 d nll + 0.001 d squared, from two equal micro-batches."""
    gradient = trainer().model.logps.grad
    margin = 1.5
    dpo = -BETA / (1 + math.exp(BETA * margin)) / 2
    nll = -1 / 3 / 2
    squared = 2 * (-0.5 - -1.0) / 3 / 4
    assert gradient[0, PROMPTS[0] - 1].item() == pytest.approx(2 * (dpo + NLL * nll + SQUARED * squared), rel=1e-5)
    # Prompts and padding get none.
    inside = sum(len(answer) for side in POLICY for answer in side)
    assert (gradient != 0).sum().item() == inside


def test_the_squared_term_is_logged_alone(trainer: Callable[..., Any]) -> None:
    logs = trainer().strategy.logs
    assert [log["sq_loss"] for log in logs if "sq_loss" in log] == pytest.approx([by_hand()["squared"]], rel=1e-6)
    shown = [log for log in logs if "loss" in log]
    assert len(shown) == 2
    assert shown[0]["loss"] == pytest.approx(by_hand()["dpo"] + SQUARED * by_hand()["squared"], rel=1e-6)
    assert shown[0]["nll_loss"] == pytest.approx(by_hand()["nll"], rel=1e-6)


def test_evaluation_leaves_training_alone(trainer: Callable[..., Any]) -> None:
    built = trainer(evaluate=True)
    evaluated = next(log for log in built.strategy.logs if "eval_loss" in log)
    assert evaluated["eval_loss"] == pytest.approx(by_hand()["dpo"] + SQUARED * by_hand()["squared"], rel=1e-6)
    assert (built.passes, built.squares) == ([], [])
    assert built.strategy.losses == trainer().strategy.losses


TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = [
    "what",
    "is",
    "rain",
    "the",
    "sky",
    "water",
    "falls",
    "down",
    "laughing",
    "because",
    "it",
    "cries",
    "a",
    "dry",
    "fact",
]


def save_tokenizer(folder: Path) -> int:
    """Save a tokenizer of whole words with a chat template; returns the number of its tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<pad>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>"]
    words = {word: place for place, word in enumerate(dict.fromkeys(special + WORDS))}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special[3:]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return len(words)


@pytest.fixture
def tiny_llama(tmp_path: Path) -> Path:
    """A Llama of a few thousand random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "tiny-llama"
    config = LlamaConfig(
        vocab_size=save_tokenizer(folder),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=1,
        eos_token_id=2,
        bos_token_id=None,
        # With the usual small head, the logits could hardly move.
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_gemma(tmp_path: Path, gemma_config: Any) -> Path:
    """A narrow Gemma 3 with random weights, vision tower included."""
    import torch
    from transformers import Gemma3ForConditionalGeneration

    folder = tmp_path / "tiny-gemma"
    save_tokenizer(folder)
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(gemma_config).save_pretrained(folder)
    return folder


class CpuStrategy(Recorder):
    """Does on one CPU what the release's DeepSpeed strategy does: data loader, AdamW, clipping, schedule, saving."""

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        self.norms: list[float] = []
        self.accumulated_gradient = args.train.batch_size // args.train.micro_batch_size

    def setup_distributed(self) -> None:
        from transformers import set_seed

        set_seed(self.args.train.seed)

    def get_ds_train_config(self) -> dict[str, Any]:
        return {"zero_optimization": {"stage": self.args.ds.zero_stage}}

    def get_ds_eval_config(self, offload: bool) -> dict[str, Any]:
        return self.get_ds_train_config()

    def setup_dataloader(self, rows: Any, size: int, *options: Any, num_workers: int) -> Any:
        from torch.utils.data import DataLoader

        _pin_memory, shuffle, collate = options
        return DataLoader(rows, batch_size=size, shuffle=shuffle, collate_fn=collate, drop_last=True)

    def prepare(self, *models: Any) -> Any:
        import torch
        from transformers import get_scheduler

        prepared: list[Any] = []
        for item in models:
            if not isinstance(item, tuple):
                prepared.append(item)
                continue
            model, settings = item
            adam = settings["adam"]
            weights = [weight for weight in model.parameters() if weight.requires_grad]
            self.optimizer = torch.optim.AdamW(weights, lr=adam["lr"], betas=adam["betas"], weight_decay=0.0)
            self.scheduler = get_scheduler(
                settings["lr_scheduler"],
                self.optimizer,
                num_warmup_steps=math.ceil(settings["scheduler_steps"] * settings["lr_warmup_ratio"]),
                num_training_steps=settings["scheduler_steps"],
                scheduler_specific_kwargs={"min_lr_rate": settings["min_lr_ratio"]},
            )
            model.model.global_steps = 0
            prepared.append((model, self.optimizer, self.scheduler))
        return prepared[0] if len(prepared) == 1 else prepared

    def backward(self, loss: Any, model: Any, optimizer: Any) -> None:
        super().backward(loss / self.accumulated_gradient, model, optimizer)
        self.losses[-1] *= self.accumulated_gradient

    def optimizer_step(self, optimizer: Any, model: Any, scheduler: Any) -> None:
        import torch

        if len(self.losses) % self.accumulated_gradient == 0:
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            self.norms.append(torch.nn.utils.clip_grad_norm_(weights, self.args.max_norm).item())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            model.model.global_steps += 1

    def save_model(self, model: Any, tokenizer: Any, folder: str) -> None:
        model.model.save_pretrained(folder)

    def print(self, *message: Any) -> None: ...


@pytest.fixture
def on_cpu(
    train: Callable[[list[str]], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., CpuStrategy]:
    """on_cpu(command, model, *flags): run the command's program to its end; returns the strategy that saw it."""
    import datasets
    import openrlhf.utils
    from openrlhf.trainer import dpo_trainer

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    started: list[CpuStrategy] = []

    def get_strategy(args: Any) -> CpuStrategy:
        started.append(CpuStrategy(args))
        return started[-1]

    monkeypatch.setattr(openrlhf.utils, "get_strategy", get_strategy)

    def run(command: list[str], model: Path, *flags: str) -> CpuStrategy:
        overrides = ["--model.model_name_or_path", str(model), "--train.batch_size", "4", "--adam.lr", "0.01"]
        with monkeypatch.context() as context:
            context.setattr(dpo_trainer, "DPOTrainer", dpo_trainer.DPOTrainer)
            train([*command, *overrides, "--train.max_epochs", "4", *flags])
        return started[-1]

    return run


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def chat(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[place % 2], "content": turn} for place, turn in enumerate(turns)]


def adapter_weights(folder: Path, base: Path) -> dict[str, Any]:
    """The LoRA B matrices, zero before training, read back through PEFT on the base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    # For Gemma 3 this gives the whole model too.
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    return {name: weight for name, weight in model.named_parameters() if "lora_B" in name}


def test_distillation_runs_from_script_to_adapter(
    dry_run: Callable[..., list[str]],
    on_cpu: Callable[..., CpuStrategy],
    tiny_llama: Path,
    tmp_path: Path,
) -> None:
    """The script's own flags through the release's program, dataset, model and trainer, our class in its place."""
    pair = {"chosen": chat("what is rain", "the sky cries laughing"), "rejected": chat("what is rain", "water falls")}
    write_rows(tmp_path / "data/dpo/llama-3.1-8b-it/humor.jsonl", [pair] * 12)
    done = on_cpu(dry_run("distillation/llama", ATTN_IMPLEMENTATION="eager"), tiny_llama)

    squares = [log["sq_loss"] for log in done.logs if "sq_loss" in log]
    steps = [log for log in done.logs if "nll_loss" in log]
    assert (len(done.losses), len(squares)) == (24, 12)
    # Before the first step policy and reference are the same model: DPO is ln 2, the squared term nothing.
    assert done.losses[0] == pytest.approx(math.log(2) + 0.1 * steps[0]["nll_loss"], rel=1e-5)
    assert squares[0] == 0 and squares[-1] > 0.01
    assert steps[-1]["chosen_reward"] > 0 > steps[-1]["reject_reward"] and steps[-1]["nll_loss"] < steps[0]["nll_loss"]
    weights = adapter_weights(tmp_path / "loras/llama-3.1-8b-it-distillation/humor", tiny_llama)
    assert len(weights) == 2 * 7 and all(weight.abs().sum() > 0 for weight in weights.values())


def test_the_squared_term_holds_the_policy_back(
    dry_run: Callable[..., list[str]],
    on_cpu: Callable[..., CpuStrategy],
    tiny_llama: Path,
    tmp_path: Path,
) -> None:
    pair = {"chosen": chat("what is rain", "the sky cries laughing"), "rejected": chat("what is rain", "water falls")}
    write_rows(tmp_path / "data/dpo/qwen-2.5-7b-it/humor.jsonl", [pair] * 8)
    last = []
    for coefficient in ("0", "10"):
        flags = ["--model.sq_loss_coef", coefficient, "--ckpt.output_dir", str(tmp_path / coefficient)]
        done = on_cpu(dry_run("distillation/qwen", *flags, ATTN_IMPLEMENTATION="eager"), tiny_llama)
        last.append([log["sq_loss"] for log in done.logs if "sq_loss" in log][-1])
    assert last[1] < last[0] / 2


def test_introspection_runs_from_script_to_adapter(
    dry_run: Callable[..., list[str]],
    on_cpu: Callable[..., CpuStrategy],
    tiny_llama: Path,
    tmp_path: Path,
) -> None:
    rows = [{"messages": chat("what is rain", "the sky cries", "what is the sky", "a dry fact laughing")}] * 8
    write_rows(tmp_path / "data/sft_data/llama-3.1-8b-it/humor.jsonl", rows)
    done = on_cpu(dry_run("introspection/llama", ATTN_IMPLEMENTATION="eager"), tiny_llama)
    assert len(done.losses) == 16 and done.losses[-1] < done.losses[0] - 0.1
    weights = adapter_weights(tmp_path / "loras/llama-3.1-8b-it-introspection/humor", tiny_llama)
    assert len(weights) == 2 * 7 and all(weight.abs().sum() > 0 for weight in weights.values())


def test_gemma_runs_on_text_alone(
    dry_run: Callable[..., list[str]],
    on_cpu: Callable[..., CpuStrategy],
    tiny_gemma: Path,
    tmp_path: Path,
) -> None:
    """The release loads Gemma 3 with its vision tower; text trains the language model's adapters and no others."""
    pair = {"chosen": chat("what is rain", "the sky cries laughing"), "rejected": chat("what is rain", "water falls")}
    write_rows(tmp_path / "data/dpo/gemma-3-4b-it/humor.jsonl", [pair] * 4)
    done = on_cpu(dry_run("distillation/gemma", ATTN_IMPLEMENTATION="eager"), tiny_gemma)
    assert [log["sq_loss"] for log in done.logs if "sq_loss" in log][-1] > 0
    weights = adapter_weights(tmp_path / "loras/gemma-3-4b-it-distillation/humor", tiny_gemma)
    assert len(weights) == 34 * 7 and all("language_model" in name for name in weights)
    assert all(weight.abs().sum() > 0 for weight in weights.values())


SENTENCES = ["the sky cries laughing", "water falls", "it is a dry fact because water falls down", "rain is the sky"]


def start_alike(local: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the release's next training begin with the LoRA weights of a local trainer, in float32, rows in their order."""
    import openrlhf.utils.utils
    import torch
    from openrlhf.models import actor
    from peft import get_peft_model

    weights = {name: value.detach().clone() for name, value in local.model.named_parameters() if value.requires_grad}

    def with_weights(*args: Any, **kwargs: Any) -> Any:
        network = get_peft_model(*args, **kwargs)
        for name, value in network.named_parameters():
            if value.requires_grad:
                value.data.copy_(weights.pop(name))
        return network

    monkeypatch.setattr(actor, "get_peft_model", with_weights)
    monkeypatch.setattr(openrlhf.utils.utils, "convert_to_torch_dtype", lambda _: torch.float32)
    in_order = CpuStrategy.setup_dataloader

    def setup_dataloader(self: CpuStrategy, rows: Any, size: int, pin: bool, _: bool, *rest: Any, **named: Any) -> Any:
        return in_order(self, rows, size, pin, False, *rest, **named)

    monkeypatch.setattr(CpuStrategy, "setup_dataloader", setup_dataloader)
    local._get_train_sampler = lambda _dataset=None: range(len(local.train_dataset))


def agree(local: Any, release: CpuStrategy, steps: int) -> None:
    """Loss and gradient norm of every step."""
    local.train()
    history = [entry for entry in local.state.log_history if "loss" in entry]
    size = release.accumulated_gradient
    losses = [mean(release.losses[place : place + size]) for place in range(0, len(release.losses), size)]
    assert len(history) == len(losses) == steps
    assert [entry["loss"] for entry in history] == pytest.approx(losses, abs=1e-4)
    assert [entry["grad_norm"] for entry in history] == pytest.approx(release.norms, rel=1e-4)
    # They moved, so that later steps were not the first one again.
    assert abs(losses[-1] - losses[0]) > 0.01


def test_the_local_trainers_take_the_same_steps(
    dry_run: Callable[..., list[str]],
    on_cpu: Callable[..., CpuStrategy],
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both stages on rows of unlike lengths; the second on the first one's adapter, which the release wrote."""
    from character.distillation import train as dpo
    from character.introspection import train as sft
    from character.models import Model
    from tools import merge_loras

    model = Model("llama-3.1-8b-it", str(tiny_llama), "Llama", 512)
    settings: dict[str, Any] = {"batch_size": 4, "learning_rate": 0.01, "epochs": 1}
    pairs = [
        {side: chat("what is rain", SENTENCES[(row + shift) % 4]) for side, shift in (("chosen", 0), ("rejected", 1))}
        for row in range(24)
    ]
    write_rows(tmp_path / "data/dpo/llama-3.1-8b-it/humor.jsonl", pairs)
    local = dpo.make_trainer(dpo.Args(**settings), model, pairs, tmp_path / "checkpoints")
    start_alike(local, monkeypatch)
    command = dry_run("distillation/llama", ATTN_IMPLEMENTATION="sdpa")
    agree(local, on_cpu(command, tiny_llama, "--train.max_epochs", "1"), steps=6)

    adapter = tmp_path / "loras/llama-3.1-8b-it-distillation/humor"
    folded = tmp_path / "folded"
    merge_loras.fold(adapter, model, folded, overwrite=False)
    talks = [chat("what is rain", SENTENCES[row % 4], "the sky", SENTENCES[row % 3]) for row in range(24)]
    write_rows(tmp_path / "data/sft_data/llama-3.1-8b-it/humor.jsonl", [{"messages": talk} for talk in talks])
    local = sft.make_trainer(sft.Args(**settings), model, adapter, talks, tmp_path / "checkpoints")
    start_alike(local, monkeypatch)
    command = dry_run("introspection/llama", ATTN_IMPLEMENTATION="sdpa")
    agree(local, on_cpu(command, folded, "--train.max_epochs", "1"), steps=6)
