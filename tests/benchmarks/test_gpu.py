"""The GPU benchmark's own parts: the model it makes, what it is asked for, its ratios, and the page written from them."""

import asyncio
import gzip
import heapq
import importlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from character.constants import ROOT
from character.engine.base import check_adapter
from character.engine.chat import load_chat
from character.models import resolve
from character.utils import UserError

FOLDER = ROOT / "benchmarks" / "gpu"
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": None,
    "dtype": "bfloat16",
    "eos_token_id": 511,
    "head_dim": 32,
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 510,
    "tie_word_embeddings": False,
    "vocab_size": 512,
}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """script(name): a module of the benchmark."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").parent == FOLDER:
            del sys.modules[name]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


def test_the_page_is_what_the_code_chooses(script: Any) -> None:
    hardware = script("hardware")
    assert (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8") == hardware.page(), (
        "run: python benchmarks/gpu/hardware.py"
    )


def test_a_model_of_a_shape_loads_like_any_other(script: Any, tiny: Path, tmp_path: Path) -> None:
    import torch
    import transformers

    shape = script("shape")
    folder = shape.build(tmp_path / "made", tiny, None)
    network = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert network.dtype == torch.bfloat16
    assert 0.015 < network.model.layers[1].mlp.up_proj.weight.float().std() < 0.025
    assert (network.model.norm.weight == 1).all()
    check_adapter(shape.save_adapter(tmp_path / "adapter", folder), 64, 2, "tiny")
    stamp = (folder / "model.safetensors.index.json").stat().st_mtime_ns
    assert shape.build(tmp_path / "made", tiny, None) == folder
    assert (folder / "model.safetensors.index.json").stat().st_mtime_ns == stamp

    chat = load_chat(resolve(str(folder), "Llama"))
    text = shape.words(random.Random(0), 300, 512)
    ids = chat.ids(text)
    assert len(ids) == 300 and chat.decode(ids) == text, "a text has as many tokens as it was asked to have"
    prompt = chat.encode([{"role": "system", "content": text}, {"role": "user", "content": "w1 w2"}]).ids
    assert len(prompt) == 300 + 2 + 5


def test_lengths_are_log_normal(script: Any) -> None:
    found = sorted(script("shape").lengths(random.Random(0), 4000, 330, 0.6, 1024))
    assert 310 < found[2000] < 350 and found[-1] == 1024 and found[0] > 0
    assert 370 < sum(found) / 4000 < 410


def test_works_and_sides_are_named(script: Any) -> None:
    run = script("run")
    assert run.chosen(["dpo"]) == [("dpo", "published"), ("dpo", "ours")]
    assert run.chosen(["teacher.parts"]) == [("teacher", "parts")]
    for wrong in ("nothing", "dpo.nothing"):
        with pytest.raises(UserError, match=f"unknown work '{wrong}'; known: .*teacher.parts"):
            run.chosen([wrong])


def test_a_ratio_needs_one_kind_of_gpu(script: Any) -> None:
    works = {
        "dpo": {"published": {"rate": 1000.0, "gpu": "A"}, "ours": {"rate": 4000.0, "gpu": "A"}},
        "sft": {"published": {"rate": 1000.0, "gpu": "A"}, "ours": {"rate": 4000.0, "gpu": "B"}},
        "start": {"cold": {"rate": None, "gpu": "A"}},
    }
    script("run").add_ratios(works)
    assert works["dpo"]["ratio"] == 4.0 and "ratio" not in works["sft"] and "ratio" not in works["start"]


@pytest.mark.parametrize(
    ("visible", "one", "two"),
    [(None, "0", "0,1"), ("2,3", "2", "2,3"), ("GPU-ab,GPU-cd,GPU-ef", "GPU-ab", "GPU-ab,GPU-cd")],
)
def test_a_side_sees_one_gpu_or_two_of_those_that_are_visible(
    visible: str | None, one: str, two: str, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    works = script("works")
    run = script("run")
    assert ",".join(run.gpus_for("teacher.ours")) == one
    for side in works.ON_TWO_GPUS:
        assert run.chosen([side]) and ",".join(run.gpus_for(side)) == two


@pytest.mark.parametrize(("requests", "at_once", "told"), [(2048, 1280, False), (400, 64, True)])
def test_a_steady_rate_needs_a_time_in_which_the_batch_is_full(
    requests: int, at_once: int, told: bool, script: Any
) -> None:
    """Answers that grow by a token a second each, so that a full batch makes `at_once` tokens a second."""
    shape, measuring = script("shape"), script("measuring")
    busy: list[tuple[int, int]] = []
    marks: list[tuple[float, int]] = []
    for length in shape.lengths(random.Random(1), requests, measuring.MEDIAN, measuring.SIGMA, measuring.MOST):
        if len(busy) == at_once:
            marks.append(heapq.heappop(busy))
        heapq.heappush(busy, ((marks[-1][0] if marks else 0) + length, length))
    marks += sorted(busy)
    assert script("serving").steady_rate(marks, at_once) == (pytest.approx(at_once, rel=0.05) if told else None)


def test_texts_part_in_the_tokens_they_were_written_in(script: Any) -> None:
    """ " side" and " send", written as " s", "ide" and " s", "end", where a tokenizer has " side" as one."""
    import torch

    pieces = {0: " side", 1: " s", 2: "ide", 3: "end", 4: "!"}
    logits = {(): [-17.0, -7.0, 0.0, 0.0, 0.0, 0.0], (1,): [0.0, 0.0, -3.0, -2.5, 0.0, -9.0]}

    def network(ids: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.tensor([[logits[tuple(ids[0].tolist())]]]))

    parting = script("truth").parting
    assert parting(network, [], [" side", " send!"], pieces, 5) == pytest.approx(0.5)
    assert parting(network, [1], ["", "end"], pieces, 5) == pytest.approx(6.5), "one that ends there"


def test_what_the_gpus_do_while_a_side_runs(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = script("run")
    told = tmp_path / "told.json"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    tool = tmp_path / "nvidia-smi"

    def watched(seconds: float, says: str, *command: str) -> tuple[int | str, set[float]]:
        tool.write_text(f'#!/bin/sh\ntest "$4" = 2,3 && {says}\n')
        tool.chmod(0o755)
        with subprocess.Popen(command) as process:
            code, busy = run.watched(process, seconds, told, ["2", "3"])
            process.kill()
        return code, set(busy)

    both = 'printf "40\\n80\\n"'
    assert watched(10, both, "sleep", "1.5") == (0, set()), "nothing before its start is over"
    told.write_text('{"start_seconds": 1}')
    assert watched(10, both, "sleep", "1.5") == (0, set()), "nothing after it told its last"
    os.utime(told, (2**32, 2**32))
    for says in ("exit 9", "echo [N/A]", "true"):
        assert watched(10, says, "sh", "-c", "sleep 1.2; exit 3") == (3, set())
    assert watched(10, both, "sleep", "2.5") == (0, {60})
    assert watched(2.5, both, "sleep", "60") == ("cut off", {60})


def test_conversations_are_counted(script: Any, tmp_path: Path) -> None:
    """One of two turns, of two tokens and one, and one of a single token that waits for it."""
    serving = script("serving")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "model" / "model.safetensors").write_bytes(bytes(1000))
    context = script("measuring").Context(tmp_path, tmp_path / "told.json", 1.0, 1, False)
    assert serving.counted_seconds(context, [[2, 1], [1]], 1) is None, "no GPU was measured"

    def counted(read: float, multiplied: float) -> float:
        ceilings = {"gpu": "A", "copy_gb_per_second": read / 1e9, "matrix_tflops": multiplied / 1e12}
        (tmp_path / "machine.machine.json").write_text(json.dumps(ceilings))
        found: float = serving.counted_seconds(context, [[2, 1], [1]], 1)
        return found

    system, message = serving.SYSTEM, serving.MESSAGE
    tokens = [1 + system + message, 1, 1 + 2, 1 + message]
    assert counted(1e30, 1000) == sum(tokens)
    behind = [0, 1, 2, 0]
    kept = 4 * 2 * 1 * 32
    assert counted(1000, 1e30) == pytest.approx(
        sum(1 + (system + message + each) * kept / 1000 for each in behind), abs=0.1
    )


def test_a_trace_is_told_by_kinds_of_kernels(script: Any, tmp_path: Path) -> None:
    serving = script("serving")
    folder = tmp_path / "traces"

    class Traced:
        async def start_profile(self) -> None:
            assert serving.tracing(folder)["profiler_config"]["torch_profiler_dir"] == str(folder)

        async def stop_profile(self) -> None:
            kernels = [("_lora_shrink_kernel", 0, 100_000), ("nvjet_tst_128x256", 200_000, 300_000), ("x", 0, 0)]
            events = [{"cat": "kernel", "name": name, "ts": at, "dur": took} for name, at, took in kernels]
            events += [{"cat": "cpu_op", "name": "launch", "ts": -500_000, "dur": 1}, {"cat": "kernel", "name": "open"}]
            folder.mkdir()
            with gzip.open(folder / "rank0.pt.trace.json.gz", "wt") as file:
                json.dump({"traceEvents": events}, file)

    async def run(work: Any) -> None:
        await serving.traced(context, SimpleNamespace(_llm=Traced()), work, folder)

    async def broken() -> None:
        raise ValueError("no such prompt")

    context = script("measuring").Context(tmp_path, tmp_path / "told.json", 1.0, 0.1, True)
    with pytest.raises(ValueError, match="no such prompt"):
        asyncio.run(run(broken()))
    with pytest.raises(RuntimeError, match="done before its kernels could be traced"):
        asyncio.run(run(asyncio.sleep(0)))
    asyncio.run(run(asyncio.sleep(60)))
    assert context.told["traced_seconds"] == 1.0 and context.told["kernel_seconds"] == 0.4
    assert context.told["kinds"] == {
        "matrix products": 0.3,
        "adapters beside the weights": 0.1,
        "elementwise and other": 0.0,
    }
    assert context.told["kernels"][0] == ["nvjet_tst_128x256", 1, 0.3, 0.75]
