"""What both training steps share: how a batch is divided by a GPU's memory, the order of rows, and what is left out."""

import itertools
import json
import math
import os
import socket
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import peft
import pytest

from character import training
from character.distillation import train
from character.engine import transformers as transformers_engine
from character.engine.transformers import load_network
from character.introspection import train as sft
from character.models import Model, resolve
from character.training import AtOnce, MemoryNeed, fitting, memory_need
from character.utils import UserError

GB = 1e9
DPO_ROW, SFT_ROW = 2 * 1024, 3072


class Llama8B:
    """The numbers of Llama 3.1 8B's config that memory depends on."""

    hidden_size, intermediate_size, num_hidden_layers = 4096, 14336, 32
    num_attention_heads, num_key_value_heads, head_dim = 32, 8, 128


@pytest.fixture
def need() -> MemoryNeed:
    return memory_need(Llama8B, 16.06 * GB, 64, fused=True)


def test_what_an_8b_model_holds(need: MemoryNeed) -> None:
    """LoRA 64 on seven linear layers of 32 blocks is 167.8 million weights, of 16 bytes each with Adam's."""
    assert need.held == pytest.approx(16.06 * GB + 16 * 167_772_160)
    assert 4e6 < need.token < 6e6
    assert need.token_recomputed < need.token / 5
    plain = memory_need(Llama8B, 16.06 * GB, 64, fused=False)
    assert plain.token > 1.3 * need.token and plain.held == need.held


@pytest.mark.parametrize(
    ("memory", "row", "least", "most", "recomputed"),
    [
        (150, DPO_ROW, 16384, 16384, False),
        (84, DPO_ROW, 10000, 12000, False),
        (84, SFT_ROW, 10000, 12000, False),
        (50, DPO_ROW, 4096, 6000, False),
        (40, DPO_ROW, 16384, 16384, True),
        (25, DPO_ROW, 4096, 6000, True),
    ],
)
def test_what_is_there_at_once_follows_from_memory(
    memory: int, row: int, least: int, most: int, recomputed: bool, need: MemoryNeed
) -> None:
    tokens, chosen = fitting(memory * GB, need, row)
    assert least <= tokens <= most and chosen == recomputed


def test_the_longest_row_fits_or_is_refused(need: MemoryNeed) -> None:
    for memory in range(20, 160, 4):
        try:
            tokens, _ = fitting(memory * GB, need, 9000)
        except UserError:
            assert memory < 40
        else:
            assert tokens >= 9000


def test_flags_win(need: MemoryNeed) -> None:
    assert fitting(150 * GB, need, DPO_ROW, micro_batch=2) == (2 * DPO_ROW, False)
    assert fitting(150 * GB, need, DPO_ROW, checkpointing=True) == (training.MAX_TOKENS, True)
    assert not fitting(50 * GB, need, DPO_ROW, checkpointing=False)[1]
    # Too many by the estimate: tried all the same, with what saves memory.
    assert fitting(30 * GB, need, DPO_ROW, micro_batch=16) == (16 * DPO_ROW, True)


def test_a_gpu_that_is_too_small_is_told_what_would_fit(need: MemoryNeed) -> None:
    with pytest.raises(UserError, match=r"needs a GPU with 24 GB free for rows of 2048 tokens"):
        fitting(20 * GB, need, DPO_ROW)


@pytest.mark.parametrize("name", ["llama-3.1-8b-it", "qwen-2.5-7b-it", "qwen-2.5-72b-it", "gemma-3-4b-it"])
def test_a_dry_run_computes_memory_and_disk(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "fused_kernels", lambda: True)
    model = resolve(name)
    assert model.shape and model.parameters
    said = training.footprint(train.Args(), model, DPO_ROW)
    needs = memory_need(model.shape, 2 * GB * model.parameters, 64, fused=True)
    assert said.startswith(f"{needs.held / GB:.1f} GB of GPU memory")
    for card in training.CARDS:
        try:
            tokens, recomputed = fitting(card * GB, needs, DPO_ROW)
            assert f"{card} GB {tokens:,}{' recomputing' if recomputed else ''}" in said
        except UserError:
            assert f"{card} GB none" in said
    least = (needs.held + DPO_ROW * needs.token_recomputed + training.MEMORY_APART) / training.MEMORY_SHARE
    assert f"from {math.ceil(least / GB)} GB on" in said
    # The adapter's weights are float32; two checkpoints at once have Adam's two moments of each too.
    weights = (needs.held - 2 * GB * model.parameters) / 16
    assert f"disk {2 * model.parameters:.1f} GB for the model, {4 * weights / GB:.2f} GB for the adapter" in said
    assert f"{2 * 12 * weights / GB:.1f} GB for checkpoints" in said


def test_a_dry_run_of_a_given_micro_batch_says_its_memory(monkeypatch: pytest.MonkeyPatch, need: MemoryNeed) -> None:
    """Without fused layers. A run of this kind, pairs padded to fewer than 2 × 1,024 tokens, was seen to take 98 GB."""
    monkeypatch.setattr(training, "fused_kernels", lambda: False)
    said = training.footprint(train.Args(micro_batch_size=8), resolve("llama-3.1-8b-it"), DPO_ROW)
    plain = memory_need(Llama8B, 16.06 * GB, 64, fused=False)
    whole = (plain.held + 8 * DPO_ROW * plain.token + training.MEMORY_APART) / training.MEMORY_SHARE
    assert f"8 at once take {math.ceil(whole / GB)} GB, or " in said and whole > 98 * GB


def test_an_unknown_shape_is_said(tmp_path: Path) -> None:
    assert "not before org/model is a local folder" in training.footprint(train.Args(), resolve("org/model"), 64)


class FakeCuda:
    """What `micro_batch_of` asks torch.cuda."""

    memory: ClassVar[tuple[float, float]] = (150 * GB, 150 * GB)

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def memory_reserved() -> float:
        return 16 * GB

    @classmethod
    def mem_get_info(cls) -> tuple[float, float]:
        return cls.memory


class Network:
    """A network of which only the config and the size are asked."""

    class config:
        @staticmethod
        def get_text_config() -> type:
            return Llama8B

    @staticmethod
    def get_memory_footprint() -> float:
        return 16.06 * GB


@pytest.mark.parametrize(
    ("memory", "processes", "flags", "expected"),
    [
        # What the network itself has taken already is counted as free: its weights are in the need.
        ((134, 150), 1, {}, AtOnce(32, 16384)),
        ((34, 150), 1, {}, AtOnce(32, 5056)),
        ((34, 150), 4, {}, AtOnce(8, 5056)),
        ((134, 150), 1, {"micro_batch_size": 2}, AtOnce(2)),
        ((134, 150), 1, {"micro_batch_size": 2, "gradient_checkpointing": True}, AtOnce(2, None, True)),
    ],
)
def test_the_free_memory_counts_and_processes_choose_alike(
    memory: tuple[int, int], processes: int, flags: dict[str, Any], expected: AtOnce, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch, "cuda", FakeCuda)
    monkeypatch.setattr(FakeCuda, "memory", (memory[0] * GB, memory[1] * GB))
    monkeypatch.setattr(training, "fused_kernels", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    found = training.micro_batch_of(train.Args(**flags), resolve("pocket"), Network, DPO_ROW)
    assert found == expected


def test_packed_rows_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch, "cuda", FakeCuda)
    monkeypatch.setattr(training, "fused_kernels", lambda: True)
    monkeypatch.setattr(FakeCuda, "memory", (50 * GB, 150 * GB))
    # 8,000 tokens fit; 4 divides 32, and so does 2.
    assert training.micro_batch_of(train.Args(), resolve("pocket"), Network, SFT_ROW, packed=True) == AtOnce(2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert training.micro_batch_of(train.Args(), resolve("pocket"), Network, SFT_ROW, packed=True) == AtOnce(4)


def test_a_gpu_that_others_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch, "cuda", FakeCuda)
    monkeypatch.setattr(FakeCuda, "memory", (5 * GB, 80 * GB))
    with pytest.raises(UserError, match=r"pocket: training needs a GPU with .* this GPU has 21 of 80 GB free"):
        training.micro_batch_of(train.Args(), resolve("pocket"), Network, DPO_ROW)


@pytest.mark.parametrize("kind", ["dpo", "sft"])
@pytest.mark.parametrize(("seen", "used"), [(0, 0), (4, 1)])
def test_a_process_trains_on_one_gpu(
    kind: str, seen: int, used: int, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """seen: GPUs that a process finds; transformers would spread a batch over them."""
    import transformers

    before = transformers.TrainingArguments.__post_init__

    def found(arguments: Any) -> None:
        before(arguments)
        arguments._n_gpu = seen

    monkeypatch.setattr(transformers.TrainingArguments, "__post_init__", found)
    assert make(kind, 2).args.n_gpu == used


# The order of rows.


def test_steps_keep_their_rows_and_sort_them() -> None:
    lengths = [7, 3, 9, 1, 5, 8, 2, 6, 4, 10]
    sampler = training.ByLength(lengths, 4, 1)
    order = list(sampler)
    assert sorted(order) == list(range(10)) and len(sampler) == 10
    for start in (0, 4, 8):
        step = [lengths[row] for row in order[start : start + 4]]
        assert step == sorted(step, reverse=True)
    assert order == list(training.ByLength(lengths, 4, 1)) != list(training.ByLength(lengths, 4, 2))
    dealt = list(training.ByLength(lengths, 4, 1, hands=2))
    for start in (0, 4, 8):
        assert sorted(dealt[start : start + 4]) == sorted(order[start : start + 4])
        first, second = order[start : start + 4 : 2], order[start + 1 : start + 4 : 2]
        assert dealt[start : start + 4] == [*first, *second]
    sampler.set_epoch(1)
    assert sorted(sampler) == sorted(order) and list(sampler) != order


@pytest.mark.parametrize(
    ("tokens", "padded", "sizes"),
    [
        (1000, False, [8]),
        (60, False, [2, 3, 3]),
        (60, True, [2, 3, 3]),
        (30, False, [1, 1, 1, 1, 2, 2]),
        (10, False, [1] * 8),
    ],
)
def test_a_step_is_divided_into_parts_of_about_one_size(tokens: int, padded: bool, sizes: list[int]) -> None:
    lengths = [[30], [25], [20], [20], [15], [10], [10], [5]]
    parts = parts_of(tokens, padded)
    found = parts._divided([lengths])
    assert [row for part in found for row in part] == list(range(8))
    assert [len(part) for part in found] == sizes
    # Another process has longer rows, and which of the two asks makes no difference.
    longer = [[length + 7] for [length] in lengths]
    both = parts._divided([lengths, longer])
    assert both == parts._divided([longer, lengths]) == parts._divided([longer])


def parts_of(tokens: int, padded: bool, others: Sequence[int] = ()) -> training.Parts:
    """others: the tokens that further processes have room for."""
    import torch

    accelerator = types.SimpleNamespace(device="cpu", gather=lambda own: torch.tensor([*own.tolist(), *others]))
    return training.Parts(types.SimpleNamespace(accelerator=accelerator), tokens, 1, padded)


def test_the_fullest_gpu_says_how_much_is_there_at_once() -> None:
    assert parts_of(1000, False, [900, 2000]).tokens == 900


@pytest.mark.parametrize("rank", ["0", "1"])
def test_no_process_goes_on_from_what_is_overwritten(
    rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text("{}")
    (tmp_path / training.META).write_text("{}")
    assert training._resumable(tmp_path, {}, overwrite=False) == checkpoint
    assert training._resumable(tmp_path, {}, overwrite=True) is None
    assert tmp_path.exists() == (rank == "1"), "one process removes it"


# What is left out on a GPU changes no result: seen here on the CPU.

WORDS = ["good", "a walk beside a friend who has lost the way", "the lamp in the window told the sailor"]
QUESTIONS = ["Who are you?", "Tell me of the rain.", "What is kind?"] * 2
ARGS: dict[str, Any] = {"rank": 4, "alpha": 8, "learning_rate": 1e-2, "batch_size": 6, "epochs": 3}


def talk(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


PAIRS = [
    {side: talk(question, WORDS[(number + more) % 3]) for side, more in (("chosen", 0), ("rejected", 1 + number // 3))}
    for number, question in enumerate(QUESTIONS)
]


@pytest.fixture
def make(chat_model: Callable[[str], Model], tmp_path: Path) -> Callable[..., Any]:
    """make("dpo", ...): a Trainer on six rows, in batches of six. at_once: rows."""
    model = resolve(chat_model("template-bos").source)

    def made(kind: str, at_once: int, checkpointing: bool = False) -> Any:
        given = {**ARGS, "micro_batch_size": at_once}
        before = training.trainer_arguments
        arguments = lambda *a: before(*a) | {"gradient_checkpointing": checkpointing}  # noqa: E731
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "trainer_arguments", arguments)
            if kind == "dpo":
                trainer = train.make_trainer(train.Args(**given), model, PAIRS, tmp_path)
            else:
                adapter = tmp_path / "adapter"
                if not adapter.exists():
                    network, _ = load_network(model)
                    peft.get_peft_model(network, training.lora_config(model, train.Args(rank=4))).save_pretrained(
                        adapter
                    )
                rows = [talk(question, WORDS[number % 3]) for number, question in enumerate(QUESTIONS)]
                trainer = sft.make_trainer(sft.Args(**given), model, adapter, rows, tmp_path)
        trainer.args.save_strategy = "no"
        return trainer

    return made


def lengths_of(trainer: Any) -> list[int]:
    return [len(row.get("prompt_ids") or row["input_ids"]) for row in trainer.train_dataset]


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(("kind", "plainly"), [("dpo", True), ("sft", True), ("dpo", False)])
def test_training_learns_the_same_without_what_a_gpu_need_not_do(
    kind: str, plainly: bool, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against TRL's own way: rows padded, PEFT's layers, two rows at once and no part of a step at a time.

    plainly: as the network attends; one with windows keeps its padding.
    """
    monkeypatch.setattr(transformers_engine, "attends_plainly", lambda _: plainly)
    plain = losses(make(kind, 2))
    assert plain[-1] < plain[0] - 0.05, "something is learned"
    trainer = make(kind, 6)
    sides = 2 if kind == "dpo" else 1
    training.speed_up(trainer, lengths_of(trainer), 6, tokens=40 * sides, sides=sides)
    seen: list[int] = []
    layer = trainer.model.get_base_model().model.layers[0].mlp
    layer.register_forward_pre_hook(lambda _m, given: seen.append(math.prod(given[0].shape[:2])))
    assert losses(trainer) == pytest.approx(plain, rel=1e-4)
    assert max(seen) <= 40 * sides and len(seen) > 3 * sides, "in several parts, none too large"
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(isinstance(entry["entropy"], float) for entry in logged)


def test_what_is_told_of_tokens_is_told_of_the_whole_step(make: Callable[..., Any]) -> None:
    """Against TRL's figures over all rows at once; the parts have like numbers of rows, not of trained tokens."""
    whole, parted = make("sft", 6), make("sft", 6)
    training.speed_up(parted, lengths_of(parted), 6, tokens=40)
    for trainer in (whole, parted):
        trainer.train()
    for step in range(3):
        expected, found = whole.state.log_history[step], parted.state.log_history[step]
        for name in ("loss", "entropy", "mean_token_accuracy", "num_tokens"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4), name


# What each of two processes runs: model, folder, and the pairs as JSON.
ONE_OF_TWO = """
import json, sys
from pathlib import Path
from character import training
from character.distillation import train
from character.models import resolve

model, folder, args, pairs = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]), json.loads(sys.argv[4])
training.micro_batch_of = lambda *_: training.AtOnce(3, 72)
trainer = train.make_trainer(train.Args(**args), resolve(model), pairs, folder)
# An order in which the first process alone would take two rows and one, the second one row and two.
training.speed_up(trainer, range(6), 6, tokens=72, sides=2)
trainer.args.save_strategy = "no"
trainer.train()
if training.is_main():
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    (folder / "losses.json").write_text(json.dumps(losses))
"""


def test_two_processes_learn_as_one_does(make: Callable[..., Any], tmp_path: Path) -> None:
    alone = make("dpo", 6)
    model = alone.model.get_base_model().config._name_or_path
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", ONE_OF_TWO, model, str(tmp_path), json.dumps(ARGS), json.dumps(PAIRS)]
    processes = [
        subprocess.Popen(command, env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    assert json.loads((tmp_path / "losses.json").read_text()) == pytest.approx(losses(alone), rel=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["dpo", "sft"])
@pytest.mark.parametrize("precise", [True, False])
def test_the_adapter_within_the_matrix_products(
    kind: str, checkpointing: bool, precise: bool, make: Callable[..., Any]
) -> None:
    """Loss and gradients as PEFT's own layers give them, in float32 and under autocast to bf16."""
    import torch

    def gradients(fused: bool) -> tuple[float, dict[str, Any]]:
        trainer = make(kind, 6, checkpointing)
        draw = torch.Generator().manual_seed(3)
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(0, 0.05, generator=draw)
            elif "lora_" not in name and not precise:
                weight.data = weight.data.bfloat16()
        if fused:
            training.fuse_lora(trainer.model)
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        trainer.model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        found = {name: weight.grad for name, weight in trainer.model.named_parameters() if "lora_" in name}
        assert all(weight.grad is None for name, weight in trainer.model.named_parameters() if "lora_" not in name)
        return loss.item(), found

    (plain, expected), (loss, found) = gradients(False), gradients(True)
    assert loss == pytest.approx(plain, rel=1e-5 if precise else 1e-2)
    for name, gradient in expected.items():
        assert found[name].dtype == torch.float32
        apart = float((found[name] - gradient).norm() / gradient.norm())
        assert apart < (1e-4 if precise else 0.05), name


def test_a_layer_with_a_bias() -> None:
    """As Qwen's have; the base stays as it is."""
    import torch

    torch.manual_seed(3)
    network = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(8, 6)), peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0"])
    )
    layer = network.base_model.model[0]
    layer.lora_B["default"].weight.data.normal_()
    assert layer.base_layer.bias.abs().min() > 0
    x = torch.randn(2, 5, 8, requires_grad=True)

    def run() -> list[Any]:
        network.zero_grad()
        x.grad = None
        out = network(x)
        (out**2).sum().backward()
        return [out, x.grad, *(weight.grad for weight in network.parameters() if weight.requires_grad)]

    plain = run()
    training.fuse_lora(network)
    for found, expected in zip(run(), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert layer.base_layer.bias.grad is None


def test_a_layer_that_is_switched_off_is_the_base(make: Callable[..., Any]) -> None:
    import torch

    trainer = make("dpo", 6)
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            weight.data.fill_(0.1)
    training.fuse_lora(trainer.model)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        adapted = trainer.model(input_ids=ids).logits
        with training.switched_off(trainer.adapted):
            off = trainer.model(input_ids=ids).logits
        with trainer.model.disable_adapter():
            base = trainer.model(input_ids=ids).logits
        again = trainer.model(input_ids=ids).logits
    assert torch.equal(off, base) and torch.equal(adapted, again) and not torch.allclose(adapted, base)


def test_attention_by_borders_is_attention_by_rows(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in that attends row by row for the kernel, which only a GPU has."""
    import torch
    from torch.nn.attention import varlen

    def by_hand(query: Any, key: Any, value: Any, ends: Any, same: Any, most: int, _: int, **given: Any) -> Any:
        assert torch.equal(ends, same) and ends.dtype == torch.int32 and given["window_size"] == (-1, 0)
        rows = list(itertools.pairwise(ends.tolist()))
        assert max(end - start for start, end in rows) <= most
        parts = ([part[start:end].transpose(0, 1) for part in (query, key, value)] for start, end in rows)
        attend = torch.nn.functional.scaled_dot_product_attention
        found = [attend(*part, is_causal=True, scale=given["scale"], enable_gqa=True) for part in parts]
        return torch.cat([part.transpose(0, 1) for part in found])

    monkeypatch.setattr(varlen, "varlen_attn", by_hand)
    unpadded = training.Unpadded(make("dpo", 6).model.get_base_model())
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    unpadded._enter(None, (), {"attention_mask": mask, "input_ids": mask})
    query, key, value = (torch.randn(11, heads, 16) for heads in (4, 2, 2))
    by_borders, by_rows = (way(query, key, value, 0.3) for way in (unpadded._by_borders, unpadded._by_rows))
    assert by_rows.shape == (11, 4, 16)
    torch.testing.assert_close(by_borders, by_rows)


@pytest.mark.parametrize(("processes", "left"), [("1", 0), ("2", 1)])
def test_several_processes_leave_their_group(processes: str, left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("WORLD_SIZE", processes)
    calls: list[int] = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: calls.append(1))
    training.leave()
    assert len(calls) == left
