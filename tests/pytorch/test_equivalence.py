"""Both frameworks compute the same function, and weights move between them unchanged or not at all."""

import dataclasses

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra torch")

from cnn_jax.core.model import CNN  # noqa: E402
from cnn_jax.core.recipes import tutorial  # noqa: E402
from cnn_jax.core.sharding import of_seed  # noqa: E402
from cnn_jax.core.training import create_train_state, make_keys  # noqa: E402
from cnn_jax.data.dataset import Dataset  # noqa: E402
from cnn_jax.data.idx import read_idx  # noqa: E402
from cnn_jax.data.loading import load_dataset  # noqa: E402
from cnn_jax.data.published import numbers  # noqa: E402
from cnn_jax.inference.torch_layout import NAMES, params_from_torch, params_to_torch  # noqa: E402
from cnn_jax.pytorch.compare import accuracy_table, read_report, summarize, to_markdown  # noqa: E402
from cnn_jax.pytorch.equivalence import measure_agreement, to_torch_images  # noqa: E402
from cnn_jax.pytorch.import_weights import read_torch_file  # noqa: E402
from cnn_jax.pytorch.processes import ComparedRun  # noqa: E402
from cnn_jax.pytorch.tutorial import TutorialCNN, TutorialImages, train_torch  # noqa: E402
from cnn_jax.runs.folder import RunFolder  # noqa: E402
from cnn_jax.runs.restore import restore_run  # noqa: E402
from cnn_jax.runtime.errors import InputFileError  # noqa: E402
from cnn_jax.runtime.records import encode  # noqa: E402
from tests.helpers import EMBEDDED, assert_same_bits, write_small_mnist  # noqa: E402

pytestmark = pytest.mark.optax_promotes
IMAGE_SHAPE = (28, 28, 1)


@pytest.fixture(scope="module")
def mnist(real_images):
    test_images = read_idx(EMBEDDED / "t10k-images-idx3-ubyte.xz", ndim=3)
    test_labels = read_idx(EMBEDDED / "t10k-labels-idx1-ubyte.xz", ndim=1)
    images, labels = real_images
    return Dataset("mnist", images[..., np.newaxis], labels.astype(np.int32),
                   test_images[..., np.newaxis], test_labels.astype(np.int32), numbers(10))  # fmt: skip


@pytest.fixture(scope="module")
def params():
    return create_train_state(make_keys(3).init_key, CNN(), IMAGE_SHAPE, tutorial(0.001)).params


@pytest.fixture(scope="module")
def first_step(mnist):
    with jax.numpy_dtype_promotion("standard"):
        return measure_agreement(mnist, seed=777, steps=1, float64_steps=1)


@pytest.fixture(scope="module")
def agreement(mnist):
    with jax.numpy_dtype_promotion("standard"):
        return measure_agreement(mnist, seed=777, steps=40, float64_steps=40)


def test_from_equal_weights_the_logits_agree_within_1e_5(first_step):
    assert first_step.logits < 1e-5


def test_every_gradient_agrees_within_1e_5_of_its_largest_entry(first_step):
    assert set(first_step.gradients) == set(NAMES)
    assert max(first_step.gradients.values()) < 1e-5, first_step.gradients


@pytest.mark.slow
def test_the_costs_of_40_adam_steps_agree_in_float64_at_every_step(agreement):
    assert len(agreement.float64_costs) == 40
    assert max(agreement.float64_costs) < 1e-9


@pytest.mark.slow
def test_in_float32_rounding_separates_the_costs_no_further_than_two_runs_of_pytorch(agreement):
    assert len(agreement.costs) == 40
    assert max(agreement.costs[:20]) < 1e-4
    assert max(agreement.costs) < 5e-3 > max(agreement.pytorch_costs)
    assert 0 < agreement.distances[-1] < 0.1


def test_weights_come_back_from_pytorchs_layout_with_the_same_bits(params, tmp_path):
    there = params_to_torch(params, IMAGE_SHAPE)
    assert {name: array.shape for name, array in there.items()} == {
        name: tuple(weight.shape) for name, weight in TutorialCNN().state_dict().items()
    }
    back = params_from_torch(there, params, IMAGE_SHAPE, source=tmp_path)
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.fixture
def state_dict(tmp_path):
    torch.manual_seed(5)
    model = TutorialCNN()
    torch.save(model.state_dict(), tmp_path / "trained.pt")
    return model, tmp_path / "trained.pt"


def test_an_imported_run_is_tested_as_pytorch_tests_it_and_exported_unchanged(state_dict, command, tmp_path):
    model, file = state_dict
    (tmp_path / "data").mkdir()
    write_small_mnist(tmp_path / "data", test=1000)
    dataset = load_dataset("mnist", tmp_path / "data", None)
    where = ("--checkpoint-dir", tmp_path, "--dataset-dir", tmp_path / "data")
    code, out, err = command("import-torch", file, *where)
    assert (code, out) == (0, ""), err
    code, out, err = command("evaluate", "trained", *where[:2])
    with torch.no_grad():
        predicted = model(to_torch_images(dataset.test_images)).argmax(dim=1).numpy()
    assert (code, out) == (0, f"Accuracy: {(predicted == dataset.test_labels).mean():.4f}\n"), err
    code, _, err = command("export", "trained", "--to", "torch", "--output", tmp_path / "out.pt", *where[:2])
    assert code == 0, err
    exported = torch.load(tmp_path / "out.pt", weights_only=True)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(exported[name], weight, rtol=0, atol=0)
    code, _, err = command("import-torch", file, *where)
    assert code == 2
    assert "already exists; give another --run-name" in err


@pytest.mark.parametrize(
    "options",
    [
        ("--learning-rate", 0.002),
        ("--recipe", "fast", "--hyperparameters", "momentum=0.9"),
        pytest.param(
            ("--batch-size", 200, "--validation", 30, "--recipe", "accurate", "--seeds", 2), marks=pytest.mark.slow
        ),
    ],
    ids=["as it was", "with a recipe's argument", "otherwise"],
)
@pytest.mark.usefixtures("without_report")
def test_an_imported_run_can_be_trained_on_with_any_settings(options, state_dict, command, small_mnist, tmp_path):
    where = ("--checkpoint-dir", tmp_path, "--dataset-dir", small_mnist)
    assert command("import-torch", state_dict[1], *where, "--run-name", "on")[0] == 0
    code, out, err = command("train", *where, "--run-name", "on", "--epochs", 1, *options)
    assert code == 0, err
    assert "training on from the imported weights\n" in err
    assert out.startswith("[Epoch:    1] cost = ")
    assert "damaged" not in err


def test_weights_are_imported_for_a_set_of_fewer_images_than_a_batch(state_dict, command, tmp_path):
    write_small_mnist(tmp_path, train=30, test=30)
    code, _, err = command("import-torch", state_dict[1], "--checkpoint-dir", tmp_path, "--dataset-dir", tmp_path)
    assert code == 0, err
    assert RunFolder(tmp_path / "trained").read_settings().batch_size == 30


def test_an_imported_run_goes_on_from_its_weights_whatever_changes_beside_them(state_dict, command, small_mnist,
                                                                               tmp_path):  # fmt: skip
    where = ("--checkpoint-dir", tmp_path, "--dataset-dir", small_mnist)
    assert command("import-torch", state_dict[1], *where, "--run-name", "on")[0] == 0
    run = RunFolder(tmp_path / "on")
    imported = of_seed(restore_run(run, None, pytest.fail).states.params, 0)
    # This is what a process leaves behind that is killed before its first checkpoint.
    run.write_settings(dataclasses.replace(run.read_settings(), recipe="fast", epochs=1, batch_size=50, seeds=2))
    states = restore_run(run, None, pytest.fail).states
    for i in range(2):
        assert_same_bits(of_seed(states.params, i), imported)
        assert_same_bits(of_seed(states.ema_params, i), imported)
    code, out, err = command("train", *where, "--run-name", "on", "--epochs", 1, "--features", 8, 16)
    assert (code, out) == (2, "")
    assert err.endswith(
        "has the weights of a network with --features 32 64 and 10 classes; train it on with those, or give another "
        "--run-name, or --fresh\n"
    )


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.st", "weights.pt"])
def test_safetensors_are_read_too_whatever_their_name(name, state_dict, tmp_path):
    from safetensors.torch import save_file

    tensors = state_dict[0].state_dict()
    save_file(tensors, tmp_path / name)
    read = read_torch_file(tmp_path / name)
    assert read.keys() == tensors.keys()
    np.testing.assert_array_equal(read["fc.bias"], tensors["fc.bias"])


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        (lambda tensor: tensor.bfloat16(), "bfloat16, strided, on cpu"),
        (lambda tensor: tensor.to_sparse(), "float32, sparse_coo, on cpu"),
        (lambda tensor: tensor.to("meta"), "float32, strided, on meta"),
        (lambda tensor: tensor.to_sparse_csr(), "float32, sparse_csr, on cpu"),
        (lambda tensor: tensor.to(torch.float8_e4m3fn), "float8_e4m3fn, strided, on cpu"),
        (lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), "qint8, strided, on cpu"),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_tensors_that_numpy_lacks_are_named_with_the_remedy(changed, kind, state_dict, tmp_path, recwarn):
    tensors = dict(state_dict[0].state_dict())
    tensors["fc.weight"] = changed(tensors["fc.weight"])
    torch.save(tensors, tmp_path / "other.pt")
    recwarn.clear()
    with pytest.raises(InputFileError, match=rf"other.pt holds fc.weight as {kind}; save plain float32 tensors"):
        read_torch_file(tmp_path / "other.pt")
    assert not recwarn.list


def test_an_empty_file_is_called_so(tmp_path):
    for name in ("weights.pt", "weights.safetensors"):
        (tmp_path / name).touch()
        with pytest.raises(InputFileError, match=f"{name} is empty; copy it again, or save weights with torch.save"):
            read_torch_file(tmp_path / name)


def test_the_type_of_safetensors_that_numpy_lacks_is_named(tmp_path):
    from safetensors.torch import save_file

    save_file({"fc.bias": torch.zeros(10).to(torch.float8_e5m2)}, tmp_path / "w.safetensors")
    with pytest.raises(InputFileError, match=r"holds tensors of float8_e5m2; save plain float32 tensors, such as"):
        read_torch_file(tmp_path / "w.safetensors")


def test_a_tensor_that_pytorch_negates_when_it_is_read_is_read_so(tmp_path):
    torch.save({"fc.bias": torch._neg_view(torch.arange(10.0))}, tmp_path / "w.pt")
    np.testing.assert_array_equal(read_torch_file(tmp_path / "w.pt")["fc.bias"], -np.arange(10, dtype=np.float32))


def test_however_many_tensors_do_not_fit_the_line_names_a_few(params, tmp_path):
    tensors = {f"unknown.{i}": np.zeros(1) for i in range(5000)}
    with pytest.raises(InputFileError, match=r"fc.bias is missing; .*; \.\.\.; give") as refused:
        params_from_torch(tensors, params, IMAGE_SHAPE, source=tmp_path)
    assert len(str(refused.value)) < 1000


def without(tensors):
    del tensors["fc.bias"]


def with_another(tensors):
    tensors["fc2.weight"] = torch.zeros(3)


def transposed(tensors):
    tensors["fc.weight"] = tensors["fc.weight"].T.contiguous()


def in_half(tensors):
    tensors["layer1.0.weight"] = tensors["layer1.0.weight"].half()


def not_finite(tensors):
    tensors["layer2.0.bias"][3] = torch.nan


def too_large(tensors):
    tensors["fc.bias"][3] = -1e38


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (without, "fc.bias is missing"),
        (with_another, "fc2.weight is not part of the network"),
        (transposed, "fc.weight has shape (3136, 10), not (10, 3136); give the weights of a network of this shape"),
        (in_half, "layer1.0.weight is float16, not float32; save plain float32 tensors, such as model.float()"),
        (not_finite, "layer2.0.bias holds values that are not finite"),
        (too_large, "fc.bias holds values that are not finite, or so large that the logits may overflow"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_and_named(change, complaint, state_dict, command, tfds_folder, tmp_path):
    tensors = dict(state_dict[0].state_dict())
    change(tensors)
    torch.save(tensors, tmp_path / "other.pt")
    code, _, err = command("import-torch", tmp_path / "other.pt", "--checkpoint-dir", tmp_path,
                           "--data-dir", tfds_folder)  # fmt: skip
    assert code == 65
    assert complaint in err
    assert len([line for line in err.splitlines() if line.startswith("error:")]) == 1
    assert not (tmp_path / "other").exists()


class Exploit:
    """An object that a pickle of unknown origin may contain."""

    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("content", ["empty", "text", "truncated", "executable", "not a state_dict", "missing"])
def test_files_that_are_not_weights_are_refused_and_never_executed(content, state_dict, command, tmp_path):
    file = tmp_path / "bad.pt"
    match content:
        case "empty":
            file.touch()
        case "text":
            file.write_text("not weights")
        case "truncated":
            file.write_bytes(state_dict[1].read_bytes()[:50_000])
        case "executable":
            torch.save({"fc.bias": Exploit()}, file)
        case "not a state_dict":
            torch.save([1, 2], file)
    code, out, err = command("import-torch", file, "--checkpoint-dir", tmp_path)
    assert (code, out) == (65, "")
    assert str(file) in err
    assert len(err.splitlines()) == 1


def test_the_tutorials_images_are_what_its_transform_makes(mnist):
    image, label = TutorialImages(mnist.train_images, mnist.train_labels)[7]
    torch.testing.assert_close(image, to_torch_images(mnist.train_images[7:8])[0], rtol=0, atol=0)
    assert label == mnist.train_labels[7]


def test_training_in_pytorch_learns_and_repeats(mnist):
    small = Dataset("mnist", mnist.train_images[:2000], mnist.train_labels[:2000],
                    mnist.test_images[:500], mnist.test_labels[:500], numbers(10))  # fmt: skip
    arguments = {"seed": 1, "epochs": 2, "batch_size": 100, "learning_rate": 0.001, "report": lambda line: None}
    run = train_torch(small, **arguments)
    assert run.accuracy > 0.8
    assert run.costs[1] < run.costs[0] < 2
    assert train_torch(small, **arguments).costs == pytest.approx(run.costs, rel=1e-3)


def test_the_report_states_its_finding(tmp_path):
    def results(*accuracies):
        seconds = {"starting": 1.0, "compiling": 2.0, "training": 65.0, "testing": 3.0}
        return [
            ComparedRun(seed=seed, costs=[0.2, 0.1], accuracy=value, unscaled_accuracy=value - 0.01, seconds=seconds)
            for seed, value in enumerate(accuracies)
        ]

    agreement = {"logits": 1e-6, "gradients": 2e-6, "costs": [1e-4], "distances": [1e-6], "pytorch_costs": [1e-4],
                 "float64_costs": [1e-12]}  # fmt: skip
    same = summarize({"cnn-jax": results(0.99, 0.991), "PyTorch": results(0.991, 0.99)}, agreement, epochs=2)
    assert "do not differ measurably: cnn-jax minus PyTorch is +0.0000" in to_markdown(same)
    other = summarize({"cnn-jax": results(0.98, 0.981), "PyTorch": results(0.991, 0.99)}, agreement, epochs=2)
    assert "accuracies differ: cnn-jax minus PyTorch is -0.0100" in to_markdown(other)
    assert "| of seeds 0 / 1 | 0.9800 / 0.9810 | 0.9910 / 0.9900 |" in accuracy_table(other)
    (tmp_path / "report.json").write_text(encode(other))
    assert read_report(tmp_path / "report.json") == other


def test_what_is_exported_of_a_run_of_other_features_comes_back(trained_run, small_mnist, command, tmp_path):
    run = trained_run("--features", 2, 4, epochs=1, reported=False)
    assert command("export", run, "--to", "torch", "--output", tmp_path / "narrow.pt")[0] == 0
    where = ("--checkpoint-dir", tmp_path)
    code, _, err = command(
        "import-torch", tmp_path / "narrow.pt", *where, "--dataset-dir", small_mnist, "--features", 2, 4
    )
    assert code == 0, err
    assert command("evaluate", "narrow", *where)[1] == command("evaluate", run)[1]
