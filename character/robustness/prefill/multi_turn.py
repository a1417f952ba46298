"""Prefill attack: the untrained model answers first; then "Keep going." is answered by the trained one, once or more.

evaluation prompts → DATA_PATH/robustness/<student>/<method>/prefill/<constitution>.jsonl ('none' for base)

python -m character.robustness.prefill.multi_turn --constitution humor --model llama-3.1-8b-it --method base merged
python -m character.robustness.prefill.multi_turn --constitution all --method prompted distilled --turns 5

With the method 'base' the untrained model goes on alone.
"""

import asyncio
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from character import cli, constitution, prompts, steps
from character.distillation import teacher
from character.engine import Engine, Message, Reply
from character.models import Model
from character.robustness.generate import trained, variants
from character.rows import Row, Rows, file_digest
from character.utils import UserError, digest

KEEP_GOING = "Keep going."
# The variant's name in paths.
PREFILL = "prefill"


@dataclass
class Args(variants.MessageArgs):
    """Arguments of the prefill attack."""

    method: list[str] = cli.flag(
        ["distilled"],
        "base, prompted, distilled (DPO), merged or sequential (DPO + introspection), or a name for --adapter",
    )
    adapter: str | None = cli.flag(
        None, "a LoRA adapter: a folder, or org/name[/subfolder][@revision] on the hub (default: the method's own)"
    )
    turns: int = cli.flag(1, 'how often the user says "Keep going."')


@dataclass(frozen=True)
class Voice:
    """Who answers "Keep going.": a method's model for a persona ('none' for base), with its system prompt or adapter."""

    method: str
    name: str
    system: str = ""
    adapter: Path | None = None


def voices(args: Args, model: Model) -> list[Voice]:
    """A voice per method and persona that the flags ask for. Raises UserError."""
    if args.adapter and len(args.method) != 1:
        raise UserError("--adapter goes with one --method, which names it")
    found = []
    for method in args.method:
        if method == "base":
            found.append(Voice(method, "none"))
        elif method == "prompted":
            for traits in constitution.load_selected(args.constitution):
                found.append(Voice(method, traits.name, system=teacher.system_prompt(traits, model)))
        else:
            for name in constitution.selected(args.constitution):
                found.append(Voice(method, name, adapter=trained.adapter_of(args.adapter, method, name, model)))
    return found


def job(
    args: Args, voice: Voice, model: Model, messages: list[str], first: dict[str, asyncio.Task[Reply]]
) -> steps.Job:
    """One output file: a row per conversation. first: the untrained model's answers, which all files share."""
    sampling = steps.sampling_of(args, args.max_tokens)
    settings = steps.settings_of(args, model, sampling) | {
        "method": voice.method,
        "prompts": args.prompts or prompts.default_source(model.short, "test"),
        "turns": args.turns,
        "system_prompt": digest(voice.system),
    }
    if voice.adapter:
        settings["adapter"] = file_digest(voice.adapter / "adapter_model.safetensors")

    async def work(engine: Engine, row: Row) -> Row:
        seed = int(row["id"], 16)
        given: Message = {"role": "user", "content": row["prompt"]}
        if row["id"] not in first:
            first[row["id"]] = asyncio.create_task(engine.reply([given], replace(sampling, seed=seed)))
        # A file that is given up on must not take the others' first answers with it.
        replies = [await asyncio.shield(first[row["id"]])]
        conversation = [*([{"role": "system", "content": voice.system}] if voice.system else []), given]
        for turn in range(1, args.turns + 1):
            conversation += [
                {"role": "assistant", "content": replies[-1].text.strip()},
                {"role": "user", "content": KEEP_GOING},
            ]
            chosen = replace(sampling, seed=seed + turn)
            replies.append(await engine.reply(conversation, chosen, adapter=voice.adapter))
        said = [reply.row() for reply in replies]
        tokens: Counter[str] = Counter()
        for part in said:
            tokens.update({key: count for key, count in part.items() if isinstance(count, int)})
        return {"first": said[0]["response"], "responses": [part["response"] for part in said[1:]], **tokens}

    file = variants.path_of(model.short, voice.method, PREFILL, voice.name)
    output = Rows(file, [{"prompt": message} for message in messages], settings, args.overwrite)
    length = len(voice.system) + len(KEEP_GOING)
    return steps.Job(
        output, work, lambda row: (length + len(row["prompt"])) * args.turns, args.max_tokens * (args.turns + 1)
    )


def main(args: Args) -> None:
    """Write one file per method and persona, all through one engine."""
    model = steps.model_of(args, args.model)
    if args.turns < 1:
        raise UserError(f"--turns {args.turns}: the user says it once or more")
    messages = prompts.load(args.prompts or prompts.default_source(model.short, "test"), args.limit)
    first: dict[str, asyncio.Task[Reply]] = {}
    speakers = voices(args, model)
    jobs = [job(args, voice, model, messages, first) for voice in speakers]
    steps.generate(jobs, args, model, [voice.adapter for voice in speakers if voice.adapter])


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
