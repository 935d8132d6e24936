"""Several digits in a picture are read in order, and what is no digit is told as such."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from cnn_jax.data.idx import read_idx
from cnn_jax.inference.characters import find_characters
from cnn_jax.inference.pictures import read_picture
from cnn_jax.inference.pretrained import LEAST_PROBABILITY, log_probabilities_of_digits
from tests.digits import DARK_PENS, SHAPES, draw_no_digits, draw_numbers, draw_strokes
from tests.helpers import EMBEDDED


def draw_row(digits, *, height=60, gap=40, top=50):
    """A sheet with a row of digits, and the box of each: left, top, right, bottom."""
    strokes, boxes, left = [], [], 40
    for digit in digits:
        drawn = [stroke * height for stroke in SHAPES[digit][0]]
        low = np.min([stroke.min(axis=0) for stroke in drawn], axis=0)
        drawn = [stroke - low + (left, top) for stroke in drawn]
        right, bottom = np.max([stroke.max(axis=0) for stroke in drawn], axis=0)
        boxes.append((left, top, right, bottom))
        strokes += drawn
        left = right + gap
    size = (int(left), top + height + 50)
    covered = draw_strokes(np.random.default_rng(1), strokes, DARK_PENS[2], height, size)
    return Image.fromarray((250 - 240 * covered).astype(np.uint8)), boxes


@pytest.fixture(scope="module")
def row(tmp_path_factory):
    """A file with the digits 4, 0 and 7 in a row, and their boxes."""
    file = tmp_path_factory.mktemp("row") / "row.png"
    picture, boxes = draw_row([4, 0, 7])
    picture.save(file)
    return file, boxes


def errors(read, expected):
    """The fewest digits to add, take away or change so that one text becomes the other."""
    row = list(range(len(expected) + 1))
    for i, a in enumerate(read, start=1):
        last, row = row, [i]
        for j, b in enumerate(expected, start=1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (a != b)))
    return row[-1]


@pytest.mark.slow(seconds=40)
def test_most_numbers_of_all_manners_are_read_right_and_few_digits_are_invented(packaged, tmp_path):
    wrong, invented, total, told = {}, 0, {}, []
    for file, lines in draw_numbers(tmp_path):
        readings = packaged.read(read_picture(str(file)).colours)
        read = "/".join("".join("?" if each.index is None else str(each.index) for each in line) for line in readings)
        expected = "/".join("".join(map(str, line)) for line in lines)
        manner = file.name.partition("-")[0]
        total[manner] = total.get(manner, 0) + sum(map(len, lines))
        wrong[manner] = wrong.get(manner, 0) + errors(read, expected)
        invented += max(0, len(read.replace("?", "")) - len(expected))
        told += [f"{file.name}: {read} for {expected}"] * (read != expected)
    count = sum(total.values())
    assert count >= 200
    assert sum(wrong.values()) <= 0.05 * count, told
    assert wrong["touching"] <= 0.2 * total["touching"], told
    assert wrong["broken"] <= 0.12 * total["broken"], told
    assert wrong["apart"] + wrong["squared"] + wrong["cells"] <= 0.01 * count, told
    assert invented <= 0.02 * count, told


@pytest.mark.slow(seconds=30)
def test_most_pictures_without_a_digit_are_refused_and_mnists_own_digits_are_not(packaged, tmp_path):
    images = read_idx(EMBEDDED / "t10k-images-idx3-ubyte.xz", ndim=3)[..., np.newaxis]
    of_digit = np.exp(log_probabilities_of_digits(images)).sum(axis=1)
    assert (of_digit < LEAST_PROBABILITY).mean() <= 0.01
    files = draw_no_digits(tmp_path)
    taken = []
    for file in files:
        readings = packaged.read(read_picture(str(file)).colours)
        if any(reading.index is not None for line in readings for reading in line):
            taken.append(file.name)
    assert len(files) == 200
    assert len(taken) <= 20, taken


def test_a_row_is_one_line_on_stdout_and_is_drawn_side_by_side(row, command):
    file, _ = row
    code, out, err = command("predict", file)
    assert (code, out) == (0, f"{file}: 4 0 7\n")
    assert len(err.splitlines()) == 7
    assert max(map(len, err.splitlines())) > 28


def test_json_has_each_character_and_its_box_in_the_files_pixels(row, command, tmp_path):
    file, boxes = row
    (result,) = json.loads(command("predict", file, "--json")[1])
    assert [each["class"] for each in result["characters"]] == ["4", "0", "7"]
    assert [each["index"] for each in result["characters"]] == [4, 0, 7]
    assert "class" not in result
    for each, box in zip(result["characters"], boxes, strict=True):
        np.testing.assert_allclose(each["box"], box, atol=6)
        assert sum(each["probabilities"]) == pytest.approx(1)
    with Image.open(file) as picture:
        picture.resize((picture.width * 4, picture.height * 4)).save(tmp_path / "large.png")
    (large,) = json.loads(command("predict", tmp_path / "large.png", "--json")[1])
    for each, box in zip(large["characters"], boxes, strict=True):
        np.testing.assert_allclose(each["box"], 4 * np.array(box), atol=24)


def test_a_picture_of_one_has_the_keys_of_one_beside_its_characters(command):
    (result,) = json.loads(command("predict", "docs/four.jpg", "--json")[1])
    (character,) = result["characters"]
    assert {key: result[key] for key in ("class", "index", "digit", "probabilities")} == {
        key: character[key] for key in ("class", "index", "digit", "probabilities")
    }


def test_with_one_the_picture_is_one_character(row, command):
    (result,) = json.loads(command("predict", row[0], "--one", "--json")[1])
    assert len(result["characters"]) == 1


def test_boxes_are_drawn_where_the_characters_are(row, command, tmp_path):
    file, boxes = row
    code, out, err = command("predict", file, "--boxes", tmp_path / "boxes.png")
    assert (code, out) == (0, f"{file}: 4 0 7\n"), err
    drawn = np.asarray(Image.open(tmp_path / "boxes.png").convert("RGB")).astype(int)
    coloured = np.ptp(drawn, axis=-1) > 50
    for left, top, right, bottom in boxes:
        middle = round((top + bottom) / 2)
        assert coloured[middle, round(left) - 8 : round(left) + 4].any()
        assert coloured[middle, round(right) - 4 : round(right) + 8].any()
        assert coloured[round(top) - 18 : round(top) - 8, round(left) - 4 : round(left) + 8].mean() > 0.5, "a label"
    code, out, err = command("predict", file, file, "--boxes", tmp_path / "two.png")
    assert (code, out, err) == (2, "", f"error: --boxes {tmp_path}/two.png: it is for one picture; give one\n")


@pytest.mark.parametrize("given", ["", "row.png"])
def test_boxes_are_not_drawn_over_the_picture_that_is_read(given, row, command, tmp_path):
    shutil.copy(row[0], tmp_path)
    (tmp_path / "link").symlink_to("row.png")
    for name in "row.png", "link":
        code, out, err = command("predict", tmp_path / given, "--boxes", tmp_path / name)
        assert (code, out) == (4, "")
        assert err == f"error: cannot write {tmp_path}/{name} (it is what is read); give another --boxes\n"
    assert (tmp_path / "row.png").read_bytes() == row[0].read_bytes()


def test_no_digit_is_an_answer_and_a_failure_only_where_there_is_no_other(row, command, tmp_path):
    Image.new("L", (90, 90), 200).save(tmp_path / "blank.png")
    code, out, err = command("predict", tmp_path / "blank.png", row[0])
    assert (code, out.splitlines()) == (0, [f"{tmp_path}/blank.png: ?", f"{row[0]}: 4 0 7"]), err
    (blank, _) = json.loads(command("predict", tmp_path / "blank.png", row[0], "--json")[1])
    assert (blank["class"], blank["index"], blank["characters"]) == (None, None, [])
    code, out, err = command("predict", tmp_path / "blank.png")
    assert (code, out) == (65, f"{tmp_path}/blank.png: ?\n")
    assert err.splitlines() == [f"error: no digit was found in {tmp_path}/blank.png; give a picture with more contrast"]


def test_letters_are_found_by_their_parts_alone(row):
    """Without a network that tells a character, no part is cut, and only what lies above each other is joined."""
    ((four, zero, seven),) = find_characters(read_picture(str(row[0])).colours, None)
    for character, box in zip((four, zero, seven), row[1], strict=True):
        np.testing.assert_allclose(character.box, box, atol=6)
        assert character.image.shape == (28, 28, 1)


def test_digits_close_below_others_are_a_line_of_their_own():
    picture, _ = draw_row([4, 0, 7], height=60, top=50)
    ink = np.asarray(picture)[42:118]  # the digits and 8 pixels above and below them, of which strokes cover some
    rows = np.vstack([np.full((40, ink.shape[1]), 250, np.uint8), ink, ink, np.full((40, ink.shape[1]), 250, np.uint8)])
    colours = np.repeat(rows[..., np.newaxis], 3, axis=-1).astype(np.float32)
    assert [len(line) for line in find_characters(colours, None)] == [3, 3]


def test_a_printed_line_is_erased_where_it_runs_along_a_stroke_too():
    picture, boxes = draw_row([8, 4, 8])
    colours = np.repeat(np.asarray(picture)[..., np.newaxis], 3, axis=-1).astype(np.float32)
    colours[78] = np.minimum(colours[78], 150)  # through the waists of the 8s, where the ink is as wide as it is tall
    (line,) = find_characters(colours, None)
    for character, box in zip(line, boxes, strict=True):
        np.testing.assert_allclose(character.box, box, atol=6)


def test_the_loose_bar_of_a_digit_close_below_another_does_not_join_two_lines():
    colours = np.full((200, 300, 3), 250, np.float32)
    low = np.asarray(draw_row([0], height=42)[0])[40:102]  # with 10 pixels around it
    tall = np.asarray(draw_row([0], height=62)[0])[40:122]
    for left in 30, 150:
        colours[20 : 20 + len(tall), left : left + tall.shape[1]] = tall[..., np.newaxis]
        colours[112 : 112 + len(low), left : left + low.shape[1]] = low[..., np.newaxis]
    colours[104:110, 75:105] = 10  # below the first of the taller digits, and above the first of the others
    upper, lower = find_characters(colours, None)
    assert [len(upper), len(lower)] == [2, 2]
