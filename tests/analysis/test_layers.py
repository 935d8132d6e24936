"""The layers shown are those that the network computes, and every mistake shown is one."""

import dataclasses
import functools
import os

import jax
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

from cnn_jax.analysis import plots
from cnn_jax.analysis.layers import (
    Inspection,
    Mistake,
    describe_confusion,
    draw_pictures,
    inspect_network,
    plain_network,
    run_layers,
)
from cnn_jax.core.evaluation import evaluate
from cnn_jax.core.model import CNN
from cnn_jax.core.sharding import of_seed
from cnn_jax.data.dataset import scale_pixels
from cnn_jax.runs.folder import RunFolder
from cnn_jax.runs.restore import restore_run

pytestmark = pytest.mark.optax_promotes


@pytest.fixture(scope="module")
def run(trained_run):
    """The folder of a run of one epoch."""
    return trained_run(epochs=1)


@pytest.fixture(scope="module")
def trained(run):
    """The run's network, its weights and the data set."""
    restored = restore_run(RunFolder(run), None, print)
    return restored.model, of_seed(restored.states.eval_variables, 0)["params"], restored.dataset


@pytest.fixture(scope="module")
def inspection(trained):
    model, params, dataset = trained
    return inspect_network(model, {"params": params}, dataset)


def initial_params(model, image):
    return jax.device_get(jax.jit(model.init)(jax.random.key(1), scale_pixels(image[np.newaxis])))["params"]


@pytest.mark.parametrize("shape", [(28, 28, 1), (9, 7, 3)])
def test_the_feature_maps_end_in_what_the_network_computes(shape):
    image = np.random.default_rng(3).integers(0, 256, shape, np.uint8)
    model = CNN(features=(5, 12), num_classes=4)
    params = initial_params(model, image)
    apply = functools.partial(model.apply, capture_intermediates=True, mutable="intermediates")
    logits, kept = jax.jit(apply)({"params": params}, scale_pixels(image[np.newaxis]))
    layers = {layer.name: layer.output for layer in run_layers(plain_network(model, params), params, image)}
    for block in (1, 2):
        (computed,) = kept["intermediates"][f"layer{block}"]["__call__"]
        np.testing.assert_allclose(layers[f"pool{block}"], computed[0], atol=1e-6)
        assert layers[f"layer{block}"].min() < 0
        np.testing.assert_array_equal(layers[f"relu{block}"], np.maximum(layers[f"layer{block}"], 0))
    np.testing.assert_allclose(layers["fc"], logits[0], atol=1e-6)


def test_the_layers_have_the_shapes_and_the_parameters_of_the_tutorials(inspection):
    assert [(layer.name, layer.output.shape, layer.parameters) for layer in inspection.layers] == [
        ("layer1", (28, 28, 32), 320),
        ("relu1", (28, 28, 32), 0),
        ("pool1", (14, 14, 32), 0),
        ("layer2", (14, 14, 64), 18_496),
        ("relu2", (14, 14, 64), 0),
        ("pool2", (7, 7, 64), 0),
        ("flatten", (3136,), 0),
        ("fc", (10,), 31_370),
    ]


def test_the_confusion_matrix_counts_every_test_image(inspection, trained):
    model, params, dataset = trained
    np.testing.assert_array_equal(inspection.confusion.sum(axis=1), np.bincount(dataset.test_labels, minlength=10))
    tested = evaluate(model, {"params": params}, dataset.test_images, dataset.test_labels)
    assert inspection.confusion.trace() == tested.correct < tested.count == inspection.confusion.sum() == 260


def test_the_most_confident_mistakes_are_mistakes_most_confident_first(inspection, trained):
    model, params, dataset = trained
    logits = np.asarray(jax.jit(model.apply)({"params": params}, scale_pixels(dataset.test_images)), np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    right = logits.argmax(axis=1) == dataset.test_labels
    surest = np.argsort(np.where(right, -1, probabilities.max(axis=1)))[::-1][:12]
    assert len(inspection.mistakes) == 12
    for mistake, index in zip(inspection.mistakes, surest, strict=True):
        np.testing.assert_array_equal(mistake.image, dataset.test_images[index])
        label, prediction = dataset.test_labels[index], logits[index].argmax()
        assert mistake.label == dataset.class_names[label] != mistake.prediction == dataset.class_names[prediction]
        assert mistake.probability == pytest.approx(probabilities[index].max(), abs=1e-5)
        black = np.asarray(jax.jit(model.apply)({"params": params}, scale_pixels(np.zeros_like(mistake.image[None]))))
        changed = logits[index, prediction] - black[0, prediction]
        assert mistake.saliency.sum() == pytest.approx(changed, abs=0.15)


def test_beside_each_mistake_is_where_the_network_looked_and_none_is_shown_as_certain(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, file: figures.append(figure))
    image, saliency = np.full((28, 28, 1), 200, np.uint8), np.ones((28, 28), np.float32)
    mistakes = [Mistake(image, "Coat", "Shirt", probability, saliency) for probability in (1.0, 0.99996, 0.5, 0.0002)]
    plots.plot_mistakes(mistakes, tmp_path / "mistakes.png")
    panels = [axes for axes in figures[0].axes if axes.get_title()]
    words = [">99.9%", ">99.9%", "50.0%", "<0.1%"]
    assert [axes.get_title() for axes in panels] == [f"Coat → Shirt\n{each}" for each in words]
    for axes in panels:
        drawn, looked = axes.images
        assert (drawn.get_array() == 200).all()
        assert (looked.get_array() == plots.draw_saliency(image, saliency)).all()
        assert drawn.get_extent()[1] < looked.get_extent()[0] < looked.get_extent()[1] <= axes.get_xlim()[1]


def test_the_most_frequent_confusions_are_told_by_the_classes_names(inspection):
    names, confusion = ["Coat", "Shirt", "猫", "bag"], np.diag([1200, 20, 3, 9])
    confusion[1, 0], confusion[0, 1], confusion[3, 2], confusion[2, 3] = 1234, 7, 5, 1
    of_four = dataclasses.replace(inspection, class_names=names, confusion=confusion)
    assert describe_confusion(of_four) == (
        "1,232 of 2,479 test images are classified correctly; the most frequent mistakes, class and predicted class: "
        "Shirt as Coat (1,234), Coat as Shirt (7), bag as 猫 (5)."
    )
    perfect = dataclasses.replace(of_four, confusion=np.diag([3, 4, 5, 6]))
    assert describe_confusion(perfect).endswith("18 test images are classified correctly.")


def test_inspect_lists_the_layers_in_80_columns_and_draws_them(run, command):
    code, out, err = command("inspect", run)
    assert code == 0
    assert max(len(line) for line in out.splitlines()) <= 80
    rows = [line.split() for line in out.splitlines()]
    assert ["pool1", "MaxPool", "float32[28,28,32]", "float32[14,14,32]"] in rows
    assert ["flatten", "Flatten", "float32[7,7,64]", "float32[3136]"] in rows
    assert ["Total", "50,186", "(200.7", "KB)"] in rows
    assert f"9 pictures after 10 steps are in {run / 'pictures'}" in err
    names = {"cost", "accuracy", "confusion", "reliability", "mistakes", "kernels1", "kernels2", "maps1", "maps2"}
    assert {file.name for file in (run / "pictures").iterdir()} == {f"{name}.png" for name in names}
    for file in (run / "pictures").iterdir():
        with Image.open(file) as picture:
            assert picture.width == 750


def test_inspect_names_the_pictures_where_they_cannot_be_written_and_needs_no_page(command, tmp_path):
    (tmp_path / "run" / "report.html").mkdir(parents=True)
    assert command("inspect", tmp_path / "run")[0] == 3  # there is no run, which it found out
    (tmp_path / "run" / "pictures").write_text("in the way")
    code, out, err = command("inspect", tmp_path / "run")
    assert (code, out, err.count("\n")) == (4, "", 1)
    assert err.startswith(f"error: cannot write {tmp_path / 'run' / 'pictures'} (")
    assert err.endswith("; give another run, or a copy of it that can be written\n")


def test_a_network_of_any_size_without_mistakes_or_epochs_is_drawn(tmp_path):
    image = np.random.default_rng(3).integers(0, 256, (9, 7, 3), np.uint8)
    model = CNN(features=(5, 33), num_classes=30)
    params = initial_params(model, image)
    kernels = {name: params[name]["kernel"] for name in ("layer1", "layer2")}
    names = ["$", "猫", "a name that is too long for its place", *map(str, range(27))]
    layers = run_layers(plain_network(model, params), params, image)
    perfect = Inspection(image, "2", names, layers, kernels, np.eye(30, dtype=int), mistakes=[])
    pictures = draw_pictures(perfect, [], tmp_path / "pictures")
    assert set(pictures) == {"confusion", "mistakes", "kernels1", "kernels2", "maps1", "maps2"}
    assert all(picture.file.stat().st_size > 1000 for picture in pictures.values())


@pytest.mark.parametrize("name", ["inspect", "report"])
def test_a_folder_that_is_not_a_run_is_refused(name, command, tmp_path):
    code, out, err = command(name, "no-such-run", "--checkpoint-dir", tmp_path)
    assert (code, out) == (3, "")
    assert "no-such-run is not a run" in err


def test_a_network_of_another_kind_is_drawn_without_its_layers(tmp_path):
    params = {"Dense_0": {"kernel": np.zeros((784, 10), np.float32)}}
    assert plain_network(CNN(), params) is None
    three_blocks = {f"layer{number}": {"kernel": np.zeros((3, 3, 1, 2 * number))} for number in (1, 2, 3)}
    params = three_blocks | {"fc": {"kernel": np.zeros((8, 10))}}
    assert plain_network(CNN(), params).features == (2, 4, 6)
    assert plain_network(nn.Dense(10), params) is None  # the same names need not be the same layers'


DRAW = """
import pathlib, sys
from cnn_jax.analysis import plots
import matplotlib, numpy as np

folder, before = pathlib.Path(sys.argv[1]), dict(matplotlib.rcParams)
plots.plot_confusion(np.eye(3, dtype=int), ["a", "b", "c"], folder / "confusion.png")
plots.plot_benchmark([("ours", "cnn-jax", 1.0, 2.0, 3.0)], folder / "bars.png", floor=0.5, title="times")


def drawn():
    from matplotlib import pyplot as plt

    plt.style.use("ggplot")  # as Optuna does
    yield "line.png", plt.figure().add_subplot()


plots.save_drawn(drawn(), folder)
assert [name for name, value in matplotlib.rcParams.items() if value != before[name]] in ([], ["backend_fallback"])
"""


def test_matplotlibs_settings_decide_nothing_of_what_is_drawn_and_none_of_ours_is_left(program, tmp_path):
    pictures = []
    for i, settings in enumerate(["", *HOSTILE_STYLES]):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "matplotlibrc").write_text(settings)
        drawing = program("-c", DRAW, folder, env=os.environ | {"MATPLOTLIBRC": str(folder)})
        _, err = drawing.communicate(timeout=300)
        assert (drawing.returncode, err) == (0, "")
        pictures.append({file.name: file.read_bytes() for file in folder.glob("*.png")})
    assert len(pictures[0]) == 3
    assert all(of_settings == pictures[0] for of_settings in pictures)


HOSTILE_STYLES = [
    "text.usetex: True\naxes.titlesize: 3\nsavefig.dpi: 7\nimage.origin: lower\nimage.cmap: jet\n",
    "font.family: No Such Font\naxes.prop_cycle: cycler('color', [])\nno.such.setting: 1\nfigure.dpi: many\n",
]
