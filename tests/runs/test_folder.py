"""What a run's files hold is believed as far as the types, and the checkpoint that is covered by a digest, agree."""

import json
import os
import shutil

import pytest

from cnn_jax.runs.folder import RunFolder, check_output
from cnn_jax.runtime.errors import InputFileError, StorageError, UsageError
from tests.helpers import ROOT, metrics_of

pytestmark = pytest.mark.optax_promotes

SMALL = ("--features", 2, 4, "--batch-size", 100)
# What no file of a run holds.
HOSTILE = {
    "empty": b"",
    "cut off": b'{"recipe": "tut',
    "a list": b"[]",
    "a number": b"5",
    "null": b"null",
    "UTF-16": '{"step": 1}'.encode("utf-16"),
    "no UTF-8": b'{"step": "\xff"}',
    "nested": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "nothing": b"{}",
    "NUL": b"\0" * 1000,
}


@pytest.fixture
def run(trained_run, tmp_path):
    """A copy of a run of two epochs that is done."""
    return RunFolder(shutil.copytree(trained_run(*SMALL, epochs=2, reported=False), tmp_path / "run"))


@pytest.fixture
def again(command, small_mnist, tmp_path):
    """Start that run's training command again, perhaps with other options."""

    def train(*options, epochs=2):
        where = ("--dataset-dir", small_mnist, "--checkpoint-dir", tmp_path, "--run-name", "run")
        return command("train", *where, *SMALL, "--epochs", epochs, *options)

    return train


def edit(file, **changes):
    """Change keys of a JSON object in a file; `...` removes one."""
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "result.json"])
@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_file_that_holds_something_else_is_named_with_the_remedy(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    folder = RunFolder(tmp_path)
    read = {
        "config.json": folder.read_settings,
        "metrics.jsonl": folder.read_metrics,
        "result.json": folder.read_result,
    }
    if (name, content) == ("metrics.jsonl", b""):
        assert folder.read_metrics() == []
        return
    with pytest.raises(InputFileError, match=rf"{name} is damaged or was edited \(.*\); .*(anew|back)"):
        read[name]()


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "result.json"])
def test_a_file_that_is_far_too_large_is_damaged_and_not_read(name, tmp_path):
    with (tmp_path / name).open("wb") as file:
        file.truncate(2**40)
    folder = RunFolder(tmp_path)
    with pytest.raises(InputFileError, match=rf"{name} is damaged: it has 1,099,511,627,776 bytes"):
        getattr(folder, "read_settings" if name == "config.json" else f"read_{name.partition('.')[0]}")()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"dataset": 5}, "dataset"),
        ({"precision": "nonsense"}, "precision"),
        ({"precision": "int8"}, "precision"),
        ({"features": [32]}, "features"),
        ({"features": [2, "4"]}, "features"),
        ({"features": [0, 4]}, "--features"),
        ({"seed": -1}, "--seed"),
        ({"seed": 10**30}, "--seed"),
        ({"epochs": "many"}, "epochs"),
        ({"epochs": True}, "epochs"),
        ({"batch_size": 1.5}, "batch_size"),
        ({"batch_size": ...}, "batch_size"),
        ({"recipe": None}, "recipe"),
        ({"dataset_dir": ["a"]}, "dataset_dir"),
        ({"dataset_dir": "a\0b"}, "dataset_dir"),
        ({"colour": "red"}, "colour"),
        # These are possible, and not what the checkpoint was trained with.
        ({"batch_size": 50}, "batch_size was 100 and is 50"),
        ({"features": [4, 8]}, r"features was 2 4 and is 4 8"),
        ({"learning_rate": 0.1}, "learning_rate was 0.001 and is 0.1"),
        ({"recipe": "accurate"}, "recipe was tutorial and is accurate"),
        ({"precision": "bfloat16"}, "precision was float32 and is bfloat16"),
        ({"seeds": 2}, "seeds was 1 and is 2"),
        ({"validation": 30}, "validation was none and is 30"),
        ({"epochs": 1.0}, "epochs was 2 and is 1"),
        ({"features": [10**9, 10**9]}, "GiB of memory"),
        ({"hyperparameters": ["a=1"]}, "--hyperparameters a: it must be left out"),
        # With these, the data do not fit.
        ({"validation": 1029}, "--batch-size 100: it must be at most 1"),
        ({"validation": 10**30}, "--validation"),
    ],
)
def test_settings_that_were_edited_are_named(changes, key, run, command):
    before = sorted(path.name for path in run.checkpoints.iterdir())
    edit(run.path / "config.json", **changes)
    code, out, err = command("evaluate", run.path)
    assert (code, out) == (65, "")
    (line,) = err.splitlines()
    assert line.startswith(f"error: {run.path / 'config.json'} is damaged or was edited (")
    assert key.replace("\\", "") in line
    # Nothing is taken for damage whose digest is right.
    assert sorted(path.name for path in run.checkpoints.iterdir()) == before
    assert not (run.path / "quarantine").exists()


def test_a_run_whose_data_were_moved_goes_on_with_them_where_they_are(run, command, small_mnist, tmp_path):
    edit(run.path / "config.json", dataset_dir=str(tmp_path / "moved"))
    code, out, err = command("evaluate", run.path)
    assert (code, out, err.count("\n")) == (65, "", 1)
    told = (
        f"the run {run.path} was trained on are no longer in {tmp_path}/moved; bring them back, or start its training"
    )
    assert told in err
    shutil.copytree(small_mnist, tmp_path / "moved")
    assert command("evaluate", run.path)[0] == 0
    where = ("--dataset-dir", tmp_path / "moved", "--checkpoint-dir", tmp_path, "--run-name", "run")
    code, _, err = command("train", *where, *SMALL, "--epochs", 2)
    assert code == 0, err
    assert "this run is finished" in err


def test_the_training_command_writes_edited_settings_anew(run, command, again):
    edit(run.path / "config.json", batch_size=50, precision="nonsense", colour="red")
    assert again()[0] == 0
    assert command("evaluate", run.path)[0] == 0


def test_a_pipe_in_a_checkpoint_is_damage_and_not_waited_for(run, command):
    file = run.checkpoints / "20" / "meta" / "metadata"
    file.unlink()
    os.mkfifo(file)
    code, _, err = command("evaluate", run.path)
    assert code == 0, err
    assert "the checkpoint of step 20 is damaged (metadata is no file); it is left out" in err


def test_a_result_whose_numbers_were_edited_is_written_anew_by_the_training_command(run, again):
    file = run.path / "result.json"
    sound = json.loads(file.read_text())
    assert again()[0] == 0
    assert json.loads(file.read_text()) == sound
    edit(file, test_accuracy=0.99)
    assert again()[0] == 0
    assert json.loads(file.read_text())["test_accuracy"] == sound["test_accuracy"]


@pytest.mark.parametrize(
    "options",
    [("--batch-size", 50), ("--features", 4, 8), ("--recipe", "accurate"), ("--validation", 30), ("--seeds", 2)],
    ids=lambda options: options[0],
)
def test_other_settings_are_refused_and_never_taken_for_damage(options, run, again):
    for extra in ((), ("--dry-run",)):
        code, out, err = again(*options, *extra)
        assert (code, out) == (2, ""), err
        (line,) = err.splitlines()
        assert f"{options[0][2:].replace('-', '_')} was " in line
    assert not (run.path / "quarantine").exists()


@pytest.fixture(scope="module")
def changed(trained_run, small_mnist, tmp_path_factory):
    """A run whose data have changed since, in a bit, and the folder of those."""
    data = shutil.copytree(small_mnist, tmp_path_factory.mktemp("changed") / "data")
    run = trained_run(*SMALL, epochs=1, data=data, reported=False)
    images = data / "t10k-images-idx3-ubyte"
    content = bytearray(images.read_bytes())
    content[5000] ^= 1
    images.write_bytes(content)
    return run, data


@pytest.mark.parametrize("name", ["evaluate", "inspect", "report", "diff", "export", "predict", "demo"])
def test_every_command_compares_the_data_before_it_computes(name, command, changed, tmp_path):
    run, data = changed
    arguments = {
        "diff": (run, shutil.copytree(run, tmp_path / "copy")),
        "export": (run, "--to", "safetensors", "--output", tmp_path / "a.safetensors"),
        "predict": (ROOT / "docs" / "four.jpg", "--run", run),
        "demo": (run, "--port", 17861),
    }
    code, out, err = command(name, *arguments.get(name, (run,)))
    assert (code, out) == (65, "")
    assert err.startswith(f"error: the data in {data} are not those that the run")


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [lines[0].replace('"cost": ', '"cost": 1'), *lines[1:]],
        lambda lines: lines[1:],
        lambda lines: lines[:1],
        lambda lines: [],
        lambda lines: [*lines[:1], "x"],
        lambda lines: lines[::-1],
    ],
    ids=["a number", "the first line", "the last line", "all lines", "no JSON", "their order"],
)
def test_metrics_that_were_edited_or_lost_are_noticed(change, run, command):
    file = run.path / "metrics.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("".join(line + "\n" for line in change(lines)))
    code, _, err = command("evaluate", run.path)
    assert code == 0, err
    assert f"{file} was edited or lost lines; the numbers are those of the checkpoint" in err


def test_metrics_that_were_edited_come_back_when_the_run_goes_on(run, again):
    file = run.path / "metrics.jsonl"
    sound = file.read_text()
    file.write_text(sound.replace('"cost": ', '"cost": 1').replace('"epoch": 2', '"epoch": 7'))
    code, out, err = again(epochs=3)
    assert (code, out.count("[Epoch:")) == (0, 3), err
    assert "was edited or lost lines" in err
    assert file.read_text().startswith(sound)
    assert [epoch["epoch"] for epoch in metrics_of(run.path)] == [1, 2, 3]


def test_a_line_that_the_checkpoint_does_not_know_yet_is_what_a_kill_leaves_behind(run, again):
    shutil.rmtree(run.checkpoints / "20")
    code, out, err = again()
    assert (code, out.count("[Epoch:")) == (0, 2), err
    assert "edited" not in err


@pytest.mark.parametrize(
    "changes",
    [{"test_accuracy": 1.5}, {"test_accuracy": ...}, {"seconds": 5}, {"step": -1}, {"versions": {"jax": 1}}, {"a": 1}],
    ids=str,
)
def test_a_result_that_was_edited_is_named(changes, run, command):
    edit(run.path / "result.json", **changes)
    code, _, err = command("report", run.path)
    assert code == 65
    assert f"{run.path / 'result.json'} is damaged or was edited (" in err.splitlines()[-1]


IN_THE_WAY = {
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a file": lambda path: path.touch(),
}
FOLDERS = ("steps", "quarantine", "pictures")


@pytest.mark.parametrize("kind", IN_THE_WAY)
@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "result.json", "report.html", "lock", *FOLDERS])
def test_what_stands_in_a_runs_place_is_told_before_it_begins(name, kind, tmp_path):
    if kind == ("a folder" if name in FOLDERS else "a file"):
        return
    IN_THE_WAY[kind](tmp_path / name)
    with pytest.raises(
        StorageError, match=rf"cannot write .*{name} \(.*; give another --checkpoint-dir or --run-name$"
    ):
        RunFolder(tmp_path).locked().__enter__()


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "report.html", *FOLDERS])
def test_a_link_into_another_run_is_refused_before_anything_is_written_there(name, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "base" / name)
    named = rf"cannot write .*/run/{name} \(it is a link into the run or study .*/base\); remove it, or give another --"
    with pytest.raises(StorageError, match=named):
        RunFolder(tmp_path / "run").locked().__enter__()
    assert [path.name for path in (tmp_path / "base").iterdir()] == ["config.json"]


def test_a_link_to_a_place_that_is_no_runs_is_followed(tmp_path):
    (tmp_path / "disk" / "steps").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "steps").symlink_to(tmp_path / "disk" / "steps")
    with RunFolder(tmp_path / "run").locked():
        pass


@pytest.mark.parametrize(
    "name", ["config.json", "metrics.jsonl", "lock", "steps/20/state", "study.db", "study.db-journal"]
)
def test_an_output_takes_no_place_of_what_a_run_is_read_back_from(name, tmp_path):
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    check_output(file)  # in any other folder
    (tmp_path / "config.json").touch()
    (tmp_path / "link").symlink_to(file)
    for given in (file, tmp_path / "link"):
        with pytest.raises(StorageError, match=rf"needs {name.partition('/')[0]}\); give another --output"):
            check_output(given)
    check_output(tmp_path / "report.html")


def test_an_output_takes_no_place_of_a_data_sets_files(small_mnist, tfds_folder, command):
    from cnn_jax.data.loading import load_dataset

    load_dataset("mnist", None, tfds_folder)
    tfds_files = [file for file in tfds_folder.rglob("*") if file.is_file()]
    assert len(tfds_files) >= 4
    for file in [*small_mnist.iterdir(), *tfds_files]:
        content = file.read_bytes()
        code, out, err = command("export", "--to", "safetensors", "--output", file)
        assert (code, out) == (4, "")
        assert err == f"error: cannot write {file} (it is part of a data set); give another --output\n"
        assert file.read_bytes() == content


def test_a_run_is_not_trained_in_a_studys_folder(tmp_path):
    (tmp_path / "study.db").touch()
    with pytest.raises(UsageError, match=r"is a study, not a run; give another --run-name$"):
        RunFolder(tmp_path).locked().__enter__()
    assert [file.name for file in tmp_path.iterdir()] == ["study.db"]


def test_settings_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "config.json").symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match="Input/output error") as refused:
        RunFolder(tmp_path).read_settings()
    assert refused.value.filename == str(tmp_path / "config.json")


def test_a_run_that_another_has_taken_the_place_of_writes_nothing_there(tmp_path):
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    with first.locked():
        first.write_metrics([])
        (tmp_path / "run").rename(tmp_path / "moved")
        with second.locked():
            second.write_result({})
            for write in (lambda: first.write_metrics([]), lambda: first.write_result({"test_accuracy": 0.5})):
                with pytest.raises(StorageError, match="run/lock is gone or another: its folder was moved"):
                    write()
        assert (tmp_path / "run" / "result.json").read_text() == "{}\n"
