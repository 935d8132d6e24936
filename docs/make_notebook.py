"""Make tutorial.ipynb from tutorial.py, with what its cells print and draw: `python docs/make_notebook.py`."""

from pathlib import Path

import jupytext
from nbclient import NotebookClient

SCRIPT = Path(__file__).with_name("tutorial.py")

if __name__ == "__main__":
    notebook = jupytext.read(SCRIPT)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # in place of a random one, so that making it anew changes what has changed
    NotebookClient(notebook, record_timing=False).execute()
    jupytext.write(notebook, SCRIPT.with_suffix(".ipynb"))
