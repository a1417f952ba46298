"""How a model is laid out on GPUs, and which CUDA graphs are kept."""

import itertools
import shutil
from types import SimpleNamespace

import pytest

from character.engine.gpus import SHARED, graph_sizes, launching, layout, steered_graphs
from character.utils import UserError


@pytest.mark.parametrize(
    ("weights", "memory", "gpus", "heads", "expected"),
    [
        (16e9, 24e9, 1, 32, (1, 1)),
        (16e9, 80e9, 8, 32, (1, 8)),
        (141e9, 80e9, 8, 64, (4, 2)),
        (141e9, 141e9, 4, 64, (2, 2)),
        (221e9, 141e9, 8, 96, (2, 4)),
        (60e9, 80e9, 7, 20, (1, 7)),
        (100e9, 80e9, 3, 64, (2, 1)),
    ],
)
def test_weights_are_split_over_as_few_gpus_as_hold_them(
    weights: float, memory: float, gpus: int, heads: int, expected: tuple[int, int]
) -> None:
    assert layout(int(weights), int(memory), gpus, heads, "the model") == expected


@pytest.mark.parametrize(("gpus", "heads"), [(1, 64), (3, 64), (8, 2)])
def test_a_model_too_large_for_all_gpus_is_refused(gpus: int, heads: int) -> None:
    with pytest.raises(UserError, match=f"large/model needs 220 GB .* here are {gpus} × 80 GB"):
        layout(int(220e9), int(80e9), gpus, heads, "large/model")


def test_graphs_for_steering_cover_full_batches() -> None:
    settings = steered_graphs(1024)
    assert settings["mode"] == "NONE", "torch.compile leaves hooks out"
    assert settings["cudagraph_mode"] == "FULL_DECODE_ONLY"
    assert settings["cudagraph_capture_sizes"] == graph_sizes(1024)


@pytest.mark.parametrize("most", [256, 512, 1024, 2048])
def test_graphs_are_of_sizes_that_fill_little_up(most: int) -> None:
    sizes = graph_sizes(most)
    assert (sizes[0], sizes[-1]) == (1, most)
    for before, after in itertools.pairwise(sizes):
        assert after <= 2 * before and after - before <= (64 if after <= 1024 else 128)


def test_kernels_are_launched_beside_the_scheduler_where_memory_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * SHARED))
    assert launching(2) == {"distributed_executor_backend": "mp"}
    assert launching(3) == {}

    def lacking(path: str) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr(shutil, "disk_usage", lacking)
    assert launching(1) == {}
