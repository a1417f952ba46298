"""When a batch's common beginning is read once, and what its attention is told then."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from character.engine.prefix import WORTH_A_GRAPH, SharedPrefix

BLOCK = 16


class Runner:
    """What reading once needs of vLLM's second model runner."""

    def __init__(self) -> None:
        builder = SimpleNamespace(build=self.build)
        group = SimpleNamespace(
            get_metadata_builder=lambda number: builder, kv_cache_spec=SimpleNamespace(block_size=BLOCK)
        )
        self.attn_groups = [[group]]
        self.cudagraph_manager = SimpleNamespace(dispatch=self.dispatch)
        self.builder = builder

    def build(self, common_prefix_len: int, common_attn_metadata: Any) -> Any:
        batch = common_attn_metadata
        return SimpleNamespace(
            query_start_loc=batch.query_start_loc_cpu,
            seq_lens=batch.seq_lens_cpu_upper_bound,
            num_actual_tokens=int(batch.query_start_loc_cpu[-1]),
            use_cascade=False,
            scheduler_metadata="plain",
            max_num_splits=32,
        )

    def dispatch(self, requests: int, tokens: int, uniform: int | None, *, num_active_loras: int) -> Any:
        return uniform


def batch_of(new: list[int], before: list[int]) -> Any:
    """A batch whose requests have so many new tokens, after so many that are computed."""
    starts = torch.tensor([0, *new]).cumsum(0).int()
    lengths = torch.tensor([a + b for a, b in zip(new, before, strict=True)], dtype=torch.int32)
    return SimpleNamespace(num_reqs=len(new), query_start_loc_cpu=starts, seq_lens_cpu_upper_bound=lengths)


@pytest.fixture
def runner() -> Runner:
    return Runner()


def test_what_all_begin_with_is_read_once(runner: Runner) -> None:
    shared = SharedPrefix(runner)
    shared.scheduled = SimpleNamespace(num_common_prefix_blocks=[60])
    new, before = [1] * 9 + [100], [1000, 970, *[1100] * 7, 960]
    found = runner.builder.build(0, batch_of(new, before))
    assert found.use_cascade and found.common_prefix_len == 960
    assert found.cu_prefix_query_lens.tolist() == [0, 109]
    assert found.prefix_kv_lens.tolist() == [960]
    assert found.suffix_kv_lens.tolist() == [a + b - 960 for a, b in zip(new, before, strict=True)]
    assert found.scheduler_metadata is None and found.max_num_splits == 0


@pytest.mark.parametrize(
    ("blocks", "new", "before"),
    [
        ([10], [1] * 9, [1000] * 9),
        ([60], [1] * 7, [1000] * 7),
        ([60], [1] * 8 + [900], [1000] * 8 + [100]),
        ([], [1] * 9, [1000] * 9),
    ],
    ids=["a short beginning", "few requests", "one that is still computing it", "nothing scheduled"],
)
def test_otherwise_attention_stays_as_it_is(
    runner: Runner, blocks: list[int], new: list[int], before: list[int]
) -> None:
    shared = SharedPrefix(runner)
    shared.scheduled = SimpleNamespace(num_common_prefix_blocks=blocks)
    found = runner.builder.build(0, batch_of(new, before))
    assert not found.use_cascade and found.scheduler_metadata == "plain"


def test_whole_blocks_that_are_computed(runner: Runner) -> None:
    shared = SharedPrefix(runner)
    shared.scheduled = SimpleNamespace(num_common_prefix_blocks=[60])
    assert runner.builder.build(0, batch_of([1] * 9, [930] * 9)).common_prefix_len == 930 // BLOCK * BLOCK
    shared.scheduled = None
    assert not runner.builder.build(0, batch_of([1] * 9, [930] * 9)).use_cascade


def test_a_large_batch_leaves_the_whole_models_graph(runner: Runner) -> None:
    shared = SharedPrefix(runner)
    dispatch = runner.cudagraph_manager.dispatch
    shared.scheduled = SimpleNamespace(num_common_prefix_blocks=[60])
    enough = WORTH_A_GRAPH // (60 * BLOCK) + 1
    assert dispatch(enough, enough, 1, num_active_loras=0) is None
    assert dispatch(enough - 1, enough - 1, 1, num_active_loras=0) == 1
    shared.scheduled = None
    assert dispatch(enough, enough, 1, num_active_loras=0) == 1
