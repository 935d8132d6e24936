"""A run's page shows its results in one file that opens without a network and runs nothing."""

import base64
import html.parser
import io
import json
import re
import shutil

import jax
import pytest
from PIL import Image

from cnn_jax.runs.summary import mean_interval
from cnn_jax.runtime.display import describe_seconds

pytestmark = pytest.mark.optax_promotes


@pytest.fixture(scope="module")
def of_three_seeds(trained_run):
    return trained_run("--seeds", 3, epochs=2)


class Page(html.parser.HTMLParser):
    """A page as a browser reads it: its elements, their attributes, its words and its styles."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.named, self.words, self.styles = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.named += [(tag, name, value) for name, value in attributes]

    def handle_data(self, data):
        (self.styles if self.elements[-1:] == ["style"] else self.words).append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def read(folder):
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_a_page_elsewhere_is_the_one_that_training_ends_with_and_leaves_the_run_alone(
    of_three_seeds, command, tmp_path
):
    before = {path: path.stat().st_mtime_ns for path in of_three_seeds.rglob("*")}
    code, out, err = command("report", of_three_seeds, "--output", tmp_path / "page.html")
    assert (code, out) == (0, "")
    assert f"the report is {tmp_path / 'page.html'}" in err
    assert (tmp_path / "page.html").read_text() == (of_three_seeds / "report.html").read_text()
    assert {path: path.stat().st_mtime_ns for path in of_three_seeds.rglob("*")} == before


def test_a_page_that_cannot_be_written_is_named_as_it_was_asked_for(of_three_seeds, command, tmp_path):
    code, _, err = command("report", of_three_seeds, "--output", tmp_path / "no" / "page.html")
    assert code == 4
    assert err == f"error: cannot write {tmp_path}/no/page.html (No such file or directory); give another --output\n"


def test_the_page_opens_without_a_network_and_runs_nothing(of_three_seeds):
    page = read(of_three_seeds)
    sources = {value for _, name, value in page.named if name in ("src", "srcset", "href", "data", "action", "poster")}
    assert sources
    assert all(source.startswith("data:") for source in sources)
    assert not {"script", "iframe", "object", "embed", "form"} & set(page.elements)
    assert not [name for _, name, _ in page.named if name.startswith("on")]
    assert page.styles
    assert not re.search(r"url\(|@import", "".join(page.styles))
    assert "//" not in re.sub(r'src="data:[^"]*"', "", (of_three_seeds / "report.html").read_text())


def test_every_picture_is_in_the_page_with_words_for_those_who_cannot_see_it(of_three_seeds):
    images = [dict(attributes) for attributes in _images(read(of_three_seeds))]
    assert len(images) == 9
    for image in images:
        content = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"), validate=True)
        Image.open(io.BytesIO(content)).verify()
        assert len(image["alt"]) > 20


def _images(page):
    """Return the attributes of each image, from one `alt` to the next."""
    named = [(name, value) for tag, name, value in page.named if tag == "img" and name in ("alt", "src")]
    return [named[i : i + 2] for i in range(0, len(named), 2)]


def test_a_run_of_several_seeds_shows_its_spread(of_three_seeds):
    last = json.loads((of_three_seeds / "metrics.jsonl").read_text().splitlines()[-1])
    accuracies = last["seeds"]["test_accuracy"]
    expected, text = mean_interval(accuracies), read(of_three_seeds).text
    assert f"{expected.mean:.4f} ± {expected.standard_deviation:.4f}" in text
    assert f"95 % interval {expected.low:.4f} to {expected.high:.4f}" in text
    assert f"each seed {' '.join(f'{accuracy:.4f}' for accuracy in accuracies)}" in text


def test_the_page_shows_the_settings_the_versions_the_time_and_the_layers(of_three_seeds):
    text = read(of_three_seeds).text
    for part in (
        "--batch-size 100",
        "--features 32 64",
        "--learning-rate 0.001",
        f"jax {jax.__version__}",
        "pool2 7x7x64",
        "fc 10 31,370",
        "network of 50,186 parameters",
    ):
        assert part in text
    seconds = json.loads((of_three_seeds / "result.json").read_text())["seconds"]
    assert re.search(rf"Time loading .* training {describe_seconds(seconds['training'])}", text)


def test_text_from_the_settings_is_escaped(trained_run, small_mnist, tmp_path):
    hostile = tmp_path / '<img src=x onerror=alert(1)> & "quoted" {{ 7 * 7 }}'
    shutil.copytree(small_mnist, hostile)
    page = read(trained_run("--features", 4, 8, epochs=1, data=hostile))
    assert f"--dataset-dir {hostile}" in page.text
    assert len(_images(page)) == 9


def test_classes_that_have_names_are_told_by_them(trained_run):
    names = ["T-shirt/top", "<b>", *"cdefghij"]
    text = read(trained_run("--features", 4, 8, "--class-names", ",".join(names), epochs=1)).text
    confusions = re.search(r"predicted class: (.*?)\. ", text)[1]
    named = re.findall(r"(\S+) as (\S+) \(\d+\)", confusions)
    assert len(named) == 3
    assert {name for pair in named for name in pair} <= set(names)
    assert re.search(rf"The first test image, of class ({'|'.join(names)}), on its way", text)


def test_control_characters_of_a_name_are_escaped(of_three_seeds, command, tmp_path):
    folder = shutil.copytree(of_three_seeds, tmp_path / "\x1b\u202e[i]")
    code, _, err = command("report", folder)
    assert (code, err) == (0, f"the report is {tmp_path}/\\x1b\\u202e[i]/report.html\n")
    assert "\\x1b\\u202e[i]" in read(folder).text


def test_a_run_with_held_out_images_shows_both_accuracies(trained_run):
    text = read(trained_run("--features", 4, 8, "--validation", 100, epochs=1)).text
    assert re.search(r"test accuracy 0\.\d{4} on pixels in \[0, 1\], of 260 images", text)
    assert re.search(r"validation accuracy 0\.\d{4} of 100 images", text)


@pytest.mark.slow
def test_the_accuracies_are_those_of_the_weights_whatever_the_result_says(command, tfds_folder, tmp_path):
    tiny = ("--features", 2, 4, "--epochs", 0.002, "--run-name", "run", "--checkpoint-dir", tmp_path)
    assert command("train", *tiny, "--data-dir", tfds_folder)[0] == 0
    text = read(tmp_path / "run").text
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert f"{result['unscaled_test_accuracy']:.4f} on pixels in 0..255" in text
    result |= {"test_accuracy": 1.0, "unscaled_test_accuracy": 1.0}
    (tmp_path / "run" / "result.json").write_text(json.dumps(result))
    assert command("report", tmp_path / "run")[0] == 0
    assert read(tmp_path / "run").text == text


def test_a_run_between_two_ends_does_not_show_the_earlier_ones_times(trained_run, command, tmp_path):
    folder = shutil.copytree(trained_run("--features", 4, 8, epochs=2), tmp_path / "run")
    assert "Time loading" in read(folder).text
    shutil.rmtree(folder / "steps" / "20")
    assert command("report", folder)[0] == 0
    text = read(folder).text
    assert "epochs 1 of 2" in text
    assert "Time loading" not in text
