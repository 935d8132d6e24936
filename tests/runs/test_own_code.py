"""A network or a recipe in a file of the user's trains, continues, is tested, and is known by its content."""

import json
import re
import shutil
import sys

import jax
import numpy as np
import pytest

from cnn_jax.core.sharding import of_seed
from cnn_jax.runs.folder import RunFolder
from cnn_jax.runs.restore import restore_run
from cnn_jax.runtime.errors import OWN_MODULE
from tests.helpers import ROOT, metrics_of, write_idx

pytestmark = [pytest.mark.optax_promotes, pytest.mark.usefixtures("without_report")]

EXAMPLES = ROOT / "docs" / "examples"

# Batch statistics beside the weights, and dropout: all that a network may need in training and not in a test.
NOISY = """
from flax import linen as nn


class Noisy(nn.Module):
    num_classes: int = 10

    @nn.compact
    def __call__(self, images, train: bool = False):
        x = nn.relu(nn.Dense(8)(images.reshape(images.shape[0], -1)))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        x = nn.Dropout(0.25, deterministic=not train)(x)
        return nn.Dense(self.num_classes)(x)
"""
MOMENTUM = """
import optax

from cnn_jax.core.recipes import Recipe


def momentum(learning_rate, steps):
    return Recipe(optax.sgd(optax.linear_schedule(learning_rate, 0.0, steps), momentum=0.9), ema_decay=0.9)
"""


@pytest.fixture
def train(command, small_mnist, tmp_path):
    """Train with the files idea.py, as NOISY, and way.py, as MOMENTUM, in the run `run`."""
    (tmp_path / "idea.py").write_text(NOISY)
    (tmp_path / "way.py").write_text(MOMENTUM)

    def run(*options, model=f"{tmp_path / 'idea.py'}:Noisy", epochs=1):
        arguments = ["--dataset-dir", small_mnist, "--checkpoint-dir", tmp_path, "--run-name", "run"]
        return command("train", *arguments, "--epochs", epochs, "--model", model, *options)

    return run


def test_a_network_of_ones_own_may_have_images_of_any_size(train, tmp_path):
    (tmp_path / "tiny").mkdir()
    for split in "train", "t10k":
        write_idx(tmp_path / "tiny" / f"{split}-images-idx3-ubyte", np.zeros((200, 2, 2), np.uint8))
        write_idx(tmp_path / "tiny" / f"{split}-labels-idx1-ubyte", np.arange(200, dtype=np.uint8) % 10)
    code, _, err = train("--dataset-dir", tmp_path / "tiny")
    assert code == 0, err


def test_a_recipe_without_a_learning_rate_has_the_usual_one(train, tmp_path):
    (tmp_path / "way.py").write_text(MOMENTUM.replace("momentum(learning_rate, steps)", "momentum(steps, learning=0.1)")
                                     .replace("learning_rate, 0.0", "learning, 0.0"))  # fmt: skip
    way = f"{tmp_path / 'way.py'}:momentum"
    code, _, err = train("--recipe", way, "--learning-rate", 0.1)
    assert code == 2
    assert f"--learning-rate 0.1: it must be 0.001, as {way} has no argument learning_rate" in err
    assert train("--recipe", way)[0] == 0


def states_of(folder):
    return restore_run(RunFolder(folder), None, pytest.fail).states


def test_a_networks_state_and_dropout_are_trained_tested_and_continued_to_the_same_bits(train, command, tmp_path):
    assert train("--seeds", 2, epochs=2)[0] == 0
    whole, metrics = states_of(tmp_path / "run"), metrics_of(tmp_path / "run")
    mean = whole.model_state["batch_stats"]["BatchNorm_0"]["mean"]
    assert mean.shape == (2, 8)
    assert np.abs(mean).min() > 0  # it was 0 before the first step
    code, out, _ = command("evaluate", tmp_path / "run")
    assert code == 0
    assert metrics[-1]["test_accuracy"] == pytest.approx(float(out.split()[-1]), abs=5e-5)
    shutil.rmtree(tmp_path / "run")
    assert train("--seeds", 2, epochs=1)[0] == train("--seeds", 2, epochs=2)[0] == 0
    jax.tree.map(np.testing.assert_array_equal, states_of(tmp_path / "run"), whole)
    shutil.rmtree(tmp_path / "run")
    assert train("--seed", 778, epochs=2)[0] == 0
    jax.tree.map(np.testing.assert_array_equal, of_seed(states_of(tmp_path / "run"), 0), of_seed(whole, 1))


def test_dropout_and_statistics_are_those_of_training_alone(train, command, tmp_path):
    assert train(epochs=0.1)[0] == 0
    network = restore_run(RunFolder(tmp_path / "run"), None, pytest.fail)
    variables = of_seed(network.states.eval_variables, 0)
    images = network.dataset.test_images[:4] / np.float32(255)
    once, again = (network.model.apply(variables, images) for _ in range(2))
    np.testing.assert_array_equal(once, again)
    alone = network.model.apply(variables, images[:1])
    np.testing.assert_allclose(alone, once[:1], atol=1e-5)  # however many images a batch has


def test_another_recipe_of_the_users_trains_and_averages(train, tmp_path):
    assert train("--recipe", f"{tmp_path / 'way.py'}:momentum", "--learning-rate", 0.05)[0] == 0
    states = states_of(tmp_path / "run")
    averaged, last = states.ema_params["Dense_1"]["bias"], states.params["Dense_1"]["bias"]
    assert not np.array_equal(averaged, last)
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["recipe"] == f"{tmp_path / 'way.py'}:momentum"
    assert (tmp_path / "run" / "recipe.py").read_text() == MOMENTUM


def test_a_run_keeps_its_code_and_needs_the_users_file_no_more(train, command, tmp_path):
    assert train("--recipe", f"{tmp_path / 'way.py'}:momentum", "--learning-rate", 0.05)[0] == 0
    (tmp_path / "idea.py").unlink()
    (tmp_path / "way.py").unlink()
    (tmp_path / "run").rename(tmp_path / "moved")
    assert command("evaluate", tmp_path / "moved")[0] == 0
    assert command("report", tmp_path / "moved", "--output", tmp_path / "page.html")[0] == 0
    assert command("inspect", tmp_path / "moved")[0] == 0


def test_a_run_is_not_damaged_where_what_its_code_imports_is_missing(train, command, tmp_path, monkeypatch):
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "idea.py").write_text("import beside\n" + NOISY)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        assert train()[0] == 0
    for name in [name for name in sys.modules if name == "beside" or name.startswith(OWN_MODULE)]:
        monkeypatch.delitem(sys.modules, name)
    code, out, err = command("evaluate", tmp_path / "run")
    assert (code, out, err.count("\n")) == (2, "", 1)
    missing = "line 1: ModuleNotFoundError: No module named 'beside'"
    remedy = "install it, or name the folder that it is in in PYTHONPATH"
    assert err == f"error: --model {tmp_path}/run/model.py:Noisy: {missing}; {remedy}\n"


def test_changed_code_is_refused_with_what_changed_and_trains_under_another_name(train, tmp_path):
    assert train(epochs=1)[0] == 0
    steps = sorted((tmp_path / "run" / "steps").iterdir())
    (tmp_path / "idea.py").write_text(NOISY.replace("nn.relu", "nn.gelu"))
    code, out, err = train(epochs=2)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "model was Noisy, SHA-256 " in err
    assert (
        "idea.py: line 10 was 'x = nn.relu(nn.Dense(8)(images.reshape(images.shape[0], -1)))' and is 'x = nn.gelu("
        in err
    )
    assert err.endswith("give them as they were, or give another --run-name, or --fresh\n")
    assert steps == sorted((tmp_path / "run" / "steps").iterdir())  # nothing was taken for damage
    assert not (tmp_path / "run" / "quarantine").exists()
    assert train("--run-name", "gelu", epochs=1)[0] == 0
    # The same content elsewhere is the same code.
    (tmp_path / "elsewhere.py").write_text(NOISY)
    assert train(model=f"{tmp_path / 'elsewhere.py'}:Noisy", epochs=2)[0] == 0


def test_a_run_is_not_taken_for_one_of_another_network(train, command, small_mnist, tmp_path):
    assert train(epochs=0.1)[0] == 0
    plain = ["train", "--dataset-dir", small_mnist, "--checkpoint-dir", tmp_path, "--run-name", "run", "--epochs", 1]
    code, _, err = command(*plain)
    assert (code, err.count("\n")) == (2, 1)
    assert re.search("model was Noisy, SHA-256 [0-9a-f]{12}... and is none", err)
    (tmp_path / "run" / "model.py").write_text(NOISY + "\n# edited\n")
    code, _, err = command("evaluate", tmp_path / "run")
    assert (code, err.count("\n")) == (65, 1)
    assert re.search("config.json .*model was Noisy", err)
    (tmp_path / "run" / "model.py").unlink()
    code, _, err = command("evaluate", tmp_path / "run")
    assert (code, err.count("\n")) == (65, 1)
    assert "model.py" in err


WRONG_MODELS = {
    "import nothing_that_exists": "line 1: ModuleNotFoundError: No module named 'nothing_that_exists'; install it, or ",
    "class Idea:": "line 1: ",
    "x = 1": "the file defines no Idea",
    "def __getattr__(name): raise SystemExit(0)": "the file defines no Idea",
    "class Ideas: pass": "the file defines no Idea; perhaps you meant Ideas",
    "Idea = 3": "it must be a class that inherits from flax.linen.Module",
    "raise SystemExit(0)": "line 1: SystemExit: 0",
    "raise GeneratorExit": "line 1: GeneratorExit: it says nothing of why",
    "raise BaseException('\x1b[31m')": "line 1: BaseException: \\x1b[31m",
    "class Mute(Exception):\n    def __str__(self): raise RuntimeError\nraise Mute":
        "line 3: Mute: it says nothing of why",
    "x = 0\0": "SyntaxError: source code",
    "from flax import linen as nn\nclass Idea(nn.Module):\n    def __call__(self, x):\n        return 1 / 0":
        "line 4: ZeroDivisionError: division by zero",
    "from flax import linen as nn\nclass Idea(nn.Module):\n    def __call__(self, x):\n        return x":
        "it returns float32 (2, 28, 28, 1) for images (2, 28, 28, 1); logits must be float32 (2, 10)",
    "from flax import linen as nn\nclass Idea(nn.Module):\n    def __call__(self, x):\n        return x[:, :10, 0, 0]":
        "it has no weights to train",
    """from flax import linen as nn
class Idea(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.param("none", nn.initializers.zeros, (0, 3))
        return nn.Dense(10)(x.reshape(len(x), -1))""":
        "it keeps params.none, float32 (0, 3), which no checkpoint holds",
    """import jax.numpy as jnp
from flax import linen as nn
class Idea(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        kept = self.variable("kept", "all", lambda: jnp.zeros(3))
        kept.value = jnp.zeros(4) if train else kept.value
        return nn.Dense(10)(x.reshape(len(x), -1))""":
        "TypeError: scan body function carry input and carry output must have equal types, but they differ: The input",
    """import jax
from flax import linen as nn
class Idea(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.variable("kept", "key", lambda: jax.random.key(0))
        return nn.Dense(10)(x.reshape(len(x), -1))""":
        "it keeps model_state.kept.key, key<fry> (), which no checkpoint holds",
    "from flax import linen as nn\nclass Idea(nn.Module):\n    n: int\n    def __call__(self, x):\n        return x":
        "TypeError: ",
    "from flax import linen as nn\nclass Idea(nn.Module):\n    n: tuple = ([],)":
        "TypeError: Failed to hash Flax Module.",
}  # fmt: skip


@pytest.mark.parametrize("source", WRONG_MODELS)
def test_code_that_is_no_network_is_refused_in_a_line_that_names_it(source, train, tmp_path):
    (tmp_path / "wrong.py").write_text(source)
    code, out, err = train(model=f"{tmp_path / 'wrong.py'}:Idea")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"--model {tmp_path / 'wrong.py'}:Idea: {WRONG_MODELS[source]}" in err
    assert not (tmp_path / "run").exists()


def test_a_network_whose_weights_fit_no_memory_is_refused_before_anything_is_written(train, tmp_path):
    huge = NOISY.replace("Dense(8)", "Dense(300_000)").replace(
        "x = nn.Dropout", "x = nn.Dense(300_000)(x)\n        x = nn.Dropout"
    )
    (tmp_path / "huge.py").write_text(huge)
    code, out, err = train(model=f"{tmp_path / 'huge.py'}:Noisy")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"--model {tmp_path / 'huge.py'}:Noisy with --seeds 1 and --batch-size 100: training needs more than " in err
    assert not (tmp_path / "run").exists()


def test_counts_and_flags_beside_the_weights_keep_their_type_and_value(train, tmp_path):
    counting = """        steps = self.variable("counts", "steps", lambda: jnp.int32(2**24 + 1))
        told = self.variable("counts", "told", lambda: jnp.bool_(False))
        if train:
            steps.value, told.value = steps.value + 1, ~told.value
        x = nn.relu"""
    source = "import jax.numpy as jnp\n" + NOISY.replace("        x = nn.relu", counting)
    (tmp_path / "idea.py").write_text(source)
    assert train(epochs=2)[0] == 0
    step, counts = metrics_of(tmp_path / "run")[-1]["step"], states_of(tmp_path / "run").model_state["counts"]
    assert (counts["steps"].dtype, counts["steps"].item()) == (np.int32, 2**24 + 1 + step)
    assert (counts["told"].dtype, counts["told"].item()) == (np.bool_, step % 2 == 1)


def test_what_the_environment_forbids_is_not_blamed_on_the_code(train, tmp_path):
    forbidden = "raise RuntimeError('INVALID_ARGUMENT: Disallowed host-to-device transfer')"
    (tmp_path / "idea.py").write_text(f"{NOISY}\n{forbidden}\n")
    code, _, err = train()
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("error: JAX_TRANSFER_GUARD forbids what the program does (")


@pytest.mark.parametrize("setting", ["jax_disable_jit", "jax_enable_x64"])
def test_code_that_changes_jaxs_settings_is_refused(setting, train, tmp_path):
    (tmp_path / "idea.py").write_text(f"import jax\njax.config.update({setting!r}, True)\n{NOISY}\n")
    try:
        code, _, err = train()
    finally:
        jax.config.update(setting, False)
    assert (code, err.count("\n")) == (2, 1)
    assert err.endswith(f"it changes JAX's setting {setting}; leave that as it is\n")


WRONG_RECIPES = {
    "return Recipe(5)": "Error: ",
    "return Recipe(optax.sgd(0.1), loss=lambda logits, labels: 1 / 0)": "line 4: ZeroDivisionError: division by zero",
    "return Recipe(optax.sgd(0.1), loss=lambda logits, labels: 'x')": "TypeError: ",
    "return Recipe(optax.sgd(0.1), loss=lambda logits, labels: 5)": "TypeError: for two images it returns ",
    "return Recipe(optax.sgd(0.1), loss=lambda logits, labels: logits)": "the losses must be float32 (2,)",
    "return Recipe(optax.sgd(0.1), loss=lambda logits, labels: logits.mean())": "; the losses must be ",
    "return Recipe(optax.sgd(0.1), augment=lambda keys, images: images[:1])": "; the images must be ",
    "return Recipe(optax.sgd(0.1), augment=lambda images: images)": "TypeError: ",
    "return Recipe(optax.sgd(0.1), ema_decay='x')": "Error: ",
    "return Recipe(optax.sgd(0.1), ema_decay=1.5)": "its ema_decay is 1.5; it must be at least 0 and below 1",
    "return Recipe(optax.sgd(0.1), ema_decay=float('nan'))": "its ema_decay is nan; it must be ",
    "return Recipe(optax.add_noise(0.1, 0.5, 0))": "it keeps opt_state.rng_key, key<fry> (), which no checkpoint holds",
    "return Recipe(optax.GradientTransformation(optax.sgd(1).init, lambda g, s, _: (g, (s, s))))": "changes the form",
    "return 3": "it returns int, not a cnn_jax.core.recipes.Recipe",
}


@pytest.mark.parametrize("body", WRONG_RECIPES)
def test_code_that_is_no_recipe_is_refused_in_a_line_that_names_it(body, train, tmp_path):
    (tmp_path / "way.py").write_text(f"import optax\nfrom cnn_jax.core.recipes import Recipe\ndef way():\n    {body}\n")
    code, out, err = train("--recipe", f"{tmp_path / 'way.py'}:way")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"--recipe {tmp_path / 'way.py'}:way: " in err
    assert WRONG_RECIPES[body] in err
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_is_a_coroutine_is_refused_without_pythons_warning(train, tmp_path, recwarn):
    (tmp_path / "way.py").write_text("async def way():\n    return 3\n")
    code, _, err = train("--recipe", f"{tmp_path / 'way.py'}:way")
    assert (code, err.count("\n")) == (2, 1)
    assert "it returns coroutine" in err
    assert not recwarn.list


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--model", "idea.py"], "--model idea.py: it must be a class in a Python file, FILE.py:CLASS"),
        (["--model", "missing.py:Idea"], "--model missing.py:Idea: the file cannot be read"),
        (["--model", ".:Idea"], "--model .:Idea: it must be a class in a Python file"),
        (["--recipe", "missing.py:way"], "--recipe missing.py:way: the file cannot be read"),
        (["--recipe", "slow"], "--recipe slow: it must be one of accurate, fast, tutorial, or a function in a Python"),
        (["--features", 4, 8], "--features 4 8: it must be left out: "),
        (["--precision", "bfloat16"], "--precision bfloat16: it must be left out: "),
        (["--recipe", f"{EXAMPLES / 'mlp.py'}:MLP"], "it returns MLP, not a cnn_jax.core.recipes.Recipe"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(options, complaint, train, tmp_path):
    code, out, err = train(*options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert complaint in err
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_network_that_is_not_the_tutorials_goes_to_stablehlo_alone(train, command, tmp_path):
    pytest.importorskip("torch", reason="needs the extra torch")
    assert train(epochs=0.1)[0] == 0
    for to in ("onnx", "torch", "safetensors"):
        code, _, err = command("export", tmp_path / "run", "--to", to, "--output", tmp_path / "file")
        assert (code, err) == (
            2, f"error: --to {to}: it has a form for the tutorial's network, not for Noisy; give --to stablehlo\n",
        )  # fmt: skip
    assert command("export", tmp_path / "run", "--to", "stablehlo", "--output", tmp_path / "file")[0] == 0
    (tmp_path / "idea.py").write_text(NOISY.replace("images.shape[0]", "len(images)"))
    assert train("--fresh", epochs=0.1)[0] == 0
    code, _, err = command("export", tmp_path / "run", "--to", "stablehlo", "--output", tmp_path / "file")
    assert (code, err.count("\n")) == (2, 1)
    assert "Noisy fails on a batch of any size (TypeError: " in err


@pytest.mark.slow(seconds=8)
def test_a_callback_that_fails_is_told_once_with_its_line(program, small_mnist, tmp_path):
    noisy = NOISY.replace("        x = nn.BatchNorm", "        jax.debug.callback(told, x)\n        x = nn.BatchNorm")
    told = "\nimport jax\n\n\ndef told(x):\n    raise ValueError('no\\x1b[31m')\n"
    (tmp_path / "idea.py").write_text(told + noisy)
    process = program(
        "train.py", "--dataset-dir", small_mnist, "--checkpoint-dir", tmp_path, "--epochs", "0.1",
        "--model", f"{tmp_path / 'idea.py'}:Noisy",
    )  # fmt: skip
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out) == (2, "")
    assert (
        err.splitlines()[-1] == f"error: a callback failed in {tmp_path / 'idea.py'}, line 6: ValueError: no\\x1b[31m"
    )
    assert "Traceback" not in err


def test_a_network_that_fails_at_another_size_of_batches_is_named_with_its_line(train, tmp_path):
    failing = "        if images.shape[0] > 100:\n            raise ValueError('too many')\n        x = nn.relu"
    (tmp_path / "big.py").write_text(NOISY.replace("        x = nn.relu", failing))
    code, out, err = train("--batch-size", 50, model=f"{tmp_path / 'big.py'}:Noisy", epochs=0.1)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == f"error: {tmp_path / 'big.py'}, line 11: ValueError: too many; correct it"


@pytest.mark.parametrize(("example", "weights"), [("mlp.py:MLP", "200,960"), ("deeper.py:Deeper", "")])
def test_the_layers_of_ones_own_network_are_those_that_it_has_for_a_batch(example, weights, train, command, tmp_path):
    assert train(model=f"{EXAMPLES}/{example}", epochs=0.1)[0] == 0
    code, out, _ = command("inspect", tmp_path / "run")
    assert code == 0
    assert weights in out
    assert "[1,28,28,1]" in out
