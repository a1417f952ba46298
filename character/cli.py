"""Command lines from dataclasses: one flag per field, its help beside the field, the same flags in every script."""

import argparse
import errno
import os
import signal
import sys
import types
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from character.utils import UserError

EngineName = Literal["auto", "vllm", "openai", "transformers"]
T = TypeVar("T")


def flag(default: Any, help: str, positional: bool = False) -> Any:
    """A dataclass field that becomes a flag. `default` may be a list; pass MISSING for a required flag."""
    metadata = {"help": help, "positional": positional}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class StepArgs:
    """Flags that every step has."""

    constitution: str = flag("humor", "names or files of constitutions, with commas between, or 'all'")
    limit: int | None = flag(None, "only the first N rows, for a trial")
    seed: int = flag(123456, "seed of data, shuffles and sampling")
    overwrite: bool = flag(False, "start anew where the output exists with other settings")
    dry_run: bool = flag(False, "say what would be done (rows, tokens, files); load no model")


@dataclass
class EngineArgs:
    """Flags of every step that generates text."""

    engine: EngineName = flag("auto", "auto: vllm where a GPU and vLLM are present, else transformers")
    base_url: str | None = flag(None, "an OpenAI-compatible endpoint, such as http://localhost:8000/v1")
    api_key_variable: str = flag("OPENAI_API_KEY", "the environment variable (or .env entry) with the endpoint's key")
    name: str | None = flag(None, "the family name used in prompts, where it cannot be read off the model's id")
    temperature: float = flag(0.7, "sampling temperature; 0 is greedy")
    top_p: float = flag(0.95, "nucleus sampling")
    repetition_penalty: float = flag(1.1, "1.0 is none")
    quantization: Literal["fp8"] | None = flag(None, "weights in 8 bits: less memory and other answers; vllm on a GPU")
    kv_cache_dtype: Literal["fp8"] | None = flag(None, "keys and values in 8 bits, likewise")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see --help)\n")


def parse(args_class: type[T], argv: list[str] | None = None, description: str | None = None) -> T:
    """Parse `argv` (default: the process's own) into a dataclass. A wrong flag prints one line and exits with 2."""
    parser = _Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    hints = get_type_hints(args_class)
    for item in fields(args_class):  # type: ignore[arg-type]
        parser.add_argument(*_names(item), **_options(item, hints[item.name]))
    return args_class(**vars(parser.parse_args(argv)))


def _names(item: Any) -> list[str]:
    return [item.name] if item.metadata["positional"] else ["--" + item.name.replace("_", "-")]


def _options(item: Any, kind: Any) -> dict[str, Any]:
    default = item.default_factory() if item.default_factory is not MISSING else item.default
    options: dict[str, Any] = {"help": item.metadata["help"]}
    if default is MISSING:
        if not item.metadata["positional"]:
            options["required"] = True
    else:
        options["default"] = default
        if default is not None and not isinstance(default, bool) and default != []:
            shown = " ".join(map(str, default)) if isinstance(default, list) else default
            options["help"] += f" (default: {shown})".replace("%", "%%")
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(option for option in get_args(kind) if option is not type(None))
    if kind is bool:
        return options | {"action": argparse.BooleanOptionalAction if default else "store_true"}
    if get_origin(kind) is list:
        options["nargs"] = "+" if default is MISSING else "*"
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        return options | {"choices": get_args(kind)}
    if item.name == "limit":
        kind = _positive
    return options | {"type": kind, "metavar": item.name.upper() if not item.metadata["positional"] else None}


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of rows from 1 up")
    return int(text)


def run(main: Callable[[T], None], args_class: type[T], description: str | None = None) -> None:
    """Parse the command line and call `main`. Mistakes print one line and exit with 2; Ctrl-C and SIGTERM, with 130."""
    args = parse(args_class, description=description)
    # torchrun ends the processes that are left when one fails, and they must not speak after it.
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        signal.signal(signal.SIGTERM, interrupt)
    try:
        main(args)
        sys.stdout.flush()
    except UserError as error:
        sys.exit(_fail(str(error), 2))
    except KeyboardInterrupt:
        sys.exit(say_interrupted())
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        if error.filename is None:
            sys.exit(_fail("the disk is full; free some space and run the same command to go on", 2))
        sys.exit(_fail(f"{error.filename}: {error.strerror}; free the disk or choose another folder in .env", 2))


def say_interrupted() -> int:
    """Say that a command was interrupted; its exit code."""
    return _fail("interrupted; finished rows are kept, run the same command to go on", 130)


def interrupt(number: int, frame: Any) -> None:
    """A handler of signals: end as at Ctrl-C, even where that is ignored, as in the background of a script."""
    # Being told twice must not break off what the first time began.
    signal.signal(number, signal.SIG_IGN)
    handler = signal.getsignal(signal.SIGINT)
    (handler if callable(handler) else signal.default_int_handler)(number, frame)


def _fail(message: str, code: int) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return code
