"""When a batch's common beginning is read once, and what its attention is told then."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from character.engine.prefix import LEAST_TOKENS, WORTH_A_GRAPH, SharedPrefix, can_share, cascade, shared_prefix

BLOCK = 16


class Runner:
    """What reading once needs of vLLM's second model runner."""

    def __init__(self, pieces: bool = True) -> None:
        builder = SimpleNamespace(build=self.build)
        group = SimpleNamespace(
            get_metadata_builder=lambda number: builder, kv_cache_spec=SimpleNamespace(block_size=BLOCK)
        )
        self.attn_groups = [[group]]
        mode = SimpleNamespace(has_piecewise_cudagraphs=lambda: pieces)
        self.cudagraph_manager = SimpleNamespace(dispatch=self.dispatch, cudagraph_mode=mode)
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
    assert not runner.builder.build(0, batch_of([1] * 9, [100] * 9)).use_cascade
    shared.scheduled = None
    assert not runner.builder.build(0, batch_of([1] * 9, [930] * 9)).use_cascade, "as when graphs are captured"
    assert (shared.read_once, shared.batches) == (1, 2)


def test_a_large_batch_leaves_the_whole_models_graph(runner: Runner) -> None:
    shared = SharedPrefix(runner)
    dispatch = runner.cudagraph_manager.dispatch
    shared.scheduled = SimpleNamespace(num_common_prefix_blocks=[60])
    enough = WORTH_A_GRAPH // (60 * BLOCK) + 1
    assert dispatch(enough, enough, 1, num_active_loras=0) is None
    assert dispatch(enough - 1, enough - 1, 1, num_active_loras=0) == 1
    shared.scheduled = SimpleNamespace(num_common_prefix_blocks=[LEAST_TOKENS // BLOCK - 1])
    assert dispatch(1024, 1024, 1, num_active_loras=0) == 1, "a beginning too short to be read once"
    shared.scheduled = None
    assert dispatch(enough, enough, 1, num_active_loras=0) == 1


def test_a_batch_stays_with_the_whole_models_graph_where_there_is_no_other() -> None:
    runner = Runner(pieces=False)
    shared = SharedPrefix(runner)
    shared.scheduled = SimpleNamespace(num_common_prefix_blocks=[60])
    enough = WORTH_A_GRAPH // (60 * BLOCK) + 1
    assert runner.cudagraph_manager.dispatch(enough, enough, 1, num_active_loras=0) == 1


def test_what_looks_different_inside_keeps_plain_attention(
    runner: Runner, caplog: pytest.LogCaptureFixture, require: Callable[[str], Any]
) -> None:
    require("vllm")
    assert shared_prefix(SimpleNamespace(input_batch=None)) is None and not caplog.text
    assert shared_prefix(SimpleNamespace(**vars(runner), prepare_inputs=None)) is None
    assert "read by each request: AttributeError" in caplog.text


@pytest.fixture
def real(require: Callable[[str], Any]) -> Any:
    """A runner of the kind that can share, of vLLM's own classes as far as they matter: two layers, one cache."""
    require("vllm")
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl, FlashAttentionMetadataBuilder
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    layers: dict[str, Any] = {}
    for name in ("layers.0.attn", "layers.1.attn"):
        attention = object.__new__(FlashAttentionImpl)
        attention.vllm_flash_attn_version = 3
        attention.sliding_window = (-1, -1)
        attention.alibi_slopes = attention.sinks = None
        layers[name] = SimpleNamespace(impl=attention)
    builder = object.__new__(FlashAttentionMetadataBuilder)
    builder.dcp_world_size = 1
    group = SimpleNamespace(
        get_metadata_builder=lambda number: builder,
        kv_cache_spec=FullAttentionSpec(block_size=BLOCK, num_kv_heads=8, head_size=128, dtype=torch.bfloat16),
        layer_names=list(layers),
    )
    return SimpleNamespace(
        attn_groups=[[group]],
        prepare_inputs=None,
        cudagraph_manager="one",
        vllm_config=SimpleNamespace(
            compilation_config=SimpleNamespace(static_forward_context=layers),
            parallel_config=SimpleNamespace(data_parallel_size=1),
            kv_transfer_config=None,
            speculative_config=None,
        ),
    )


def attention_of(runner: Any) -> Any:
    """The second layer's."""
    return runner.vllm_config.compilation_config.static_forward_context["layers.1.attn"].impl


def test_the_kind_that_can_share(real: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_share(real)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert not can_share(real)


@pytest.mark.parametrize(
    "change",
    [
        lambda runner: delattr(runner, "prepare_inputs"),
        lambda runner: delattr(runner, "attn_groups"),
        lambda runner: runner.attn_groups.append(runner.attn_groups[0]),
        lambda runner: setattr(runner, "cudagraph_manager", None),
        lambda runner: setattr(attention_of(runner), "vllm_flash_attn_version", 4),
        lambda runner: setattr(attention_of(runner), "sliding_window", (4095, 0)),
        lambda runner: setattr(attention_of(runner), "sinks", torch.zeros(8)),
        lambda runner: setattr(runner.vllm_config.parallel_config, "data_parallel_size", 2),
        lambda runner: setattr(runner.vllm_config, "kv_transfer_config", "one"),
        lambda runner: setattr(runner.vllm_config, "speculative_config", "one"),
    ],
    ids=[
        "the first runner",
        "no attention",
        "two caches",
        "no graphs",
        "other kernels",
        "a sliding window",
        "sinks",
        "copies in step",
        "a connector",
        "drafts",
    ],
)
def test_other_kinds_read_by_themselves(real: Any, change: Callable[[Any], None]) -> None:
    change(real)
    assert not can_share(real)


def flash_attention(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    seqused_k: Any,
    softmax_scale: float,
    causal: bool,
    block_table: Any,
    **more: Any,
) -> Any:
    """What vLLM's kernels compute, out of paged keys and values; tokens × heads × size."""
    found, sums = torch.empty_like(q), torch.empty(q.shape[1], len(q))
    for number, length in enumerate(seqused_k.tolist()):
        first, last = cu_seqlens_q[number : number + 2].tolist()
        blocks = block_table[number, : -(-length // BLOCK)].long()
        keys, values = (cache[blocks].flatten(0, 1)[:length] for cache in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[first:last], keys) * softmax_scale
        if causal:
            later = torch.ones(last - first, length, dtype=torch.bool).triu(length - (last - first) + 1)
            scores = scores.masked_fill(later, float("-inf"))
        found[first:last] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
        sums[:, first:last] = scores.logsumexp(-1)
    if more.get("out") is not None:
        more["out"].copy_(found)
    return (found, sums) if more.get("return_softmax_lse") else found


def test_vllms_attention_finds_the_same(require: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    require("vllm")
    from vllm.v1.attention.backends import flash_attn

    monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", flash_attention, raising=False)
    heads, size, shared = 2, 8, 2 * BLOCK
    attention = flash_attn.FlashAttentionImpl(heads, size, size**-0.5, heads, None, None, "auto")
    attention.vllm_flash_attn_version = 3
    scale = torch.ones(1)
    layer: Any = SimpleNamespace(_q_scale=scale, _k_scale=scale, _v_scale=scale)
    new, lengths = torch.tensor([1, 3, 1, 20]), torch.tensor([40, 36, 33, 60], dtype=torch.int32)
    starts = torch.cat([torch.zeros(1), new.cumsum(0)]).int()
    # Two blocks of all, then two of each request's own.
    blocks = torch.tensor([[1, 2, 3 + 2 * number, 4 + 2 * number] for number in range(4)], dtype=torch.int32)
    torch.manual_seed(0)
    cache = torch.randn(12, heads, BLOCK, 2 * size)
    query = torch.randn(int(new.sum()), heads, size)
    metadata = flash_attn.FlashAttentionMetadata(
        num_actual_tokens=len(query),
        max_query_len=20,
        query_start_loc=starts,
        max_seq_len=60,
        seq_lens=lengths,
        block_table=blocks,
        slot_mapping=starts,
        use_cascade=False,
        common_prefix_len=0,
        cu_prefix_query_lens=None,
        prefix_kv_lens=None,
        suffix_kv_lens=None,
    )
    plain, read_once = torch.empty(2, *query.shape)
    attention.forward(layer, query, query, query, cache, metadata, plain)
    cascade(metadata, shared)
    attention.forward(layer, query, query, query, cache, metadata, read_once)
    assert metadata.use_cascade
    torch.testing.assert_close(read_once, plain)
