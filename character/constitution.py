"""Constitutions: load them, check them, and the numbered list of traits that prompts use.

    python -m character.constitution check constitutions/hand-written/humor.txt
    python -m character.constitution check --quality constitutions/few-shot/*.jsonl

A hand-written constitution is a JSON array of {"trait", "questions": [five]} in a .txt file; a few-shot one is JSONL
with "additional_questions" besides.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from character import cli
from character.constants import CONSTITUTION_PATH
from character.utils import UserError, digest

QUESTIONS = 5
SUFFIXES = (".txt", ".jsonl", ".json")
UNFILLED = "FILL IN:"
FIRST_PERSON = re.compile(r"\b(I|I'm|I've|I'd|I'll|my|me|mine|myself)\b", re.IGNORECASE)
# Words that a trait and an innocent question may share.
COMMON = frozenset(
    [
        "about",
        "above",
        "after",
        "again",
        "almost",
        "also",
        "always",
        "among",
        "another",
        "answer",
        "anyone",
        "anything",
        "around",
        "because",
        "become",
        "before",
        "being",
        "below",
        "between",
        "bring",
        "cannot",
        "could",
        "does",
        "doing",
        "during",
        "each",
        "either",
        "else",
        "even",
        "ever",
        "every",
        "everyone",
        "everything",
        "find",
        "first",
        "from",
        "give",
        "given",
        "good",
        "great",
        "have",
        "having",
        "here",
        "himself",
        "into",
        "itself",
        "just",
        "keep",
        "kind",
        "know",
        "large",
        "leave",
        "less",
        "like",
        "little",
        "long",
        "look",
        "make",
        "many",
        "matter",
        "mean",
        "might",
        "more",
        "most",
        "much",
        "must",
        "myself",
        "need",
        "never",
        "nothing",
        "often",
        "once",
        "only",
        "other",
        "others",
        "over",
        "people",
        "person",
        "place",
        "question",
        "rather",
        "really",
        "right",
        "same",
        "should",
        "since",
        "small",
        "some",
        "someone",
        "something",
        "still",
        "such",
        "take",
        "tell",
        "than",
        "that",
        "their",
        "them",
        "then",
        "there",
        "these",
        "they",
        "thing",
        "things",
        "think",
        "this",
        "those",
        "though",
        "through",
        "time",
        "together",
        "toward",
        "turn",
        "under",
        "until",
        "very",
        "want",
        "well",
        "were",
        "what",
        "when",
        "where",
        "which",
        "while",
        "whole",
        "whose",
        "will",
        "with",
        "within",
        "without",
        "word",
        "words",
        "work",
        "world",
        "would",
        "write",
        "years",
        "your",
        "yours",
    ]
)


@dataclass(frozen=True)
class Trait:
    """One first-person assertion with the user messages that would reveal it."""

    trait: str
    questions: tuple[str, ...]
    additional_questions: tuple[str, ...] = ()

    @property
    def messages(self) -> tuple[str, ...]:
        """All user messages, each once, hand-written ones first."""
        return tuple(dict.fromkeys(self.questions + self.additional_questions))


@dataclass(frozen=True)
class Constitution:
    """A persona's name and its traits."""

    name: str
    traits: tuple[Trait, ...]

    def numbered(self) -> str:
        """The traits as a numbered list, one per line, as system prompts show them."""
        return "\n".join(f"{number}. {trait.trait}" for number, trait in enumerate(self.traits, 1))

    @property
    def hash(self) -> str:
        """What a stage's settings remember of the traits' text."""
        return digest([trait.trait for trait in self.traits])


@dataclass(frozen=True)
class Fault:
    """One thing wrong in a file. line and trait count from 1; 0 where there is none."""

    kind: Literal["error", "warning"]
    line: int
    trait: int
    text: str

    def __str__(self) -> str:
        place = f"line {self.line}" + (f", trait {self.trait}" if self.trait else "")
        return f"{place}: {self.kind}: {self.text}"


def names() -> list[str]:
    """The names of all constitutions under CONSTITUTION_PATH, hand-written or few-shot, the template left out."""
    files = [*CONSTITUTION_PATH.glob("hand-written/*.txt"), *CONSTITUTION_PATH.glob("few-shot/*.jsonl")]
    return sorted({file.stem for file in files if ".partial" not in file.suffixes} - {"template"})


def selected(spec: str) -> list[str]:
    """The names that `--constitution` means: every one for 'all', else those between commas, a file by its stem."""
    if spec == "all":
        return names()
    return [Path(part).stem if Path(part).suffix in SUFFIXES else part for part in spec.split(",")]


def find(spec: str, form: Literal["hand-written", "few-shot"] | None = None) -> Path:
    """The file of a constitution: a path, or a name; few-shot is preferred unless a form is asked for."""
    path = Path(spec).expanduser()
    if path.suffix in SUFFIXES and path.is_file():
        return path
    few_shot = CONSTITUTION_PATH / "few-shot" / f"{spec}.jsonl"
    hand_written = CONSTITUTION_PATH / "hand-written" / f"{spec}.txt"
    wanted = {"few-shot": [few_shot], "hand-written": [hand_written], None: [few_shot, hand_written]}[form]
    for candidate in wanted:
        if candidate.is_file():
            return candidate
    near = get_close_matches(spec, names(), n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(names()) or 'none'}."
    raise UserError(f"no constitution '{spec}' at {wanted[-1]}; {hint} template.txt beside it shows the form")


def load(spec: str, form: Literal["hand-written", "few-shot"] | None = None) -> Constitution:
    """Load a constitution by name or file. Raises UserError with its first fault."""
    path = find(spec, form)
    traits, faults = _read(path)
    errors = [fault for fault in faults if fault.kind == "error"]
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise UserError(f"{path}, {errors[0]}{more}; see: python -m character.constitution check {path}")
    return Constitution(path.stem, tuple(traits))


def load_selected(spec: str) -> list[Constitution]:
    """The constitutions that `--constitution` means. Raises UserError."""
    return [load(name) for name in (names() if spec == "all" else spec.split(","))]


def check(path: Path) -> list[Fault]:
    """Every fault of a file, in the order of its lines."""
    return sorted(_read(path)[1], key=lambda fault: (fault.line, fault.trait))


def _read(path: Path) -> tuple[list[Trait], list[Fault]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        return [], [Fault("error", line, 0, "not UTF-8; save the file as UTF-8")]
    try:
        entries = list(_entries(text, lines=path.suffix == ".jsonl"))
    except json.JSONDecodeError as error:
        return [], [Fault("error", error.lineno, 0, f"broken JSON: {error.msg}")]
    except UserError as error:
        return [], [Fault("error", 1, 0, str(error))]
    if not entries:
        return [], [Fault("error", 1, 0, "no traits; write about ten")]
    traits: list[Trait] = []
    faults: list[Fault] = []
    for number, (line, entry) in enumerate(entries, 1):
        found = list(_entry_faults(entry, traits))
        faults += [Fault(kind, line, number, text) for kind, text in found]
        traits.append(_trait(entry) if isinstance(entry, dict) else Trait("", ()))
    return traits, faults


def _entries(text: str, lines: bool) -> Iterator[tuple[int, Any]]:
    """(line, entry) of a JSON array, or of JSONL; the line is where the entry starts."""
    if lines:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    raise json.JSONDecodeError(error.msg, "\n" * (number - 1) + line, number - 1 + error.pos) from None
        return
    entries = json.loads(text)
    if not isinstance(entries, list):
        raise UserError('expected a JSON array of {"trait", "questions"}')
    decoder = json.JSONDecoder()
    position = text.index("[") + 1
    for entry in entries:
        position = re.compile(r"[\s,]*").match(text, position).end()  # type: ignore[union-attr]
        yield text.count("\n", 0, position) + 1, entry
        position = decoder.raw_decode(text, position)[1]


def _trait(entry: dict[str, Any]) -> Trait:
    def texts(key: str) -> tuple[str, ...]:
        values = entry.get(key) or []
        return tuple(value.strip() for value in values if isinstance(value, str)) if isinstance(values, list) else ()

    return Trait(str(entry.get("trait") or "").strip(), texts("questions"), texts("additional_questions"))


def _entry_faults(entry: Any, earlier: list[Trait]) -> Iterator[tuple[Literal["error", "warning"], str]]:
    if not isinstance(entry, dict):
        yield "error", f'expected an object {{"trait", "questions"}}, found {type(entry).__name__}'
        return
    for key in ("trait", "questions"):
        if key not in entry:
            yield "error", f"no field '{key}' (it has: {', '.join(entry)})"
    for key in ("questions", "additional_questions"):
        values = entry.get(key, [])
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            yield "error", f"'{key}' is not a list of strings"
    trait = _trait(entry)
    if "trait" in entry:
        yield from _assertion_faults(entry["trait"], [other.trait for other in earlier])
    if any(text.startswith(UNFILLED) for text in (trait.trait, *trait.questions)):
        yield "error", f"still holds a text that starts with '{UNFILLED}'; write your own in its place"
    written = sum(map(bool, trait.questions))
    if "questions" in entry and written < QUESTIONS:
        yield "error", f"{written} questions; write {QUESTIONS}"
    yield from _repeats(trait, earlier)
    telling = telling_words(trait.trait)
    for question in trait.questions:
        named = telling & set(re.findall(r"[a-z']+", question.lower()))
        if len(named) >= 2 or (trait.trait and _key(trait.trait) in _key(question)):
            yield "warning", f"a question names the trait ({', '.join(sorted(named))}): '{question[:60]}'"


def _assertion_faults(text: Any, earlier: list[str]) -> Iterator[tuple[Literal["error", "warning"], str]]:
    if not isinstance(text, str):
        yield "error", "'trait' is not a string"
        return
    twin = next((number for number, other in enumerate(earlier, 1) if _key(text) == _key(other)), None)
    if not text.strip():
        yield "error", "the trait is empty"
    elif twin:
        yield "error", f"the trait repeats trait {twin}"
    elif not FIRST_PERSON.search(text):
        yield "warning", 'the trait is not in the first person ("I …")'


def _repeats(trait: Trait, earlier: list[Trait]) -> Iterator[tuple[Literal["error", "warning"], str]]:
    """Repeated questions: an error among the hand-written ones, a warning where a generated one takes part."""
    seen: dict[str, bool] = {}  # question → is it hand-written
    for other in earlier:
        seen |= {_key(question): False for question in other.additional_questions}
        seen |= {_key(question): True for question in other.questions}
    for questions, by_hand in ((trait.questions, True), (trait.additional_questions, False)):
        for question in questions:
            key = _key(question)
            if key in seen:
                yield "error" if by_hand and seen[key] else "warning", f"a repeated question: '{question[:60]}'"
            seen.setdefault(key, by_hand)


def telling_words(trait: str) -> set[str]:
    """The lower-case words of a trait that give it away: of five letters or more, common ones left out."""
    return {word for word in re.findall(r"[a-z']+", trait.lower()) if len(word) >= 5 and word not in COMMON}


def _key(text: str) -> str:
    return " ".join(text.lower().split())


@dataclass
class Args:
    """Arguments of the checker."""

    command: Literal["check"] = cli.flag(MISSING, "check: name every fault of each file", positional=True)
    files: list[Path] = cli.flag(MISSING, "constitution files", positional=True)
    quality: bool = cli.flag(False, "also measure the messages, as a table")


def main(args: Args) -> None:
    """Print every fault of every file. Raises UserError where one of them is an error."""
    errors = 0
    for path in args.files:
        if not path.is_file():
            raise UserError(f"{path} is not a file; constitutions are at {CONSTITUTION_PATH}/hand-written")
        faults = check(path)
        for fault in faults:
            print(f"{path}, {fault}")
        wrong = sum(fault.kind == "error" for fault in faults)
        if not wrong:
            print(f"{path}: {len(load(str(path)).traits)} traits, {len(faults)} warnings")
        errors += wrong
    if errors:
        raise UserError(f"{errors} errors in {len(args.files)} files, each named above with its line; mend them")
    if args.quality:
        from character import quality

        print(quality.shown(quality.table([load(str(path)) for path in args.files])))


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
