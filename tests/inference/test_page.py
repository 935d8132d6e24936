"""The page without a server reads as `predict` does, asks for nothing, and shows names as nothing but text."""

import dataclasses
import itertools
import json
import re
import shutil
import time

import jax
import numpy as np
import pytest
from PIL import Image

from cnn_jax.data.idx import read_idx
from cnn_jax.inference.page import EMBEDDED as EMBEDDED_JSON
from cnn_jax.inference.page import FOLDER, write_page
from cnn_jax.inference.pictures import ORIENTATION, read_picture
from tests.digits import (
    DARK_PAPERS,
    DARK_PENS,
    LIGHT_PAPERS,
    LIGHT_PENS,
    NO_DIGITS,
    SHAPES,
    draw_digit,
    draw_no_digit,
    draw_numbers,
)
from tests.helpers import EMBEDDED, ROOT, start_browser, touch

CHANGE = "document.title = 'changed'"
HOSTILE = f'</script><script>{CHANGE}</script><img src=x onerror="{CHANGE}"><!-- &amp; {{{{ 7 * 7 }}}}'


def embedded_in(file):
    """What the scripts of a page get from Python."""
    (embedded,) = EMBEDDED_JSON.findall(file.read_text())
    return json.loads(embedded)


@pytest.fixture(scope="module")
def page(packaged, tmp_path_factory):
    """The page of the network in the package."""
    file = tmp_path_factory.mktemp("page") / "digits.html"
    write_page(packaged, file)
    return file


def of_other_images(packaged, image_shape, class_names):
    """A network that takes other images and was never trained."""
    other = dataclasses.replace(
        packaged, image_shape=image_shape, class_names=class_names, features=(5, 7), temperature=0.5, background=20
    )
    images = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    shapes = jax.eval_shape(other.model.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    return dataclasses.replace(other, params=params)


def test_the_page_is_one_small_file_that_loads_nothing_and_forbids_itself_to(page):
    text = page.read_text()
    assert page.stat().st_size < 1_000_000
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="(.*?)">', text)
    assert policy == ("default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:")
    assert text.index(policy) < text.index("<style>") < text.index("<script")
    assert re.findall(r'(?:src|href|action|srcset|data)="(.*?)"', text) == ["data:,"]
    assert not re.search(r"https?:|@import|url\((?!\$\{)", text)


def test_the_scripts_can_stand_in_a_document():
    for script in FOLDER.glob("*.js"):
        assert not re.search("</script|<!--", script.read_text(), re.IGNORECASE), script.name


def test_what_names_hold_is_text_and_no_markup(packaged, page, tmp_path):
    names = (HOSTILE, "B\u202e", "\ud800", *"DEFGHIJ")
    write_page(dataclasses.replace(packaged, name=HOSTILE, class_names=names), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert re.findall("</?script|<img|<!--", text) == re.findall("</?script|<img|<!--", page.read_text())
    assert embedded_in(tmp_path / "page.html")["class_names"] == [HOSTILE, r"B\u202e", r"\ud800", *"DEFGHIJ"]


def test_a_run_of_images_with_as_many_channels_as_no_picture_has_is_refused(packaged, command, tmp_path, monkeypatch):
    other = of_other_images(packaged, (28, 28, 4), packaged.class_names)
    monkeypatch.setattr("cnn_jax.inference.export.load_packaged", lambda seed: other)
    code, out, err = command("export", "--to", "html", "--output", tmp_path / "page.html")
    assert (code, out, list(tmp_path.iterdir())) == (2, "", [])
    assert err.splitlines()[-1] == (
        "error: mnist: its network takes images of 28x28x4; pictures have 1 or 3 channels; name another run"
    )


def test_the_pages_tell_how_the_page_is_made_and_what_that_prints(command, tfds_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = command("export", "--to", "html", "--output", "digits.html", "--data-dir", tfds_folder)
    assert code == 0
    told = "$ python -m cnn_jax export --to html --output digits.html\n" + "".join(err.splitlines(True)[-2:])
    assert told in (ROOT / "docs" / "using-a-network.md").read_text()
    row = r"^\| .* \| `python -m cnn_jax export --to html .*\(docs/using-a-network.md#a-page-without-a-server\) \|$"
    assert re.search(row, (ROOT / "README.md").read_text(), re.MULTILINE)
    assert (tmp_path / "digits.html").stat().st_size < 1_000_000


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """A real browser without a window, which logs its requests."""
    driver = start_browser(
        tmp_path_factory.mktemp("browser"), "--window-size=1000,800", logs=("performance", "browser")
    )
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


# Reads a file as the page does, and returns what it makes of it.
READ_FILE = """
const [number, done] = arguments, url = URL.createObjectURL(document.getElementById("test").files[number]);
pictureOf(url).then(read).then(
  ({lines}) => done(lines.map(line => line.map(each => ({...each, image: [...each.image]})))),
  error => done(String(error)),
);
"""


def read_on_page(driver, file, pictures):
    """Open a page, and return what it makes of picture files."""
    driver.get(file.as_uri())
    give_files(driver, pictures)
    return [driver.execute_async_script(READ_FILE, number) for number in range(len(pictures))]


def give_files(driver, files):
    """Put files into an input of the test's own on a page."""
    driver.execute_script(
        "const input = document.createElement('input');"
        "[input.type, input.multiple, input.id] = ['file', true, 'test'];"
        "document.body.append(input);"
    )
    driver.find_element("id", "test").send_keys("\n".join(map(str, files)))


def assert_same_readings(found, trained, pictures):
    """The page's readings, in lines, are those of `predict`."""
    assert len(found) == len(pictures)
    for lines, picture in zip(found, pictures, strict=True):
        assert not isinstance(lines, str), lines
        expected = trained.read(read_picture(str(picture)).colours)
        assert indices_of(lines) == [[each.index for each in line] for line in expected], picture
        for reading, each in zip(itertools.chain(*lines), itertools.chain(*expected), strict=True):
            image = np.reshape(reading["image"], trained.image_shape)
            assert np.abs(image - each.image.astype(int)).max() <= 1, picture
            np.testing.assert_allclose(reading["probabilities"], each.probabilities, atol=1e-4, err_msg=str(picture))


def indices_of(lines):
    """What a page read in each line."""
    return [[reading["index"] for reading in line] for line in lines]


def pasted(rng, image):
    """A test image of MNIST, enlarged, somewhere on a larger sheet of its colour or of the other polarity."""
    side = int(rng.integers(40, 400))
    width, height = (int(each) for each in rng.integers(side, 2 * side, 2))
    sheet = Image.new("L", (width, height))
    corner = (int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1)))
    sheet.paste(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC), corner)
    return Image.fromarray(255 - np.asarray(sheet)) if rng.random() < 0.5 else sheet


def transparent(picture, colour):
    """A digit in one colour on nothing."""
    grey = np.asarray(picture.convert("L"))
    layer = np.zeros((*grey.shape, 4), np.uint8)
    # Opaque or not at all, because a browser keeps the colours of what shines through only to a few levels.
    layer[..., :3], layer[..., 3] = colour, np.where((grey > 127) == (grey.mean() < 127), 255, 0)
    return Image.fromarray(layer)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """200 picture files: drawn, of MNIST's test images, large, narrow, transparent, blank, and of no digit."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("pictures")
    drawn = []
    for i in range(95):
        pens, papers = (LIGHT_PENS, DARK_PAPERS) if i % 3 == 0 else (DARK_PENS, LIGHT_PAPERS)
        shapes = SHAPES[i % 10]
        strokes, pen = shapes[rng.integers(len(shapes))], pens[rng.integers(len(pens))]
        drawn.append(draw_digit(rng, strokes, pen, papers[rng.integers(len(papers))]))
    images = read_idx(EMBEDDED / "t10k-images-idx3-ubyte.xz", ndim=3)
    drawn += [pasted(rng, image) for image in images[:60]]
    drawn += [drawn[i].resize(size) for i, size in enumerate([(4000, 3000), (1100, 2500), (3001, 2001)])]
    drawn += [drawn[i].resize(size) for i, size in enumerate([(60, 512), (700, 40), (8, 8), (9, 33)], start=3)]
    drawn += [transparent(drawn[i], [(0, 0, 0), (255, 255, 255), (200, 30, 40)][i % 3]) for i in range(7)]
    drawn += [Image.new("RGB", (120, 80), colour) for colour in ("white", "black", "teal")]
    drawn += [draw_no_digit(rng, NO_DIGITS[i % len(NO_DIGITS)]) for i in range(28)]
    files = [folder / f"{number}.png" for number in range(len(drawn))]
    for file, picture in zip(files, drawn, strict=True):
        picture.save(file)
    return files


@pytest.mark.slow(seconds=90)
def test_200_pictures_are_read_as_predict_reads_them(driver, page, packaged, pictures):
    assert len(pictures) == 200
    found = read_on_page(driver, page, pictures)
    assert_same_readings(found, packaged, pictures)
    indices = {index for lines in found for line in indices_of(lines) for index in line}
    assert indices == {*range(10), None}
    assert [] in found


@pytest.mark.slow(seconds=60)
def test_32_pictures_of_several_digits_are_read_line_by_line_as_predict_reads_them(driver, page, packaged, tmp_path):
    """Digits apart, touching, broken, on ruled and squared paper, in a shadow, in cells and in forms."""
    files = [file for file, _ in draw_numbers(tmp_path)][::2]  # of every manner
    assert len(files) == 32
    found = read_on_page(driver, page, files)
    assert_same_readings(found, packaged, files)
    assert {len(lines) for lines in found} >= {1, 2, 3}
    assert sum(len(line) for lines in found for line in lines) > 150


@pytest.mark.slow(seconds=10)
@pytest.mark.parametrize("image_shape", [(23, 21, 1), (16, 18, 3)])
def test_other_images_and_classes_are_read_as_predict_reads_them_too(image_shape, driver, packaged, pictures, tmp_path):
    names = (HOSTILE, "a bag", *(f"class {number}" for number in range(2, 12)))
    trained = of_other_images(packaged, image_shape, names)
    write_page(trained, tmp_path / "page.html")
    some = [pictures[i] for i in (0, 1, 30, 100, 155, 158, 166, 170, 190)]
    found = read_on_page(driver, tmp_path / "page.html", some)
    assert_same_readings(found, trained, some)
    ((reading,),) = found[0]
    assert driver.find_elements("css selector", "canvas:not(#seen)") == []  # no board to draw on
    driver.find_element("css selector", "input").send_keys(str(some[0]))
    wait_for(driver, names[reading["index"]])
    rows = [row.text for row in driver.find_elements("css selector", ".class b")]
    most = sorted(np.argsort(reading["probabilities"])[-10:])
    assert rows == [names[i] for i in most]
    assert driver.title == "mnist reads a picture"


@pytest.mark.slow(seconds=5)
def test_letters_are_drawn_and_laid_out_as_predict_does_and_all_that_is_drawn_is_one(
    driver, packaged, pictures, tmp_path
):
    trained = of_other_images(packaged, (28, 28, 1), tuple("ABCDEFGHIJKL"))
    write_page(trained, tmp_path / "page.html")
    some = [*pictures[:3], *pictures[-6:]]
    found = read_on_page(driver, tmp_path / "page.html", some)
    assert_same_readings(found, trained, some)
    assert all(reading["index"] is not None for lines in found for line in lines for reading in line)
    assert max(len(line) for lines in found for line in lines) > 1
    assert driver.find_element("css selector", "h1").text == "Draw a character"
    draw_seven(driver, "mouse")
    wait_for(driver, *trained.class_names)


def wait_for(driver, *answers):
    """Wait until a page gives one of some answers."""
    wait_until(driver, "return document.querySelector('output').innerText", *answers)


def wait_until(driver, script, *expected):
    """Wait until a script returns one of these, at most two minutes; the beginning of a drawing may be read first."""
    end = time.monotonic() + 120
    while (found := driver.execute_script(script)) not in expected:
        assert time.monotonic() < end, found
        time.sleep(0.05)


def told_on(driver):
    """What a page says about its answer."""
    return driver.find_element("css selector", "#told").text


@pytest.mark.slow(seconds=5)
def test_what_is_no_digit_and_no_picture_is_told(driver, page, packaged, pictures, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    Image.new("L", (2000, 20), 255).save(tmp_path / "narrow.png")
    Image.new("L", (200, 200), 255).save(tmp_path / "blank.png")
    readings = ((file, packaged.read(read_picture(str(file)).colours)) for file in reversed(pictures))
    shutil.copy(
        next(file for file, lines in readings if [[each.index for each in line] for line in lines] == [[None]]),
        tmp_path / "scribble.png",
    )
    driver.get(page.as_uri())
    for name, told in {
        "text.png": "The file is no picture that this browser can read; save it as PNG or JPEG.",
        "narrow.png": "The picture is too small or too narrow; give a larger one.",
        "blank.png": "Nothing was found; give a picture with more contrast.",
        "scribble.png": "This is no digit.",
    }.items():
        driver.find_element("css selector", "input").send_keys(str(ROOT / "docs" / "four.jpg"))
        wait_for(driver, "4")
        driver.find_element("css selector", "input").send_keys(str(tmp_path / name))
        wait_for(driver, "?")
        assert told_on(driver) == told
        assert driver.find_elements("css selector", ".class") == []
        assert driver.find_element("id", "seen").is_displayed() == (name == "scribble.png")


@pytest.mark.slow(seconds=3)
def test_a_photograph_is_turned_upright_as_its_camera_says(driver, page, tmp_path):
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    with Image.open(ROOT / "docs" / "four.jpg") as picture:
        picture.rotate(90, expand=True).save(tmp_path / "turned.jpg", quality=95, exif=turned)
    driver.get(page.as_uri())
    driver.find_element("css selector", "input").send_keys(str(tmp_path / "turned.jpg"))
    wait_for(driver, "4")


# Drops one file on the page, whose decoding takes long, and pastes another.
GIVE_FILES = """
const decode = pictureOf;
let waits = 300; // milliseconds
pictureOf = async url => {
  const wait = waits;
  waits = 0;
  await new Promise(done => setTimeout(done, wait));
  return decode(url);
};
const [first, second] = [...document.getElementById("test").files].map(file => {
  const given = new DataTransfer();
  given.items.add(file);
  return given;
});
document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: first, bubbles: true, cancelable: true}));
document.body.dispatchEvent(new ClipboardEvent("paste", {clipboardData: second, bubbles: true}));
"""


@pytest.mark.slow(seconds=3)
def test_a_picture_is_dropped_or_pasted_and_the_newest_counts(driver, page, tmp_path):
    Image.new("L", (200, 200), 255).save(tmp_path / "blank.png")
    for names, answer in ((("four.jpg", "blank.png"), "?"), (("blank.png", "four.jpg"), "4")):
        driver.get(page.as_uri())
        give_files(driver, [ROOT / "docs" / name if name == "four.jpg" else tmp_path / name for name in names])
        driver.execute_script(GIVE_FILES)
        wait_for(driver, answer)
        time.sleep(0.5)
        wait_for(driver, answer)


def draw_seven(driver, kind):
    """Draw a 7 on the board with the mouse or a finger."""
    from selenium.webdriver.common.actions.action_builder import ActionBuilder
    from selenium.webdriver.common.actions.pointer_input import PointerInput

    board = driver.find_element("css selector", "#board canvas")
    actions = ActionBuilder(driver, mouse=PointerInput(kind, kind), duration=1)
    actions.pointer_action.move_to(board, -60, -70).pointer_down()
    for x, y in [(-60 + 10 * i, -70) for i in range(13)] + [(60 - 5 * i, -70 + 13 * i) for i in range(12)]:
        actions.pointer_action.move_to(board, x, y)
    actions.pointer_action.pointer_up()
    actions.perform()


@pytest.mark.slow(seconds=5)
def test_a_drawn_digit_is_read_and_no_request_leaves_the_page(driver, page):
    driver.get(page.as_uri())
    driver.get_log("performance")
    driver.get(page.as_uri())
    draw_seven(driver, "mouse")
    most = "[...document.querySelectorAll('.class.most')].map(e => e.innerText.trim().split(/\\s+/))"
    wait_until(driver, f"return [document.querySelectorAll('.class').length, {most}]", [10, [["7", ">99.9%"]]])
    driver.find_element("css selector", "input").send_keys(str(ROOT / "docs" / "four.jpg"))
    wait_for(driver, "4")
    # The picture has taken the drawing's place: what is drawn now is alone on the board.
    draw_seven(driver, "mouse")
    wait_for(driver, "7")
    driver.find_element("css selector", "#board button").click()
    wait_for(driver, "nothing yet")
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    assert page.as_uri() in asked
    assert all(url == page.as_uri() or url.startswith(("blob:", "data:")) for url in asked)
    refused = driver.execute_async_script(
        "const done = arguments[0]; fetch('http://127.0.0.1:9/').then(() => done(null), error => done(error.message))"
    )
    assert refused == "Failed to fetch"
    assert "Content Security Policy" in str(driver.get_log("browser"))


@pytest.fixture
def phone(driver):
    """The browser with a phone's small window, which fingers touch."""
    window = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", window)
    driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    yield driver
    driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.slow(seconds=5)
def test_on_a_phone_a_digit_is_drawn_and_cleared_by_touch_and_nothing_lies_beside_the_window(phone, page):
    phone.get(page.as_uri())
    widths = "return [innerWidth, document.documentElement.scrollWidth]"
    wait_for(phone, "nothing yet")
    assert phone.execute_script(widths) == [390, 390]
    draw_seven(phone, "touch")
    wait_for(phone, "7")
    assert phone.execute_script(widths) == [390, 390]
    answer = phone.find_element("css selector", "output").rect
    assert answer["y"] + answer["height"] < 844  # it is seen while one draws
    camera = phone.find_element("css selector", ".camera")
    assert camera.is_displayed()
    assert camera.find_element("css selector", "input").get_attribute("capture") == "environment"
    for control in phone.find_elements("css selector", "button, label"):
        assert control.rect["height"] >= 44
    for _ in range(10):  # on a busy machine a tap may be lost
        touch(phone, "#board button", [(0.5, 0.5)])
        time.sleep(0.5)
        if phone.find_element("css selector", "output").text == "nothing yet":
            break
    wait_for(phone, "nothing yet")


@pytest.mark.slow(seconds=10)
def test_several_digits_are_read_while_they_are_drawn_and_shown_side_by_side_in_their_lines(phone, page):
    phone.get(page.as_uri())
    bar_and_stem = [(0.025 * i, 0) for i in range(9)] + [(0.2 - 0.015 * i, 0.04 * i) for i in range(9)]
    answers = []
    for left, top in ((0.1, 0.1), (0.4, 0.1), (0.7, 0.1), (0.3, 0.57)):
        touch(phone, "#board canvas", [(left + x, top + y) for x, y in bar_and_stem])
        answers.append("7")
        wait_for(phone, " ".join(answers))
    shown_and_in_line = (  # each line's images stand side by side
        "const rows = [...document.querySelectorAll('#characters > div')];"
        "return [rows.map(row => [...row.children].map(e => [e.innerText.split(/\\s+/), e.className])),"
        "  rows.every(row => [...row.children].every(e => e.offsetTop === row.firstChild.offsetTop))]"
    )
    wait_until(phone, shown_and_in_line, [[[[["7", ">99.9%"], ""]] * 3, [[["7", ">99.9%"], ""]]], True])
    assert phone.execute_script("return document.documentElement.scrollWidth") == 390
    assert not phone.find_element("id", "seen").is_displayed()
    # While several are read, a board that is cleared is empty at once, and stays so.
    touch(phone, "#board canvas", [(0.6, 0.57), (0.6, 0.9)])
    phone.execute_script("document.querySelector('#board button').click()")
    wait_for(phone, "nothing yet")
    time.sleep(0.5)
    wait_for(phone, "nothing yet")


@pytest.mark.slow(seconds=5)
def test_by_keyboard_a_picture_is_chosen_and_cleared_and_the_focus_is_seen(driver, page):
    from selenium.webdriver import ActionChains, Keys

    driver.get(page.as_uri())
    outlines = []
    for _ in range(2):
        ActionChains(driver).send_keys(Keys.TAB).perform()
        outlines.append(
            driver.execute_script(
                "const focused = document.activeElement, seen = focused.closest('label') ?? focused;"
                "const style = getComputedStyle(seen);"
                "return [seen.textContent.trim(), style.outlineStyle, style.outlineWidth]"
            )
        )
    assert outlines == [["Clear", "solid", "3px"], ["Choose a picture", "solid", "3px"]]
    driver.switch_to.active_element.send_keys(str(ROOT / "docs" / "four.jpg"))
    wait_for(driver, "4")
    ActionChains(driver).key_down(Keys.SHIFT).send_keys(Keys.TAB).key_up(Keys.SHIFT).send_keys(Keys.ENTER).perform()
    wait_for(driver, "nothing yet")
    assert driver.find_element("css selector", "#board canvas").value_of_css_property("background-image") == "none"
