"""Where files live. Every path is read from the environment or .env and has a default inside the repository."""

import os
from pathlib import Path

from dotenv import load_dotenv

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "assets"
load_dotenv(ROOT / ".env")


def _folder(variable: str, default: str) -> Path:
    """The folder named by an environment variable; a relative one is taken from the repository's root."""
    return ROOT / Path(os.environ.get(variable) or default).expanduser()


DATA_PATH = _folder("DATA_PATH", "data")
MODEL_PATH = _folder("MODEL_PATH", "models")
LORA_PATH = _folder("LORA_PATH", "loras")
CONSTITUTION_PATH = _folder("CONSTITUTION_PATH", "constitutions")
FIGURE_PATH = _folder("FIGURE_PATH", "figures")
