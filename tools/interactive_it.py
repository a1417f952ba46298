"""Chat in the terminal: with a model alone, with an adapter or a constitution, or with two side by side.

messages, typed or piped in one per line → replies as they are written; /save keeps the conversation as JSON

    python tools/interactive_it.py --model llama-3.1-8b-it --adapter humor
    python tools/interactive_it.py --model llama-3.1-8b-it --adapter humor --against base
    python tools/interactive_it.py --constitution sarcasm --temperature 0 <messages.txt

Enter sends, Alt-Enter begins a new line, Ctrl-C stops a reply, Ctrl-D leaves; /help lists the commands.
"""

import asyncio
import contextlib
import itertools
import re
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from character import cli, constitution, steps
from character.constants import DATA_PATH, LORA_PATH
from character.distillation.teacher import system_prompt
from character.engine import Engine, Message, Reply, choose, open_engine
from character.engine.base import adapter_config
from character.models import Model, Reasoning
from character.rows import RowError
from character.utils import UserError, write_json

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

CHATS = DATA_PATH / "chats"
BASE, NONE = "base", "none"
# Where a persona's adapter is looked for, the finished one first.
KINDS = ("personas", "sequential", "distillation")
# A terminal narrower than this shows two replies below each other.
SIDE_BY_SIDE = 80
# A model may write codes that move the cursor or change colours; only tabs and line ends are let through.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass
class Args(cli.EngineArgs):
    """Arguments of the chat."""

    model: str = cli.flag("pocket", "short name, repo id, folder, or the name an endpoint serves")
    adapter: str | None = cli.flag(None, "a LoRA adapter: a folder, or the name of a trained persona")
    constitution: str | None = cli.flag(None, "a constitution, by name or file, as the persona's system prompt")
    system: str | None = cli.flag(None, "a system prompt of your own, for every side")
    against: str | None = cli.flag(None, "answer beside it: 'base' for the model alone, or another adapter")
    max_tokens: int = cli.flag(1024, "new tokens per reply")
    seed: int = cli.flag(123456, "seed of the sampling")
    markdown: bool = cli.flag(True, "show replies as formatted Markdown (on a terminal)")


@dataclass
class Side:
    """One conversation: who answers, and what was said. prompt_name: a constitution that is the system prompt."""

    model: Model
    adapter: Path | None = None
    system: str | None = None
    prompt_name: str | None = None
    turns: list[Message] = field(default_factory=list)

    @property
    def label(self) -> str:
        """How the side is named on the screen."""
        name = f"{self.adapter.parent.name}/{self.adapter.name}" if self.adapter else self.model.short
        if self.system:
            name += f" + {self.prompt_name or 'own'} system prompt"
        return name

    def messages(self, turns: list[Message]) -> list[Message]:
        """The conversation behind its system prompt."""
        return [{"role": "system", "content": self.system}, *turns] if self.system else turns


def find_adapter(spec: str, model: Model, served: bool) -> Path:
    """The LoRA folder that `spec` means: a folder, or a persona's name. Raises UserError where there is none.

    served: an endpoint has the adapters, so that the folder need not be here.
    """
    folder = Path(spec).expanduser()
    if "/" in spec or (folder / "adapter_config.json").exists():
        if not served:
            adapter_config(folder)
        return folder
    places = [LORA_PATH / f"{model.short}-{kind}" / spec for kind in KINDS]
    found = next((place for place in places if (place / "adapter_config.json").exists()), None)
    if found is None and not served:
        raise UserError(
            f"no adapter of '{spec}' under {LORA_PATH}/{model.short}-*; run: python tools/merge_loras.py merge "
            f"--constitution {spec} --model {model.short}, or name the adapter's folder"
        )
    return found or places[0]


def sides_of(args: Args, model: Model, served: bool) -> list[Side]:
    """The persona, behind what it is compared with. Raises UserError where flags contradict each other."""
    if args.constitution and args.system:
        raise UserError("--constitution and --system are both system prompts; give one of them")
    persona = Side(model, system=args.system)
    if args.adapter and args.adapter != NONE:
        persona.adapter = find_adapter(args.adapter, model, served)
    if args.constitution:
        persona = _with_constitution(persona, args.constitution)
    if args.against is None:
        return [persona]
    other = Side(model, system=args.system)
    if args.against != BASE:
        other.adapter = find_adapter(args.against, model, served)
    if (other.adapter, other.system) == (persona.adapter, persona.system):
        raise UserError(f"--against {args.against}: both sides are {other.label}; add --adapter or --constitution")
    return [other, persona]


def _with_constitution(side: Side, spec: str) -> Side:
    traits = constitution.load(spec)
    return replace(side, system=system_prompt(traits, side.model), prompt_name=traits.name)


def split_trace(text: str, reasoning: Reasoning | None) -> tuple[str, str]:
    """(reasoning trace, answer) of a text that may still be growing; no trace for a model that does not reason."""
    if reasoning is None:
        return "", text.strip()
    trace, closed, answer = text.rpartition(reasoning.close)
    if not closed and text.lstrip().startswith(reasoning.open):
        trace, answer = text, ""
    return trace.strip().removeprefix(reasoning.open).strip(), answer.strip()


# The screen.


@dataclass
class View:
    """What one side says, as it grows."""

    label: str
    reasoning: Reasoning | None
    markdown: bool
    text: str = ""

    def add(self, piece: str) -> None:
        """Take the next piece of the reply."""
        self.text += CONTROL.sub("", piece)

    def body(self) -> "RenderableType":
        """The reply so far, its reasoning dimmed."""
        from rich.console import Group
        from rich.text import Text

        trace, answer = split_trace(self.text, self.reasoning)
        shown: RenderableType = formatted(answer) if self.markdown else Text(answer)
        return Group(Text(trace + "\n", style="dim"), shown) if trace else shown


def formatted(text: str) -> "RenderableType":
    """Text as Markdown, in which single line ends and HTML tags stay as the model wrote them."""
    from markdown_it import MarkdownIt
    from rich.markdown import Markdown

    parser = MarkdownIt().enable(["strikethrough", "table"]).disable(["html_block", "html_inline"])
    shown = Markdown("", code_theme="ansi_dark", hyperlinks=False)
    shown.parsed = parser.parse(text)
    for token in shown.parsed:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
    return shown


def layout(views: list[View], width: int) -> "RenderableType":
    """One reply under its name, or two in columns (below each other where the terminal is narrow)."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    if len(views) == 1:
        return Group(Text(views[0].label, style="bold cyan"), views[0].body())
    panels = [
        Panel(view.body(), title=Text(view.label, style=f"bold {colour}"), title_align="left", border_style=colour)
        for view, colour in zip(views, ("white", "cyan"), strict=True)
    ]
    if width < SIDE_BY_SIDE:
        return Group(*panels)
    table = Table.grid(expand=True, padding=(0, 1, 0, 0))
    for _ in panels:
        table.add_column(ratio=1)
    table.add_row(*panels)
    return table


class Tail:
    """The last lines of what `views` show, as many as fit the terminal."""

    def __init__(self, views: list[View]):
        self.views = views

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.segment import Segment, SegmentLines

        lines: list[list[Segment]] = console.render_lines(layout(self.views, options.max_width), options, pad=False)
        yield SegmentLines(lines[-max(1, console.height - 2) :], new_lines=True)


class Screen:
    """Where replies and notices go: a terminal, or a file or pipe that gets plain text."""

    def __init__(self, typed: bool):
        from rich.console import Console

        self.console = Console(highlight=False)
        self.typed = typed

    def notice(self, text: str) -> None:
        """One line about the chat itself."""
        if self.console.is_terminal:
            self.console.print(text, style="dim", markup=False)
        else:
            print(f"# {text}", flush=True)

    def message(self, text: str) -> None:
        """The user's message, where it was not typed here."""
        if not self.typed:
            print(f"> {text}", flush=True)

    @contextlib.contextmanager
    def growing(self, views: list[View]) -> Iterator[None]:
        """Show the views while they grow, and the whole of them at the end."""
        if not self.console.is_terminal:
            yield
            for view in views:
                trace, answer = split_trace(view.text, view.reasoning)
                name = [f"[{view.label}]"] if len(views) > 1 else []
                print(*name, *([f"({trace})"] if trace else []), answer, "", sep="\n", flush=True)
            return
        from rich.live import Live

        with Live(Tail(views), console=self.console, refresh_per_second=12, transient=True):
            yield
        self.console.print(layout(views, self.console.width), "")

    @contextlib.contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Show that something takes a while."""
        with self.console.status(text) if self.console.is_terminal else contextlib.nullcontext():
            yield


class Typed:
    """Messages typed at a prompt that can be edited and has a history."""

    def __init__(self) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.history import FileHistory
        from prompt_toolkit.key_binding import KeyBindings

        CHATS.mkdir(parents=True, exist_ok=True)
        keys = KeyBindings()
        keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
        self.session: PromptSession[str] = PromptSession(
            history=FileHistory(CHATS / "history"),
            completer=WordCompleter([f"/{name}" for name in COMMANDS], sentence=True),
            complete_while_typing=False,
            key_bindings=keys,
        )

    async def lines(self) -> Any:
        """Yield what is typed until Ctrl-D."""
        while True:
            try:
                yield await self.session.prompt_async("> ", handle_sigint=False)
            except KeyboardInterrupt:
                continue
            except EOFError:
                return

    async def until_stopped(self, work: Awaitable[Any]) -> bool:
        """Wait for `work`; whether it was finished before Ctrl-C. What is typed meanwhile waits for the next prompt.

        Ctrl-C is read as a key: as a signal it would also end the processes that an engine started.
        """
        from prompt_toolkit.input.typeahead import store_typeahead
        from prompt_toolkit.key_binding.key_processor import KeyPress
        from prompt_toolkit.keys import Keys

        task = asyncio.ensure_future(work)
        keyboard = self.session.app.input
        kept: list[KeyPress] = []

        def read() -> None:
            for press in keyboard.read_keys():
                if press.key == Keys.ControlC:
                    task.cancel()
                else:
                    kept.append(press)

        with keyboard.raw_mode(), keyboard.attach(read):
            await asyncio.wait([task])
        store_typeahead(keyboard, kept)
        if task.cancelled():
            return False
        await task
        return True


class Piped:
    """Messages from a pipe or file, one per line."""

    async def lines(self) -> Any:
        """Yield the lines. Raises UserError where there are none, or one is not UTF-8."""
        number = 0
        for number, line in enumerate(sys.stdin.buffer, 1):
            try:
                yield line.decode().rstrip("\r\n")
            except UnicodeDecodeError:
                raise UserError(f"standard input, line {number}: not UTF-8; save the messages as UTF-8") from None
        if number == 0:
            raise UserError("standard input is empty; pipe in messages, one per line, or start it in a terminal")

    async def until_stopped(self, work: Awaitable[Any]) -> bool:
        """Wait for `work`."""
        await work
        return True


# The chat.


class Chat:
    """Both conversations, the engine, and what the commands do."""

    def __init__(self, args: Args, model: Model, screen: Screen, source: Typed | Piped):
        self.args = args
        self.model = model
        self.screen = screen
        self.source = source
        self.kind = choose(args.engine, args.base_url)
        self.sampling = steps.sampling_of(args, args.max_tokens)
        self.sides = sides_of(args, model, self.kind == "openai")
        self.adapters = [side.adapter for side in self.sides if side.adapter]
        self.seeds = itertools.count()
        self.saved: set[Path] = set()
        self.is_over = False
        self.engine: Engine | None = None

    @property
    def persona(self) -> Side:
        """The side that the commands change."""
        return self.sides[-1]

    async def run(self) -> None:
        """Load the model and answer until the messages end."""
        try:
            await self._open()
            self.screen.notice(f"{' | '.join(side.label for side in self.sides)} ({self.kind}); /help lists commands")
            async for line in self.source.lines():
                try:
                    await self.take(line)
                except (UserError, RowError) as error:
                    # Someone who types can go on; a script that goes wrong has to say so.
                    if not self.screen.typed:
                        raise UserError(str(error)) from None
                    self.screen.notice(f"error: {error}")
                if self.is_over:
                    break
        finally:
            if self.engine:
                await self.engine.close()

    async def take(self, line: str) -> None:
        """Answer a message or carry out a command. Raises UserError or RowError."""
        if not line.strip():
            return
        if not line.startswith("/"):
            self.screen.message(line)
            await self.answer([[*side.turns, {"role": "user", "content": line.strip()}] for side in self.sides])
            return
        name, _, rest = line[1:].strip().partition(" ")
        if name not in COMMANDS:
            raise UserError(f"no command '/{name}'; /help lists them, and a space before '/' makes it a message")
        await COMMANDS[name][0](self, rest.strip())

    async def _open(self) -> None:
        self.engine = open_engine(
            self.model,
            engine=self.args.engine,
            base_url=self.args.base_url,
            api_key_variable=self.args.api_key_variable,
            seed=self.args.seed,
            adapters=self.adapters,
            precision=steps.precision_of(self.args),
        )
        with self.screen.waiting(f"loading {self.model.short} …"):
            await self.engine.start()

    async def answer(self, conversations: list[list[Message]]) -> None:
        """Show each side's reply to its conversation; the sides change when all have answered."""
        views = [View(side.label, self.model.reasoning, self.args.markdown) for side in self.sides]
        sampling = replace(self.sampling, seed=next(self.seeds))
        engine = self.engine
        assert engine is not None
        replies: list[Reply] = []

        async def all_replies() -> None:
            asked = zip(self.sides, conversations, views, strict=True)
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [
                        group.create_task(engine.stream(side.messages(turns), sampling, view.add, adapter=side.adapter))
                        for side, turns, view in asked
                    ]
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
            replies.extend(task.result() for task in tasks)
            for view, reply in zip(views, replies, strict=True):
                view.text = CONTROL.sub("", reply.text)

        with self.screen.growing(views):
            finished = await self.source.until_stopped(all_replies())
        if not finished:
            self.screen.notice("stopped; this message and its reply are not kept")
            return
        for side, turns, view, reply in zip(self.sides, conversations, views, replies, strict=True):
            answer = split_trace(view.text, view.reasoning)[1]
            side.turns = [*turns, {"role": "assistant", "content": answer}]
            name = f"{side.label}: " if len(self.sides) > 1 else ""
            if reply.finish_reason == "length":
                self.screen.notice(f"{name}cut off at {reply.completion_tokens} tokens (--max-tokens, or the context)")
            if reply.dropped_turns:
                self.screen.notice(f"{name}the {reply.dropped_turns} oldest messages no longer fit into the context")

    # Commands: each takes the text behind its name.

    async def set_adapter(self, spec: str) -> None:
        """Change the persona's adapter."""
        if not spec:
            self.screen.notice(f"adapter: {self.persona.adapter or NONE}")
            return
        adapter = None if spec == NONE else find_adapter(spec, self.model, self.kind == "openai")
        if adapter and adapter not in self.adapters:
            before = self.adapters
            self.adapters = [*before, adapter]
            # vLLM has to know the adapters when it starts.
            if self.kind == "vllm":
                await self._reopen(before)
        self.persona.adapter = adapter
        self.screen.notice(f"now {self.persona.label}; the conversation goes on (/reset begins anew)")

    async def _reopen(self, before: list[Path]) -> None:
        assert self.engine is not None
        await self.engine.close()
        try:
            await self._open()
        except UserError:
            self.adapters = before
            await self._open()
            raise

    async def set_system(self, text: str) -> None:
        """Change the system prompt of every side."""
        if text:
            for side in self.sides:
                side.system, side.prompt_name = (None if text == NONE else text), None
        for side in self.sides:
            self.screen.notice(f"system prompt of {side.label}: {side.system or NONE}")

    async def set_constitution(self, spec: str) -> None:
        """Change the persona's system prompt to a constitution."""
        if not spec:
            raise UserError("/constitution needs a name, such as /constitution humor")
        new = _with_constitution(self.persona, spec)
        self.persona.system, self.persona.prompt_name = new.system, new.prompt_name
        self.screen.notice(f"now {self.persona.label}")

    async def regenerate(self, _: str) -> None:
        """Draw the last reply again."""
        if not self.persona.turns:
            raise UserError("there is no reply to draw again; send a message first")
        self.screen.message(self.persona.turns[-2]["content"])
        await self.answer([side.turns[:-1] for side in self.sides])

    async def save(self, spec: str) -> None:
        """Write the conversation as JSON; a file that this chat did not write is left alone."""
        path = Path(spec).expanduser() if spec else CHATS / f"{datetime.now():%Y-%m-%d-%H%M%S}.json"
        if path.exists() and path.resolve() not in self.saved:
            raise UserError(f"{path} exists; choose another name")
        conversations = [
            {
                "label": side.label,
                "adapter": str(side.adapter) if side.adapter else None,
                "messages": side.messages(side.turns),
            }
            for side in self.sides
        ]
        chat = {"model": self.model.source, "engine": self.kind, "sampling": self.sampling.settings()}
        write_json(path, chat | {"seed": self.args.seed, "conversations": conversations})
        self.saved.add(path.resolve())
        self.screen.notice(f"saved {path}")

    async def reset(self, _: str) -> None:
        """Forget what was said."""
        for side in self.sides:
            side.turns = []
        self.screen.notice("a new conversation")

    async def help(self, _: str) -> None:
        """List the commands."""
        for name, (_method, argument, meaning) in COMMANDS.items():
            self.screen.notice(f"/{name} {argument}".ljust(32) + meaning)

    async def quit(self, _: str) -> None:
        """Leave."""
        self.is_over = True


Command = Callable[[Chat, str], Awaitable[None]]
COMMANDS: dict[str, tuple[Command, str, str]] = {
    "adapter": (Chat.set_adapter, "FOLDER|PERSONA|none", "change the persona's adapter"),
    "constitution": (Chat.set_constitution, "NAME|FILE", "make a constitution the persona's system prompt"),
    "system": (Chat.set_system, "TEXT|none", "change the system prompt of every side; alone: show it"),
    "regenerate": (Chat.regenerate, "", "draw the last reply again"),
    "save": (Chat.save, "[FILE]", f"write the conversation as JSON (default: a new file in {CHATS})"),
    "reset": (Chat.reset, "", "begin a new conversation"),
    "help": (Chat.help, "", "this list"),
    "quit": (Chat.quit, "", "leave (so does Ctrl-D)"),
}


def main(args: Args) -> None:
    """Chat in the terminal, or with the messages that are piped in. Raises UserError."""
    typed = sys.stdin.isatty() and sys.stdout.isatty()
    model = steps.model_of(args, args.model)
    chat = Chat(args, model, Screen(typed), Typed() if typed else Piped())
    try:
        asyncio.run(chat.run())
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
