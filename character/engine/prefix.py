"""Reading once per batch what all its prompts begin with: vLLM's cascade attention, for its second model runner.

Requests behind one system prompt share that prompt's keys and values in memory, yet each request reads them anew at every
token. Cascade attention reads them once for all requests, and joins what it finds with what each request has of its own:
the same sum in another order. vLLM's first model runner can do so; this adds it to the second.
"""

import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

# As vLLM's own rule has it.
LEAST_TOKENS, LEAST_REQUESTS = 256, 8
# Tokens times requests from which on a batch leaves the whole model's CUDA graph, which has plain attention in it, for a
# graph of each part: an estimate, by which an 8B model saves 4 ms of reading.
WORTH_A_GRAPH = 2**17


class SharedPrefix:
    """What a worker's model runner gets for it, once it has its memory for keys and values.

    runner: vLLM's second model runner. `scheduled` is what it runs at present, or None. `batches` counts those that it
    has run, `read_once` those of them that were prepared to read their beginning once, as all do but some of the small ones
    that a graph of the whole model runs.
    """

    scheduled: Any = None
    batches = read_once = 0

    def __init__(self, runner: Any):
        [[group]] = runner.attn_groups
        builder = group.get_metadata_builder(0)
        self.block_size: int = group.kv_cache_spec.block_size
        builder.build = self._building(builder.build)
        manager = runner.cudagraph_manager
        # Without graphs of the parts, as when it steers, leaving the whole model's would leave a batch none.
        if manager.cudagraph_mode.has_piecewise_cudagraphs():
            manager.dispatch = self._dispatching(manager.dispatch)

    def _tokens(self) -> int:
        """How many tokens all requests have in common."""
        blocks = self.scheduled.num_common_prefix_blocks if self.scheduled else None
        return blocks[0] * self.block_size if blocks else 0

    def _dispatching(self, dispatch: Callable[..., Any]) -> Callable[..., Any]:
        def dispatched(requests: int, tokens: int, uniform: int | None, *more: Any, **named: Any) -> Any:
            shared = self._tokens()
            if shared >= LEAST_TOKENS and requests * shared >= WORTH_A_GRAPH:
                uniform = None
            return dispatch(requests, tokens, uniform, *more, **named)

        return dispatched

    def _building(self, build: Callable[..., Any]) -> Callable[..., Any]:
        def built(common_prefix_len: int, common_attn_metadata: Any, **named: Any) -> Any:
            metadata = build(common_prefix_len=common_prefix_len, common_attn_metadata=common_attn_metadata, **named)
            self.batches += self.scheduled is not None
            if shared := self._shared(common_attn_metadata):
                cascade(metadata, shared)
                self.read_once += 1
            return metadata

        return built

    def _shared(self, batch: Any) -> int:
        """Tokens that this batch reads once: what all have in common, and have computed; whole blocks; 0 where few."""
        requests = batch.num_reqs
        tokens = self._tokens()
        if tokens < LEAST_TOKENS or requests < LEAST_REQUESTS or batch.seq_lens_cpu_upper_bound is None:
            return 0
        starts = batch.query_start_loc_cpu[: requests + 1]
        computed = batch.seq_lens_cpu_upper_bound[:requests] - starts.diff()
        shared = min(tokens, int(computed.min())) // self.block_size * self.block_size
        return shared if shared >= LEAST_TOKENS else 0


def cascade(metadata: Any, shared: int) -> None:
    """Have a batch's attention read its first `shared` tokens once. metadata: of flash attention; changed in place."""
    import torch

    # Filled on the device: a copy from the host would wait for the batch before.
    queries = torch.zeros(2, dtype=torch.int32, device=metadata.seq_lens.device)
    queries[1:].fill_(metadata.num_actual_tokens)
    metadata.use_cascade = True
    metadata.common_prefix_len = shared
    metadata.cu_prefix_query_lens = queries
    metadata.prefix_kv_lens = torch.full_like(queries[:1], shared)
    metadata.suffix_kv_lens = metadata.seq_lens[: len(metadata.query_start_loc) - 1] - shared
    # The plan was for plain attention; without one, the kernels plan for themselves.
    metadata.scheduler_metadata = metadata.prefix_scheduler_metadata = None
    metadata.max_num_splits = 0


def shared_prefix(runner: Any) -> SharedPrefix | None:
    """What reads common beginnings once, or None where this model runner and its attention are not known to allow it."""
    try:
        return SharedPrefix(runner) if can_share(runner) else None
    except (AttributeError, ImportError, KeyError, TypeError) as error:
        # Another version of vLLM may look different inside; plain attention is right in any.
        log.warning("what prompts begin with is read by each request: %r", error)
        return None


def can_share(runner: Any) -> bool:
    """Whether a model runner and its attention are of the kind that this was seen to work with."""
    groups = [group for several in getattr(runner, "attn_groups", []) for group in several]
    if not hasattr(runner, "prepare_inputs") or len(groups) != 1 or not getattr(runner, "cudagraph_manager", None):
        return False
    import vllm.envs
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    config, [group] = runner.vllm_config, groups
    builder = group.get_metadata_builder(0)
    layers = config.compilation_config.static_forward_context
    return (
        type(builder) is FlashAttentionMetadataBuilder
        and builder.dcp_world_size == 1
        and type(group.kv_cache_spec) is FullAttentionSpec
        and all(_is_plain(layers[name].impl) for name in group.layer_names)
        # Copies of a mixture of experts step together; what a connector holds back counts as one more request's, drafts
        # make lengths uncertain, and with the last an answer must not depend on its batch.
        and config.parallel_config.data_parallel_size == 1
        and config.kv_transfer_config is None
        and config.speculative_config is None
        and not vllm.envs.VLLM_BATCH_INVARIANT
    )


def _is_plain(attention: Any) -> bool:
    """Whether a layer's attention is causal over everything before, by the kernels that this was seen to work with."""
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

    return (
        type(attention) is FlashAttentionImpl
        and attention.vllm_flash_attn_version == 3
        and attention.sliding_window == (-1, -1)
        and attention.alibi_slopes is None
        and attention.sinks is None
    )
