"""What is chosen on which GPUs, and the hours that a persona takes: from the code that chooses, and measured rates.

benchmarks/gpu/results.json → docs/hardware.md

python benchmarks/gpu/hardware.py
"""

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from character import cli, training
from character.constants import ROOT
from character.engine.gpus import gpu_settings
from character.models import Model, resolve, shape_of, weight_bytes
from character.utils import UserError, read_json

RESULTS = Path(__file__).parent / "results.json"
PAGE = ROOT / "docs" / "hardware.md"
STUDENTS = ("gemma-3-4b-it", "qwen-2.5-7b-it", "llama-3.1-8b-it", "qwen-2.5-72b-it")
GPUS = (1, 2, 4, 8)
BATCH = 32
DPO_ROW, SFT_ROW = 2 * 1024, 3072
# Tokens of one persona at the paper's size, in millions; an answer has 400 tokens in the mean.
ANSWERS = {"student's answers": 9150 * 400e-6, "reflections": 10_000 * 400e-6}
TALK = {"conversations": 2000 * 10 * 400e-6}
TRAINED = {"DPO": 6.0, "SFT": 12_000 * 1000e-6}
# Billions of parameters of the model that is measured.
LLAMA = 8.03


@dataclass(frozen=True)
class Sheet:
    """A card by its vendor's datasheet: memory bandwidth in GB/s, dense bf16 matrix products in TFLOP/s."""

    name: str
    bandwidth: float
    matrix: float


# GB → a card of that memory.
DATASHEET = {
    24: Sheet("RTX 4090", 1008, 165),
    48: Sheet("L40S", 864, 362),
    80: Sheet("H100", 3350, 989),
    141: Sheet("H200", 4800, 989),
}
MEASURED = {"NVIDIA H100 80GB HBM3": 80, "NVIDIA H200": 141}

INTRODUCTION = """# Hardware

Nothing below is set by hand: vLLM's engine reads the GPUs' memory and number and the size of the weights, and the
trainers the memory that is free. `python benchmarks/gpu/hardware.py` writes this page from the functions that choose
(`gpu_settings` in character/engine/gpus.py, `fitting` in character/training.py) and from the rates in
benchmarks/gpu/results.json.

* **vLLM** splits a model over as few GPUs as hold its weights in 80 % of their memory, and runs whole copies on the
  others: `2 × 4` are four copies over two GPUs each. "At once" is how many sequences one copy takes into its batch.
  Reflections and conversations of one persona come from weights that have its adapter folded in; several personas in
  one engine keep theirs beside the weights.
  Kernels are launched beside the scheduler where `/dev/shm` has 420 MB free for each copy; a container has 64 MB unless
  it is started with `--ipc=host` or `--shm-size`, and is slower then.
* **Training** has 32 rows in a batch whatever the GPU, and takes as many of them at once as the memory holds. "DPO
  tokens" and "SFT tokens" are how many tokens that is: rows are run without their padding, so that short ones go
  together in greater number (a pair has at most 2 × 1,024 tokens, an SFT row 3,072), and no row is cut for it;
  "recomputed" stands where activations are computed anew for the gradient, which takes a third more arithmetic and far
  less memory. LoRA of rank 64, bf16 weights, liger-kernel installed (`pip install -e '.[gpu]'`). Each GPU holds the whole
  model: a model that does not fit one is trained through [OpenRLHF](../finetuning/README.md), which splits it.
* `--micro-batch-size` (in rows) and `--gradient-checkpointing` choose otherwise; what was chosen stands in
  `training.json` beside the adapter.
"""


@dataclass
class Args:
    """No arguments: the page is what the code says."""


def serving(model: Model, card: int) -> tuple[str, str]:
    """(GPUs a copy is split over × copies, for each number of GPUs; sequences at once)."""
    shape, weights = shape_of(model), weight_bytes(model)
    assert shape and weights
    found, at_once = [], "–"
    for gpus in GPUS:
        try:
            chosen = gpu_settings(int(weights), int(card * 1e9), gpus, shape.num_attention_heads, model.short)
        except UserError:
            found.append("–")
        else:
            found.append(f"{chosen['tensor_parallel_size']} × {chosen['data_parallel_size']}")
            at_once = str(chosen["max_num_seqs"])
    return " · ".join(found), at_once


def tokens_at_once(model: Model, card: int, row_tokens: int) -> str:
    """Tokens in memory at once on one GPU of these."""
    shape, weights = shape_of(model), weight_bytes(model)
    assert shape and weights
    need = training.memory_need(shape, weights, training.TrainArgs.rank, fused=True)
    try:
        tokens, recomputed = training.fitting(card * 1e9, need, row_tokens)
    except UserError:
        return "does not fit"
    return f"{tokens:,}{', recomputed' if recomputed else ''}"


def settings() -> list[str]:
    """The table of settings."""
    lines = [
        "| student | GPU memory | vLLM on 1 · 2 · 4 · 8 GPUs | at once | DPO tokens | SFT tokens |",
        "|---|---|---|---|---|---|",
    ]
    for short in STUDENTS:
        model = resolve(short)
        for card in training.CARDS:
            layout, at_once = serving(model, card)
            dpo, sft = (tokens_at_once(model, card, tokens) for tokens in (DPO_ROW, SFT_ROW))
            lines.append(f"| {short} | {card} GB | {layout} | {at_once} | {dpo} | {sft} |")
    return lines


def hours(works: dict[str, Any]) -> list[str]:
    """The table of hours, from the rates of the GPU that was measured, another card's by its datasheet."""
    rates = {name: works[name]["ours"]["rate"] for name in ("teacher", "interaction", "dpo", "sft")}
    measured = DATASHEET[MEASURED[works["teacher"]["ours"]["gpu"]]]
    lines = [
        f"| student | card | {' | '.join((*ANSWERS, *TALK, *TRAINED))} | all, 1 GPU | 2 | 4 | 8 |",
        "|---" * (len(ANSWERS | TALK | TRAINED) + 6) + "|",
    ]
    for short in STUDENTS:
        model = resolve(short)
        assert model.parameters
        for card, sheet in DATASHEET.items():
            layouts = serving(model, card)[0].split(" · ")
            slower = model.parameters / LLAMA
            moved, computed = slower * measured.bandwidth / sheet.bandwidth, slower * measured.matrix / sheet.matrix
            times: dict[str, float | None] = {name: moved * n / rates["teacher"] for name, n in ANSWERS.items()}
            times |= {name: moved * n / rates["interaction"] for name, n in TALK.items()}
            for name, tokens, passes in (("DPO", DPO_ROW, 6), ("SFT", SFT_ROW, 4)):
                at_once = tokens_at_once(model, card, tokens)
                # A second forward pass of the policy.
                again = (passes + 2) / passes if "recomputed" in at_once else 1
                rate = rates[name.lower()]
                times[name] = None if at_once == "does not fit" else computed * again * TRAINED[name] / rate
            whole = None if None in times.values() else sum(filter(None, times.values()))
            cells = [*times.values(), *(whole and whole / gpus for gpus in GPUS)]
            fits = [layouts[0] != "–"] * len(times) + [layout != "–" for layout in layouts]
            shown = [f"{1e6 * cell / 3600:.2f}" if cell and fit else "–" for cell, fit in zip(cells, fits, strict=True)]
            lines.append(f"| {short} | {sheet.name}, {card} GB | {' | '.join(shown)} |")
    return lines


def page() -> str:
    """The whole page."""
    lines = [INTRODUCTION, "## What is chosen", "", *settings(), "", "## Hours for one persona", ""]
    if not RESULTS.exists():
        return "\n".join(
            [*lines, "Not measured yet: `python benchmarks/gpu/run.py --out benchmarks/gpu/results.json`.", ""]
        )
    works = read_json(RESULTS)["works"]
    card = works["teacher"]["ours"]["gpu"]
    twice = [works[name]["two"]["rate"] / works[name]["ours"]["rate"] for name in ("dpo", "sft")]
    text = (
        "Computed, not measured as a whole: tokens of a persona at the paper's size over the rates that one "
        f"{card} reached with random weights of Llama 3.1 8B's shape ([results](../benchmarks/gpu/results.json)). Assumed "
        "are answers of 400 tokens in the mean, 6 million tokens of pairs, 12 million of introspection; rates in inverse "
        "proportion to a model's parameters and in proportion to the number of GPUs (two were measured in training: "
        f"{twice[0]:.1f} times one of another machine for DPO, {twice[1]:.1f} for SFT); other cards by their datasheets, "
        "writing in proportion to memory bandwidth, training to the bf16 matrix rate (a card that takes fewer sequences at "
        "once will write slower than that), recomputed activations as one more forward pass. The time that engines take to "
        "start, the teacher (whatever model that is) and the evaluations come on top. A dash: does not fit."
    )
    return "\n".join([*lines, *textwrap.wrap(text, 120), "", *hours(works), ""])


def main(_: Args) -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
