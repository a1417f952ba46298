"""vLLM's settings that follow from GPUs and a model: how it is split, how much runs at once, which CUDA graphs are kept."""

import shutil
from typing import Any

from character.utils import UserError

# Of a GPU's memory, at most this much for weights.
WEIGHTS_SHARE = 0.8
# From this much memory on, a GPU takes 1,024 sequences at once.
LARGE_GPU = 70e9
# Bytes of shared memory that vLLM lays out for what a scheduler and its worker tell each other.
SHARED = 400 * 2**20


def gpu_settings(weights: int, memory: int, gpus: int, heads: int, source: str) -> dict[str, int]:
    """vLLM's arguments that follow from GPUs alike and a model. weights, memory: bytes, of the model and of one GPU.

    Raises UserError where all GPUs together are too small.
    """
    split, replicas = layout(weights, memory, gpus, heads, source)
    large = memory >= LARGE_GPU
    return {
        "tensor_parallel_size": split,
        "data_parallel_size": replicas,
        "max_num_batched_tokens": 8192 if large else 4096,
        "max_num_seqs": 1024 if large else 256,
    }


def steered_graphs(sequences: int) -> dict[str, Any]:
    """vLLM's compilation settings for steering: torch.compile would leave the hooks out, CUDA graphs have them in.

    sequences: at once. Graphs are for batches that decode alone: of batches with prompts in them, those of vLLM's second
    model runner gave wrong answers with flash attention 3.
    """
    return {"mode": "NONE", "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": graph_sizes(sequences)}


def batch_graphs(sequences: int) -> dict[str, Any]:
    """vLLM's compilation settings for all else: graphs of full batches, and of batches that prompts join.

    sequences: at once. On most GPUs vLLM's own end at 512 tokens. Past them each kernel is launched by itself, which takes
    an 8B model's batch of 1,024 longer than the GPU needs for it.
    """
    return {"cudagraph_capture_sizes": graph_sizes(2 * sequences)}


def launching(copies: int) -> dict[str, str]:
    """vLLM's arguments by which kernels are launched beside the scheduler, which else shares one interpreter with it.

    Empty where there is too little shared memory for that, as in a container by default. copies: of the model.
    """
    try:
        enough = shutil.disk_usage("/dev/shm").free >= copies * SHARED
    except OSError:
        enough = False
    return {"distributed_executor_backend": "mp"} if enough else {}


def graph_sizes(most: int) -> list[int]:
    """Batches, in tokens, of which a CUDA graph is kept; a batch between two of them is filled up."""
    steps = [1, 2, 4, 8, *range(16, 256, 16), *range(256, 512, 32), *range(512, 1024, 64)]
    return [size for size in (*steps, *range(1024, most + 1, 128)) if size <= most]


def layout(weights: int, memory: int, gpus: int, heads: int, source: str) -> tuple[int, int]:
    """(GPUs that one copy of the model is split over, copies). weights, memory: bytes, of the model and of one GPU.

    Raises UserError where all GPUs together are too small.
    """
    for split in (1, 2, 4, 8, 16):
        if split <= gpus and heads % split == 0 and weights <= WEIGHTS_SHARE * memory * split:
            return split, gpus // split
    raise UserError(
        f"{source} needs {weights / 1e9:.0f} GB for its weights alone, of at most {WEIGHTS_SHARE:.0%} of the memory; "
        f"here are {gpus} × {memory / 1e9:.0f} GB; use a smaller model, more GPUs, or an endpoint (--base-url)"
    )
