"""The scripts run and the notebooks are made from them; the statements of the pages and the cluster jobs hold."""

import importlib.util
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import tomllib

import jupytext
import nbformat
import pytest
import yaml

from cnn_jax.cli.commands import COMMANDS, train
from cnn_jax.cli.parser import parameters_of, parse, parse_command
from cnn_jax.runtime.display import describe_values
from cnn_jax.runtime.errors import CnnJaxError, UsageError
from tests.helpers import ROOT, metrics_of

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
RESEARCH = (DOCS / "research.md").read_text()
# What pages name that is an option of another program.
FOREIGN = {
    "--epoch",  # a mistake that is shown
    "--build-arg",  # Docker's
    "--logdir",  # TensorBoard's
    "--quiet",  # pip's
    "--tag",  # Docker's
    "--tyro-write-completion",  # one of 0.1.0, which the changelog names
    "--kills",  # of tests.fault_injection
    *("--debug", "--help", "--print-completion", "--version"),  # every command's, and no setting
}


def blocks(language):
    """The code of a language on the researchers' page, block by block."""
    return re.findall(rf"^```{language}\n(.*?)^```$", RESEARCH, re.MULTILINE | re.DOTALL)


def call_of(line):
    """The call that a shell's line starts the program with."""
    words = shlex.split(line)
    words = [word for word in words[words.index("python") + 1 :] if word not in ("$@", "&")]
    if words[0] == "train.py":
        return parse(train, words[1:], prog="train.py")
    assert words[:2] == ["-m", "cnn_jax"]
    return parse_command(COMMANDS, words[2:])


def settings_of(line):
    """The settings of the training that a shell's line starts."""
    return call_of(line).keywords["settings"]


@pytest.mark.slow(seconds=80)
def test_the_tutorial_runs_and_all_that_it_claims_holds(program, tfds_folder):
    # Its steps are so many that it pays to optimise them.
    variables = {"MPLBACKEND": "agg", "TFDS_DATA_DIR": str(tfds_folder), "XLA_FLAGS": ""}
    process = program("docs/tutorial.py", env=os.environ | variables)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert re.search(r"^\[Epoch:    2\] cost = 0\.0\d+$", out, re.MULTILINE)
    assert re.search(r"^Accuracy: 0\.9[89]", out, re.MULTILINE)


@pytest.mark.slow(seconds=20)
def test_the_quickstart_runs_and_training_leaves_its_figures_to_the_notebook(
    program, small_mnist, tfds_folder, tmp_path
):
    code = (
        (DOCS / "quickstart.py")
        .read_text()
        .replace("epochs=3", f"epochs=1, features=(4, 8), dataset_dir={str(small_mnist)!r}")
    )
    code += "\nprint(plt.get_backend(), len(plt.get_fignums()))\n"
    (tmp_path / "quickstart.py").write_text(code)
    variables = {"MPLBACKEND": "svg", "TFDS_DATA_DIR": str(tfds_folder)}
    process = program("quickstart.py", cwd=tmp_path, env=os.environ | variables)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "epoch 1/1: test accuracy " in err
    assert re.search(r"^[\d,]+ of 10,000 test images are wrong\nsvg 3$", out, re.MULTILINE)
    assert (tmp_path / "checkpoints" / "quickstart" / "report.html").exists()


@pytest.mark.parametrize(
    ("device", "extra"), [(None, ""), ("nvidia-smi", "[cuda]"), ("/dev/accel0", "[tpu]"), ("/dev/vfio/0", "[tpu]")]
)
def test_the_quickstart_installs_the_package_only_where_it_is_missing(device, extra, monkeypatch):
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda words, check: commands.append(words))
    monkeypatch.setattr(shutil, "which", lambda name: name if name == device else None)
    monkeypatch.setattr(pathlib.Path, "exists", lambda path: str(path) == device)
    cell = next(cell for cell in jupytext.read(DOCS / "quickstart.py").cells if cell.cell_type == "code")
    exec(cell.source, {})
    assert commands == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    exec(cell.source, {})
    ((*_, source),) = commands
    assert source == f"cnn-jax{extra}"
    assert not extra or extra.strip("[]") in optional_dependencies()


def optional_dependencies():
    """The package's extras."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.parametrize("name", ["quickstart", "tutorial"])
def test_the_notebook_is_made_from_the_script_and_was_run_from_top_to_bottom(name):
    script, notebook = jupytext.read(DOCS / f"{name}.py"), nbformat.read(DOCS / f"{name}.ipynb", as_version=4)
    remedy = "make it anew: python docs/make_notebook.py"
    assert [(c.cell_type, c.source) for c in notebook.cells] == [(c.cell_type, c.source) for c in script.cells], remedy
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), remedy
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"stream", "display_data"}
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}
    shown = sum("image/png" in output.get("data", ()) for output in outputs)
    assert shown == (DOCS / f"{name}.py").read_text().count("plt.show()")
    assert (DOCS / f"{name}.ipynb").stat().st_size < 500_000


def test_a_notebook_shows_each_epoch_of_a_training_as_it_ends():
    notebook = nbformat.read(DOCS / "quickstart.ipynb", as_version=4)
    (training,) = (cell for cell in notebook.cells if cell.source.startswith("import cnn_jax"))
    lines = [output.get("text") or output.data["text/plain"] for output in training.outputs]
    epochs = [line for line in lines if re.match(r"\[Epoch: |epoch \d/3: test accuracy ", line)]
    assert [line[0] for line in epochs] == ["[", "e"] * 3  # each is an output of its own


def known_options():
    """The options of all commands."""
    return {parameter.option for command in COMMANDS for parameter in parameters_of(command)}


@pytest.mark.parametrize("page", [*PAGES, DOCS / "quickstart.py", DOCS / "tutorial.py"], ids=lambda page: page.name)
def test_every_option_on_a_page_exists(page):
    named = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]*)(?!\w)", page.read_text()))
    assert named - known_options() <= FOREIGN


def commands_on(page):
    """The lines that start the program on a page, in its blocks and in its prose, each with the line after it."""
    start = r"(?:pip .* && |\w+=\S+ )*python (?:train\.py|-m cnn_jax) "
    text = page.read_text()
    yield from re.findall(rf"^(?:\$ )?({start}.*)\n(?=(.*)$)", text, re.MULTILINE)
    yield from ((" ".join(line.split()), "") for line in re.findall(rf"`({start}[^`]*)`", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_on_a_page_is_understood_and_its_mistakes_are_reported_as_it_says(page):
    for line, answer in commands_on(page):
        words = line.partition(" # ")[0]
        if "--help" in words:
            continue
        if answer.startswith("error: "):
            with pytest.raises(UsageError, match=f"^{re.escape(answer.removeprefix('error: '))}$"):
                call_of(words)
        else:
            call_of(words)


def test_no_command_is_overlooked():
    counts = {page.name: len(list(commands_on(page))) for page in PAGES}
    assert counts["README.md"] >= 9
    assert counts["research.md"] >= 18
    assert sum(counts.values()) >= 45
    mistakes = [answer for page in PAGES for _, answer in commands_on(page) if answer.startswith("error: ")]
    assert len(mistakes) == 2


def test_a_block_of_the_researchers_shell_code_is_commands_of_the_program_and_installations():
    lines = "".join(blocks("sh")).splitlines()
    commands = [line for line in lines if " train.py" in line or "-m cnn_jax" in line]
    assert len(commands) >= 15
    assert all(line.startswith("pip install -e '.[") for line in set(lines) - set(commands))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        file, _, anchor = target.partition("#")
        if file.startswith("https:"):
            continue
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), target
        assert linked.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(linked), target


def anchors(page):
    """The anchors that a page's headings get: in small letters, spaces as hyphens, other punctuation left out."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_read_in_five_minutes_and_names_the_two_commands():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.split()) <= 1500
    assert "\npython train.py --epochs 15\n" in readme
    assert "\npip install -e '.[test]' && pytest\n" in readme


def test_the_program_that_is_read_in_an_evening_is_as_short_as_the_readme_says():
    files = [ROOT / "train.py", *(ROOT / "cnn_jax" / "core").glob("*.py")]
    said = re.search(r"at most ([\d,]+) lines", (ROOT / "README.md").read_text())[1]
    assert sum(len(file.read_text().splitlines()) for file in files) <= int(said.replace(",", ""))


def test_the_readme_lists_every_room_and_every_file_of_the_core():
    readme = (ROOT / "README.md").read_text()
    rooms = [folder.name for folder in (ROOT / "cnn_jax").iterdir() if (folder / "__init__.py").exists()]
    assert set(re.findall(r"^  (\w+)/ ", readme, re.MULTILINE)) == set(rooms)
    files = [file.name for file in (ROOT / "cnn_jax" / "core").glob("*.py") if file.name != "__init__.py"]
    assert sorted(re.findall(r"^\d\. `(\w+\.py)`", readme, re.MULTILINE)) == sorted(files)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_of_the_package_that_a_page_names_exists(page):
    rooms = "cli|pytorch|analysis|inference|runs|core|data|runtime"
    for file in re.findall(rf"`(?:cnn_jax/)?((?:{rooms})/[\w/]+\.\w+)`", page.read_text()):
        assert (ROOT / "cnn_jax" / file).exists(), file


@pytest.mark.slow(seconds=30)
@pytest.mark.usefixtures("without_report")
@pytest.mark.optax_promotes
def test_the_researchers_code_runs(command, program, small_mnist, tfds_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, recipe in (("mnist-seed777-seeds5", "tutorial"), ("mnist-seed777-seeds5-fast", "fast")):
        code, _, err = command(
            "train", "--dataset-dir", small_mnist, "--run-name", name, "--recipe", recipe, "--epochs", 1, "--seeds", 2,
            "--features", 4, 8,
        )  # fmt: skip
        assert code == 0, err
    code, out, err = command("diff", "mnist-seed777-seeds5", "mnist-seed777-seeds5-fast", "--output", "diff.html")
    assert code == 0, err
    assert "95 % interval" in out
    code, _, err = command(
        "sweep", "--dataset-dir", small_mnist, "--trials", 1, "--epochs", 1, "--validation", 500,
        "--recipe", "fast", "--batch-size", 100, "--features", 4, 8,
    )  # fmt: skip
    assert code == 0, err

    page = "\n".join(blocks("python"))
    assert page.count("batch_size=50)\n") == 1
    # A third of an epoch suffices for the accuracy below.
    (tmp_path / "page.py").write_text(page.replace("batch_size=50)\n", "batch_size=50)[:400]\n"))
    process = program("page.py", cwd=tmp_path, env=os.environ | {"TFDS_DATA_DIR": str(tfds_folder)})
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "95 % interval" in out
    assert float(re.search(r"Evaluation\(correct=(\d+), count=10000", out)[1]) > 9500

    for options, line in (
        (("--dataset-dir", "noise"), "noise: 500 training and 100 test images, 16x16x1, 3 classes"),
        (("--dataset", "colours"), "colours: 600 training and 100 test images, 16x16x3, 3 classes"),
    ):
        code, _, err = command("train", *options, "--data-dir", tfds_folder, "--dry-run")
        assert code == 0, err
        assert line in err


@pytest.mark.parametrize("example", sorted((DOCS / "examples").glob("*.py")), ids=lambda file: file.stem)
@pytest.mark.usefixtures("without_report")
@pytest.mark.optax_promotes
def test_an_example_is_short_says_what_it_came_to_and_trains(example, command, small_mnist, tmp_path):
    text = example.read_text()
    assert len(text.splitlines()) < 60
    (line,) = re.findall("^Run: (.*)$", text, re.MULTILINE)
    assert settings_of(line).seeds == 5
    result = json.loads((ROOT / "benchmarks" / "runs" / "examples" / f"{example.stem}.json").read_text())
    accuracy = describe_values([seed["test_accuracy"] for seed in result["seeds"]])
    assert f"\nTest accuracy: {accuracy} over 5 seeds, " in text
    assert re.search(rf"^\| \[{example.name}\]\(examples/{example.name}\) .* \| {accuracy} \|", RESEARCH, re.MULTILINE)
    words = shlex.split(line.partition("train.py ")[2].replace("--seeds 5", "--seeds 1"))
    where = ["--dataset-dir", small_mnist, "--checkpoint-dir", tmp_path, "--run-name", "run", "--batch-size", 50]
    code, _, err = command("train", *words, *where, "--epochs", 3)
    assert code == 0, err
    assert metrics_of(tmp_path / "run")[-1]["test_accuracy"] > 0.6


def test_the_slurm_job_is_a_shell_script_that_starts_one_run():
    file = DOCS / "cluster" / "slurm.sh"
    checked = subprocess.run(["bash", "-n", file], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    lines = file.read_text().splitlines()
    directives = [number for number, line in enumerate(lines) if line.startswith("#SBATCH --")]
    commands = [number for number, line in enumerate(lines) if line and not line.startswith("#")]
    assert max(directives) < min(commands)  # SLURM reads none that come later
    started = [lines[number] for number in commands if "train.py" in lines[number]]
    assert [line.split()[0] for line in started] == ["python", "srun"]
    assert [settings_of(line).dry_run for line in started] == [True, False]
    assert len({settings_of(line).checkpoint_dir for line in started}) == 1


def test_the_kubernetes_job_is_one_run_of_all_its_pods():
    service, job = yaml.safe_load_all((DOCS / "cluster" / "kubernetes.yaml").read_text())
    assert (service["apiVersion"], service["kind"]) == ("v1", "Service")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]

    pods = job["spec"]["completions"]
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["parallelism"] == pods
    command = " ".join(container["command"])
    runs = [settings_of(command.replace("$(JOB_COMPLETION_INDEX)", str(index))) for index in range(pods)]
    assert [run.process_id for run in runs] == list(range(pods))
    assert {run.num_processes for run in runs} == {pods}

    # The first pod's name holds only with a headless service that finds the job's pods, and with its name as subdomain.
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    (port,) = (port["port"] for port in service["spec"]["ports"])
    assert runs[0].coordinator == f"{job['metadata']['name']}-0.{service['metadata']['name']}:{port}"

    (mount,), (volume,) = container["volumeMounts"], pod["volumes"]
    assert mount["name"] == volume["name"]
    assert runs[0].checkpoint_dir.is_relative_to(mount["mountPath"])
    assert runs[0].data_dir.is_relative_to(mount["mountPath"])

    (rule,) = job["spec"]["podFailurePolicy"]["rules"]
    assert pod["restartPolicy"] == "Never"  # Kubernetes allows the policy with no other
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert set(rule["onExitCodes"]["values"]) <= {error.exit_code for error in CnnJaxError.__subclasses__()}
