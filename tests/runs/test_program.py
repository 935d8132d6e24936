"""A run's functions are compiled by any XLA that its JAX brings."""

import jax
import numpy as np
import pytest

from cnn_jax.core.sharding import make_mesh
from cnn_jax.runs.program import Sizes, compile_soon, make_program, make_recipe, start_states, takes_any_arguments
from cnn_jax.runs.settings import TrainSettings
from cnn_jax.runtime.errors import UsageError
from tests.helpers import assert_same_bits

pytestmark = pytest.mark.optax_promotes


def batches_of(program):
    return compile_soon(program, program.epoch, np.int32(0))(np.int32(0)).batches


@pytest.mark.parametrize(("epochs", "count"), [(0.02, 1), (1, 1), (1.25, 2), (2, 2), (1.0001, 1)])
def test_the_last_epoch_counts_as_one_wherever_it_ends(epochs, count):
    sizes = Sizes(6000, (28, 28, 1), 10)
    assert make_program(TrainSettings.of(epochs=epochs), sizes, make_mesh(1, jax.devices()[:1])).epochs == count


def test_an_option_that_xla_no_longer_has_is_left_out(monkeypatch):
    settings = TrainSettings.of(features=(2, 4))
    program = make_program(settings, Sizes(200, (28, 28, 1), 10), make_mesh(1, jax.devices()[:1]))
    states, batches = start_states(program), batches_of(program)
    compiled = jax.stages.Lowered.compile

    def without_choice(lowered, compiler_options=None):
        if "xla_cpu_use_fusion_emitters" in compiler_options:
            raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: No such compile option")
        return compiled(lowered, compiler_options)

    monkeypatch.setattr(jax.stages.Lowered, "compile", without_choice)
    assert_same_bits(start_states(program), states)
    np.testing.assert_array_equal(batches_of(program), batches)


ASKING = """
import optax
from cnn_jax.core.recipes import Recipe

def made(learning_rate):
    return Recipe(optax.sgd(learning_rate / 2))

def asks_when_made(learning_rate):
    return Recipe(optax.sgd(min(learning_rate, 0.1)))

def asks_when_it_trains(learning_rate):
    return Recipe(optax.sgd(lambda step: float(learning_rate)))

def asks_in_its_loss(learning_rate, most=1.0):
    def loss(logits, labels):
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.clip(0, most) if most > 0 else losses
    return Recipe(optax.sgd(learning_rate), loss=loss)

def takes_none():
    return Recipe(optax.sgd(0.1))
"""


def takes_any(recipe, **given):
    settings, sizes = TrainSettings(recipe=recipe, features=(2, 4), **given), Sizes(200, (28, 28, 1), 10)
    return takes_any_arguments(settings, make_program(settings, sizes, make_mesh(1, jax.devices()[:1])), sizes)


@pytest.mark.parametrize(
    ("name", "takes"),
    [
        ("made", True),
        ("asks_when_made", False),
        ("asks_when_it_trains", False),
        ("asks_in_its_loss", False),
        ("takes_none", True),
    ],
)
def test_a_recipe_that_asks_for_an_argument_is_known_before_it_is_compiled(tmp_path, name, takes):
    (tmp_path / "own.py").write_text(ASKING)
    given = {"hyperparameters": ("most=0.5",)} if name == "asks_in_its_loss" else {}
    assert takes_any(f"{tmp_path / 'own.py'}:{name}", **given) is takes


def test_the_named_recipes_take_any_arguments():
    assert takes_any("tutorial")
    assert takes_any("fast", hyperparameters=("momentum=0.8", "smoothing=0.1"))
    assert takes_any("accurate", hyperparameters=("weight_decay=0.1", "smoothing=0.1"))


@pytest.mark.parametrize(
    ("recipe", "name", "remedy"),
    [
        ("tutorial", "smoothing", "left out: tutorial takes none"),
        ("fast", "smooth", "one of momentum, smoothing, which fast takes"),
        ("accurate", "degrees", "one of weight_decay, smoothing, which accurate takes"),
    ],
)
def test_a_recipe_refuses_arguments_that_it_does_not_take(recipe, name, remedy):
    with pytest.raises(UsageError, match=f"--hyperparameters {name}: it must be {remedy}"):
        make_recipe(TrainSettings(recipe=recipe, hyperparameters=(f"{name}=0.5",)), 10)
