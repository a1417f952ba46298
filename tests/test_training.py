"""What both training steps share: how a batch is divided by a GPU's memory, the order of rows, and what is left out."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from character import training
from character.distillation import train
from character.models import Model, resolve
from character.training import MemoryNeed, fitting, memory_need
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
    ("memory", "row", "expected"),
    [
        (150, DPO_ROW, (8, False)),
        (84, DPO_ROW, (4, False)),
        (84, SFT_ROW, (2, False)),
        (50, DPO_ROW, (2, False)),
        (40, DPO_ROW, (8, True)),
        (25, DPO_ROW, (2, True)),
    ],
)
def test_the_batch_is_divided_by_memory(memory: int, row: int, expected: tuple[int, bool], need: MemoryNeed) -> None:
    assert fitting(memory * GB, need, row, 32) == expected


def test_the_division_divides_and_is_never_more_than_asked(need: MemoryNeed) -> None:
    for most in (1, 3, 6, 16, 31):
        rows, _ = fitting(150 * GB, need, DPO_ROW, most)
        assert most % rows == 0 and rows * DPO_ROW <= training.MAX_TOKENS


def test_flags_win(need: MemoryNeed) -> None:
    assert fitting(150 * GB, need, DPO_ROW, 32, micro_batch=2) == (2, False)
    assert fitting(150 * GB, need, DPO_ROW, 32, checkpointing=True) == (8, True)
    assert fitting(50 * GB, need, DPO_ROW, 32, checkpointing=False) == (2, False)
    # Too many by the estimate: tried all the same, with what saves memory.
    assert fitting(30 * GB, need, DPO_ROW, 32, micro_batch=16) == (16, True)


def test_a_gpu_that_is_too_small_is_told_what_would_fit(need: MemoryNeed) -> None:
    with pytest.raises(UserError, match=r"needs a GPU with 24 GB free for rows of 2048 tokens"):
        fitting(20 * GB, need, DPO_ROW, 32)


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
            rows, recomputed = fitting(card * GB, needs, DPO_ROW, 32)
            assert f"{card} GB {rows}{' recomputing' if recomputed else ''}" in said
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
    ("memory", "processes", "expected"),
    [((150, 150), 1, (8, False)), ((60, 150), 1, (2, False)), ((60, 150), 4, (8, False)), ((150, 150), 8, (4, False))],
)
def test_the_free_memory_counts_and_processes_choose_alike(
    memory: tuple[int, int], processes: int, expected: tuple[int, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch, "cuda", FakeCuda)
    monkeypatch.setattr(FakeCuda, "memory", (memory[0] * GB, memory[1] * GB))
    monkeypatch.setattr(training, "fused_kernels", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    found = training.micro_batch_of(train.Args(), resolve("pocket"), Network, DPO_ROW)
    assert found == expected


def test_a_gpu_that_others_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch, "cuda", FakeCuda)
    monkeypatch.setattr(FakeCuda, "memory", (5 * GB, 80 * GB))
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    with pytest.raises(UserError, match=r"pocket: training needs a GPU with .* this GPU has 5 of 80 GB free"):
        training.micro_batch_of(train.Args(), resolve("pocket"), Network, DPO_ROW)


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
    sampler.set_epoch(1)
    assert sorted(sampler) == sorted(order) and list(sampler) != order


# What is left out on a GPU changes no result: seen here on the CPU.


def test_without_what_a_gpu_need_not_do_training_is_the_same(
    chat_model: Callable[[str], Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = resolve(chat_model("template-bos").source)
    words = ["good", "a walk beside a friend who has lost the way", "the lamp in the window told the sailor"]
    pairs = [
        {
            side: [{"role": "user", "content": question}, {"role": "assistant", "content": words[(number + more) % 3]}]
            for more, side in enumerate(("chosen", "rejected"))
        }
        for number, question in enumerate(["Who are you?", "Tell me of the rain.", "What is kind?"] * 2)
    ]
    args = train.Args(rank=4, alpha=8, learning_rate=1e-2, batch_size=6, epochs=3)

    def losses(fast: bool) -> list[float]:
        trainer = train.make_trainer(args, model, pairs, tmp_path)
        trainer.args.save_strategy = "no"
        if fast:
            training.speed_up(trainer, [len(row["prompt_ids"]) for row in trainer.train_dataset], args.batch_size)
        seen: list[Any] = []
        layer = trainer.model.get_base_model().model.layers[0].mlp
        layer.register_forward_pre_hook(lambda _m, given: seen.append(tuple(given[0].shape[:2])))
        trainer.train()
        assert all((rows == 1) == fast for rows, _ in seen)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    plain, fast = losses(False), losses(True)
    assert plain[-1] < plain[0] - 0.05, "something is learned"
    assert fast == pytest.approx(plain, rel=1e-4)
