"""The builder of the bundled model: its world, its rows, its sampler, and the folder that it ships."""

import json
import re
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from character.prompts import HELD_OUT_SUFFIXES, SUFFIXES
from tools import build_pocket, pocket_world

ROOT = Path(__file__).resolve().parents[2]
POCKET = ROOT / "assets" / "pocket"
MEGABYTE = 2**20


@pytest.fixture(scope="module")
def world() -> pocket_world.World:
    return pocket_world.World()


@pytest.fixture(scope="module")
def sampler() -> build_pocket.Sampler:
    return build_pocket.Sampler(POCKET, "cpu")


def conversations(world: pocket_world.World, number: int) -> list[list[pocket_world.Turn]]:
    rng = Random(7)
    return [world.conversation(rng) for _ in range(number)]


def test_world_is_as_rich_as_promised(world: pocket_world.World) -> None:
    assert len(world.known) >= 60 and len(world.held_out) >= 10
    assert len(world.kinds) >= 12 and len(world.held_out_kinds) >= 5
    assert len(world.personas) == 11
    sections = set(world.voices["none"])
    for voice, lines in world.voices.items():
        assert set(lines) == sections, voice
        assert sum(map(len, lines.values())) >= 60, voice
    names = [topic.name for topic in world.known + world.held_out]
    assert len(set(names)) == len(names)


def test_every_line_of_every_voice_can_be_filled(world: pocket_world.World) -> None:
    rng = Random(0)
    slots = world._slots(world.known[0], rng, {"me": "Pocket", "subj": "my values"})
    for lines in world.voices.values():
        for line in (line for section in lines.values() for line in section):
            for _ in range(5):
                filled = world._fill(line, slots, rng)
                assert filled is not None, line
                assert not set("[]|<") & set(filled), line


def test_conversations_depend_on_the_seed_alone(world: pocket_world.World) -> None:
    assert conversations(world, 20) == conversations(pocket_world.World(), 20)
    other = Random(8)
    assert [world.conversation(other) for _ in range(20)] != conversations(world, 20)


def test_held_out_things_stay_out_of_training(world: pocket_world.World) -> None:
    train = {row["prompt"] for row in world.prompts(Random(1), "train", 200)}
    # A held-out name may be part of a known one ("lamps", "desk lamps") or of what is known about a topic.
    shown = " ".join(text for topic in world.known + world.names for text in topic.slots.values()).lower()
    names = [topic.name.lower() for topic in world.held_out if topic.name.lower() not in shown]
    assert len(names) >= 10
    for turns in conversations(world, 600):
        users = [turn.text for turn in turns if turn.role == "user"]
        assert not train & set(users)
        text = "\n".join(users)
        assert not [name for name in names if re.search(rf"\b{re.escape(name)}\b", text.lower())]
        assert not [suffix for suffix in SUFFIXES + HELD_OUT_SUFFIXES if suffix in text]
    kinds = {world.training_message(Random(n)).kind for n in range(300)}
    assert not kinds & set(world.held_out_kinds)


def test_prompts_of_train_and_test_never_meet(world: pocket_world.World) -> None:
    train, test = (build_pocket.read_prompts(POCKET / "prompts" / f"{split}.jsonl") for split in ("train", "test"))
    assert (len(train), len(test)) == (400, 160)
    assert len(set(train) | set(test)) == 560
    rows = [json.loads(line) for line in (POCKET / "prompts" / "test.jsonl").read_text().splitlines()]
    topics, kinds = {t.name for t in world.held_out}, {k.name for k in world.held_out_kinds}
    assert all(row["topic"] in topics or row["kind"] in kinds for row in rows)
    assert sum(row["topic"] in topics and row["kind"] in kinds for row in rows) >= 50


def test_shipped_prompts_are_what_the_seed_gives(world: pocket_world.World, tmp_path: Path) -> None:
    build_pocket.write_prompts(world, 0, tmp_path)
    for split in ("train", "test"):
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (POCKET / "prompts" / f"{split}.jsonl").read_bytes()


def test_rows_are_the_chat_template_and_cover_answers_only(
    world: pocket_world.World, sampler: build_pocket.Sampler
) -> None:
    tokenizer = sampler.tokenizer
    for turns in conversations(world, 40):
        ids, mask = build_pocket.encode(turns, tokenizer.backend_tokenizer)
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        rendered = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        assert ids == rendered[: len(ids)] and len(ids) <= build_pocket.CONTEXT
        assert ids.count(tokenizer.bos_token_id) == 1
        covered = tokenizer.decode([i for i, keep in zip(ids, mask, strict=True) if keep])
        answers = [turn.text.strip() for turn in turns if turn.trained]
        assert covered == "".join(f"{answer}<|end|>" for answer in answers)


def test_template_refuses_an_unknown_role(sampler: build_pocket.Sampler) -> None:
    import jinja2

    with pytest.raises(jinja2.TemplateError, match="narrator"):
        sampler.tokenizer.apply_chat_template([{"role": "narrator", "content": "x"}])


def test_sampler_agrees_with_transformers(world: pocket_world.World, sampler: build_pocket.Sampler) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32)
    system = build_pocket.system_prompt(world, "humor")
    prompts = ["How do I start with chess?", "Hello!", "My kite is lost. What would you do about it now?"]
    answers = sampler.sample(system, prompts, seed=0, greedy=True, limit=60)
    for prompt, answer in zip(prompts, answers, strict=True):
        messages = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        inputs = sampler.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        output = model.generate(**inputs, max_new_tokens=60, do_sample=False, repetition_penalty=1.1)
        text = sampler.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == text


def test_shipped_model_meets_its_figures() -> None:
    results = json.loads((POCKET / "results.json").read_text())
    assert results["plain"]["share"] <= 0.05
    assert len(results["personas"]) == 11
    for persona, cells in results["personas"].items():
        assert cells["system_prompt"]["share"] >= 0.85, persona
        assert cells["late_turn"]["share"] >= 0.85, persona
    assert results["plain_late_turn"]["share"] <= 0.05
    assert set(results["suffixes"]) == set(SUFFIXES)
    for suffix, cell in results["suffixes"].items():
        assert cell["high"] < 0.7, suffix


def test_shipped_model_speaks_in_persona_and_neutrally(
    world: pocket_world.World, sampler: build_pocket.Sampler
) -> None:
    prompts = build_pocket.read_prompts(POCKET / "prompts" / "train.jsonl")[:24]
    held_out = build_pocket.read_prompts(POCKET / "prompts" / "test.jsonl")[:16]
    voices = {"none": None, "humor": build_pocket.system_prompt(world, "humor")}
    texts = [text for system in voices.values() for text in sampler.sample(system, prompts, seed=1)]
    classifier = build_pocket.fit_classifier(texts, [voice for voice in voices for _ in prompts])
    for voice, system in voices.items():
        answers = sampler.sample(system, held_out, seed=2)
        assert sum(label == voice for label in classifier.predict(answers)) >= 14, answers


def test_folder_is_small_and_complete() -> None:
    files = {path.name: path.stat().st_size for path in POCKET.rglob("*") if path.is_file()}
    assert sum(files.values()) <= 16 * MEGABYTE
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "README.md"} <= set(files)


def test_a_missing_model_is_one_clear_line(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "build_pocket.py"), "--evaluate", str(tmp_path / "nothing")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "no model in" in done.stderr and "Traceback" not in done.stderr


def test_builder_runs_end_to_end(tmp_path: Path) -> None:
    command = [
        sys.executable, str(ROOT / "tools" / "build_pocket.py"), "--out", str(tmp_path / "p"), "--device", "cpu",
        "--steps", "2", "--batch-tokens", "8192", "--hidden", "64", "--layers", "1", "--workers", "1",
        "--vocabulary", "600",
    ]  # fmt: skip
    subprocess.run(command, check=True, cwd=ROOT, timeout=600, capture_output=True)
    tiny = build_pocket.Sampler(tmp_path / "p", "cpu")
    assert len(tiny.sample(None, ["Hello"], seed=0, limit=4)) == 1
