"""Notebooks: run one in a fresh kernel of this Python, and write it as one HTML page that loads nothing from elsewhere.

    notebook = execute(path, {"STUDENT": "pocket", "CONSTITUTION": "humor"})
    write_html(notebook, Path("report.html"), "humor on pocket")

A notebook reads what it is about by `os.environ.get("NAME", "default")`, so that it also runs as it is.
"""

import asyncio
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from character.constants import ROOT
from character.utils import UserError, replacing

# Extends nbconvert's: a head with our style, figures with their cell's `alt` text, no code and no script.
TEMPLATE = Path(__file__).with_name("page.html.j2")


def execute(path: Path, environment: Mapping[str, str]) -> Any:
    """The notebook at `path` with its outputs, run with these environment variables.

    Its defaults for them become their values, so that it shows the same when it is run again by hand. Raises UserError
    where a cell does, and nbclient's CellExecutionError, with the cell and its traceback, for any other error in one.
    """
    import nbformat
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for name, value in environment.items():
            default = re.compile(rf'(environ\.get\("{name}", )"[^"]*"')
            cell.source = default.sub(lambda found: found[1] + json.dumps(value), cell.source)  # noqa: B023
    with tempfile.TemporaryDirectory() as folder:
        manager = AsyncKernelManager(
            # With no folder of kernels to look into it takes this Python's own, whatever others a person has installed.
            kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),
            transport="ipc",
            connection_file=f"{folder}/kernel.json",
        )
        resources = {"metadata": {"path": str(ROOT)}}
        client = NotebookClient(notebook, km=manager, resources=resources, record_timing=False)
        try:
            asyncio.run(_run(client, os.environ | environment))
        except CellExecutionError as error:
            if error.ename != "UserError":
                raise
            raise UserError(error.evalue) from None
    return notebook


async def _run(client: Any, environment: Mapping[str, str]) -> None:
    """Start the client's kernel, run every cell, and stop the kernel, on Ctrl-C too."""
    from nbclient.exceptions import DeadKernelError

    await client.async_start_new_kernel(env=environment)
    try:
        await client.async_start_new_kernel_client()
        for index, cell in enumerate(client.nb.cells):
            await client.async_execute_cell(cell, index)
    except DeadKernelError:
        # Also what nbclient makes of Ctrl-C.
        task = asyncio.current_task()
        if task and task.cancelling():
            raise asyncio.CancelledError from None
        raise UserError("the notebook's kernel died, perhaps for want of memory; run the same command again") from None
    finally:
        await client.km.shutdown_kernel(now=True)
        if client.kc:
            client.kc.stop_channels()


def write_html(notebook: Any, path: Path, title: str) -> None:
    """Write the notebook's text and outputs, without its code, as one page."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(
        template_file=str(TEMPLATE), exclude_input=True, exclude_output_prompt=True, exclude_anchor_links=True
    )
    page, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"name": title}})
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def write(notebook: Any, path: Path) -> None:
    """Write the notebook itself."""
    import nbformat

    with replacing(path) as temporary:
        nbformat.write(notebook, temporary)
