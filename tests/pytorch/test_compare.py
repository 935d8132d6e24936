"""A comparison is made of its own runs' results, each sound, by one process at a time."""

import json
import time

import pytest

pytest.importorskip("torch", reason="needs the extra torch")

from cnn_jax.pytorch import compare as compare_module
from cnn_jax.pytorch.compare import FLOAT64_STEPS, STEPS
from cnn_jax.pytorch.processes import ComparedRun, start_worker
from cnn_jax.runs.folder import RunFolder
from cnn_jax.runtime.errors import InputFileError
from cnn_jax.runtime.files import locked

ARGUMENTS = ("compare", "--seeds", 2, "--seed", 5, "--epochs", 1, "--output")
RESULT = {
    "seed": 5,
    "costs": [0.25],
    "accuracy": 0.98,
    "unscaled_accuracy": 0.97,
    "seconds": {"starting": 1.0, "compiling": 2.0, "training": 65.0, "testing": 3.0},
}
AGREEMENT = {"logits": 1e-6, "gradients": 2e-6, "float64_costs": [1e-12] * FLOAT64_STEPS}
AGREEMENT |= {name: [1e-4] * STEPS for name in ("costs", "distances", "pytorch_costs")}


@pytest.fixture
def measured(tmp_path):
    """The folder of a comparison in which everything has been measured."""
    (tmp_path / "runs").mkdir()
    for framework in ("cnn-jax", "pytorch"):
        for seed in (5, 6):
            content = json.dumps(RESULT | {"seed": seed, "accuracy": 0.98 + seed / 1000})
            (tmp_path / "runs" / f"{framework}-seed{seed}-epochs1.json").write_text(content)
    (tmp_path / "runs" / "agreement-seed5.json").write_text(json.dumps(AGREEMENT))
    return tmp_path


def test_what_has_been_measured_is_not_measured_again(measured, command):
    code, out, err = command(*ARGUMENTS, measured)
    assert (code, out) == (0, ""), err
    report = json.loads((measured / "report.json").read_text())
    assert report["frameworks"]["PyTorch"]["runs"][1] == RESULT | {"seed": 6, "accuracy": 0.986}
    text = (measured / "report.md").read_text()
    assert "do not differ measurably" in text
    assert "that they differ by less than 0.0015 give p = " in text


def test_of_runs_beside_other_work_the_times_are_left_out(measured, command, monkeypatch):
    runs = measured / "runs"
    (runs / "cnn-jax-seed6-epochs1.json").unlink()
    timed = ComparedRun(**RESULT | {"seed": 6})
    monkeypatch.setattr(compare_module, "_train_in_jax", lambda *arguments: timed)
    assert command(*ARGUMENTS, measured, "--untimed")[0] == 0
    assert json.loads((runs / "cnn-jax-seed6-epochs1.json").read_text()) == RESULT | {"seed": 6, "seconds": {}}
    text = (measured / "report.md").read_text()
    assert "| training | 1 min 05 s | 1 min 05 s |" in text
    assert "Times are medians over 1 seeds" in text
    for file in runs.glob("cnn-jax-seed*"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"seconds": {}}))
    assert command(*ARGUMENTS, measured)[0] == 0
    text = (measured / "report.md").read_text()
    assert "| training |" not in text
    assert "Times" not in text


DAMAGED = {
    "empty": "",
    "half": "{",
    "a list": "[]",
    "null": "null",
    "other keys": '{"a": 1}',
    "not UTF-8": b"\xff",
    "one key more": RESULT | {"more": 1},
    "no costs": RESULT | {"costs": []},
    "another seed": RESULT | {"seed": 7},
    "other epochs": RESULT | {"costs": [0.2, 0.1]},
    "more than all": RESULT | {"accuracy": 7.98},
    "not a number": RESULT | {"accuracy": float("nan")},
    "a cost that is not finite": RESULT | {"costs": [float("inf")]},
    "a part is missing": RESULT | {"seconds": {"training": 1.0}},
    "an agreement of no steps": AGREEMENT | {"costs": []},
    "an agreement of fewer steps": AGREEMENT | {"costs": [1e-4]},
    "an agreement below zero": AGREEMENT | {"logits": -1},
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_result_is_refused_with_its_name_and_the_remedy(damage, measured, command):
    content = DAMAGED[damage]
    name = "agreement-seed5.json" if "agreement" in damage else "pytorch-seed5-epochs1.json"
    text = json.dumps(content) if isinstance(content, dict) else content
    (measured / "runs" / name).write_bytes(text.encode() if isinstance(text, str) else text)
    code, out, err = command(*ARGUMENTS, measured)
    assert (code, out, err.count("\n")) == (65, "", 1), err
    assert err.startswith(f"error: {measured / 'runs' / name} is damaged or was edited (")
    assert err.endswith("; delete it and run the same command again, which measures it anew\n")
    assert not (measured / "report.json").exists()


@pytest.mark.parametrize("damage", ["missing", "no test on unscaled pixels", "no training", "half"])
def test_a_finished_run_whose_result_is_damaged_is_refused_too(damage, monkeypatch, command, tmp_path):
    result = {"test_accuracy": 0.9, "unscaled_test_accuracy": 0.8, "step": 600, "machine": "", "device": ""}
    result |= {"versions": {}, "seconds": dict.fromkeys(["loading", "compiling", "training", "testing"], 1.0)}
    if damage == "no training":
        del result["seconds"]["training"]
    elif damage == "no test on unscaled pixels":
        del result["unscaled_test_accuracy"]

    class Training:  # of a run that ends well, and is then damaged
        def __init__(self, command, **_):
            run = tmp_path / "runs" / command[-1]
            run.mkdir()
            if damage != "missing":
                text = json.dumps(result)
                (run / "result.json").write_text(text[:20] if damage == "half" else text)

        pid, __enter__, __exit__, wait = 0, lambda self: self, lambda *_: None, lambda _: 0

    monkeypatch.setattr(compare_module.subprocess, "Popen", Training)
    code, _, err = command(*ARGUMENTS, tmp_path)
    assert code == 65, err
    assert f"error: {tmp_path}/runs/cnn-jax-seed5-epochs1/result.json is damaged or was edited (" in err


def test_of_two_comparisons_in_a_folder_the_second_ends_with_6_in_a_line(measured, command):
    with locked(measured / "runs" / "lock"):
        code, out, err = command(*ARGUMENTS, measured)
    assert (code, out, err.count("\n")) == (6, "", 1)
    assert f"is writing the comparison {measured}; wait for it, stop it, or give another --output\n" in err


@pytest.mark.parametrize("name", ["compare", "benchmark"])
def test_a_run_is_no_place_for_what_is_measured(name, command, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    code, out, err = command(name, "--output", tmp_path)
    assert (code, out) == (4, "")
    assert err == f"error: cannot write {tmp_path} (it is a run or a study); give another --output\n"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("name", ["report.json", "report.md", "report.png"])
def test_a_report_that_cannot_be_written_is_refused_before_the_trainings(name, measured, command):
    (measured / "runs" / "agreement-seed5.json").unlink()
    (measured / name).mkdir()
    code, out, err = command(*ARGUMENTS, measured)
    assert (code, out, err.count("\n")) == (4, "", 1), err
    assert f"cannot write {measured / name} (it is a folder" in err


def test_a_training_that_was_not_taken_over_is_begun_anew(monkeypatch, command, tmp_path):
    (tmp_path / "runs" / "cnn-jax-seed5-epochs1").mkdir(parents=True)
    (tmp_path / "runs" / "cnn-jax-seed5-epochs1" / "result.json").write_text("{}")
    started = []

    class Training:
        def __init__(self, command, **_):
            started.extend(command)

        pid, __enter__, __exit__, wait = 0, lambda self: self, lambda *_: None, lambda _: 4

    monkeypatch.setattr(compare_module.subprocess, "Popen", Training)
    assert command(*ARGUMENTS, tmp_path)[0] == 4
    assert "--fresh" in started


def test_what_was_compared_is_not_written_over(measured, command):
    (measured / "runs" / "lock").touch()
    for file in "cnn-jax-seed5-epochs1.json", "new.json":
        code, out, err = command("diff", "a", "b", "--output", measured / "runs" / file)
        assert (code, out) == (4, "")
        needed = f"the comparison {measured} needs runs"
        assert err == f"error: cannot write {measured}/runs/{file} ({needed}); give another --output\n"


def test_a_training_that_fails_ends_the_comparison_with_its_line_and_its_exit_code(program, tmp_path):
    with RunFolder(tmp_path / "runs" / "cnn-jax-seed5-epochs1").locked():
        process = program("-m", "cnn_jax", *ARGUMENTS, tmp_path)
        out, err = process.communicate(timeout=300)
    (line,) = (line for line in err.splitlines() if "error" in line)
    assert (process.returncode, out) == (6, "")
    assert "is writing the run" in line


def test_a_comparison_that_is_stopped_ends_its_training_and_tells_it_in_one_line(program, tmp_path):
    process = program("-m", "cnn_jax", *ARGUMENTS, tmp_path)
    while not (tmp_path / "runs" / "cnn-jax-seed5-epochs1" / "config.json").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    out, err = process.communicate(timeout=300)  # the training has the same stderr, until it has ended
    assert (process.returncode, out) == (143, "")
    (line,) = (line for line in err.splitlines() if "stopped" in line)
    assert line == "stopped by SIGTERM; run the same command again"


def refuse(pipe):
    raise InputFileError("a file is damaged; fetch it again")


def test_a_process_that_fails_says_so_in_a_line_and_hands_its_exit_code_on(capfd):
    with start_worker(refuse, name="the process") as worker, pytest.raises(SystemExit) as ended:
        worker.receive()
    assert ended.value.code == 65
    assert capfd.readouterr().err == "error: a file is damaged; fetch it again\n"


def test_the_stage_from_equal_weights_says_how_long_it_takes(measured, command, monkeypatch):
    from cnn_jax.pytorch.equivalence import Agreement
    from cnn_jax.runtime import display

    def measure(dataset, *, seed, steps, float64_steps):
        assert len(dataset.train_labels) == 60_000
        display.time.sleep(0.3)
        return Agreement(**AGREEMENT | {"gradients": {"fc.bias": 2e-6}})

    monkeypatch.setattr("cnn_jax.pytorch.equivalence.measure_agreement", measure)
    monkeypatch.setattr(display, "REMIND_SECONDS", 0.1)
    (measured / "runs" / "agreement-seed5.json").unlink()
    code, _, err = command(*ARGUMENTS, measured)
    what = "from equal weights: 600 steps in float32 and 100 in float64, in both frameworks"
    assert code == 0, err
    assert err.startswith(f"{what}\n")
    assert f"{what}: 0." in err
    assert json.loads((measured / "runs" / "agreement-seed5.json").read_text()) == AGREEMENT
