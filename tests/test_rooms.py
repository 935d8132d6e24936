"""Each room imports only from rooms below it, is small, says what is in it, and each library has its owner."""

import ast
import functools
import re

import pytest

from tests.helpers import ROOT

PACKAGE = ROOT / "cnn_jax"
ROOMS = ("runtime", "data", "core", "runs", "inference", "analysis", "pytorch", "cli")  # from below to above
FILES_PER_ROOM = 8
CORE_LINES = 1300

# The files, or the rooms, that alone import a library.
OWNERS = {
    "tensorflow_datasets": ("data/tfds.py", "data/mnist/builder.py"),
    "grain": ("core/input_pipeline.py",),
    "optax": ("core/", "pytorch/"),
    "flax": ("core/", "runs/", "analysis/", "inference/", "pytorch/"),
    "orbax": ("runs/checkpoint.py",),
    "optuna": ("analysis/sweep.py",),
    "sqlalchemy": ("analysis/sweep.py",),
    "tensorboardX": ("runs/folder.py",),
    "matplotlib": ("analysis/plots.py",),
    "jinja2": ("inference/page/",),
    "gradio": ("inference/demo/",),
    "onnx": ("inference/export.py",),
    "onnxruntime": ("inference/export.py",),
    "safetensors": ("inference/", "pytorch/import_weights.py"),
    "torch": ("inference/torch_layout.py", "inference/export.py", "pytorch/"),
    "PIL": ("inference/pictures.py", "inference/preprocess.py", "pytorch/tutorial.py"),
    "rich": ("runtime/display.py",),
    "msgspec": ("runtime/records.py",),
}

FILES = sorted(str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py"))


@functools.cache
def imports_of(file):
    """The full names that a file imports, at its top or in its functions."""
    names = set()
    for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def rooms_of(file):
    """The rooms from which a file imports."""
    return {name.split(".")[1] for name in imports_of(file) if name.startswith("cnn_jax.")} & set(ROOMS)


def test_every_room_is_in_the_order():
    assert sorted(ROOMS) == sorted(folder.parent.name for folder in PACKAGE.glob("*/__init__.py"))


@pytest.mark.parametrize("file", [file for file in FILES if "/" in file])
def test_a_file_imports_only_from_its_room_and_those_below(file):
    room = file.partition("/")[0]
    assert rooms_of(file) <= set(ROOMS[: ROOMS.index(room) + 1])


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_has_few_files_and_a_line_for_each_in_its_docstring(room):
    files = {path.name for path in (PACKAGE / room).glob("*.py")} - {"__init__.py"}
    folders = {f"{path.name}/" for path in (PACKAGE / room).iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert len(files) <= FILES_PER_ROOM
    docstring = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text()))
    listed = re.findall(r"^(\w+(?:\.py|/)) +\S", docstring, re.MULTILINE)
    assert sorted(listed) == sorted(files | folders)


def test_the_core_is_read_in_an_evening():
    files = [ROOT / "train.py", *(PACKAGE / "core").glob("*.py")]
    assert sum(len(file.read_text().splitlines()) for file in files) <= CORE_LINES


@pytest.mark.parametrize("library", OWNERS)
def test_a_library_is_imported_by_its_owners_alone(library):
    users = {file for file in FILES if any(name.split(".")[0] == library for name in imports_of(file))}
    strangers = {file for file in users if not file.startswith(OWNERS[library])}
    assert users
    assert not strangers
