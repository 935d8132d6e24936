"""The files that people look for in a repository agree with each other and with the code."""

import itertools
import re
import tomllib

import yaml
from packaging.version import Version

import cnn_jax
from tests.helpers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CHECKS = (ROOT / ".ci" / "run").read_text().splitlines()


def instructions():
    """The Dockerfile's instructions, each with its arguments, in order."""
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def test_the_image_of_the_dockerfile_is_the_one_that_the_kubernetes_job_starts():
    _, job = yaml.safe_load_all((ROOT / "docs" / "cluster" / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    built = dict(instructions())

    # The line at its top makes that image, for the GPUs that the job asks for.
    assert container["image"] == f"cnn-jax:{cnn_jax.__version__}"
    (command,) = re.findall(r"docker build .*", (ROOT / "Dockerfile").read_text())
    assert f"--tag {container['image']} --build-arg EXTRA=cuda ." in command
    assert "nvidia.com/gpu" in container["resources"]["limits"]

    # It starts as the user, and in the folder, that the image is made for; the user is not root.
    assert built["WORKDIR"] == container["workingDir"]
    security = pod["securityContext"]
    assert int(built["USER"]) == security["runAsUser"] == security["fsGroup"] > 0
    assert security["runAsNonRoot"] is True
    assert any(name == "RUN" and f"useradd --uid {built['USER']} " in words for name, words in instructions())


def test_the_dockerfile_installs_this_repository_for_a_python_and_with_an_extra_that_there_are():
    steps = instructions()
    names = [name for name, _ in steps]
    assert set(names) <= {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "USER", "CMD"}
    version = re.fullmatch(r"python:(3\.\d+)-slim", dict(steps)["FROM"])[1]
    assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]
    assert ("ARG", 'EXTRA=""') in steps  # without it the image is for CPUs
    assert {"cuda", "tpu"} <= set(PROJECT["optional-dependencies"])
    (install,) = (words for name, words in steps if name == "RUN" and "pip install" in words)
    assert install.endswith('--editable ".${EXTRA:+[$EXTRA]}"')
    assert names.index("WORKDIR") < names.index("COPY") < names.index("RUN") < names.index("USER") < names.index("CMD")


def test_what_docker_leaves_out_is_nothing_that_git_knows():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    needed = ("cnn_jax", "docs", "tests", "benchmarks", "train.py", "pyproject.toml", "README.md", "LICENSE")
    assert not set(ignored) & {*needed, "*", "**"}
    assert "!checkpoints/.gitignore" in ignored


def test_the_workflow_runs_all_checks_on_the_oldest_and_the_newest_python():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "checks.yaml").read_text())
    (job,) = workflow["jobs"].values()
    versions = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if "Python :: 3." in line]
    assert job["strategy"]["matrix"]["python"] == [versions[0], versions[-1]]
    assert PROJECT["requires-python"] == f">={versions[0]}"
    (step,) = (step for step in job["steps"] if "run" in step)
    assert step["run"] == ".ci/run"
    assert step["env"] == {"PYTHON": "python${{ matrix.python }}"}
    assert any("${PYTHON:-python3}" in line for line in CHECKS)


def test_pre_commit_runs_the_checks_that_stand_between_installing_and_testing():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    (installed,) = (number for number, line in enumerate(CHECKS) if line.startswith("pip install "))
    quick = itertools.takewhile(lambda line: not line.startswith("wait "), CHECKS[installed + 1 :])
    assert [hook["entry"] for hook in hooks] == [line for line in quick if line and not line.startswith("#")]
    assert not any(hook["pass_filenames"] for hook in hooks)


def test_all_tests_are_run_before_a_change_is_ready_the_slow_ones_too():
    commands = [line for line in CHECKS if line and not line.startswith("#")]
    # One run of all: what tests of both kinds share is made once, and one core waits for the other once.
    assert commands[-2] == "pytest -m ''"
    assert commands[-1].startswith("XLA_FLAGS='' pytest -k ")


def test_the_version_is_that_of_the_changelogs_unreleased_changes():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    changes = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert PROJECT["version"] == cnn_jax.__version__
    assert changes[0] == "Unreleased"
    assert changes[1] == f"{citation['version']} - {citation['date-released']}"
    # Whoever has changes that are in no release sees it by the version, and so do the runs that they continue.
    assert Version(cnn_jax.__version__) > Version(citation["version"])
    assert {"cff-version", "message", "title", "authors", "license"} <= set(citation)
    assert citation["license"] == PROJECT["license"].partition(" AND ")[0]
