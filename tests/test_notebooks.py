"""Notebooks: run with environment variables, written as a page that needs nothing from elsewhere, committed bare."""

import os
import re
import time
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from character import notebooks
from character.constants import ROOT
from character.utils import UserError

COMMITTED = [
    path for path in ROOT.glob("*/**/*.ipynb") if not {".venv", ".ipynb_checkpoints", "figures"} & {*path.parts}
]
SETUP = 'import os\n%matplotlib inline\n%config InlineBackend.figure_formats = ["svg"]\nfrom character import figures'
FIGURE = 'figures.bars({os.environ.get("STUDENT", "pocket"): {"x": 0.5}}, "y")'


def make(path: Path, *code: str) -> Path:
    cells = [nbformat.v4.new_markdown_cell("# A title"), *map(nbformat.v4.new_code_cell, code)]
    cells[-1].metadata["alt"] = 'one "bar"'
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_page_has_the_outputs_and_loads_nothing(tmp_path: Path) -> None:
    secret = 'print(os.environ.get("STUDENT", "pocket"), len("some code"))'
    notebook = notebooks.execute(make(tmp_path / "in.ipynb", SETUP, secret, FIGURE), {"STUDENT": 'llama "3"'})
    assert notebook.cells[2].outputs[0].text == 'llama "3" 9\n'
    notebooks.write(notebook, tmp_path / "out.ipynb")
    notebooks.write_html(notebook, tmp_path / "out.html", "Humor & more")
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "<title>Humor &amp; more</title>" in page and "A title" in page and 'llama "3" 9' in page
    assert re.search(r'alt=.one ("|&quot;)bar("|&quot;)', page)
    assert page.count("data:image/svg+xml") == 1
    assert "some code" not in page and "Out[" not in page and "<script" not in page and "@import" not in page
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)|url\((?!["']?data:)""", page)
    # Run again by hand, without the variables, it is about the same model.
    assert "STUDENT" not in os.environ
    again = notebooks.execute(tmp_path / "out.ipynb", {})
    assert again.cells[2].outputs[0].text == 'llama "3" 9\n'


def test_error_in_a_cell(tmp_path: Path) -> None:
    wrong = make(tmp_path / "wrong.ipynb", "from character.utils import UserError\nraise UserError('no data; run it')")
    with pytest.raises(UserError, match=r"^no data; run it$"):
        notebooks.execute(wrong, {})
    with pytest.raises(CellExecutionError, match=r"ZeroDivisionError"):
        notebooks.execute(make(tmp_path / "fault.ipynb", "1 / 0"), {})


@pytest.mark.parametrize(
    ("signal", "error", "message"),
    [("SIGINT, os.getppid()", KeyboardInterrupt, "^$"), ("SIGKILL, os.getpid()", UserError, "kernel died")],
    ids=["Ctrl-C", "killed"],
)
def test_kernel_that_ends_early_is_no_traceback(
    signal: str, error: type[BaseException], message: str, tmp_path: Path
) -> None:
    number, whom = signal.split(", ")
    source = f"import os, signal, time\nos.kill({whom}, signal.{number})\ntime.sleep(60)"
    begun = time.monotonic()
    with pytest.raises(error, match=message):
        notebooks.execute(make(tmp_path / "in.ipynb", source), {})
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: str(path.relative_to(ROOT)))
def test_committed_notebook_is_bare(path: Path) -> None:
    notebook: Any = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    # Logic belongs into modules, where it is checked and tested.
    assert not any(re.search(r"^\s*(def|class|for|while|if) ", cell.source, re.MULTILINE) for cell in code)
