"""What the vLLM engine alone has: its settings on GPUs, its adapters' ranks, its quiet log, and how it fails."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from character.engine import Sampling, Steering
from character.engine.gpus import graph_sizes, launching
from character.engine.steering import MARK, STEERINGS, SteeredModel, number_in
from character.engine.vllm import (
    VLLMEngine,
    _cause,
    _known,
    _output_to,
    _rank,
    _short,
    weights_folder,
)
from character.models import Model, resolve
from character.utils import UserError
from repeng import ControlVector

pytestmark = pytest.mark.xdist_group("vllm")

MESSAGES = [{"role": "user", "content": "Who are you?"}]
GREEDY = Sampling(temperature=0, top_p=1, repetition_penalty=1, max_tokens=24)
# So strong a penalty also holds back the end of the turn, which the prompt contains.
ENDLESS = Sampling(temperature=0, top_p=1, repetition_penalty=9, max_tokens=380)
SMALL_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
LOG = """\
INFO 11-22 09:58:44 [model.py:684] Resolved architecture: LlamaForCausalLM
WARNING 11-22 09:58:44 [importing.py:83] ImportError: No module named harmless
(Worker_TP1 pid=12) WARNING 11-22 09:58:45 [importing.py:83] ImportError: No module named harmless
(Worker_TP1 pid=12) ERROR 11-22 09:58:45 [multiproc_executor.py:870] WorkerProc failed to start.
(Worker_TP1 pid=12) ERROR 11-22 09:58:45 [registry.py:1086] subprocess.CalledProcessError: Command 'python' failed.
(Worker_TP1 pid=12) ERROR 11-22 09:58:45 [registry.py:1086] RuntimeError: Error raised in subprocess:
(Worker_TP1 pid=12) ERROR 11-22 09:58:45 [multiproc_executor.py:870] Traceback (most recent call last):
(Worker_TP1 pid=12) ERROR 11-22 09:58:45 [multiproc_executor.py:870]   File "loader.py", line 3, in load
(Worker_TP1 pid=12) ERROR 11-22 09:58:45 [multiproc_executor.py:870] torch.OutOfMemoryError: CUDA out of memory. Tried
(EngineCore pid=11) ERROR 11-22 09:58:46 [core.py:866] Exception: WorkerProc initialization failed. See stack trace.
RuntimeError: Engine core initialization failed. See root cause above.
"""
# What vLLM 0.26 says, and what becomes of it.
TAKEN = (
    "ValueError: Free memory on device cuda:0 (10.2/79.2 GiB) on startup is less than desired GPU memory utilization "
    "(0.92, 72.9 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."
)
NO_CACHE = (
    "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing "
    "the engine (this flag also controls CPU memory reservation on the CPU backend, despite its name)."
)
NO_TOKEN = (
    "ValueError: Cannot auto-fit max_model_len: not enough GPU memory available to serve even a single token. Try "
    "increasing `gpu_memory_utilization`."
)
TOO_LARGE = (
    "RuntimeError: Failed to load model - not enough GPU memory. Try lowering --gpu-memory-utilization to free memory "
    "for weights, increasing --tensor-parallel-size, or using --quantization."
)


# On one machine, any.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha_pattern": {"q_proj": 8}}, "uses alpha_pattern"),
        ({"rank_pattern": {"q_proj": 8}}, "uses rank_pattern"),
        ({"use_dora": True}, "uses use_dora"),
        ({"modules_to_save": ["lm_head"]}, "uses modules_to_save"),
        ({"r": 1024}, "has rank 1024; vLLM takes at most 512"),
    ],
)
def test_adapters_that_vllm_would_get_wrong_are_refused(
    change: dict[str, Any], message: str, adapters: Any, chat_model: Callable[[str], Model], tmp_path: Path
) -> None:
    import transformers

    model = chat_model("template-bos")
    config = transformers.AutoConfig.from_pretrained(model.source)
    assert _rank(adapters.large, config, model) == 16
    folder = shutil.copytree(adapters.large, tmp_path / "changed")
    settings = json.loads((folder / "adapter_config.json").read_text()) | change
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=message):
        _rank(folder, config, model)


def test_the_cause_is_the_first_exception_of_the_log() -> None:
    assert _cause(LOG) == "OutOfMemoryError: CUDA out of memory. Tried"
    assert _cause(LOG.partition("(Worker_TP1 pid=12) ERROR")[0]) is None


def explained(
    line: str,
    tmp_path: Path,
    what: str = "could not start",
    error: Exception | None = None,
    precision: dict[str, str] | None = None,
    version: str = "0.29.0",
) -> str:
    """What an engine on a GPU says where the log of a vLLM of this version has this line."""
    engine = VLLMEngine(Model("some", "some/model", "Some"), 0, precision=precision)
    engine._log, engine._sizes = tmp_path / "log", "16.1 GB of weights on 1 × 24 GB"
    engine._log.write_text(f"(EngineCore pid=11) ERROR 11-22 09:58:46 [core.py:1330] {line}\n" if line else "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("character.engine.vllm.versions", lambda: {"vllm": version})
        return engine._explained(what, error or RuntimeError("Engine core initialization failed."))


def test_a_gpu_that_others_use(tmp_path: Path) -> None:
    message = explained(TAKEN, tmp_path)
    assert "some/model: others use this GPU: 10.2 of 79.2 GiB are free, 72.9 are wanted; wait, end what" in message
    assert "utilization" not in message


@pytest.mark.parametrize("line", [NO_CACHE, NO_TOKEN, TOO_LARGE])
def test_too_little_memory_says_what_there_is_and_what_helps(line: str, tmp_path: Path) -> None:
    message = explained(line, tmp_path)
    assert "use a smaller model, more GPUs" in message
    assert "here are 16.1 GB of weights on 1 × 24 GB, and --quantization fp8 --kv-cache-dtype fp8 need half" in message
    again = explained(line, tmp_path, precision={"quantization": "fp8"})
    assert "here are 16.1 GB of weights on 1 × 24 GB" in again and "fp8" not in again


def test_a_process_that_ends_without_a_word(tmp_path: Path) -> None:
    message = explained("", tmp_path, "stopped")
    assert "one of its processes ended without a word" in message and "finished rows are kept" in message


@pytest.mark.parametrize(
    ("version", "known"),
    [("0.26.0", True), ("0.29.1+cpu", True), ("0.25.3", False), ("0.30.0", False), ("1.27", False)],
)
def test_versions_that_are_known(version: str, known: bool, tmp_path: Path) -> None:
    assert _known(version) == known
    message = explained("ValueError: no such field", tmp_path, version=version)
    assert (
        f"vLLM {version} could not start: ValueError: no such field; known to work: 0.26 to 0.29" in message
    ) != known
    gone = explained("", tmp_path, error=AttributeError("vllm has no AsyncEngineArgs"), version=version)
    assert f"vLLM {version} could not start: vllm has no AsyncEngineArgs; known to work: 0.26 to 0.29" in gone


def test_several_copies_of_the_model_are_told_what_to_draw() -> None:
    engine = VLLMEngine(Model("some", "some/model", "Some"), 5)

    def seed(replicas: int, own: int) -> int | None:
        parallel = SimpleNamespace(data_parallel_size=replicas)
        engine._llm = SimpleNamespace(vllm_config=SimpleNamespace(parallel_config=parallel))
        return engine._seed_of(Sampling(seed=own))

    assert seed(1, 7) is None, "seeds would slow the sampler for nothing"
    assert seed(2, 7) == seed(4, 7) != seed(2, 8)
    assert 0 <= (seed(2, 2**64 - 1) or 0) < 2**31


def test_a_conversation_stays_with_one_copy_of_the_model() -> None:
    engine = VLLMEngine(Model("some", "some/model", "Some"), 0)

    def replica(replicas: int, *said: str) -> int | None:
        parallel = SimpleNamespace(data_parallel_size=replicas)
        engine._llm = SimpleNamespace(vllm_config=SimpleNamespace(parallel_config=parallel))
        return engine._replica([{"role": "user", "content": text} for text in said])

    assert replica(1, "be kind", "hello", "hi", "so?") is None
    assert replica(4, "be kind", "hello") is None, "nothing to find again"
    turns = [("be kind", "hello", f"I am {number}", "so?") for number in range(400)]
    chosen = [replica(4, *said) for said in turns]
    assert chosen == [replica(4, *said, "well", "then") for said in turns]
    assert min(map(chosen.count, range(4))) > 70


def test_a_validation_error_becomes_one_line() -> None:
    error = "1 validation error for ModelConfig\n  Value error, No such thing. [type=value_error, input={}]\n    See"
    assert _short(error) == "No such thing"
    assert len(_short("word " * 200)) <= 300


def test_a_steerings_number_is_read_off_a_requests_id() -> None:
    assert number_in(f"17{MARK}3-ab12cd34") == number_in(f"17{MARK}3") == 3
    assert number_in("17-ab12cd34") == number_in("17") == 0


class Stack(torch.nn.Module):
    """A model of two layers that hand on what they get, in two parts as vLLM's do; tokens × hidden size."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=2))

    def forward(self, hidden: Any) -> Any:
        rest = torch.zeros_like(hidden)
        for layer in self.layers:
            hidden, rest = layer((hidden, rest))
        return hidden + rest


def test_each_token_gets_what_its_request_asks_for() -> None:
    network = Stack()
    # As vLLM's second model runner, which needs Triton.
    runner: Any = SimpleNamespace(
        device=torch.device("cpu"),
        max_num_tokens=16,
        model_config=SimpleNamespace(dtype=torch.float32, get_hidden_size=lambda: 4),
        get_model=lambda: network,
        prepare_inputs=lambda scheduled, _: SimpleNamespace(
            req_ids=list(scheduled), num_scheduled_tokens=np.array(list(scheduled.values()))
        ),
    )
    steered = SteeredModel(runner)
    steered.add(1, ControlVector("llama", {0: np.full(4, 1, np.float32)}))
    steered.add(2, ControlVector("llama", {0: np.full(4, 2, np.float32), 1: np.full(4, 10, np.float32)}))
    runner.prepare_inputs({f"1{MARK}2-ab": 3, "2": 1, f"3{MARK}1-cd": 2}, None)
    # The last two pad the batch.
    assert network(torch.zeros(8, 4))[:6].tolist() == [[value] * 4 for value in (12, 12, 12, 0, 1, 1)]
    # As a model that vLLM takes from transformers, whose layers get the tokens as one row.
    assert network(torch.zeros(1, 8, 4))[0, :6].tolist() == [[value] * 4 for value in (12, 12, 12, 0, 1, 1)]
    runner.prepare_inputs({"2": 5}, None)
    assert not network(torch.zeros(5, 4)).any()


def test_output_goes_to_the_log_and_stays_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    waits = "import sys; print('early', flush=True); sys.stdin.read(); print('late')"
    with _output_to(log):
        os.write(1, b"inside\n")
        child = subprocess.Popen([sys.executable, "-c", waits], stdin=subprocess.PIPE)
    print("outside")
    child.communicate()
    assert sorted(log.read_text().split()) == ["early", "inside", "late"]
    assert capfd.readouterr().out == "outside\n"


def started(model: Model, adapters: tuple[Path, ...] = ()) -> None:
    """Start an engine; it is closed again whatever happens."""

    async def start() -> None:
        async with VLLMEngine(model, 0, adapters):
            pass

    asyncio.run(start())


def test_a_folder_without_safetensors(chat_model: Callable[[str], Model], tmp_path: Path) -> None:
    folder = shutil.copytree(chat_model("template-bos").source, tmp_path / "bare")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"bare has no \*\.safetensors"):
        started(Model("bare", str(folder), "Bare"))


@pytest.mark.parametrize("config", ['{"model_type": "unheard-of"}', '{"model_type": "llama"', "{}"])
def test_a_folder_with_a_broken_config(config: str, chat_model: Callable[[str], Model], tmp_path: Path) -> None:
    folder = shutil.copytree(chat_model("template-bos").source, tmp_path / "broken")
    (folder / "config.json").write_text(config)
    with pytest.raises(UserError, match=r"cannot load the model .*broken: ") as caught:
        started(Model("broken", str(folder), "Broken"))
    assert "\n" not in str(caught.value)


def test_a_model_without_a_chat_template(chat_model: Callable[[str], Model], tmp_path: Path) -> None:
    folder = shutil.copytree(chat_model("template-bos").source, tmp_path / "base")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template, so it is no chat model"):
        started(Model("base", str(folder), "Base"))


def test_a_model_that_the_network_does_not_give(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UserError, match=r"cannot load the model org/absent: .*network, or name a local folder"
    ) as caught:
        weights_folder(Model("absent", "org/absent", "Absent"))
    assert "\n" not in str(caught.value)


def test_a_gated_model(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(repo: str, **_: Any) -> str:
        raise OSError(f"403 Client Error. Cannot access gated repo for url https://huggingface.co/{repo}.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=r"accept its terms on the hub and put HF_TOKEN into .env"):
        weights_folder(Model("gated", "org/gated", "Gated"))


# With vLLM.


@pytest.fixture
def small_cpu(monkeypatch: pytest.MonkeyPatch, require: Callable[[str], Any]) -> None:
    """vLLM, small and on one core."""
    require("vllm")
    for variable, value in SMALL_CPU.items():
        monkeypatch.setenv(variable, value)
    # TRL, which other tests import, sets it; to the engine it would mean that somebody wants to see vLLM's log.
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)


class FakeGPUs:
    """What `_settings` asks vLLM's platform."""

    def __init__(self, count: int, memory: float):
        self.count, self.memory = count, memory

    def is_cpu(self) -> bool:
        return False

    def is_unspecified(self) -> bool:
        return False

    def is_cuda(self) -> bool:
        return True

    def device_count(self) -> int:
        return self.count

    def get_device_total_memory(self) -> int:
        return int(self.memory)


def settings_on(gpus: FakeGPUs, engine: VLLMEngine, ranks: Sequence[int] = ()) -> dict[str, Any]:
    """What an engine would start vLLM with on a machine that has these GPUs."""
    import transformers
    import vllm.platforms

    config = transformers.AutoConfig.from_pretrained(engine.model.source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm.platforms, "current_platform", gpus, raising=False)
        return engine._settings(Path(engine.model.source), config, list(ranks))


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("gpus", "expected", "concurrency"),
    [
        (FakeGPUs(4, 80e9), {"max_num_seqs": 1024, "data_parallel_size": 4, "max_loras": 2}, 5120),
        (FakeGPUs(1, 24e9), {"max_num_seqs": 256, "data_parallel_size": 1, "max_loras": 2}, 320),
        (FakeGPUs(1, 2e6), {"max_num_seqs": 256, "tensor_parallel_size": 1, "max_loras": 1, "max_cpu_loras": 2}, 320),
    ],
)
def test_settings_follow_the_gpus(
    gpus: FakeGPUs,
    expected: dict[str, int],
    concurrency: int,
    chat_model: Callable[[str], Model],
    adapters: Any,
    small_cpu: None,
) -> None:
    import vllm

    engine = VLLMEngine(chat_model("template-bos"), 7, [adapters.small, adapters.large])
    settings = settings_on(gpus, engine, [4, 16])
    assert settings.items() >= expected.items()
    assert settings["seed"] == 7
    assert (settings["max_lora_rank"], settings["enable_prefix_caching"], settings["trust_remote_code"]) == (
        16,
        True,
        False,
    )
    assert engine.concurrency == concurrency
    assert settings["worker_cls"] == "character.engine.worker.Worker"
    assert settings.items() >= launching(expected.get("data_parallel_size", 1)).items()
    compiled = vllm.AsyncEngineArgs(**settings).compilation_config
    assert compiled.cudagraph_capture_sizes == graph_sizes(2 * expected["max_num_seqs"])


@pytest.mark.vllm
def test_a_folded_adapter_takes_no_slot(chat_model: Callable[[str], Model], adapters: Any, small_cpu: None) -> None:
    import vllm

    for gpus in (FakeGPUs(1, 80e9), FakeGPUs(2, 24e9)):
        settings = settings_on(gpus, VLLMEngine(chat_model("template-bos"), 7, [adapters.large], folded=True), [16])
        plain = settings_on(gpus, VLLMEngine(chat_model("template-bos"), 7))
        added = {"load_format": "folded", "model_loader_extra_config": {"adapter": str(adapters.large)}}
        assert settings == plain | added
        vllm.AsyncEngineArgs(**settings)


@pytest.mark.vllm
def test_steering_on_a_gpu_has_hooks_in_its_graphs(chat_model: Callable[[str], Model], small_cpu: None) -> None:
    import vllm

    settings = settings_on(FakeGPUs(1, 80e9), VLLMEngine(chat_model("template-bos"), 7, steered=True))
    assert settings["worker_cls"] == "character.engine.worker.SteeredWorker"
    assert "enforce_eager" not in settings
    compiled = vllm.AsyncEngineArgs(**settings).compilation_config
    assert (compiled.mode.name, compiled.cudagraph_mode.name) == ("NONE", "FULL_DECODE_ONLY")


def test_an_engine_steers_by_so_many_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    async def learn(number: int, steering: Steering) -> int:
        return number

    async def ask(count: int) -> list[int]:
        engine = VLLMEngine(resolve("pocket"), 7, steered=True)
        monkeypatch.setattr(engine, "_learn", learn)
        return [await engine._steering(Steering(Path("x"), strength)) for strength in range(count)]

    assert asyncio.run(ask(STEERINGS - 1)) == list(range(1, STEERINGS))
    with pytest.raises(UserError, match=r"at most 511 control vectors and strengths; name fewer constitutions"):
        asyncio.run(ask(STEERINGS))


@pytest.mark.vllm
def test_eight_bits_take_half_the_memory(chat_model: Callable[[str], Model], small_cpu: None) -> None:
    import vllm

    model = chat_model("template-bos")
    gpu = FakeGPUs(1, sum(file.stat().st_size for file in Path(model.source).glob("*.safetensors")))
    with pytest.raises(UserError, match="for its weights alone"):
        settings_on(gpu, VLLMEngine(model, 7))
    asked = {"quantization": "fp8", "kv_cache_dtype": "fp8"}
    settings = settings_on(gpu, VLLMEngine(model, 7, precision=asked))
    assert settings.items() >= asked.items()
    vllm.AsyncEngineArgs(**settings)


@pytest.mark.vllm
def test_vllm_for_gpus_where_there_is_none(
    chat_model: Callable[[str], Model], small_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm.platforms
    from vllm.platforms.interface import UnspecifiedPlatform

    monkeypatch.setattr(vllm.platforms, "current_platform", UnspecifiedPlatform(), raising=False)
    with pytest.raises(UserError, match=r"vLLM sees no GPU here; .*--engine transformers"):
        VLLMEngine(chat_model("template-bos"), 7)._settings(Path(), None, [])
    monkeypatch.undo()


@pytest.mark.vllm
def test_a_start_that_fails_says_why_in_one_line_and_nothing_else(
    chat_model: Callable[[str], Model],
    small_cpu: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "100000")
    with pytest.raises(UserError, match=r"could not start .*memory.*use a smaller model") as caught:
        started(chat_model("template-bos"))
    assert "\n" not in str(caught.value)
    log = Path(str(caught.value).split("vLLM's log: ")[1].rstrip(")"))
    assert "Traceback" in log.read_text()
    log.unlink()
    assert capfd.readouterr() == ("", "")


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """The event loop that the engine lives in."""
    with asyncio.Runner() as found:
        yield found


@pytest.fixture(scope="module")
def engine(
    runner: asyncio.Runner, chat_model: Callable[[str], Model], adapters: Any, require: Callable[[str], Any]
) -> Iterator[VLLMEngine]:
    """An engine with two adapters; the last test kills it."""
    require("vllm")
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in SMALL_CPU.items():
            patch.setenv(variable, value)
        patch.delenv("VLLM_LOGGING_LEVEL", raising=False)
        found = VLLMEngine(chat_model("template-bos"), 0, [adapters.small, adapters.large, adapters.small])
        runner.run(found.__aenter__())
        yield found
        runner.run(found.close())
        if found._log:
            found._log.unlink(missing_ok=True)


@pytest.mark.vllm
def test_the_context_is_the_models(engine: VLLMEngine) -> None:
    assert engine.chat.context == 512
    assert engine.room and engine.room > 10_000
    assert engine.info.notes == []
    assert len(engine._loras) == 2


@pytest.mark.vllm
def test_an_adapter_that_vllm_refuses(
    engine: VLLMEngine, runner: asyncio.Runner, adapters: Any, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(adapters.small, tmp_path / "renamed")
    weights = folder / "adapter_model.safetensors"
    save_file({name.replace("o_proj", "odd_proj"): tensor for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(UserError, match=r"vLLM cannot load adapter .*renamed: .*odd_pr") as caught:
        runner.run(engine._load(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.vllm
def test_answers_to_one_prompt_share_its_prefill(engine: VLLMEngine, runner: asyncio.Runner) -> None:
    from vllm import SamplingParams, TokensPrompt

    block = engine._llm.vllm_config.cache_config.block_size
    ids = engine.chat.encode([{"role": "user", "content": "Who are you? " * 72}]).ids

    async def answer(number: int) -> int:
        inputs = TokensPrompt(prompt_token_ids=ids)
        async for output in engine._llm.generate(inputs, SamplingParams(max_tokens=4), f"shared-{number}"):
            last = output
        return int(last.num_cached_tokens)

    async def all_at_once() -> list[int]:
        return await asyncio.gather(*map(answer, range(5)))

    assert len(ids) > 2 * block
    first, *others = runner.run(all_at_once())
    assert first == 0
    assert all(len(ids) - cached <= block for cached in others), (len(ids), block, others)


@pytest.mark.vllm
def test_a_cancelled_call_is_aborted_in_vllm(engine: VLLMEngine, runner: asyncio.Runner) -> None:
    async def cancel() -> tuple[int, int]:
        tasks = [asyncio.create_task(engine.reply(MESSAGES, ENDLESS)) for _ in range(8)]
        await asyncio.sleep(0.3)
        before = engine._llm.output_processor.get_num_unfinished_requests()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return before, engine._llm.output_processor.get_num_unfinished_requests()

    assert runner.run(cancel()) == (8, 0)


@pytest.mark.vllm
def test_a_worker_that_dies_ends_the_run_with_one_line(
    engine: VLLMEngine, runner: asyncio.Runner, capfd: pytest.CaptureFixture[str]
) -> None:
    async def die() -> list[Any]:
        tasks = [asyncio.create_task(engine.reply(MESSAGES, ENDLESS)) for _ in range(3)]
        await asyncio.sleep(0.3)
        for core in engine._llm.engine_core.resources.engine_manager.processes:
            for worker in Path(f"/proc/{core.pid}/task/{core.pid}/children").read_text().split():
                os.kill(int(worker), signal.SIGKILL)
        waiting = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
        return [*waiting, *await asyncio.gather(engine.reply(MESSAGES, GREEDY), return_exceptions=True)]

    for failure in runner.run(die()):
        assert isinstance(failure, UserError)
        assert re.search("vLLM stopped with .*: Worker proc .* died unexpectedly", str(failure))
        assert "\n" not in str(failure)
    assert capfd.readouterr() == ("", "")
