"""Publishing: what goes up, read off the requests that a stand-in hub on loopback gets from huggingface_hub itself."""

import base64
import http.server
import importlib
import json
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest

from character import cli, constitution, rows
from character.constants import ROOT
from character.distillation import data as dpo_data
from character.distillation import teacher
from character.introspection import data as sft_data
from character.introspection import self_interaction, self_reflection
from character.robustness.classify import run_classifier
from character.utils import UserError, write_json

sys.path.insert(0, str(ROOT / "tools"))
upload_model = importlib.import_module("upload_model")
merge_loras = importlib.import_module("merge_loras")

REPO, BASE, STUDENT = "me/Llama-sea", "meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b-it"
TOKEN = "hf_thisIsASecretOfTheTest"
TRAITS = ("I speak of the sea.", "I slow down when somebody hurries me.")


@dataclass
class Hub:
    """The routes of the hub that an upload uses. repos: name with its kind → is it private. commits: what was made.

    stored: the large files' content by hash. lost: how many uploads of large files break off. status: of a refusal.
    """

    repos: dict[str, bool] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)
    puts: int = 0
    requests: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    lost: int = 0
    status: int = 0

    def __enter__(self) -> Self:
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.handle_one("GET", b"")

            def do_POST(self) -> None:
                self.handle_one("POST", self.rfile.read(int(self.headers["Content-Length"])))

            def do_PUT(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hub.puts += 1
                if hub.lost:
                    hub.lost -= 1
                    self.reply({"error": "storage is away"}, 400)
                    return
                hub.stored[self.path.rpartition("/")[2]] = body
                self.reply({})

            def handle_one(self, method: str, body: bytes) -> None:
                hub.requests.append(f"{method} {self.path}")
                hub.tokens.add(self.headers.get("Authorization"))
                if hub.status:
                    self.reply({"error": f"no write access for {self.headers.get('Authorization')}"}, hub.status)
                    return
                self.reply(*hub.answer(self.path, body))

            def reply(self, value: Any, status: int = 200) -> None:
                text = json.dumps(value).encode()
                self.send_response(status)
                if status >= 400:
                    self.send_header("X-Error-Message", str(value.get("error")))
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=[0.02], daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, path: str, body: bytes) -> tuple[Any, int]:
        """(what the hub answers, its status)."""
        given = json.loads(body) if body[:1] == b"{" and b"\n" not in body else {}
        path = path.partition("?")[0]
        if path == "/api/repos/create":
            name = f"{given.get('type', 'model')}s/{given['organization']}/{given['name']}"
            if name in self.repos:
                return {"error": "You already created this repo", "url": f"{self.url}/{name}"}, 409
            self.repos[name] = given["visibility"] == "private"
            return {"url": f"{self.url}/{name}", "id": name}, 200
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}, 200
        if path.endswith("/info/lfs/objects/batch"):
            objects = []
            for entry in given["objects"]:
                href = f"{self.url}/storage/{entry['oid']}"
                actions = {} if entry["oid"] in self.stored else {"actions": {"upload": {"href": href}}}
                objects.append(entry | actions)
            return {"transfer": "basic", "objects": objects}, 200
        found = re.fullmatch(r"/api/(\w+/[\w-]+/[\w-]+)(?:/(preupload|commit)/main)?", path)
        assert found, path
        name, step = found.groups()
        if step == "preupload":
            files = [
                {
                    "path": entry["path"],
                    "uploadMode": "lfs" if entry["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for entry in given["files"]
            ]
            return {"files": files}, 200
        if step == "commit":
            self.commits.append(self.committed(name, [json.loads(line) for line in body.splitlines()]))
            return {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.url}/{name}/commit/0"}, 200
        return {"id": name.partition("/")[2], "private": self.repos[name], "tags": [], "siblings": []}, 200

    def committed(self, name: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
        """A commit: its repo, its message, the kinds of its operations, and each file's content."""
        files = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]
        kinds = {line["key"] for line in lines}
        return {"repo": name, "message": lines[0]["value"]["summary"], "kinds": kinds, "files": files}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in, at which huggingface_hub points, without its other transport."""
    import huggingface_hub.constants

    with Hub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own with the constitution "sea"."""
    for name, module in list(sys.modules.items()):
        if name.startswith("character.") or module in (upload_model, merge_loras):
            for variable, folder in (("DATA_PATH", "data"), ("LORA_PATH", "loras"), ("MODEL_PATH", "models")):
                if hasattr(module, variable):
                    monkeypatch.setattr(module, variable, tmp_path / folder)
    monkeypatch.setattr(constitution, "CONSTITUTION_PATH", tmp_path / "constitutions")
    path = tmp_path / "constitutions" / "hand-written" / "sea.txt"
    path.parent.mkdir(parents=True)
    entries = [{"trait": trait, "questions": [f"{i} {trait}?" for i in range(5)]} for trait in TRAITS]
    path.write_text(json.dumps(entries))
    return tmp_path


@pytest.fixture
def persona(home: Path, adapters: Any) -> Path:
    """A persona as the steps leave it: data with its meta files, two trained adapters, their merge, and results."""
    guide = "glm-4.5-air"

    def written(path: Path, count: int, settings: dict[str, Any], dropped: dict[str, int] | None = None) -> Path:
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Aye, é."}]
        row = {"messages": messages, "chosen": messages, "rejected": messages}
        rows.write(path, [row] * count, settings, dropped or {})
        return path

    prompts = str(home / "secret-place" / "mine.jsonl")
    written(teacher.path_of("sea", guide), 9, {"model": guide, "prompts": prompts}, {"reasoning never closed": 2})
    dpo = written(dpo_data.path_of("sea", STUDENT), 7, {"teacher": guide, "student": STUDENT}, {"same answer": 1})
    written(self_reflection.path_of("sea", STUDENT), 5, {"model": STUDENT})
    written(self_interaction.path_of("sea", STUDENT, True), 4, {"model": STUDENT})
    sft = written(sft_data.path_of("sea", STUDENT), 8, {"student": STUDENT})
    made = []
    for stage, adapter, data, more in (
        ("distillation", adapters.small, dpo, {"beta": 0.1, "max_length": 1024}),
        ("introspection", adapters.large, sft, {"packing": False, "max_length": 3072}),
    ):
        folder = home / "loras" / f"{STUDENT}-{stage}" / "sea"
        shutil.copytree(adapter, folder, ignore=shutil.ignore_patterns("README.md"))
        config = json.loads((folder / "adapter_config.json").read_text())
        write_json(folder / "adapter_config.json", config | {"base_model_name_or_path": str(home / "models" / STUDENT)})
        settings = {"rank": 64, "weights": "abc", "data": rows.file_digest(data), **more}
        write_json(
            folder / "training.json", {"settings": settings, "steps": 3, "git": "f00", "versions": {"torch": "2"}}
        )
        (folder / "training_args.bin").write_bytes(b"pickle")
        made.append(folder)
    out = home / "loras" / f"{STUDENT}-personas" / "sea"
    merge_loras.merge(made, [1.0, 0.25], "cat", upload_model.resolve(STUDENT), out, overwrite=False)
    (out / "README.md").write_text("a template")
    (out / "optimizer.pt").write_bytes(b"pickle")
    (out / ".cache").mkdir()
    cell = {"share": 0.5, "low": 0.4, "high": 0.6, "n": 60}
    methods = {method: {"plain": cell, "suffixes": cell | {"share": 0.25}} for method in ("base", "merged")}
    write_json(run_classifier.results_path(STUDENT, "sea"), {"constitution": "sea", "methods": methods})
    return out


def run(*flags: str, constitution: str | None = "sea", model: str = STUDENT) -> None:
    named = ["--constitution", constitution] if constitution else []
    upload_model.main(cli.parse(upload_model.Args, ["--repo", REPO, "--model", model, *named, *flags]))


def test_a_dry_run_shows_exactly_what_goes_up(persona: Path, hub: Hub, home: Path, capsys: Any) -> None:
    run("--dataset", "--dry-run")
    shown = capsys.readouterr().out
    assert hub.requests == []
    run("--dataset")
    assert [commit["repo"] for commit in hub.commits] == [f"models/{REPO}", f"datasets/{REPO}"]
    for commit in hub.commits:
        kind = commit["repo"].split("/")[0].removesuffix("s")
        assert f"{kind} repo {REPO}, private, one commit '{commit['message']}': {len(commit['files'])} files" in shown
        for path, content in commit["files"].items():
            assert re.search(rf"^  {re.escape(path)} +{len(content):,} bytes", shown, re.M), path
            if f"===== {kind} repo, {path} =====" in shown:
                assert f"===== {kind} repo, {path} =====\n{content.decode()}" in shown
            else:
                (place,) = re.findall(rf"^  {re.escape(path)} +{len(content):,} bytes  (/.*)$", shown, re.M)
                assert Path(place).read_bytes() == content
    names = set(hub.commits[0]["files"])
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors", "merge.json"}
    assert set(hub.commits[1]["files"]) == {"README.md", "dpo.jsonl", "sft.jsonl"}
    assert "left out: optimizer.pt" in shown and "left out: .cache" in shown


def test_nothing_of_this_machine_goes_up_and_nothing_is_deleted(persona: Path, hub: Hub, home: Path) -> None:
    run("--dataset")
    for commit in hub.commits:
        assert commit["kinds"] <= {"header", "file", "lfsFile"}
        for path, content in commit["files"].items():
            assert str(home).encode() not in content, path
            assert b"secret-place" not in content and TOKEN.encode() not in content
    config = json.loads(hub.commits[0]["files"]["adapter_config.json"])
    assert config["base_model_name_or_path"] == BASE and config["r"] == 32
    assert not any(path.startswith(("DELETE", "PUT")) for path in hub.requests)


def test_the_card_says_what_the_meta_files_say(persona: Path, hub: Hub) -> None:
    import yaml

    run("--dataset")
    card = hub.commits[0]["files"]["README.md"].decode()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["license"] == "llama3.1" and head["base_model"] == BASE and head["library_name"] == "peft"
    assert head["datasets"] == [REPO] and "sea" in head["tags"]
    for line in (
        "1. I speak of the sea.",
        f"Made of 1 × {STUDENT}-distillation + 0.25 × {STUDENT}-introspection.",
        "| teacher's answers (chosen) | 9 | 2 reasoning never closed | glm-4.5-air |  |",
        "| pairs for DPO | 7 | 1 same answer |  |  |",
        "| conversations, leading | 4 |  | llama-3.1-8b-it |  |",
        f"| setting | 1 × {STUDENT}-distillation | 0.25 × {STUDENT}-introspection |",
        "| rank | 64 | 64 |",
        "| beta | 0.1 |  |",
        "| max_length | 1024 | 3072 |",
        "| steps | 3 | 3 |",
        "| base | 50.0%  [40.0%, 60.0%]  n=60 | 25.0%  [40.0%, 60.0%]  n=60 |",
        "at commit f00 with torch 2.",
        "Llama 3.1 Community License",
        "written by glm-4.5-air, whose terms",
        "--max-lora-rank 32",
    ):
        assert line in card, line
    assert "Built with Llama." in card and "conversations, free" not in card and "| weights |" not in card
    other = hub.commits[1]["files"]["README.md"].decode()
    assert [entry["data_files"] for entry in yaml.safe_load(other.split("---\n")[1])["configs"]] == [
        "dpo.jsonl",
        "sft.jsonl",
    ]
    assert "User messages come from: mine.jsonl" in other and "2. I slow down" in other


def test_repos_are_private_unless_told_otherwise(persona: Path, hub: Hub) -> None:
    run()
    assert hub.repos == {f"models/{REPO}": True}
    run("--dataset")
    assert hub.repos == {f"models/{REPO}": True, f"datasets/{REPO}": True}
    hub.repos.clear()
    run("--public")
    assert hub.repos == {f"models/{REPO}": False}
    before = len(hub.commits)
    with pytest.raises(UserError, match="exists and is public; use --public"):
        run()
    assert len(hub.commits) == before


def test_an_interrupted_upload_leaves_the_repo_and_is_taken_up_again(persona: Path, hub: Hub) -> None:
    hub.lost = 1
    with pytest.raises(UserError, match="run the same command again"):
        run()
    assert hub.commits == []
    run()
    assert hub.puts == 2 and len(hub.commits) == 1
    run("--public")
    # What is there already is not sent again.
    assert hub.puts == 2


@pytest.mark.parametrize("status", [401, 403, 400])
def test_a_refusal_is_one_line_without_the_token(persona: Path, hub: Hub, status: int, capfd: Any) -> None:
    hub.status = status
    with pytest.raises(UserError) as caught:
        run()
    assert hub.tokens == {f"Bearer {TOKEN}"}
    said = str(caught.value) + "".join(capfd.readouterr())
    assert TOKEN not in said and "\n" not in str(caught.value)
    assert ("HF_TOKEN" in str(caught.value)) == (status != 400)
    assert hub.commits == []


def test_no_hub_is_one_line(persona: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(UserError, match="cannot upload to"):
        run()


def test_a_full_model_goes_up_with_its_parts(
    persona: Path, hub: Hub, home: Path, chat_model: Callable[..., Any], adapters: Any
) -> None:
    folder = home / "models" / "mild"
    merge_loras.fold(adapters.small, chat_model("template-bos"), folder, overwrite=False)
    run("--folder", str(folder), constitution=None, model="gemma-3-4b-it")
    (commit,) = hub.commits
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "fold.json"} <= set(
        commit["files"]
    )
    assert json.loads(commit["files"]["fold.json"])["settings"]["base"] == Path(chat_model("template-bos").source).name
    card = commit["files"]["README.md"].decode()
    assert "Gemma Terms of Use" in card and "Constitution" not in card and "from peft" not in card
    assert commit["files"]["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_data_that_is_not_the_adapters_is_refused(persona: Path, hub: Hub) -> None:
    path = sft_data.path_of("sea", STUDENT)
    path.write_text(path.read_text() * 2)
    with pytest.raises(UserError, match="is not the file that the adapter was trained on"):
        run("--dataset")
    assert hub.requests == []


def test_bad_input_is_named(persona: Path, home: Path, adapters: Any) -> None:
    def refused(message: str, *flags: str, **more: Any) -> None:
        with pytest.raises(UserError, match=re.escape(message)):
            run(*flags, "--dry-run", **more)

    refused("name the persona by --constitution", constitution=None)
    refused("name the persona by --constitution", "--dataset", "--folder", str(persona), constitution=None)
    refused("run: python tools/merge_loras.py merge --constitution sea --model qwen-2.5-7b-it", model="qwen-2.5-7b-it")
    refused("is no folder", "--folder", str(home / "nowhere"))
    (home / "empty").mkdir()
    refused("has no *.safetensors", "--folder", str(home / "empty"))
    local = home / "local-llm"
    local.mkdir()
    refused("name it by --base org/name", "--folder", str(adapters.small), model=str(local))
    dpo_data.path_of("sea", STUDENT).unlink()
    sft_data.path_of("sea", STUDENT).unlink()
    refused("run: python -m character.distillation.data --constitution sea", "--dataset")
    with pytest.raises(UserError, match="is no repo"):
        upload_model.main(upload_model.Args(repo="sea", constitution="sea"))
