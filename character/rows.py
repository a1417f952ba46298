"""A stage's output file: JSONL that survives a kill at any instant and never mixes settings.

    output = Rows(path, inputs, settings)
    if not output.complete:
        await output.fill(work, ...)

While a stage runs, finished rows are appended to `<name>.partial.jsonl`. At the end they are put in input order and
the file becomes `<name>.jsonl` in one rename: a file of that name is whole. `<name>.meta.json` says how it was made.
A sealed file that is extended stays as it is until the longer one replaces it.
"""

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from character.utils import (
    UserError,
    digest,
    git_commit,
    read_json,
    read_jsonl,
    replacing,
    versions,
    write_json,
)

# Every line starts with its id, so that a scan need not parse answers of any length.
LINE = re.compile(rb'\{"id": "([0-9a-f]{16})"(, "dropped": )?')
# Fields whose sums the meta file has; dropped_turns: oldest messages that did not fit into the context.
TOTALS = ("prompt_tokens", "completion_tokens", "dropped_turns")
Row = dict[str, Any]
# While the whole job is dry-run: file → its rows, as far as they are known before the steps have run; else None.
planned: dict[Path, list[Row]] | None = None


class RowError(Exception):
    """One row cannot be finished now (a server gave up on it); the others go on and a later run tries it again."""


class Drop(Exception):
    """A row is finished but not kept; the message is the reason that the meta file counts."""


def identify(inputs: Iterable[Mapping[str, Any]]) -> dict[str, Row]:
    """id → row, in order. An id is a hash of the row's content, and of its count where the same row comes again."""
    seen: Counter[str] = Counter()
    rows: dict[str, Row] = {}
    for row in inputs:
        content = digest(row)
        seen[content] += 1
        rows[content if seen[content] == 1 else digest([content, seen[content]])] = dict(row)
    return rows


class Rows:
    """One output file: what of it is there already, and how to finish it.

    Raises UserError where a file made with other settings is there (naming the difference), unless `overwrite`.
    """

    def __init__(
        self, path: Path, inputs: Iterable[Mapping[str, Any]], settings: Mapping[str, Any], overwrite: bool = False
    ):
        self.path = path
        self.partial = path.with_suffix(".partial.jsonl")
        self.meta_path = path.with_suffix(".meta.json")
        self.settings = json.loads(json.dumps(settings))
        self.inputs = identify(inputs)
        if not self.inputs:
            raise UserError(f"{path}: no input rows; see the step before this one")
        self.overwrite = overwrite
        self._survey()

    @property
    def complete(self) -> bool:
        """Whether the sealed file has every input row."""
        return not self.missing and self.path.exists() and not self.partial.exists()

    def _survey(self) -> None:
        """Find out which rows are missing."""
        done: set[str] = set()
        if not self.overwrite:
            self._check_settings()
            done = {*_scan(self.path), *_scan(self.partial), *self._dropped()}
        self.missing = [key for key in self.inputs if key not in done]

    def _dropped(self) -> dict[str, str]:
        """id → reason of the rows that a sealed file leaves out."""
        return read_json(self.meta_path)["dropped"] if self.meta_path.exists() else {}

    def describe(self) -> str:
        """One line for `--dry-run` and for a finished file."""
        there = len(self.inputs) - len(self.missing)
        return f"{self.path}: {len(self.inputs)} rows, {there} there, {len(self.missing)} to do"

    def _check_settings(self) -> None:
        if self.meta_path.exists():
            check_settings(self.path, read_json(self.meta_path)["settings"], self.settings)
        elif self.path.exists() or (self.partial.exists() and self.partial.stat().st_size):
            raise UserError(f"{self.path} is there without {self.meta_path.name}; move it away or use --overwrite")

    async def fill(
        self,
        work: Callable[[Row], Awaitable[Row]],
        *,
        concurrency: int = 256,
        info: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        """Finish every missing row with `work`, then seal the file.

        work: input row with its id → the fields to add to it; raises Drop to leave the row out, RowError where it failed.
        info: what the meta file says besides the settings (model source, revision, engine), asked at the end.
        Raises UserError where rows failed, after the others are finished.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._opened() as file:
            started = time.time()
            # Another process may have been at work since this object was made.
            self._survey()
            self._write_meta({"sealed": False, "info": dict(info())})
            if self.missing:
                failures = await self._work(file, work, concurrency)
                if failures:
                    shown = "; ".join(failures[:3]) + ("; …" if len(failures) > 3 else "")
                    raise UserError(
                        f"{self.path}: {len(failures)} of {len(self.inputs)} rows failed: {shown}. "
                        "The others are kept; run the same command to try these again"
                    )
            self._seal(dict(info()), time.time() - started)

    def _opened(self) -> FileIO:
        """The partial file, locked, without a half-written last line."""
        while True:
            # Unbuffered, so that a write that fails is not tried again when the file is closed.
            file = open(self.partial, "a+b", buffering=0)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.close()
                raise UserError(f"{self.path} is being written by another process; wait for it or stop it") from None
            if os.fstat(file.fileno()).st_nlink:
                break
            # The process that had the lock has just sealed the file and removed this one.
            file.close()
        if self.overwrite:
            self.path.unlink(missing_ok=True)
            file.truncate(0)
        file.truncate(_end_of_last_line(file))
        return file

    async def _work(self, file: FileIO, work: Callable[[Row], Awaitable[Row]], concurrency: int) -> list[str]:
        todo = iter(self.missing)
        failures: list[str] = []
        tokens = 0
        with tqdm(total=len(self.inputs), initial=len(self.inputs) - len(self.missing), unit="row",
                  desc=self.path.stem, disable=None, file=sys.stderr) as bar:  # fmt: skip
            begun = time.time()

            async def worker() -> None:
                nonlocal tokens
                for key in todo:
                    row: Row
                    try:
                        given = {"id": key, **self.inputs[key]}
                        row = given | await work(given)
                    except Drop as drop:
                        row = {"id": key, "dropped": str(drop)}
                    except RowError as error:
                        failures.append(f"{key} ({error})")
                        continue
                    self._append(file, row)
                    tokens += row.get("completion_tokens", 0)
                    bar.set_postfix_str(f"{tokens / (time.time() - begun):.0f} tokens/s", refresh=False)
                    bar.update()

            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(concurrency, len(self.missing))):
                        group.create_task(worker())
            except BaseExceptionGroup as errors:
                # One cause stopped every worker; its own message is the one to show.
                raise errors.exceptions[0] from None
        return failures

    def _append(self, file: FileIO, row: Row) -> None:
        # Half a surrogate pair, which an endpoint's JSON may hold, has no UTF-8.
        line = json.dumps(row, ensure_ascii=False).encode(errors="replace") + b"\n"
        start = file.seek(0, os.SEEK_END)
        try:
            written = 0
            while written < len(line):
                written += file.write(line[written:])
        except OSError as error:
            file.truncate(start)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"the disk is full: {self.partial}; finished rows are kept, free some space and run again"
                ) from None
            raise UserError(f"cannot write {self.partial}: {error.strerror}") from None

    def _seal(self, info: Row, seconds: float) -> None:
        """Copy the rows in input order to the final name; rows that are not among the inputs go last, in file order."""
        dropped = self._dropped()
        tokens: Counter[str] = Counter()
        kept = 0
        with replacing(self.path) as temporary:
            with contextlib.ExitStack() as stack, open(temporary, "wb") as target:
                places: dict[str, tuple[BinaryIO, int, bool]] = {}
                for path in (self.path, self.partial):
                    if path.exists():
                        file: BinaryIO = stack.enter_context(open(path, "rb"))
                        places |= {key: (file, *place) for key, place in _scan(path).items()}
                for key in (*self.inputs, *(key for key in places if key not in self.inputs)):
                    if key in dropped:
                        continue
                    file, offset, is_dropped = places[key]
                    file.seek(offset)
                    line = file.readline()
                    row = json.loads(line)
                    if is_dropped:
                        dropped[key] = row["dropped"]
                        continue
                    target.write(line)
                    kept += 1
                    tokens.update({name: row[name] for name in TOTALS if name in row})
            reasons = Counter(dropped.values())
            counts = {"in": kept + len(dropped), "kept": kept, "dropped": dict(reasons)}
            state = {"sealed": True, "info": info, "rows": counts, "tokens": dict(tokens), "seconds": seconds}
            # Before the rename, so that a sealed file's dropped rows are always on record.
            self._write_meta(state | {"dropped": dropped})
        self.partial.unlink()
        if tokens["dropped_turns"]:
            print(f"{self.path}: {tokens['dropped_turns']} oldest turns did not fit into the context and were left out")
        print(f"{self.path}: {kept} rows" + "".join(f", {count} dropped ({why})" for why, count in reasons.items()))

    def _write_meta(self, state: Row) -> None:
        earlier = read_json(self.meta_path) if self.meta_path.exists() and not self.overwrite else {}
        state.setdefault("dropped", earlier.get("dropped", {}))
        state["seconds"] = round(state.get("seconds", 0) + earlier.get("seconds", 0), 1)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(
            self.meta_path,
            {
                "settings": self.settings,
                **state,
                "started": earlier.get("started", now),
                "written": now,
                "git": git_commit(),
                "versions": versions(),
            },
        )
        self.overwrite = False


def check_settings(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise UserError, naming what differs, where `path` was made with other settings than asked for now."""
    differences = [
        f"{key} was {json.dumps(before.get(key))}, now {json.dumps(now.get(key))}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if differences:
        raise UserError(
            f"{path} was made with other settings: {'; '.join(differences)}. "
            "Use the same settings, or --overwrite to start anew"
        )


def _end_of_last_line(file: FileIO) -> int:
    """The offset after the last newline, read backwards in blocks."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - (1 << 16))
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _scan(path: Path) -> dict[str, tuple[int, bool]]:
    """id → (offset, is it a dropped row) of every whole line; memory holds ids alone, whatever the answers' length."""
    found: dict[str, tuple[int, bool]] = {}
    if not path.exists():
        return found
    with open(path, "rb") as file:
        offset = 0
        for number, line in enumerate(file, 1):
            match = LINE.match(line)
            if not line.endswith(b"\n"):
                break
            if not match or not line.endswith(b"}\n"):
                raise UserError(f"{path}, line {number}: not a row of this project; move the file away or --overwrite")
            found[match[1].decode()] = (offset, match[2] is not None)
            offset += len(line)
    return found


def is_planned(path: Path) -> bool:
    """Whether an earlier step of a job that is dry-run would write `path`."""
    return planned is not None and path in planned


def plan(path: Path, found: Iterable[Row]) -> None:
    """Remember, for the later steps of a job that is dry-run, that `path` would get these rows."""
    if planned is not None:
        planned.setdefault(path, []).extend(found)


def read(path: Path, *fields: str, made_by: str) -> list[Row]:
    """The kept rows of a finished file, each with `fields`; of a planned one, what is known of its rows.

    made_by: the command that writes the file, named where it is missing or unfinished. A JSONL file of the person's
    own, without a meta file, is read as it is. Raises UserError for a missing, unfinished, empty or broken file.
    """
    if planned is not None and path in planned:
        return planned[path]
    if not path.exists():
        partial = path.with_suffix(".partial.jsonl")
        state = "is unfinished" if partial.exists() else "does not exist"
        raise UserError(f"{path} {state}; run: {made_by}")
    kept: list[Row] = []
    try:
        kept.extend(read_jsonl(path, *fields))
    except UserError as error:
        raise UserError(f"{error}; or make the file anew: {made_by} --overwrite") from None
    return kept


def settings_of(path: Path) -> Row:
    """The settings in the meta file beside `path`; empty where the file is the person's own."""
    meta = path.with_suffix(".meta.json")
    return read_json(meta)["settings"] if meta.exists() else {}


def write(path: Path, rows: Iterable[Row], settings: Mapping[str, Any], dropped: Mapping[str, int]) -> int:
    """Write a file made from others in one go, and its meta file; return how many rows it has.

    dropped: reason → count of the rows left out. The file appears whole or not at all.
    """
    kept = 0
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            kept += 1
    meta = {
        "settings": dict(settings),
        "sealed": True,
        "rows": {"in": kept + sum(dropped.values()), "kept": kept, "dropped": dict(dropped)},
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git_commit(),
        "versions": versions(),
    }
    write_json(path.with_suffix(".meta.json"), meta)
    return kept


def file_digest(path: Path) -> str | None:
    """A hash of a file's content, by which a later stage knows its input again; None of a planned file."""
    if is_planned(path):
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
