"""Whose adapter a method takes: its own, a folder, or one that is published on the hub, fetched for real."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from character import cli, steps
from character.engine.base import find_adapter
from character.robustness.generate import prompted, trained, variants
from character.utils import UserError

COMMIT = "a" * 40


@pytest.fixture
def hub() -> Iterator[Callable[[dict[str, bytes]], tuple[str, list[str]]]]:
    """hub({path: content}): (URL of a hub whose repo org/name holds these files, the paths that are fetched from it)."""
    servers = []

    def start(files: dict[str, bytes]) -> tuple[str, list[str]]:
        fetched: list[str] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(whole=False)

            def do_GET(self) -> None:
                self.answer(whole=True)

            def answer(self, whole: bool) -> None:
                _, found, path = self.path.partition(f"/org/name/resolve/{COMMIT}/")
                content = files.get(path)
                if self.path.startswith(f"/api/models/org/name/tree/{COMMIT}"):
                    listed = [{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in files.items()]
                    content = json.dumps(listed).encode()
                elif self.path == "/api/models/org/name/revision/v1":
                    content = json.dumps({"id": "org/name", "sha": COMMIT}).encode()
                if content is None:
                    self.send_error(404)
                    return
                if found and whole:
                    fetched.append(path)
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.end_headers()
                if whole:
                    self.wfile.write(content)

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=[0.02], daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}", fetched

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def command(home: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    places = {"DATA_PATH": str(home / "data"), "LORA_PATH": str(home / "loras"), "HF_HOME": str(home / "hub")}
    script = [sys.executable, "-m", "character.robustness.generate.trained", *flags]
    return subprocess.run(script, env=os.environ | places | environment, capture_output=True, text=True, check=False)


def test_a_published_adapter_answers_like_a_folders(
    pocket_adapter: Path, hub: Callable[..., Any], tmp_path: Path
) -> None:
    names = ("adapter_config.json", "adapter_model.safetensors")
    published = {f"humor/{name}": (pocket_adapter / name).read_bytes() for name in names}
    url, fetched = hub({**published, "humor/adapter_model.bin": b"pickle", "README.md": b"# Card"})
    flags = ["--constitution", "humor", "--limit", "2", "--no-suffixes", "--max-tokens", "12"]
    for method, adapter in (("theirs", "org/name/humor@v1"), ("mine", str(pocket_adapter))):
        done = command(tmp_path, *flags, "--method", method, "--adapter", adapter, HF_ENDPOINT=url)
        assert done.returncode == 0, done.stderr
    assert sorted(fetched) == sorted(published)
    theirs, mine = (
        (tmp_path / "data" / "robustness" / "pocket" / method / "plain" / "humor.jsonl").read_text(encoding="utf-8")
        for method in ("theirs", "mine")
    )
    assert theirs == mine and theirs.count("\n") == 2


def test_an_adapter_that_cannot_be_had_is_one_line(hub: Callable[..., Any], tmp_path: Path) -> None:
    url, _ = hub({"README.md": b"# Card"})
    for spec, said in (
        ("org/gone@v1", "cannot fetch the adapter org/gone@v1"),
        ("org/name@v1", "the hub's org/name@v1 has no"),
    ):
        failed = command(tmp_path, "--method", "theirs", "--adapter", spec, "--dry-run", HF_ENDPOINT=url)
        assert failed.returncode == 2 and failed.stderr.splitlines()[-1].startswith(f"error: {said}")
    with pytest.raises(UserError, match="is no LoRA adapter"):
        find_adapter(str(tmp_path / "nothing"))


def test_a_method_without_adapter_names_what_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trained, "LORA_PATH", tmp_path)
    with pytest.raises(UserError, match="needs --adapter"):
        trained.main(trained.Args(method=["mine"]))
    with pytest.raises(UserError, match="no LoRA adapter"):
        trained.main(trained.Args(method=["distilled"]))


def test_held_out_suffixes_only_when_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(variants, "DATA_PATH", tmp_path)
    asked: list[steps.Job] = []
    monkeypatch.setattr(steps, "generate", lambda jobs, *_: asked.extend(jobs))
    for flags, expected in (([], 9), (["--held-out"], 13), (["--no-suffixes", "--held-out"], 5)):
        asked.clear()
        prompted.main(cli.parse(prompted.Args, ["--limit", "2", *flags]))
        assert len(asked) == expected
    messages = [row["message"] for row in asked[-1].rows.inputs.values()]
    assert asked[-1].rows.path == tmp_path / "robustness" / "pocket" / "prompted" / "held-out-4" / "humor.jsonl"
    assert len(messages) == 2 and all(message.endswith("Respond in default mode.)") for message in messages)
