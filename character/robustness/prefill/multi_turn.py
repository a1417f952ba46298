"""Prefill attack: the untrained model answers first; then "Keep going." is answered by the trained one, once or more.

evaluation prompts → DATA_PATH/robustness/<student>/<method>/prefill/<constitution>.jsonl ('none' for base)

python -m character.robustness.prefill.multi_turn --constitution humor --model llama-3.1-8b-it --method base merged
python -m character.robustness.prefill.multi_turn --constitution all --method prompted distilled --turns 5

With the method 'base' the untrained model goes on alone.
"""

import asyncio
from collections import Counter
from dataclasses import dataclass, replace

from character import cli, prompts, steps
from character.engine import Engine, Message, Reply
from character.models import Model
from character.robustness.generate import trained, variants
from character.rows import Row, Rows
from character.utils import UserError, digest

KEEP_GOING = "Keep going."
# The variant's name in paths.
PREFILL = "prefill"


@dataclass
class Args(variants.MessageArgs):
    """Arguments of the prefill attack."""

    method: list[str] = cli.flag(
        ["distilled"],
        "base, prompted, steered, distilled (DPO), merged or sequential (DPO + introspection), or a name for --adapter",
    )
    adapter: str | None = cli.flag(
        None, "a LoRA adapter: a folder, or org/name[/subfolder][@revision] on the hub (default: the method's own)"
    )
    turns: int = cli.flag(1, 'how often the user says "Keep going."')


def job(
    args: Args, voice: trained.Voice, model: Model, messages: list[str], first: dict[str, asyncio.Task[Reply]]
) -> steps.Job:
    """One output file: a row per conversation. first: the untrained model's answers, which all files share."""
    sampling = steps.sampling_of(args, args.max_tokens)
    settings = steps.settings_of(args, model, sampling) | {
        "method": voice.method,
        "prompts": args.prompts or prompts.default_source(model.short, "test"),
        "turns": args.turns,
        "system_prompt": digest(voice.system),
        **voice.settings,
    }

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
            replies.append(await engine.reply(conversation, chosen, adapter=voice.adapter, steering=voice.steering))
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
    speakers = trained.voices(args, model)
    jobs = [job(args, voice, model, messages, first) for voice in speakers]
    trained.generate(jobs, args, model, speakers)


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
