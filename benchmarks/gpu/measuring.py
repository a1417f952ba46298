"""What every side of the benchmark is given, and how it tells its figures; and the machine's own."""

import functools
import itertools
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shape

from character import training
from character.engine import Sampling
from character.models import Model, resolve
from character.utils import write_json

SAMPLING = Sampling()
# Lengths of answers in tokens: log-normal.
MEDIAN, SIGMA, MOST = 330, 0.6, 1024
SYSTEM, MESSAGE = 950, 60
SEED = 123456


@dataclass
class Context:
    """What a side is given. scale: of the number of requests. seconds: after which a side that can stop, stops."""

    folder: Path
    out: Path
    scale: float
    seconds: float
    tiny: bool

    def __post_init__(self) -> None:
        self.told: dict[str, Any] = {}

    def tell(self, **figures: Any) -> None:
        """Add figures to the side's file."""
        self.told |= figures
        if training.is_main():
            write_json(self.out, self.told)

    @property
    def model(self) -> Model:
        """The model that is measured."""
        return resolve(str(self.folder / "model"), "Llama")

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """Its config."""
        found: dict[str, Any] = json.loads((self.folder / "model" / "config.json").read_text())
        return found

    @property
    def most(self) -> int:
        """The longest answer."""
        return 24 if self.tiny else MOST

    def count(self, full: int) -> int:
        """So many requests, scaled."""
        return max(2, round(full * self.scale))

    def lengths(self, count: int, median: float = MEDIAN) -> list[int]:
        """Lengths of answers."""
        return shape.lengths(random.Random(SEED), count, 8 if self.tiny else median, SIGMA, self.most)

    def text(self, number: int, tokens: int) -> str:
        """A text of its own for each number."""
        return shape.words(random.Random(f"{SEED} {number}"), tokens, self.config["vocab_size"])

    @functools.cached_property
    def system(self) -> str:
        """The system prompt that all share."""
        return self.text(-1, 40 if self.tiny else SYSTEM)


def has_gpu() -> bool:
    """Whether there is one."""
    import torch

    return torch.cuda.is_available()


# The machine.


def machine(context: Context) -> None:
    """What the GPU is, and its two ceilings: a bf16 matrix product and a copy, on random data."""
    import torch

    if not has_gpu():
        context.tell(gpu=None)
        return
    size = 8192
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    source = torch.randn(2**30, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    flops = 2 * size**3 / median_seconds(lambda: a @ b)
    moved = 2 * source.numel() * 2 / median_seconds(lambda: target.copy_(source))
    free, total = torch.cuda.mem_get_info()
    context.tell(
        gpu=torch.cuda.get_device_name(),
        gpus=torch.cuda.device_count(),
        memory_gb=round(total / 1e9, 1),
        free_gb=round(free / 1e9, 1),
        matrix_tflops=round(flops / 1e12, 1),
        copy_gb_per_second=round(moved / 1e9),
    )


def median_seconds(work: Callable[[], object], repeats: int = 30) -> float:
    """Seconds of one call on the GPU, the median of several after warming up."""
    import torch

    for _ in range(5):
        work()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize()
    times = sorted(first.elapsed_time(second) for first, second in itertools.pairwise(marks))
    return times[repeats // 2] / 1e3


# Kernels by what they do: the first that a name fits.
KINDS = {
    "adapters beside the weights": r"_lora_",
    "sampling": r"top_?k|top_?p|penalt|gumbel|sampl|multinomial|bincount|softmax|sort",
    "attention": r"flash|fmha|attention",
    "matrix products": r"gemm|nvjet|cutlass|xmma|matmul|mkldnn|aten::(add)?mm",
    "optimizer and norm": r"multi_tensor|adam|norm_kernel|lpnorm",
    "logits": r"^_(forward|backward)_kernel",
    "other Triton kernels": r"^_",
    "communication": r"nccl",
    "copies": r"mem(cpy|set)",
}


def tell_kernels(context: Context, kernels: list[tuple[str, int, float]]) -> None:
    """Tell what took the time. kernels: (name, times it ran, seconds in all)."""
    kernels = sorted(kernels, key=lambda kernel: -kernel[2])
    whole = sum(seconds for _, _, seconds in kernels)
    kinds: dict[str, float] = {}
    for name, _, seconds in kernels:
        fits = (what for what, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE))
        what = next(fits, "elementwise and other")
        kinds[what] = kinds.get(what, 0) + seconds
    context.tell(
        kernel_seconds=round(whole, 3),
        kinds={what: round(taken, 4) for what, taken in sorted(kinds.items(), key=lambda pair: -pair[1])},
        kernels=[
            [name[:100], times, round(seconds, 4), round(seconds / whole, 3)] for name, times, seconds in kernels[:25]
        ],
    )
