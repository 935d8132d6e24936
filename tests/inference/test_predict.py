"""Each picture of a digit gets one line, in the order given."""

import dataclasses
import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from cnn_jax.data.idx import read_idx
from cnn_jax.inference import predict
from cnn_jax.inference.preprocess import prepare_picture
from cnn_jax.inference.pretrained import load_trained
from tests.digits import draw_digits
from tests.helpers import EMBEDDED, read_digit


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder of drawn digits, and a list of its files and the digit that each shows."""
    folder = tmp_path_factory.mktemp("digits")
    return folder, draw_digits(folder)


def test_at_least_95_percent_of_drawn_digits_are_read_right(drawn, command):
    folder, files = drawn
    code, out, err = command("predict", folder, "--json")
    assert (code, err) == (0, "")
    read = {result["file"]: result.get("digit") for result in json.loads(out)}
    wrong = [f"{file.name} as {read[str(file)]}" for file, digit in files if read[str(file)] != digit]
    assert len(files) >= 30
    assert len(wrong) <= 0.05 * len(files), wrong


@pytest.mark.slow
def test_mnists_own_images_are_read_as_well_as_without_files(packaged, tmp_path):
    images = read_idx(EMBEDDED / "t10k-images-idx3-ubyte.xz", ndim=3)[:500]
    labels = read_idx(EMBEDDED / "t10k-labels-idx1-ubyte.xz", ndim=1)[:500]
    digits = []
    for number, image in enumerate(images):
        # As scanned: dark on light, larger, and not in the middle.
        paper = np.pad(255 - image, ((9, 2), (1, 14)), constant_values=255)
        Image.fromarray(paper).resize((215, 195), Image.Resampling.BICUBIC).save(tmp_path / f"{number}.png")
        digits.append(read_digit(str(tmp_path / f"{number}.png")))
    read = packaged.logits(np.stack(digits)).argmax(axis=1)
    assert (read == labels).mean() >= 0.98


@pytest.fixture(scope="module")
def three(drawn):
    """Three of the drawn files, not in the order of their names, and the digits that are read in them."""
    _, files = drawn
    chosen = [files[i] for i in (68, 9, 40)]
    return [str(file) for file, _ in chosen], [digit for _, digit in chosen]


def test_stdout_gets_one_line_per_file_in_the_order_given(three, command):
    files, digits = three
    code, out, err = command("predict", *files)
    assert (code, out) == (0, "".join(f"{file}: {digit}\n" for file, digit in zip(files, digits, strict=True))), err


def test_a_person_sees_what_the_network_saw_and_the_three_most_probable_digits(three, command):
    files, digits = three
    code, out, err = command("predict", files[0])
    assert (code, out) == (0, f"{files[0]}: {digits[0]}\n")
    *picture, line = err.splitlines()
    assert len(picture) == 14
    assert set("".join(picture)) == set(" ▀▄█")
    seen = read_digit(files[0])[..., 0] >= 128
    assert sum("▀▄".count(block) + 2 * "█".count(block) for block in "".join(picture)) == seen.sum()
    assert re.fullmatch(rf"{re.escape(files[0])}: {digits[0]} with [>\d.]+%, \d with [<\d.]+%, \d with [<\d.]+%", line)


def test_json_holds_all_probabilities_in_the_order_given_and_nothing_else_is_printed(three, command):
    files, digits = three
    code, out, err = command("predict", *files, "--json")
    results = json.loads(out)
    assert (code, err) == (0, "")
    assert [(result["file"], result["digit"]) for result in results] == list(zip(files, digits, strict=True))
    for result in results:
        assert sum(result["probabilities"]) == pytest.approx(1)
        assert int(np.argmax(result["probabilities"])) == result["digit"]
        assert len(result["probabilities"]) == 10


def test_an_image_can_come_by_standard_input(three, program):
    files, digits = three
    with open(files[0], "rb") as image:
        process = program("-m", "cnn_jax", "predict", files[1], "-", stdin=image)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (0, f"{files[1]}: {digits[1]}\n-: {digits[0]}\n"), err
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", err)


def test_standard_input_from_a_terminal_is_refused_and_not_waited_for(program):
    leader, terminal = os.openpty()
    process = program("-m", "cnn_jax", "predict", "-", stdin=terminal)
    _, err = process.communicate(timeout=300)
    os.close(leader)
    os.close(terminal)
    assert process.returncode == 65
    assert err.startswith("error: - is standard input, which is a terminal; ")


def test_a_folder_stands_for_its_images_by_name(three, command, tmp_path):
    files, digits = three
    for name, file in zip(("b.PNG", "a.jpeg", "c.jpg"), files, strict=True):
        shutil.copy(file, tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    code, out, err = command("predict", tmp_path, files[0])
    assert code == 0, err
    assert out.splitlines() == [
        f"{tmp_path}/a.jpeg: {digits[1]}",
        f"{tmp_path}/b.PNG: {digits[0]}",
        f"{tmp_path}/c.jpg: {digits[2]}",
        f"{files[0]}: {digits[0]}",
    ]


def test_of_many_pictures_the_first_are_answered_before_the_last_are_read(three, command, monkeypatch):
    files, digits = three
    events, read = [], predict.read_picture
    monkeypatch.setattr(predict, "read_picture", lambda *given: events.append("read") or read(*given))
    monkeypatch.setattr(predict.Display, "result", lambda display, *lines: events.extend(lines))
    assert command("predict", *files)[0] == 0
    first, second, third = (f"{file}: {digit}" for file, digit in zip(files, digits, strict=True))
    assert events == ["read", first, "read", second, "read", third]


def test_files_that_cannot_be_read_are_reported_last_and_the_others_are_read(three, command, tmp_path):
    files, digits = three
    (tmp_path / "empty.png").touch()
    given = (files[0], tmp_path / "missing.png", files[1], tmp_path / "empty.png", files[0])
    code, out, err = command("predict", *given)
    assert (code, out.splitlines()) == (65, [f"{files[i]}: {digits[i]}" for i in (0, 1, 0)])
    assert err.splitlines()[-2:] == [
        f"error: {tmp_path}/missing.png cannot be opened (No such file or directory); give a picture file",
        f"error: {tmp_path}/empty.png is empty; give a picture file",
    ]
    code, out, _ = command("predict", *given, "--json")
    assert (code, [result["file"] for result in json.loads(out)]) == (65, [str(files[i]) for i in (0, 1, 0)])
    assert command("predict", tmp_path / "missing.png")[:2] == (65, "")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has such files")
def test_every_input_that_can_be_read_is_answered(three, command, tmp_path):
    files, digits = three
    (tmp_path / "none").mkdir()
    bad = ("/proc/self/mem", tmp_path / "none", "/dev/zero", "n" * 300, tmp_path / "\x1b[2J.png")
    code, out, err = command("predict", *(word for name in bad for word in (name, files[0])))
    assert (code, out) == (65, f"{files[0]}: {digits[0]}\n" * len(bad))
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert [line.partition(" is ")[0].partition(" cannot ")[0] for line in errors] == [
        f"error: {str(name).replace(chr(27), chr(92) + 'x1b')}" for name in bad
    ]
    assert errors[0] == "error: /proc/self/mem cannot be read (Input/output error); give a picture file"


def test_a_digit_is_drawn_on_a_terminal_of_any_encoding(three, program):
    files, digits = three
    process = program("-m", "cnn_jax", "predict", files[0], env=os.environ | {"PYTHONIOENCODING": "ascii"})
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (0, f"{files[0]}: {digits[0]}\n"), err
    assert set("".join(err.splitlines()[:14])) == set(" '.#")


def test_at_least_one_image_must_be_named(command):
    code, out, err = command("predict")
    assert (code, out) == (2, "")
    assert "at least one picture file" in err


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_name_that_is_not_text_is_printed_with_its_bytes(three, program, tmp_path):
    files, digits = three
    file = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")
    shutil.copy(files[0], file)
    process = program("-m", "cnn_jax", "predict", file, env=os.environ | {"PYTHONUTF8": "1"})
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (0, f"{tmp_path}/\\xff.png: {digits[0]}\n"), err


@pytest.mark.optax_promotes
@pytest.mark.usefixtures("without_report")
def test_a_run_reads_with_its_own_weights(three, command, small_mnist, tmp_path):
    where = ("--checkpoint-dir", tmp_path)
    quick = ("--epochs", 1, "--features", 4, 8)
    assert command("train", "--dataset-dir", small_mnist, "--run-name", "run", *quick, *where)[0] == 0
    files, _ = three
    code, out, err = command("predict", *files, "--run", "run", *where, "--json", "--one")
    assert code == 0, err
    network = load_trained(tmp_path / "run", None, pytest.fail)
    logits = network.logits(np.stack([read_digit(file) for file in files]))
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose([result["probabilities"] for result in json.loads(out)], expected, rtol=1e-4)
    Image.new("L", (90, 90), 200).save(tmp_path / "blank.png")
    code, out, err = command("predict", tmp_path / "blank.png", "--run", "run", *where)
    assert (code, out) == (65, f"{tmp_path}/blank.png: ?\n")
    assert err.endswith("if run has learned no digits, name its classes in a labels.txt beside its data\n")
    code, out, err = command("predict", *files, "--run", "none", *where)
    assert (code, out) == (3, "")
    assert "none is not a run" in err


def test_a_run_of_images_that_no_picture_can_be_is_refused(three, command, packaged, monkeypatch):
    other = dataclasses.replace(packaged, image_shape=(32, 32, 4))
    monkeypatch.setattr("cnn_jax.inference.predict.load_trained", lambda *arguments: other)
    code, out, err = command("predict", three[0][0], "--run", "some")
    assert (code, out) == (2, "")
    end = "its network takes images of 32x32x4; pictures have 1 or 3 channels; name another run\n"
    assert err == f"error: --run some: {end}"


def only(lines):
    """The image of the one reading."""
    ((reading,),) = lines
    return reading.image[..., 0]


def test_a_picture_of_anything_else_is_shrunk_to_the_networks_images_and_as_dark_as_they_are(packaged, real_images):
    boot, names = real_images[0][0], ("Ankle boot", *map(str, range(9)))
    enlarged = np.repeat(boot.repeat(10, axis=0).repeat(10, axis=1)[..., np.newaxis], 3, axis=-1).astype(np.float32)
    network = dataclasses.replace(packaged, class_names=names)
    for colours in (enlarged, 255 - enlarged):
        np.testing.assert_array_equal(only(network.read(colours)), boot)
    light = dataclasses.replace(network, background=255)
    np.testing.assert_array_equal(only(light.read(enlarged)), 255 - boot)
    shrunk = prepare_picture(enlarged, (14, 7, 3), 0)
    assert shrunk is not None
    assert shrunk.shape == (14, 7, 3)
    assert network.read(np.full((50, 50, 3), 9, np.float32)) == []
    assert not np.array_equal(only(packaged.read(enlarged, one=True)), boot)  # digits are laid out as MNIST does


def test_the_answer_has_the_classs_name_and_number(three, command):
    files, digits = three
    for answer, digit in zip(json.loads(command("predict", *files, "--json")[1]), digits, strict=True):
        assert (answer["digit"], answer["class"], answer["index"]) == (digit, str(digit), digit)
