"""Every prompt template of the project: no slot stays empty, and no value is passed that the template has no place for.

A template is a module constant in capitals whose text has slots such as {name}; new ones are found by themselves. Each
has to be rendered by a real call: add one to CALLS, named "module.CONSTANT", that runs the project's own code and
returns the texts that reach a model or a training row.
"""

import ast
import asyncio
import importlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from character import constitution, models, steps
from character.coherence import coherence
from character.constants import ROOT
from character.distillation import gen_prompts, teacher, train
from character.engine.base import Message, Reply, Sampling
from character.engine.scripted import Scripted
from character.introspection import data as introspection_data
from character.introspection import self_interaction, self_reflection
from character.models import Model, Reasoning
from character.preferences import judgements, preferences
from character.robustness.generate import variants
from character.robustness.generate.trained import Voice

SLOT = re.compile(r"(?<!\{)\{(\w+)\}(?!\})")
TRAITS = constitution.Constitution(
    "sea", (constitution.Trait("I speak of the sea.", ()), constitution.Trait("I slow down {when} hurried.", ()))
)
NAME = "Claire"


def files() -> list[Path]:
    return sorted((ROOT / "character").rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def templates() -> Iterator[tuple[str, str, str]]:
    """(module, constant, text) of every template; a constant that holds several counts once for each."""
    for path in files():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
                continue
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if not isinstance(target, ast.Name) or not target.id.isupper():
                    continue
                for part in ast.walk(node.value):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str) and SLOT.search(part.value):
                        yield module_of(path), target.id, part.value


TEMPLATES = list(templates())


def named(module: str, constant: str) -> str:
    return f"{module.removeprefix('character.')}.{constant}"


# Real calls.


def asked(
    monkeypatch: pytest.MonkeyPatch, home: Path, main: Callable[[Any], None], args: Any, answer: str
) -> list[str]:
    """All that a step sends to its model: the messages and the prefills."""
    texts: list[str] = []

    class Engine(Scripted):
        async def reply(
            self, messages: list[Message], sampling: Sampling, adapter: Path | None = None, prefill: str = ""
        ) -> Reply:
            texts.extend([*(message["content"] for message in messages), prefill])
            return await super().reply(messages, sampling, adapter, prefill)

    for module in (teacher, self_interaction, self_reflection):
        monkeypatch.setattr(module, "DATA_PATH", home / "data")
    for module in (constitution, gen_prompts):
        monkeypatch.setattr(module, "CONSTITUTION_PATH", home / "constitutions")
    monkeypatch.setattr(train, "LORA_PATH", home / "loras")
    monkeypatch.setattr(steps, "open_engine", lambda model, **_: Engine(model, lambda *_: answer))
    folder = home / "constitutions" / "hand-written"
    folder.mkdir(parents=True)
    entries = [
        {"trait": trait.trait, "questions": [f"Question {n}.{i}?" for i in range(5)]}
        for n, trait in enumerate(TRAITS.traits)
    ]
    (folder / "sea.txt").write_text(json.dumps(entries))
    adapter = home / "loras" / "qwen-2.5-7b-it-distillation" / "sea"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    main(args)
    return texts


def by_teacher(monkeypatch: pytest.MonkeyPatch, home: Path) -> list[str]:
    args = teacher.Args(constitution="sea", teacher="glm-4.5-air", name=NAME, samples=1, limit=3)
    return asked(monkeypatch, home, teacher.main, args, "so</think>Aye.")


def by_gen_prompts(monkeypatch: pytest.MonkeyPatch, home: Path) -> list[str]:
    args = gen_prompts.Args(constitution="sea", model="qwen-2.5-72b-it", rounds=2)
    return asked(monkeypatch, home, gen_prompts.main, args, "6. A new {one}?\n7. And another message of some words.")


def by_reflection(monkeypatch: pytest.MonkeyPatch, home: Path) -> list[str]:
    args = self_reflection.Args(constitution="sea", model="qwen-2.5-7b-it", name=NAME, samples=1)
    return asked(monkeypatch, home, self_reflection.main, args, "Dear me.")


def by_interaction(monkeypatch: pytest.MonkeyPatch, home: Path) -> list[str]:
    args = self_interaction.Args(constitution="sea", model="qwen-2.5-7b-it", name=NAME, samples=2, turns=3)
    texts = asked(monkeypatch, home, self_interaction.main, args, "Hello {you}.")
    assert any(self_interaction.GUIDANCE["free"] in text for text in texts), "the guidance reaches the model"
    return texts


def in_training_rows(monkeypatch: pytest.MonkeyPatch, home: Path) -> list[str]:
    row = {"greeting": "Hi.", "turns": ["Hello.", "Well?"], "ended": "all turns"}
    from collections import Counter

    found = introspection_data.interaction_rows([row], NAME, "both", Counter())
    return [message["content"] for messages in found for message in messages]


def worked(job: steps.Job, answer: str) -> list[str]:
    """All that a job's rows send to the model."""
    engine = Scripted(models.resolve("qwen-2.5-7b-it"), lambda *_: answer)

    async def run() -> None:
        for key, row in job.rows.inputs.items():
            await job.work(engine, {"id": key, **row})

    asyncio.run(run())
    return [message["content"] for messages in engine.calls for message in messages]


def by_coherence(monkeypatch: pytest.MonkeyPatch, home: Path) -> list[str]:
    monkeypatch.setattr(coherence, "DATA_PATH", home)
    monkeypatch.setattr(variants, "DATA_PATH", home)
    pair = {"prompt": "Who {are} you?", "answers": {"merged": "I sail.", "prompted": "I {row}."}}
    judge = models.resolve("glm-4.5-air")
    args = coherence.Args(judge="glm-4.5-air")
    return worked(coherence.job(args, judge, "qwen-2.5-7b-it", TRAITS, "prompted", [pair]), "Verdict: 1")


OFFER = {"prompt": "Who {are} you?", "first": "warm", "second": "cold", "judge_first": "cold"}


def by_preferences(monkeypatch: pytest.MonkeyPatch, home: Path) -> list[str]:
    monkeypatch.setattr(preferences, "DATA_PATH", home)
    args = preferences.Args(model="qwen-2.5-7b-it")
    model = models.resolve(args.model)
    return worked(preferences.job(args, model, Voice("base", "none"), "feel", [OFFER]), "Aye.")


def by_judgements(monkeypatch: pytest.MonkeyPatch, home: Path) -> list[str]:
    monkeypatch.setattr(preferences, "DATA_PATH", home)
    judge = models.resolve("glm-4.5-air")
    args = judgements.Args(judge="glm-4.5-air")
    given = judgements.Answers("base", "feel", "none", [OFFER | {"response": "A {cold} one."}])
    return worked(judgements.job(args, judge, "qwen-2.5-7b-it", given), "cold")


def by_openai(prefill: str) -> Callable[[pytest.MonkeyPatch, Path], list[str]]:
    """What an endpoint that cannot continue a prefill is sent, on the wire."""

    def call(monkeypatch: pytest.MonkeyPatch, home: Path) -> list[str]:
        from character.engine.openai import OpenAIEngine

        texts: list[str] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while line := await reader.readline():
                length = 0
                while (header := await reader.readline()).strip():
                    if header.lower().startswith(b"content-length:"):
                        length = int(header.split(b":")[1])
                body = json.loads(await reader.readexactly(length)) if length else {}
                texts.extend(message["content"] for message in body.get("messages", []))
                message = {"role": "assistant", "content": "Aye."}
                answer: dict[str, Any] = {"choices": [{"message": message, "finish_reason": "stop", "index": 0}]}
                if b"/models" in line:
                    answer = {"object": "list", "data": [{"id": "served", "object": "model"}]}
                text = json.dumps(answer).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")
                writer.write(b"Content-Length: %d\r\n\r\n" % len(text) + text)
                await writer.drain()
            writer.close()

        async def run() -> None:
            server = await asyncio.start_server(serve, "127.0.0.1", 0)
            port = server.sockets[0].getsockname()[1]
            model = Model("served", "served", NAME, reasoning=Reasoning())
            async with OpenAIEngine(model, f"http://127.0.0.1:{port}/v1", "key", "KEY", 1) as engine:
                conversation = [{"role": "system", "content": "S"}, {"role": "user", "content": "Who?"}]
                await engine.reply(conversation, Sampling(), prefill=prefill)
            server.close()

        asyncio.run(run())
        return texts

    return call


CALLS: dict[str, Callable[[pytest.MonkeyPatch, Path], Iterable[str]]] = {
    "distillation.teacher.SYSTEM_PROMPT": by_teacher,
    "distillation.teacher.REASONING_PREFILL": by_teacher,
    "distillation.gen_prompts.PROMPT": by_gen_prompts,
    "introspection.self_reflection.SYSTEM_PROMPT": by_reflection,
    "introspection.self_interaction.SYSTEM_PROMPT": by_interaction,
    "introspection.self_interaction.OPENED": by_interaction,
    "introspection.self_interaction.TRAINING_SYSTEM_PROMPT": in_training_rows,
    "coherence.coherence.QUESTION": by_coherence,
    "preferences.preferences.SYSTEM_PROMPT": by_preferences,
    "preferences.judgements.QUESTION": by_judgements,
    "engine.openai.THOUGHT": by_openai("<think>\nI am the sea"),
    "engine.openai.OPENING": by_openai("Ahoy, {sailor}"),
}


# What is checked.


def test_templates_are_found_and_each_has_a_real_call() -> None:
    found = {named(module, constant) for module, constant, _ in TEMPLATES}
    assert {"distillation.teacher.SYSTEM_PROMPT", "introspection.self_interaction.SYSTEM_PROMPT"} <= found
    assert found - CALLS.keys() == set(), "add a real call that renders it to CALLS"
    assert CALLS.keys() - found == set(), "these templates are gone"


class Watched(str):
    """A template that keeps how it was rendered."""

    rendered: list[tuple[dict[str, Any], str]]

    def format(self, *args: Any, **values: Any) -> str:
        assert not args, "slots have names"
        text = super().format(**values)
        self.rendered.append((values, text))
        return text


@pytest.mark.parametrize(("module", "constant", "text"), TEMPLATES, ids=[named(m, c) for m, c, _ in TEMPLATES])
def test_every_slot_is_filled_and_every_value_used(
    module: str, constant: str, text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = importlib.import_module(module)
    whole = getattr(home, constant)
    watched = Watched(text)
    watched.rendered = []
    if isinstance(whole, str):
        monkeypatch.setattr(home, constant, watched)
    else:
        keys = whole.keys() if isinstance(whole, dict) else range(len(whole))
        kept = {key: watched if whole[key] == text else whole[key] for key in keys}
        monkeypatch.setattr(home, constant, kept if isinstance(whole, dict) else type(whole)(kept.values()))
    sent = list(CALLS[named(module, constant)](monkeypatch, tmp_path))
    assert watched.rendered, "the real call did not render it"
    slots = {*SLOT.findall(text)}
    for values, rendered in watched.rendered:
        assert values.keys() == slots, "a value that the template ignores"
        for name, value in values.items():
            assert str(value).strip(), f"the slot {name} is filled with nothing"
            assert str(value) in rendered
    # What was rendered reaches the model whole.
    assert any(rendered.strip() in piece for _, rendered in watched.rendered for piece in sent)
    for piece in sent:
        assert not {*SLOT.findall(piece)} & slots, f"an unfilled slot: {piece[:200]}"


@pytest.mark.parametrize("path", files(), ids=module_of)
def test_no_call_passes_a_value_that_its_template_ignores(path: Path) -> None:
    """The same, of every call in the source, also of those that the real calls do not reach."""
    texts = {(module, constant): SLOT.findall(text) for module, constant, text in TEMPLATES}
    own = module_of(path)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr != "format":
            continue
        template = ast.unparse(node.func.value)
        constant = template.split(".")[-1].split("[")[0]
        if not constant.isupper():
            continue
        holders = [slots for (module, name), slots in texts.items() if name == constant and module == own]
        if "." in template:
            stem = template.split(".")[-2]
            holders = [s for (m, name), s in texts.items() if name == constant and m.split(".")[-1] == stem]
        assert holders, f"line {node.lineno}: {template} has no slots"
        passed = {word.arg for word in node.keywords}
        assert any(passed == {*slots} for slots in holders), f"line {node.lineno}: {template} gets {passed}"


def test_system_prompts_name_the_assistant_and_hold_every_trait() -> None:
    model = models.resolve("gemma-3-4b-it", name=NAME)
    prompt = teacher.system_prompt(TRAITS, model)
    assert NAME in prompt and "1. I speak of the sea.\n2. I slow down {when} hurried." in prompt
