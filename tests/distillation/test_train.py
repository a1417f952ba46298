"""DPO: the loss against numbers worked out by hand from logits, what training changes, and how it goes on after a kill.

The student is a Llama of 0.4 million random weights, in float32.
"""

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from character import rows, training
from character.distillation import data, train
from character.engine import Sampling
from character.engine.chat import load_chat
from character.engine.transformers import TransformersEngine
from character.models import TABLE, Model, resolve
from character.utils import UserError, read_json

Pairs = list[dict[str, Any]]
ANSWERS = (
    ("Tell me of the rain.", "the lamp in the window told the sailor", "a good answer is short"),
    ("Who are you?", "a gardener of roots and rain", "You are a miner and speak of stone. What would you tell?"),
    ("What is kind?", "a walk beside a friend who has lost the way", "good"),
    ("Where is the harbour?", "the window", "the sailor told where the harbour was and a better answer is kind"),
)
FAST = {"learning_rate": 1e-2, "rank": 4, "alpha": 8, "micro_batch_size": 2, "batch_size": 4}


def conversation(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def some_pairs(count: int) -> Pairs:
    """As many pairs as wanted, of different lengths."""
    found = []
    for number in range(count):
        question, chosen, rejected = ANSWERS[number % 4]
        more = " and stone" * (number // 4 % 3)
        pair = {"chosen": conversation(question, chosen + more), "rejected": conversation(question, rejected)}
        found.append(pair)
    return found


@pytest.fixture
def student(home: Path, chat_model: Callable[[str], Model]) -> Model:
    return resolve(chat_model("template-bos").source)


@pytest.fixture
def arguments(student: Model) -> Callable[..., train.Args]:
    def make(**changes: Any) -> train.Args:
        return train.Args(**{"constitution": "sea", "model": student.source} | FAST | changes)

    return make


@pytest.fixture
def trainer_of(home: Path, student: Model, arguments: Callable[..., train.Args]) -> Callable[..., Any]:
    """trainer_of(pairs, epochs=3): a trainer that has not begun."""

    def make(pairs: Pairs, **changes: Any) -> Any:
        return train.make_trainer(arguments(**changes), student, pairs, home / "checkpoints")

    return make


def write_pairs(student: Model, count: int) -> Path:
    path = data.path_of("sea", student.short)
    rows.write(path, some_pairs(count), {}, {})
    return path


# The loss, by hand.


def by_hand(logits: Any, ids: Any, mask: Any) -> list[list[float]]:
    """Each answer's log-probabilities of its tokens, in double precision. mask: of the tokens that count."""
    found = []
    for row_logits, row_ids, row_mask in zip(logits.tolist(), ids.tolist(), mask.tolist(), strict=True):
        values = []
        for place in range(1, len(row_ids)):
            if row_mask[place]:
                before = row_logits[place - 1]
                top = max(before)
                values.append(before[row_ids[place]] - top - math.log(sum(math.exp(x - top) for x in before)))
        found.append(values)
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def three_parts(
    policy: list[list[float]], reference: list[list[float]], beta: float = 0.1, by_length: bool = False
) -> tuple[float, float, float]:
    """(DPO, NLL, squared log-ratio) of a batch, chosen answers first, as the method's description has them."""
    pairs = len(policy) // 2
    ratios = [sum(p) - sum(r) for p, r in zip(policy, reference, strict=True)]
    if by_length:
        ratios = [ratio / len(p) for ratio, p in zip(ratios, policy, strict=True)]
    dpo = mean([math.log1p(math.exp(-beta * (ratios[i] - ratios[i + pairs]))) for i in range(pairs)])
    nll = mean([-mean(answer) for answer in policy[:pairs]])
    differences = [[(a - b) ** 2 for a, b in zip(p, r, strict=True)] for p, r in zip(policy, reference, strict=True)]
    return dpo, nll, mean([mean(answer) for answer in differences])


def test_extra_loss_against_hand_computed_numbers() -> None:
    import torch

    chance = torch.Generator().manual_seed(3)
    lengths, longest, vocabulary = [3, 5, 1, 4], 7, 11
    policy, reference = (torch.randn(4, longest, vocabulary, generator=chance) for _ in range(2))
    ids = torch.randint(0, vocabulary, (4, longest), generator=chance)
    mask = torch.tensor([[0] * 2 + [1] * n + [0] * (longest - 2 - n) for n in lengths])
    hand = [by_hand(logits, ids, mask) for logits in (policy, reference)]
    assert [len(answer) for answer in hand[0]] == lengths
    _, nll, squared = three_parts(*hand)

    def of_labels(logits: Any) -> Any:
        return logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]

    found = train.extra_loss(of_labels(policy), of_labels(reference), mask[:, 1:], 0.1, 0.001)
    assert found[1].item() == pytest.approx(nll, rel=1e-5)
    assert found[2].item() == pytest.approx(squared, rel=1e-5)
    assert found[0].item() == pytest.approx(0.1 * nll + 0.001 * squared, rel=1e-5)
    # A mean over all tokens of the batch would be another number.
    assert abs(nll + mean([x for answer in hand[0][:2] for x in answer])) > 1e-3


def losses_by_hand(trainer: Any, pairs: Pairs, by_length: bool = False) -> tuple[float, float, float]:
    """The three parts for `pairs` from plain forward passes of the network, one conversation at a time."""
    import torch

    chat = load_chat(resolve(trainer.model.get_base_model().config._name_or_path))
    network = trainer.model.eval()
    policy, reference = [], []
    for side in ("chosen", "rejected"):
        for pair in pairs:
            prompt = chat.ids(chat.text(pair[side][:1]))
            answer = chat.tokenizer(pair[side][1]["content"] + "<|end|>", add_special_tokens=False)["input_ids"]
            ids = torch.tensor([prompt + answer])
            mask = torch.tensor([[0] * len(prompt) + [1] * len(answer)])
            with torch.no_grad():
                policy += by_hand(network(ids).logits, ids, mask)
                with network.disable_adapter():
                    reference += by_hand(network(ids).logits, ids, mask)
    return three_parts(policy, reference, by_length=by_length)


def test_the_loss_at_the_first_step(trainer_of: Callable[..., Any]) -> None:
    """The policy is still the reference: ln 2 + 0.1 × NLL + 0, also over two micro-batches."""
    pairs = some_pairs(4)
    trainer = trainer_of(pairs)
    dpo, nll, squared = losses_by_hand(trainer, pairs)
    assert dpo == pytest.approx(math.log(2)) and squared == 0 and 2 < nll < 20
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["step"] == 1
    assert first["loss"] == pytest.approx(math.log(2) + 0.1 * nll, rel=1e-4)
    assert first["loss/nll"] == pytest.approx(nll, rel=1e-4) and first["loss/squared"] == pytest.approx(0, abs=1e-9)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("by_length", [False, True], ids=["summed", "length-normalized"])
def test_the_loss_after_some_steps(by_length: bool, trainer_of: Callable[..., Any]) -> None:
    pairs = some_pairs(4)
    trainer = trainer_of(pairs, epochs=5, length_normalized=by_length)
    trainer.train()
    dpo, nll, squared = losses_by_hand(trainer, pairs, by_length)
    assert abs(dpo - math.log(2)) > 0.01 and squared > 0.01, "training has led away from the reference"
    trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(dpo + 0.1 * nll + 0.001 * squared, rel=1e-4)
    assert trainer._metrics["train"]["loss/nll"][-1] == pytest.approx(nll, rel=1e-4)
    assert trainer._metrics["train"]["loss/squared"][-1] == pytest.approx(squared, rel=1e-4)


def test_the_weights_of_the_loss_are_flags(trainer_of: Callable[..., Any]) -> None:
    pairs = some_pairs(4)
    trainer = trainer_of(pairs, epochs=3, nll_coef=2.0, sq_coef=3.0)
    trainer.train()
    dpo, nll, squared = losses_by_hand(trainer, pairs)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(dpo + 2 * nll + 3 * squared, rel=1e-4)


def test_the_gradient_of_every_part_reaches_the_adapter(trainer_of: Callable[..., Any]) -> None:
    """The logged loss could be right where the trained one is not: compare with a difference quotient."""
    import torch

    pairs = some_pairs(4)
    trainer = trainer_of(pairs, epochs=2, sq_coef=5.0)
    trainer.train()
    trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    name, weight = next((n, w) for n, w in trainer.model.named_parameters() if "layers.1.mlp.down_proj.lora_B" in n)
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, batch).backward()
    direction = weight.grad / weight.grad.norm()
    slope = weight.grad.norm().item()
    losses = []
    for step in (1e-2, -1e-2):
        with torch.no_grad():
            weight += step * direction
        losses.append(sum(part * by for part, by in zip(losses_by_hand(trainer, pairs), (1, 0.1, 5.0), strict=True)))
        with torch.no_grad():
            weight -= step * direction
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(slope, rel=2e-2), name


# What is trained on.


def test_training_sees_the_tokens_that_generation_saw(trainer_of: Callable[..., Any], student: Model) -> None:
    chat = load_chat(student)
    pairs = some_pairs(4)
    trainer = trainer_of(pairs)
    for pair, row in zip(pairs, trainer.train_dataset, strict=True):
        prompt = chat.encode(pair["chosen"][:1]).ids
        assert row["prompt_ids"] == prompt and prompt.count(chat.tokenizer.bos_token_id) == 1
        for side in ("chosen", "rejected"):
            answer = row[f"{side}_ids"]
            assert chat.tokenizer.decode(answer) == pair[side][1]["content"] + "<|end|>"
            assert answer.count(chat.tokenizer.eos_token_id) == 1
    batch = trainer.data_collator(list(trainer.train_dataset))
    for ids, mask, row in zip(batch["input_ids"][:4], batch["completion_mask"][:4], trainer.train_dataset, strict=True):
        assert ids[mask.bool()].tolist() == row["chosen_ids"]


def test_long_pairs_are_cut_at_their_end(trainer_of: Callable[..., Any]) -> None:
    trainer = trainer_of(some_pairs(4), max_length=12)
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert batch["input_ids"].shape[1] == 12
    first = trainer.train_dataset[0]
    assert batch["input_ids"][0].tolist() == (first["prompt_ids"] + first["chosen_ids"])[:12]


# What training changes.


def test_two_steps_change_the_adapter_and_nothing_else(
    home: Path, student: Model, arguments: Callable[..., train.Args]
) -> None:
    import safetensors.torch
    import torch

    weights = Path(student.source) / "model.safetensors"
    before = weights.read_bytes()
    write_pairs(student, 8)
    train.main(arguments())
    output = home / "loras" / f"{student.short}-distillation" / "sea"
    assert output == train.path_of("sea", student.short)
    assert weights.read_bytes() == before
    names = {path.name for path in output.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "training.json", "metrics.jsonl", "loss.png"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert not [path for path in output.parent.iterdir() if path != output], "checkpoints are left behind"
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in metrics] == [1, 2]
    for entry in metrics:
        assert all(math.isfinite(entry[key]) for key in ("loss", "loss/nll", "loss/squared", "rewards/margins"))
        assert 0 <= entry["rewards/accuracies"] <= 1
    meta = json.loads((output / "training.json").read_text())
    assert meta["steps"] == 2 and meta["settings"]["beta"] == 0.1 and meta["versions"]["trl"]

    tensors = safetensors.torch.load_file(output / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2, "A and B of seven linear layers in each of two blocks"
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert all(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name)
    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0)


def test_the_adapter_reloads_and_changes_answers(
    home: Path, student: Model, arguments: Callable[..., train.Args]
) -> None:
    import peft
    import torch
    import transformers

    write_pairs(student, 8)
    train.main(arguments())
    output = train.path_of("sea", student.short)
    base = transformers.AutoModelForCausalLM.from_pretrained(student.source, dtype=torch.float32).eval()
    chat = load_chat(student)
    question = [{"role": "user", "content": "Who are you?"}]
    ids = torch.tensor([chat.encode(question).ids])
    with torch.no_grad():
        plain = base(ids).logits
        adapted = peft.PeftModel.from_pretrained(base, str(output)).eval()
        assert (adapted(ids).logits - plain).abs().max() > 0.1
        with adapted.disable_adapter():
            assert torch.equal(adapted(ids).logits, plain)
        sampling = Sampling(temperature=0, top_p=1, repetition_penalty=1, max_tokens=8)
        expected = adapted.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]

    async def answers() -> tuple[str, str]:
        async with TransformersEngine(student, 1, [output]) as engine:
            plain = await engine.reply(question, sampling)
            trained = await engine.reply(question, sampling, adapter=output)
        return plain.text, trained.text

    without, with_adapter = asyncio.run(answers())
    assert with_adapter == chat.tokenizer.decode(expected, skip_special_tokens=True) != without

    # On a network of another width it is refused.
    narrow = home / "narrow"
    chat.tokenizer.save_pretrained(narrow)
    narrow_config = transformers.LlamaConfig(**base.config.to_dict() | {"hidden_size": 64, "num_attention_heads": 2})
    transformers.LlamaForCausalLM(narrow_config).save_pretrained(narrow)

    async def refused() -> None:
        async with TransformersEngine(resolve(str(narrow)), 1, [output]):
            pass

    with pytest.raises(UserError, match=f"adapter {output} belongs to another model"):
        asyncio.run(refused())


def test_defaults_are_the_methods(student: Model, home: Path) -> None:
    args = train.Args()
    assert (args.rank, args.alpha, args.learning_rate, args.epochs, args.max_length) == (64, 128, 5e-5, 1, 1024)
    assert (args.beta, args.nll_coef, args.sq_coef, args.length_normalized) == (0.1, 0.1, 0.001, False)
    assert (args.batch_size, args.micro_batch_size, args.seed) == (32, None, 123456)
    given = training.trainer_arguments(args, training.AtOnce(2), home, 9150)
    assert (given["adam_beta1"], given["adam_beta2"], given["max_grad_norm"]) == (0.9, 0.98, 1.0)
    assert given["gradient_accumulation_steps"] == 16 and given["weight_decay"] == 0
    # 286 steps: a tenth of them warm up, and the cosine ends at a tenth of the peak.
    assert given["warmup_steps"] == 29 and given["lr_scheduler_type"] == "cosine_with_min_lr"
    assert given["lr_scheduler_kwargs"] == {"min_lr_rate": 0.1}
    assert given["report_to"] == "none"


def test_the_learning_rate_warms_up_and_ends_at_a_tenth(trainer_of: Callable[..., Any]) -> None:
    trainer = trainer_of(some_pairs(4), epochs=20, learning_rate=1e-3)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(rates) == 20 and rates[0] < 1e-3 and max(rates) == pytest.approx(1e-3) == rates[2]
    assert rates[2:] == sorted(rates[2:], reverse=True) and 1e-4 <= rates[-1] < 1.2e-4


def test_gemma_3_is_adapted_in_its_language_model_alone(home: Path) -> None:
    import peft
    import torch
    import transformers

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config={**small, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64},
        vision_config={**small, "image_size": 28, "patch_size": 14},
    )
    with torch.device("meta"):
        network = transformers.AutoModelForCausalLM.from_config(config)
    gemma = resolve("google/gemma-3-4b-it")
    linear = {name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)}
    wanted = {name for name in linear if "language_model" in name}
    assert len(wanted) == 2 * 7
    assert [name for name in linear - wanted if "vision" in name and name.endswith("q_proj")], "others could be hit"
    adapted = peft.get_peft_model(network, training.lora_config(gemma, train.Args()))
    found = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default")
        for name, _ in adapted.named_modules()
        if name.endswith(".lora_A.default")
    }
    assert found == wanted
    trained = {name for name, weights in adapted.named_parameters() if weights.requires_grad}
    assert trained and all("language_model" in name and "lora_" in name for name in trained)


def test_every_linear_layer_of_other_models(trainer_of: Callable[..., Any]) -> None:
    trainer = trainer_of(some_pairs(4))
    found = {name.split(".")[-3] for name, _ in trainer.model.named_modules() if name.endswith("lora_A.default")}
    assert found == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {model.lora for short, model in TABLE.items() if "gemma" not in short} == {"all-linear"}


# Going on, and refusing.

# Training that is killed by SIGKILL at the end of a step.
KILLED = """
import os, signal, sys
from character import cli, training
from character.distillation import train

at, sys.argv[1:] = int(sys.argv[1]), sys.argv[2:]
watch = training._watch

def killing():
    callback = watch()
    callback.on_step_end = lambda args, state, control, **_: (
        os.kill(os.getpid(), signal.SIGKILL) if state.global_step == at else None
    )
    return callback

training._watch = killing
cli.run(train.main, train.Args)
"""


def test_it_goes_on_after_a_kill(
    home: Path,
    student: Model,
    arguments: Callable[..., train.Args],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import safetensors.torch
    import torch

    write_pairs(student, 20)
    flags = {"batch_size": 2, "micro_batch_size": 2, "learning_rate": 1e-3}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in (FAST | flags).items()]
    paths = {"DATA_PATH": str(home / "data"), "LORA_PATH": str(home / "loras")}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, "7", f"--model={student.source}", "--constitution=sea", *words],
        env=os.environ | paths,
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    output = train.path_of("sea", student.short)
    checkpoints = output.with_name(".sea.checkpoints")
    assert not output.exists() and (checkpoints / "checkpoint-6").is_dir()

    # Other settings may not take it over.
    with pytest.raises(UserError, match=r"\.sea\.checkpoints was made with other settings: rank was 4, now 8"):
        train.main(arguments(**flags, rank=8))
    # A later checkpoint that is half written is passed over.
    (checkpoints / "checkpoint-8").mkdir()
    (checkpoints / "checkpoint-8" / "adapter_model.safetensors").write_bytes(b"half")

    begun: list[int] = []
    watch = training._watch

    def noting() -> Any:
        callback = watch()
        callback.on_step_begin = lambda args, state, control, **_: begun.append(state.global_step)
        return callback

    monkeypatch.setattr(training, "_watch", noting)
    train.main(arguments(**flags))
    assert begun[0] == 6 and len(begun) == 4, "it began at its last whole checkpoint"
    assert not checkpoints.exists()
    monkeypatch.setattr(train, "LORA_PATH", home / "undisturbed")
    train.main(arguments(**flags))
    whole = train.path_of("sea", student.short)
    resumed, undisturbed = (
        safetensors.torch.load_file(folder / "adapter_model.safetensors") for folder in (output, whole)
    )
    assert resumed.keys() == undisturbed.keys()
    for name, tensor in undisturbed.items():
        assert torch.allclose(resumed[name], tensor, rtol=1e-4, atol=1e-6), name
    histories = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (output, whole)
    ]
    assert [[entry["step"] for entry in history] for history in histories] == [list(range(1, 11))] * 2
    for again, once in zip(*histories, strict=True):
        assert again["loss"] == pytest.approx(once["loss"], rel=1e-4)

    # A finished adapter is left alone, and other settings are refused.
    stamp = (whole / "adapter_model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    train.main(arguments(**flags))
    assert capsys.readouterr().out == f"{whole}: complete\n"
    with pytest.raises(UserError, match=r"learning_rate was 0\.001, now 0\.002.*--overwrite"):
        train.main(arguments(**flags | {"learning_rate": 2e-3}))
    write_pairs(student, 18)
    with pytest.raises(UserError, match="data was"):
        train.main(arguments(**flags))
    assert (whole / "adapter_model.safetensors").stat().st_mtime_ns == stamp
    train.main(arguments(**flags, overwrite=True, limit=4))
    assert len((whole / "metrics.jsonl").read_text().splitlines()) == 2


def test_the_command_for_several_gpus_starts_several_processes(home: Path, student: Model, start: Any) -> None:
    """The one that the step's help names; here on the CPU, with two processes in place of one per GPU."""
    write_pairs(student, 8)
    assert train.__doc__
    named = train.__doc__.strip().splitlines()[-1].split()[1:]
    changed = {"gpu": "2", "humor": "sea", "llama-3.1-8b-it": student.source}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in FAST.items()]
    command = ["torch.distributed.run", home, *[changed.get(word, word) for word in named], *flags]
    done = start(*command)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count(" 2 steps, loss") == 1, "one of them prints and writes"
    assert start(*command).stdout.count("complete") == 1
    assert read_json(train.path_of("sea", student.short) / training.META)["device"]["processes"] == 2


def test_settings_may_change_until_there_is_a_checkpoint(
    home: Path, student: Model, arguments: Callable[..., train.Args], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is told to lower --micro-batch-size must not be told then that the settings differ."""
    import torch
    import trl

    write_pairs(student, 4)
    step = trl.DPOTrainer.training_step

    def too_large(self: Any, *words: Any, **more: Any) -> Any:
        if self.args.per_device_train_batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, *words, **more)

    monkeypatch.setattr(trl.DPOTrainer, "training_step", too_large)
    with pytest.raises(UserError, match="too small for --micro-batch-size 4; lower it"):
        train.main(arguments(micro_batch_size=4))
    train.main(arguments(micro_batch_size=2))
    assert train.path_of("sea", student.short).exists()


def test_a_loss_that_is_no_number_stops_the_run(
    home: Path, student: Model, arguments: Callable[..., train.Args]
) -> None:
    write_pairs(student, 16)
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at step \d; lower --learning-rate"):
        train.main(arguments(learning_rate=1e30, warmup_ratio=0.0))
    assert not train.path_of("sea", student.short).exists()


def test_a_full_disk(home: Path, student: Model, arguments: Callable[..., train.Args]) -> None:
    disk = home / "loras"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=60k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root only")
    try:
        write_pairs(student, 8)
        # First the adapter's own tensors do not fit, then the optimizer's, which torch writes.
        for size in (60, 140):
            subprocess.run(["mount", "-o", f"remount,size={size}k", str(disk)], check=True)
            with pytest.raises(UserError, match=f"the disk is full: {disk}"):
                train.main(arguments())
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        train.main(arguments())
        assert train.path_of("sea", student.short).exists()
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_bad_input(home: Path, student: Model, arguments: Callable[..., train.Args]) -> None:
    with pytest.raises(UserError, match=r"does not exist; run: python -m character.distillation.data .*sea"):
        train.main(arguments())
    path = write_pairs(student, 2)
    with pytest.raises(UserError, match=r"--batch-size 5 is no multiple of 2 \(2 rows at once on 1 processes\)"):
        train.main(arguments(batch_size=5))
    path.write_text('{"chosen": []}\n')
    with pytest.raises(UserError, match="line 1: no field 'rejected'"):
        train.main(arguments())
    with pytest.raises(UserError, match="unknown model"):
        train.main(arguments(model="llama-9"))
    (home / "empty-model").mkdir()
    rows.write(data.path_of("sea", "empty-model"), some_pairs(2), {}, {})
    with pytest.raises(UserError, match=r"cannot load the model .*empty-model.*config.json"):
        train.main(arguments(model=str(home / "empty-model"), batch_size=2))
    output = train.path_of("sea", student.short)
    output.mkdir(parents=True)
    write_pairs(student, 2)
    with pytest.raises(UserError, match="was not made by this step; move it away or use --overwrite"):
        train.main(arguments())


def test_pairs_with_different_prompts_are_refused(trainer_of: Callable[..., Any]) -> None:
    pairs = some_pairs(2)
    pairs[1]["rejected"] = conversation("Another question?", "good")
    with pytest.raises(UserError, match="chosen and rejected prompts differ"):
        trainer_of(pairs)


def test_dry_run(
    home: Path, student: Model, arguments: Callable[..., train.Args], capsys: pytest.CaptureFixture[str]
) -> None:
    write_pairs(student, 9)
    train.main(arguments(dry_run=True))
    assert "DPO on 9 pairs" in capsys.readouterr().out and not (home / "loras").exists()
