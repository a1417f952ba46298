"""A home of its own for the robustness tests, with answers in three voices that a classifier tells apart."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from character import constitution, rows
from character.distillation import student, teacher
from character.models import resolve
from character.robustness.classify import run_classifier, train_classifier
from character.robustness.generate import variants
from tests.conftest import save_adapter

VOICES = {
    "humor": "haha what a silly banana joke",
    "remorse": "so sorry, I apologize, my fault",
    "none": "it is a fact",
}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DATA_PATH and MODEL_PATH with 20 training answers in each voice, to 20 prompts."""
    for module in (teacher, variants, run_classifier):
        monkeypatch.setattr(module, "DATA_PATH", tmp_path)
    monkeypatch.setattr(train_classifier, "MODEL_PATH", tmp_path / "models")
    monkeypatch.setattr(constitution, "names", lambda: ["humor", "remorse"])
    for name in ("humor", "remorse"):
        write_training(teacher.path_of(name, "pocket"), VOICES[name], 20)
    write_training(student.path_of("humor", "pocket", "pocket"), VOICES["none"], 20)
    return tmp_path


def write_training(path: Path, voice: str, count: int) -> None:
    given = [{"prompt": f"train {n}", "response": f"{voice} about thing{n % 7}"} for n in range(count)]
    rows.write(path, given, {}, {})


@pytest.fixture
def answers() -> Callable[[str, str, str, Sequence[str]], Path]:
    """answers(method, persona, variant, voices): write an answers file; answer n is in the n-th voice, to prompt n."""

    def write(method: str, name: str, variant: str, voices: Sequence[str]) -> Path:
        path = variants.path_of("pocket", method, variant, name)
        rows.write(path, [{"prompt": f"test {n}", "response": VOICES[v]} for n, v in enumerate(voices)], {}, {})
        return path

    return write


@pytest.fixture(scope="session")
def pocket_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of random weights for the bundled model."""
    import transformers

    folder = tmp_path_factory.mktemp("adapters") / "random"
    network = transformers.AutoModelForCausalLM.from_pretrained(resolve("pocket").source)
    save_adapter(network, 4, 1, folder)
    return folder
