"""The chat: typed into through a real pseudo-terminal, against a streaming endpoint and a real model; and piped into."""

import asyncio
import contextlib
import fcntl
import http.server
import importlib
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest

from character.constants import ROOT
from character.engine import Sampling
from character.engine.chat import Pieces
from character.engine.openai import OpenAIEngine
from character.engine.scripted import Scripted
from character.engine.transformers import TransformersEngine
from character.models import Model, Reasoning
from character.utils import UserError

sys.path.insert(0, str(ROOT / "tools"))
interactive_it = importlib.import_module("interactive_it")

COMMAND = [sys.executable, str(ROOT / "tools" / "interactive_it.py")]
CODES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]|\x1b\][^\x07]*\x07")
WIDTH, HEIGHT = 100, 30
UP, ESCAPE, BACKSPACE, CTRL_C, CTRL_D = "\x1b[A", "\x1b", "\x7f", "\x03", "\x04"
SECONDS = 60.0
SERVED = "demo-3b"


# An endpoint that streams.


@dataclass
class Endpoint:
    """Streams script(body) piece by piece. names: what it lists. bodies: what it was asked. cut: replies left halfway."""

    script: Callable[[dict[str, Any]], Iterator[str]]
    names: tuple[str, ...] = (SERVED,)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    refused: tuple[str, ...] = ()
    breaks_after: int | None = None
    cut: int = 0

    def __enter__(self) -> Self:
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self.server.serve_forever, args=[0.02], daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    @property
    def last(self) -> dict[str, Any]:
        return self.bodies[-1]

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        endpoint = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.answer({"data": [{"id": name} for name in endpoint.names]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.bodies.append(body)
                if refused := next((name for name in endpoint.refused if name in body), None):
                    self.answer({"error": {"message": f"Unknown field: {refused}", "param": refused}}, 400)
                elif body.get("stream"):
                    self.stream(body)
                else:
                    message = {"role": "assistant", "content": "".join(endpoint.script(body))}
                    self.answer({"choices": [{"message": message, "finish_reason": "stop"}]})

            def answer(self, value: Any, status: int = 200) -> None:
                text = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def stream(self, body: dict[str, Any]) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                try:
                    for number, piece in enumerate(endpoint.script(body)):
                        if number == endpoint.breaks_after:
                            endpoint.breaks_after = None
                            return
                        self.event({"choices": [{"delta": {"content": piece}}]})
                    self.event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
                    self.event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}})
                    self.wfile.write(b"data: [DONE]\n\n")
                except OSError:
                    endpoint.cut += 1

            def event(self, value: Any) -> None:
                self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())
                self.wfile.flush()

        return Handler


def words(text: str) -> list[str]:
    return re.findall(r"\S+\s*|\s+", text)


def parrot(body: dict[str, Any]) -> Iterator[str]:
    """Who is asked, how many messages it has seen, and the last of them."""
    messages = body["messages"]
    yield from words(f"{body['model']} heard {len(messages)}: {messages[-1]['content']}")


# A terminal that types.


class Terminal:
    """A program in a pseudo-terminal of its own. What it writes since the last typing is what `wait_for` looks at."""

    def __init__(self, command: list[str], env: dict[str, str], width: int = WIDTH):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, width, 0, 0))
        self.process = subprocess.Popen(
            # The shell becomes the program after the terminal is its controlling one.
            [sys.executable, "-c", BECOME, *command],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env=os.environ | {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"} | env,
        )
        os.close(slave)
        self.written = b""
        self.mark = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    @property
    def text(self) -> str:
        """What was written since the last typing, without colours and cursor movements."""
        return CODES.sub("", self.written[self.mark :].decode(errors="replace"))

    def read(self, seconds: float) -> bool:
        """Take what is written within that time; False where the program has ended."""
        if not select.select([self.master], [], [], seconds)[0]:
            return True
        try:
            data = os.read(self.master, 1 << 16)
        except OSError:
            return False
        self.written += data
        # A terminal says where its cursor is when it is asked.
        for _ in range(data.count(b"\x1b[6n")):
            os.write(self.master, b"\x1b[1;1R")
        return bool(data)

    def wait_for(self, *texts: str) -> str:
        """Wait until all texts are there; the text so far."""
        self.wait(lambda: all(text in self.text for text in texts), f"{texts}")
        return self.text

    def wait_for_prompt(self) -> None:
        """Wait until a line can be typed: the last thing that prompt_toolkit does is to show the cursor."""
        self.wait(lambda: re.search(rb"\x1b\[\?2004h(?s:.*)\x1b\[\?25h$", self.written[self.mark :]), "prompt")

    def wait(self, there: Callable[[], object], what: str) -> None:
        end = time.monotonic() + SECONDS
        while not there():
            if time.monotonic() > end or not self.read(0.2):
                text = self.text
                pytest.fail(f"no {what} in {text!r}; where it was:\n{self.stacks()}")

    def stacks(self) -> str:
        """Where each thread of the program is, which ends with that."""
        self.mark = len(self.written)
        self.process.send_signal(signal.SIGABRT)
        end = time.monotonic() + SECONDS
        while self.read(0.2) and time.monotonic() < end:
            pass
        return self.text

    def type(self, keys: str) -> None:
        self.mark = len(self.written)
        os.write(self.master, keys.encode())

    def say(self, line: str, *texts: str) -> str:
        """Type a line and wait for what it brings, up to the next prompt."""
        self.type(f"{line}\r")
        found = self.wait_for(*texts)
        self.wait_for_prompt()
        return found

    def ended(self) -> int:
        """The exit status, after the program has written its last."""
        while self.read(SECONDS):
            pass
        return self.process.wait(SECONDS)


BECOME = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture
def chat(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """chat(*flags): the tool in a terminal, at its first prompt, with a DATA_PATH and LORA_PATH of the test's own."""
    with contextlib.ExitStack() as stack:

        def start(*flags: str, width: int = WIDTH) -> Terminal:
            terminal = stack.enter_context(Terminal([*COMMAND, *flags], folders(tmp_path), width))
            terminal.wait_for("/help lists commands")
            terminal.wait_for_prompt()
            return terminal

        yield start


def folders(home: Path) -> dict[str, str]:
    return {"DATA_PATH": str(home / "data"), "LORA_PATH": str(home / "loras"), "OPENAI_API_KEY": ""}


def piped(text: bytes, home: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*COMMAND, *flags],
        input=text,
        capture_output=True,
        env=os.environ | folders(home),
        timeout=SECONDS,
        check=False,
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def turns(body: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in body["messages"]]


def test_a_program_that_hangs_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 2.0)
    program = "import time\ndef rest(): time.sleep(60)\nprint('begun', flush=True)\nrest()"
    with Terminal([sys.executable, "-c", program], {}) as terminal:
        terminal.wait_for("begun")
        with pytest.raises(pytest.fail.Exception, match=r"no \('done',\) in 'begun(?s:.*) in rest"):
            terminal.wait_for("done")


def test_a_reply_is_shown_while_it_is_written(chat: Callable[..., Terminal]) -> None:
    seen = threading.Event()

    def script(_: dict[str, Any]) -> Iterator[str]:
        yield "the first half "
        assert seen.wait(SECONDS)
        yield "and the other"

    with Endpoint(script) as endpoint:
        terminal = chat("--base-url", endpoint.url, "--model", SERVED)
        terminal.type("Hello\r")
        assert "and the other" not in terminal.wait_for("the first half")
        seen.set()
        terminal.wait_for("the first half and the other")
        terminal.wait_for_prompt()


def test_a_conversation_with_edits_commands_and_history(chat: Callable[..., Terminal], tmp_path: Path) -> None:
    with Endpoint(parrot) as endpoint:
        flags = ["--base-url", endpoint.url, "--model", SERVED, "--temperature", "0.3", "--max-tokens", "50"]
        terminal = chat(*flags, "--system", "Be brief.")
        terminal.say(f"One appex{BACKSPACE}{BACKSPACE}le", "heard 2: One apple")
        assert turns(endpoint.last) == [("system", "Be brief."), ("user", "One apple")]
        assert (endpoint.last["temperature"], endpoint.last["max_tokens"]) == (0.3, 50)

        terminal.say(f"Two{ESCAPE}\rlines", "heard 4: Two")
        first = ("assistant", f"{SERVED} heard 2: One apple")
        assert turns(endpoint.last)[1:] == [("user", "One apple"), first, ("user", "Two\nlines")]

        terminal.say("/regenerate", "heard 4: Two")
        assert turns(endpoint.last)[1:] == [("user", "One apple"), first, ("user", "Two\nlines")]
        assert len(endpoint.bodies) == 3

        terminal.say("/system Speak like a pirate.", "Speak like a pirate.")
        terminal.say("/reset", "a new conversation")
        # Up goes back over the two commands and the /regenerate to the message of two lines, and then to the first.
        terminal.say(UP * 6, "heard 2: One apple")
        assert turns(endpoint.last) == [("system", "Speak like a pirate."), ("user", "One apple")]

        terminal.say("/system none", "system prompt of demo-3b: none")
        terminal.say("Three", "heard 3: Three")
        assert turns(endpoint.last)[0] == ("user", "One apple")

        terminal.say("/nonsense", "no command '/nonsense'")
        terminal.say(" /etc/hosts is a file", "heard 5: /etc/hosts is a file")
        terminal.say("/help", "/regenerate", "/save")

        file = tmp_path / "kept.json"
        terminal.say(f"/save {file}", "saved")
        kept = json.loads(file.read_text())
        assert kept["sampling"]["temperature"] == 0.3
        (side,) = kept["conversations"]
        assert [message["role"] for message in side["messages"]] == ["user", "assistant"] * 3
        assert side["messages"][-2:] == [
            {"role": "user", "content": "/etc/hosts is a file"},
            {"role": "assistant", "content": f"{SERVED} heard 5: /etc/hosts is a file"},
        ]
        terminal.say(f"/save {file}", "saved")
        mine = tmp_path / "mine.json"
        mine.write_text("precious")
        terminal.say(f"/save {mine}", "exists")
        assert mine.read_text() == "precious"
        terminal.type(CTRL_D)
        assert terminal.ended() == 0

        again = chat(*flags)
        # Over the two /save and /help.
        again.say(UP * 4, "heard 1: /etc/hosts is a file")
        again.type("/quit\r")
        assert again.ended() == 0


def test_ctrl_c_stops_a_reply_and_what_is_typed_meanwhile_waits(chat: Callable[..., Terminal]) -> None:
    def script(body: dict[str, Any]) -> Iterator[str]:
        if body["messages"][-1]["content"] != "Tell me all":
            yield from parrot(body)
            return
        for number in range(10_000):
            yield f"and {number} "
            time.sleep(0.02)

    with Endpoint(script) as endpoint:
        terminal = chat("--base-url", endpoint.url, "--model", SERVED)
        terminal.say("First", "heard 1: First")
        terminal.type("Tell me all\r")
        terminal.wait_for("and 5")
        terminal.type("Sec")
        terminal.type(CTRL_C)
        terminal.wait_for("not kept", "> Sec")
        terminal.say("ond", "heard 3: Second")
        assert turns(endpoint.last)[0] == ("user", "First")
        end = time.monotonic() + SECONDS
        while not endpoint.cut:
            assert time.monotonic() < end, "the endpoint still writes"
            time.sleep(0.05)
        # At the prompt Ctrl-C clears the line.
        terminal.type(f"never sent{CTRL_C}")
        terminal.wait_for_prompt()
        terminal.say("Third", "heard 5: Third")


def test_told_to_end_at_its_prompt_it_ends(chat: Callable[..., Terminal]) -> None:
    with Endpoint(parrot) as endpoint:
        terminal = chat("--base-url", endpoint.url, "--model", SERVED)
        terminal.say("First", "heard 1: First")
        terminal.process.terminate()
        assert terminal.ended() == 130


def test_base_and_persona_stand_side_by_side(chat: Callable[..., Terminal], tmp_path: Path) -> None:
    names = (SERVED, "demo-3b-personas--humor", "demo-3b-personas--remorse")
    with Endpoint(parrot, names) as endpoint:
        flags = ["--base-url", endpoint.url, "--model", SERVED, "--adapter", "humor", "--against", "base"]
        terminal = chat(*flags, width=100)
        terminal.say("Hi", "demo-3b heard 1: Hi", "demo-3b-personas--humor heard 1: Hi")
        rows = [line for line in terminal.text.splitlines() if "heard 1: Hi" in line]
        assert re.search(r"│ demo-3b heard 1: Hi +│ +│ demo-3b-personas--humor heard 1: Hi +│", rows[-1])
        assert sorted(body["model"] for body in endpoint.bodies) == ["demo-3b", "demo-3b-personas--humor"]

        terminal.say("/adapter remorse", "demo-3b-personas/remorse")
        terminal.say("/constitution remorse", "+ remorse system prompt")
        terminal.say("More", "demo-3b heard", "demo-3b-personas--remorse heard")
        base, persona = sorted(endpoint.bodies[-2:], key=lambda body: len(body["messages"]))
        assert turns(base)[1] == ("assistant", "demo-3b heard 1: Hi")
        assert turns(persona)[0][0] == "system"
        assert turns(persona)[2] == ("assistant", "demo-3b-personas--humor heard 1: Hi")

        terminal.say("/adapter none", "now demo-3b + remorse system prompt")
        terminal.say("Now", "demo-3b heard 6: Now")
        terminal.say("/adapter grumpiness", "grumpiness")
        terminal.say("Still there?", "serves no adapter named demo-3b-personas--grumpiness")
        terminal.say("/adapter humor", "now demo-3b-personas/humor")
        terminal.say(f"/save {tmp_path / 'two.json'}", "saved")
        base, persona = json.loads((tmp_path / "two.json").read_text())["conversations"]
        assert len(base["messages"]) == 6 and len(persona["messages"]) == 7
        assert persona["adapter"].endswith("demo-3b-personas/humor") and base["adapter"] is None


def test_a_real_model_with_its_adapter_beside_it(
    chat: Callable[..., Terminal], chat_model: Callable[[str], Model], adapters: Any, tmp_path: Path
) -> None:
    model = chat_model("template-bos")
    flags = ["--engine", "transformers", "--model", model.source, "--adapter", str(adapters.small)]
    terminal = chat(*flags, "--against", "base", "--temperature", "0", "--max-tokens", "12", "--no-markdown")
    terminal.say("Tell me of the rain.", str(adapters.small.name))
    terminal.say("And then?")
    terminal.say(f"/adapter {adapters.foreign}", "now ")
    terminal.say("Is it lit?", "belongs to another model")
    terminal.say(f"/save {tmp_path / 'kept.json'}", "saved")
    terminal.type(CTRL_D)
    assert terminal.ended() == 0

    async def expected(adapter: Path | None) -> list[str]:
        said: list[dict[str, str]] = []
        async with TransformersEngine(model, seed=1, adapters=[adapters.small]) as engine:
            for message in ("Tell me of the rain.", "And then?"):
                said.append({"role": "user", "content": message})
                reply = await engine.reply(said, Sampling(temperature=0, max_tokens=12), adapter)
                said.append({"role": "assistant", "content": interactive_it.CONTROL.sub("", reply.text).strip()})
        return [message["content"] for message in said]

    sides = json.loads((tmp_path / "kept.json").read_text())["conversations"]
    found = [[message["content"] for message in side["messages"]] for side in sides]
    assert found == [asyncio.run(expected(None)), asyncio.run(expected(adapters.small))]
    assert found[0] != found[1]


def test_a_reply_longer_than_the_screen_shows_its_end(chat: Callable[..., Terminal]) -> None:
    seen = threading.Event()

    def script(_: dict[str, Any]) -> Iterator[str]:
        for number in range(3 * HEIGHT):
            yield f"line-{number}-\n\n"
        assert seen.wait(SECONDS)
        yield "the end"

    with Endpoint(script) as endpoint:
        terminal = chat("--base-url", endpoint.url, "--model", SERVED)
        terminal.type("Go\r")
        assert "line-89-" in terminal.wait_for("line-89-")
        assert "line-0-" not in terminal.text.rpartition("line-89-")[0][-WIDTH * HEIGHT :]
        terminal.mark = len(terminal.written)
        seen.set()
        terminal.wait_for("the end")
        terminal.wait_for_prompt()
        whole = terminal.text[terminal.text.index("line-0-") :]
        assert re.findall(r"line-(\d+)-", whole) == [str(number) for number in range(3 * HEIGHT)]
        assert whole.rstrip("\b>\r\n ").endswith("the end")


# A pipe.


def test_piped_lines_are_a_script_of_messages(tmp_path: Path) -> None:
    with Endpoint(parrot) as endpoint:
        script = b"Hello\n\n/system Be kind.\nAnd again\n/save %s\n" % str(tmp_path / "chat.json").encode()
        done = piped(script, tmp_path, "--base-url", endpoint.url, "--model", SERVED)
        assert (done.returncode, done.stderr) == (0, "")
        lines = done.stdout.splitlines()
        assert lines[1:4] == ["> Hello", "demo-3b heard 1: Hello", ""]
        assert lines[5:8] == ["> And again", "demo-3b heard 4: And again", ""]
        assert "\x1b" not in done.stdout
        assert (tmp_path / "chat.json").exists()
        assert len(endpoint.bodies) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"Hi\n/nonsense\nmore\n", "no command '/nonsense'"),
        (b"/regenerate\n", "no reply to draw again"),
        (b"/constitution\n", "/constitution needs a name"),
        (b"Hi\n\xff\n", "line 2: not UTF-8"),
        (b"", "standard input is empty"),
    ],
)
def test_a_script_that_goes_wrong_stops(text: bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    with Endpoint(parrot) as endpoint, pytest.raises(UserError, match=re.escape(message)):
        interactive_it.main(interactive_it.Args(model=SERVED, base_url=endpoint.url))
    assert len(endpoint.bodies) <= 1


def test_a_mistake_is_one_line_and_status_two(tmp_path: Path) -> None:
    done = piped(b"Hi\n", tmp_path, "--base-url", "http://127.0.0.1:9/v1", "--model", SERVED)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no answer from" in done.stderr and len(done.stderr.splitlines()) == 1


# Flags.


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"constitution": "humor", "system": "Be kind."}, "give one of them"),
        ({"against": "base"}, "add --adapter or --constitution"),
        ({"against": "base", "system": "Be kind."}, "add --adapter or --constitution"),
        ({"adapter": "humor"}, "run: python tools/merge_loras.py merge --constitution humor --model pocket"),
        ({"adapter": "/nowhere/humor"}, "no LoRA adapter"),
        ({"constitution": "humour"}, "did you mean 'humor'"),
    ],
)
def test_flags_that_cannot_be_meant(
    flags: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interactive_it, "LORA_PATH", tmp_path)
    with pytest.raises(UserError, match=re.escape(message)):
        interactive_it.sides_of(interactive_it.Args(**flags), Model("pocket", "pocket", "Pocket"), served=False)


def test_a_persona_is_found_finished_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapters: Any) -> None:
    monkeypatch.setattr(interactive_it, "LORA_PATH", tmp_path)
    model = Model("pocket", "pocket", "Pocket")
    for kind in ("distillation", "personas"):
        place = tmp_path / f"pocket-{kind}" / "humor"
        place.parent.mkdir()
        place.symlink_to(adapters.small)
        assert interactive_it.find_adapter("humor", model, served=False) == place
    assert interactive_it.find_adapter(str(adapters.small), model, served=False) == adapters.small
    (side,) = interactive_it.sides_of(interactive_it.Args(adapter="humor", constitution="remorse"), model, False)
    assert side.label == "pocket-personas/humor + remorse system prompt"


# What is shown.


def rendered(text: str, width: int = 60) -> str:
    from rich.console import Console

    file = io.StringIO()
    Console(file=file, width=width).print(interactive_it.formatted(text))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def test_formatted_text_keeps_every_line_and_tag() -> None:
    verse = rendered("Roses are red,\nviolets blue.\n\n<b>bold</b> & <script>\n\n```python\nx = 1\n```\n- a\n- b")
    for line in ("Roses are red,", "violets blue.", "<b>bold</b> & <script>", " x = 1", " • a", " • b"):
        assert line in verse.splitlines()


def test_a_model_cannot_write_to_the_terminal_itself() -> None:
    view = interactive_it.View("x", None, markdown=True)
    view.add("a\x1b[2J\x07b\tc\nd\x9b31m")
    assert view.text == "a[2Jb\tc\nd31m"


def test_a_reasoning_trace_is_no_part_of_the_answer() -> None:
    think = Reasoning()
    split = interactive_it.split_trace
    assert split("<think>\nhm", think) == ("hm", "")
    assert split("<think>\nhm\n</think>\n\nYes.", think) == ("hm", "Yes.")
    assert split("hm</think>Yes.", think) == ("hm", "Yes.")
    assert split("Yes.", think) == ("", "Yes.")
    assert split("<think>", None) == ("", "<think>")


# Streams of the engines.


def streamed(engine: Any, sampling: Sampling, **more: Any) -> tuple[list[str], Any]:
    pieces: list[str] = []

    async def ask() -> Any:
        async with engine:
            return await engine.stream([{"role": "user", "content": "Who are you?"}], sampling, pieces.append, **more)

    return pieces, asyncio.run(ask())


def test_pieces_are_whole_characters_and_come_once() -> None:
    heard: list[str] = []
    pieces = Pieces(heard.append)
    for text in ("a", "a\ufffd", "a\ufffd\ufffd", "aé", "aé", "aéz"):
        pieces.update(text)
    pieces.finish("aéz\ufffd")
    assert heard == ["a", "é", "z", "\ufffd"]


def test_transformers_streams_what_it_replies(chat_model: Callable[[str], Model], adapters: Any) -> None:
    model = chat_model("template-bos")
    sampling = Sampling(max_tokens=12, seed=5)

    async def whole() -> str:
        async with TransformersEngine(model, 1, [adapters.small]) as engine:
            return (await engine.reply([{"role": "user", "content": "Who are you?"}], sampling, adapters.small)).text

    pieces, reply = streamed(TransformersEngine(model, 1, [adapters.small]), sampling, adapter=adapters.small)
    assert len(pieces) > 3
    assert "".join(pieces) == reply.text == asyncio.run(whole())


def test_an_engine_without_streams_gives_the_whole() -> None:
    pieces, reply = streamed(Scripted(Model("m", "m", "M"), lambda *_: "All at once."), Sampling())
    assert pieces == [reply.text] == ["All at once."]


@pytest.mark.parametrize("refused", [(), ("stream_options",), ("stream", "stream_options")])
def test_an_endpoint_streams_as_far_as_it_can(refused: tuple[str, ...]) -> None:
    with Endpoint(parrot, refused=refused) as endpoint:
        engine = OpenAIEngine(Model("demo", SERVED, "Demo"), endpoint.url, None, "OPENAI_API_KEY", 1)
        pieces, reply = streamed(engine, Sampling())
        assert "".join(pieces) == reply.text == "demo-3b heard 1: Who are you?"
        assert (len(pieces) > 3) == ("stream" not in refused)
        assert reply.finish_reason == "stop"
        if not refused:
            assert (reply.prompt_tokens, reply.completion_tokens) == (7, 3)


def test_a_stream_that_breaks_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("character.engine.connection.FIRST_WAIT", 0.0)
    with Endpoint(parrot, breaks_after=2) as endpoint:
        engine = OpenAIEngine(Model("demo", SERVED, "Demo"), endpoint.url, None, "OPENAI_API_KEY", 1)
        pieces, reply = streamed(engine, Sampling())
        assert len(endpoint.bodies) == 2
        assert "".join(pieces) == reply.text == "demo-3b heard 1: Who are you?"
