"""Make each script's notebook, with what its cells print and draw: `python docs/make_notebook.py`."""

import tempfile
from pathlib import Path

import jupytext
from nbclient import NotebookClient

SCRIPTS = [Path(__file__).with_name(name) for name in ("quickstart.py", "tutorial.py")]

if __name__ == "__main__":
    for script in SCRIPTS:
        notebook = jupytext.read(script)
        for number, cell in enumerate(notebook.cells):
            cell.id = f"cell-{number}"  # in place of a random one, so that making it anew changes what has changed
        with tempfile.TemporaryDirectory() as folder:  # where no run is finished yet
            NotebookClient(notebook, record_timing=False, resources={"metadata": {"path": folder}}).execute()
        jupytext.write(notebook, script.with_suffix(".ipynb"))
