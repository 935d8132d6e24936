"""A saliency says what each pixel contributes to a logit: all contributions together are what the image changes."""

import jax
import numpy as np
import pytest

from cnn_jax.core.model import CNN
from cnn_jax.inference.logits import logits, saliency
from cnn_jax.inference.pictures import AGAINST, FOR, draw_saliency


def test_the_contributions_of_an_images_pixels_sum_to_what_it_changes_of_the_logit(packaged, real_images):
    images, labels = real_images[0][:20, ..., np.newaxis], real_images[1][:20]
    for classes in (labels, (labels + 1) % 10):
        maps = saliency(packaged.model, packaged.variables, images, classes)
        assert (maps.shape, maps.dtype) == ((20, 28, 28), np.float32)
        with_ink, without = packaged.logits(images), packaged.logits(np.zeros_like(images))
        changed = (with_ink - without)[np.arange(20), classes]
        np.testing.assert_allclose(maps.sum(axis=(1, 2)), changed, atol=0.15)
        assert np.abs(changed).max() > 3
        assert not maps[images[..., 0] == 0].any()


def test_without_its_most_salient_ink_a_digit_loses_more_of_its_logit_than_without_as_much_other_ink(
    packaged, real_images
):
    images, labels = real_images[0][:50, ..., np.newaxis], real_images[1][:50]
    maps = saliency(packaged.model, packaged.variables, images, labels)

    def mean_logit(order):
        """Of the images without the 20 inked pixels that come first in this order."""
        cut = images.copy()
        for image, scores in zip(cut, np.where(images[..., 0] > 0, order, -np.inf), strict=True):
            image.reshape(-1)[scores.ravel().argsort()[::-1][:20]] = 0
        return packaged.logits(cut)[np.arange(50), labels].mean()

    others = mean_logit(np.random.default_rng(0).random(maps.shape))
    assert mean_logit(maps) + 1 < others < mean_logit(-maps) - 1


@pytest.mark.parametrize("shape", [(0, 9, 7, 3), (2, 9, 7, 3)])
def test_any_number_of_images_of_any_channels_have_a_saliency(shape):
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    model = CNN(features=(3, 4), num_classes=5)
    variables = model.init(jax.random.key(0), jax.numpy.zeros((1, *shape[1:])))
    maps = saliency(model, variables, images, np.arange(len(images)))
    assert maps.shape == shape[:-1]
    differences = logits(model, variables, images) - logits(model, variables, np.zeros_like(images))
    of_classes = differences[np.arange(len(images)), np.arange(len(images))]
    np.testing.assert_allclose(maps.sum(axis=(1, 2)), of_classes, atol=0.01)


def test_what_speaks_for_a_class_is_red_against_it_blue_and_other_ink_grey():
    ink = np.full((1, 4, 1), 200, np.uint8)
    ink[0, 3] = 0
    for_, against, neither, paper = draw_saliency(ink, np.array([[2, -2, 0, 0]], np.float32))[0].tolist()
    assert (tuple(for_), tuple(against)) == (FOR, AGAINST)
    assert len(set(neither)) == 1
    assert neither[0] < paper[0] == 255
    blank = draw_saliency(np.zeros((2, 3, 1), np.uint8), np.zeros((2, 3), np.float32))
    assert blank.tolist() == np.full((2, 3, 3), 255).tolist()
    dark, bright = draw_saliency(np.array([[[0] * 3, [255] * 3]], np.uint8), np.zeros((1, 2), np.float32))[0, :, 0]
    assert dark < bright == 255
