"""Each command runs with what the package and the extra that it names install, and needs nothing else."""

import os
from importlib.metadata import packages_distributions, requires

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TRAIN = "train --dataset-dir {data} --checkpoint-dir {runs} --epochs 1 --features 4 8 --run-name run"
COMMANDS = {
    "": (
        TRAIN,
        "evaluate run --checkpoint-dir {runs}",
        "inspect run --checkpoint-dir {runs}",
        "report run --checkpoint-dir {runs}",
        TRAIN + " --run-name other --seed 1",
        "diff run other --checkpoint-dir {runs}",
        "predict {runs}/run/pictures/mistakes.png",
        "export --to safetensors --output {runs}/model.safetensors",
        "import-torch {runs}/model.safetensors --checkpoint-dir {runs}",
        "export run --checkpoint-dir {runs} --to html --output {runs}/page.html",
    ),
    "export": (
        "export {run} --to onnx --output {runs}/model.onnx",
        "export {run} --to stablehlo --output {runs}/model.stablehlo",
    ),
    "torch": (
        "export {run} --to torch --output {runs}/model.pt",
        "import-torch {runs}/model.pt --dataset-dir {data} --features 4 8 --checkpoint-dir {runs}",
        "evaluate model --checkpoint-dir {runs}",
    ),
    "sweep": ("sweep --trials 1 --epochs 0.1 --dataset-dir {data} --checkpoint-dir {runs} --validation 500",),
    "plan": ("plan h100 --features 2 2",),
    "tensorboard": (TRAIN + " --tensorboard",),
}

# A program that cannot find some modules.
HIDE = """
import sys
from importlib.machinery import PathFinder

class Installed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {others} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Installed
from cnn_jax.cli.commands import main
"""


def packages_of(extra):
    """The packages that pip installs for cnn-jax with an extra, and the modules that only other packages bring."""
    seen, todo = set(), {("cnn-jax", frozenset({extra}))}
    while todo:
        name, extras = todo.pop()
        seen.add((name, extras))
        for requirement in map(Requirement, requires(name) or []):
            wanted = requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in extras | {""})
            if wanted:
                todo.add((canonicalize_name(requirement.name), frozenset(requirement.extras)))
        todo -= seen
    packages = {name for name, _ in seen}
    others = [
        module
        for module, brought_by in packages_distributions().items()
        if not packages & {canonicalize_name(name) for name in brought_by}
    ]
    return packages, others


@pytest.mark.slow
@pytest.mark.parametrize("extra", COMMANDS)
def test_commands_need_nothing_but_what_their_extra_brings(
    extra, program, trained_run, small_mnist, tfds_folder, tmp_path
):
    if extra == "torch":
        pytest.importorskip("torch", reason="needs the extra torch")
    if extra == "plan":
        pytest.importorskip("jax_cuda13_plugin", reason="needs the extra plan")
    packages, others = packages_of(extra)
    assert "jax" in packages
    assert "pytest" in others
    code, run = HIDE.format(others=others), trained_run("--features", 4, 8, epochs=1, reported=False)
    for line in COMMANDS[extra]:
        code += f"main({line.format(data=small_mnist, run=run, runs=tmp_path).split()})\n"
    process = program("-c", code, env=os.environ | {"TFDS_DATA_DIR": str(tfds_folder)})
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, f"{out}\n{err}"
