# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A convolutional network in JAX, for those who know PyTorch
#
# You know Python, and you have trained a small network in PyTorch. This page builds the same kind of network in JAX:
# two blocks of convolution, ReLU and pooling, then one dense layer that tells ten digits apart. Each new thing comes
# with the PyTorch line beside it, and every claim is checked by an `assert` in the next cell. What JAX does differently
# (keys, pytrees, `value_and_grad`, `jit`) is explained where you first need it.
#
# It takes about a minute on two cores. Run it as a notebook, or as `python docs/tutorial.py`.

# %%
import functools
import itertools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn
from jax import lax

from cnn_jax.core.evaluation import evaluate
from cnn_jax.core.model import CNN
from cnn_jax.core.recipes import tutorial
from cnn_jax.core.training import SeedEpoch, batch_indices, create_train_state, make_keys, run_steps, train_step
from cnn_jax.data.dataset import scale_pixels
from cnn_jax.data.loading import load_dataset

# GPUs and TPUs round the factors of a product unless told otherwise. Here both sides of an equality should agree.
jax.config.update("jax_default_matmul_precision", "highest")
plt.rcParams["image.cmap"] = "gray"

# %% [markdown]
# ## 1. An image is an array
#
# | PyTorch | JAX |
# | --- | --- |
# | `torch.tensor(x)` | `jnp.asarray(x)` |
# | `x.to("cuda")` | nothing: arrays are made on the accelerator if there is one |
# | images are (N, channels, height, width) | images are (N, height, width, channels) |
# | `x[0] = 1` changes `x` | `y = x.at[0].set(1)` makes a new array; `x` stays as it was |
#
# MNIST has 60,000 images to train on and 10,000 to test on. A pixel is one byte, from 0 (black) to 255 (white). Gray
# images have one channel; a colour photograph would have three, for red, green and blue.

# %%
dataset = load_dataset("mnist", None, None)
train_images, train_labels = jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels)
test_images, test_labels = jnp.asarray(dataset.test_images), jnp.asarray(dataset.test_labels)

print("training images", train_images.shape, train_images.dtype, "on", train_images.devices())
assert train_images.shape == (60_000, 28, 28, 1)
assert test_images.shape == (10_000, 28, 28, 1)
assert train_images.dtype == jnp.uint8
assert (int(train_images.min()), int(train_images.max())) == (0, 255)

figure, axes = plt.subplots(1, 8, figsize=(10, 1.6), layout="constrained")
for panel, image, label in zip(axes, dataset.train_images, dataset.train_labels, strict=False):
    panel.imshow(image[:, :, 0])
    panel.set_title(int(label))
    panel.axis("off")
plt.show()

# %% [markdown]
# PyTorch's `ToTensor()` turns bytes into fractions between 0 and 1. Here the bytes stay bytes, a quarter of the memory,
# and `scale_pixels` divides by 255 just before the network sees them. Remember this line: the last chapter is about
# what happens without it.

# %%
digit = scale_pixels(train_images[0])  # (28, 28, 1)
assert digit.dtype == jnp.float32
assert (float(digit.min()), float(digit.max())) == (0, 1)

bytes_ = jnp.array([0, 51, 255], jnp.uint8)
changed = bytes_.at[0].set(102)  # PyTorch: bytes_[0] = 102
assert bytes_.tolist() == [0, 51, 255]
assert changed.tolist() == [102, 51, 255]

# %% [markdown]
# ### Why not a dense layer alone?
#
# A dense layer takes the image as one long row of 784 numbers, and gives each its own weight. It cannot know which
# pixels are neighbours. Here is the proof: shuffle the pixels of every image in one fixed way, shuffle the weights in
# the same way, and the outputs stay what they were. A digit and a shuffled digit are the same task to a dense layer. To
# you they are not, because you see strokes: neighbouring pixels that belong together.

# %%
shuffle = np.random.default_rng(0).permutation(784)
weights = np.random.default_rng(1).normal(size=(784, 10)).astype(np.float32)
rows = np.asarray(scale_pixels(train_images[:5])).reshape(5, 784)
np.testing.assert_allclose(rows @ weights, rows[:, shuffle] @ weights[shuffle], rtol=1e-3, atol=1e-3)

figure, axes = plt.subplots(1, 2, figsize=(4, 2), layout="constrained")
for panel, row, title in zip(axes, (rows[0], rows[0, shuffle]), ("a digit", "the same, shuffled"), strict=True):
    panel.imshow(row.reshape(28, 28))
    panel.set_title(title)
    panel.axis("off")
plt.show()

# %% [markdown]
# ## 2. Convolution by hand
#
# A convolution looks at a small window of the image. It multiplies the pixels in the window by a small array of
# weights, the **kernel**, number by number, and adds the products up. That sum is one number of the output. Then the
# window moves on and the same kernel is used again. The output is called a **feature map**: it is large where the image
# looks like the kernel.
#
# (In mathematics a convolution turns the kernel upside down first. No deep learning library does, and neither do we.)


# %%
def convolve_slowly(image, kernel, stride=1, padding=0):
    """Slide a kernel, (k, k), over an image, (height, width), and return the feature map."""
    image = jnp.pad(image, padding)
    k = len(kernel)
    tops = range(0, image.shape[0] - k + 1, stride)
    lefts = range(0, image.shape[1] - k + 1, stride)
    return jnp.array([[(image[i : i + k, j : j + k] * kernel).sum() for j in lefts] for i in tops])


bar = jnp.array(
    [
        [0, 0, 9, 0, 0],
        [0, 0, 9, 0, 0],
        [0, 0, 9, 0, 0],
        [0, 0, 9, 0, 0],
        [0, 0, 9, 0, 0],
    ],
    jnp.float32,
)
left_edge = jnp.array([[-1, 1], [-1, 1]], jnp.float32)

print(convolve_slowly(bar, left_edge))
assert convolve_slowly(bar, left_edge).shape == (4, 4)
assert convolve_slowly(bar, left_edge)[0].tolist() == [0, 18, -18, 0]

# %% [markdown]
# The kernel asks: is it brighter on the right than on the left? Yes at the bar's left edge (18), the opposite at its
# right edge (-18), and neither elsewhere (0).
#
# Now the library's convolution. `dimension_numbers` says how the arrays are laid out: images as (**N**umber,
# **H**eight, **W**idth, **C**hannels), kernels as (**H**eight, **W**idth, **I**nput channels, **O**utput channels).


# %%
def convolve(images, kernels, stride=1, padding=0):
    """Convolve images, (N, H, W, C), with kernels, (k, k, C, F), and return the feature maps, (N, H', W', F)."""
    return lax.conv_general_dilated(
        images,
        kernels,
        window_strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


by_library = convolve(bar.reshape(1, 5, 5, 1), left_edge.reshape(2, 2, 1, 1))
assert by_library.shape == (1, 4, 4, 1)
np.testing.assert_allclose(by_library[0, :, :, 0], convolve_slowly(bar, left_edge))

# %% [markdown]
# ### Stride and padding
#
# The **stride** is how far the window moves at a time. The **padding** is how many rows and columns of zeros are put
# around the image first: without it, the map is smaller than the image, and the pixels at the border count less than
# those in the middle.

# %%
ramp = jnp.arange(25, dtype=jnp.float32).reshape(5, 5)
square = jnp.ones((3, 3), jnp.float32)

for stride, padding, size in ((1, 0, 3), (2, 0, 2), (1, 1, 5), (2, 1, 3)):
    feature_map = convolve_slowly(ramp, square, stride, padding)
    print(f"stride {stride}, padding {padding}: 5x5 -> {feature_map.shape[0]}x{feature_map.shape[1]}")
    assert feature_map.shape == (size, size)
    same = convolve(ramp[None, :, :, None], square[:, :, None, None], stride, padding)
    np.testing.assert_allclose(feature_map, same[0, :, :, 0])

# %% [markdown]
# ### How large is the feature map?
#
# With an image of n rows, a kernel of k rows, p rows of padding on either side and a stride of s, the window's top row
# can be at 0, s, 2s, ... up to n + 2p - k. So the map has
#
# $$\left\lfloor \frac{n - k + 2p}{s} \right\rfloor + 1$$
#
# rows, and likewise for its columns. The tutorial's convolutions have k = 3, s = 1 and p = 1: the size stays as it is.
#
# `jax.eval_shape` tells the shape that a function would return, without computing anything. That makes it cheap to
# check the formula for some hundred cases.


# %%
def map_size(n, k, p, s):
    """Return the rows of a feature map."""
    return (n - k + 2 * p) // s + 1


for n, k, p, s in itertools.product(range(5, 12), range(1, 6), range(3), range(1, 4)):
    image, kernel = jnp.zeros((1, n, n, 1)), jnp.zeros((k, k, 1, 1))
    feature_map = jax.eval_shape(functools.partial(convolve, stride=s, padding=p), image, kernel)
    assert feature_map.shape == (1, map_size(n, k, p, s), map_size(n, k, p, s), 1)

assert map_size(28, 3, 1, 1) == 28
assert map_size(14, 3, 1, 1) == 14

# %% [markdown]
# ### What kernels see
#
# Three kernels made by hand, and what each finds in a digit. A network does not get its kernels from us: it finds them
# by training. In the end we shall look at the ones it found.

# %%
upright = jnp.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], jnp.float32)
by_hand = {"upright edges": upright, "level edges": upright.T, "blurred": jnp.ones((3, 3), jnp.float32) / 9}

figure, axes = plt.subplots(1, 4, figsize=(9, 2.4), layout="constrained")
axes[0].imshow(digit[:, :, 0])
axes[0].set_title("the image")
for panel, (name, kernel) in zip(axes[1:], by_hand.items(), strict=True):
    panel.imshow(convolve(digit[None], kernel[:, :, None, None], padding=1)[0, :, :, 0])
    panel.set_title(name)
for panel in axes:
    panel.axis("off")
plt.show()

# %% [markdown]
# ## 3. Several input channels, several kernels
#
# We need some random numbers now, and so we meet JAX's **keys**.
#
# | PyTorch | JAX |
# | --- | --- |
# | `torch.manual_seed(0)` sets a generator that all share | `key = jax.random.key(0)` is a value like any other |
# | `torch.randn(3)` moves the generator on | `jax.random.normal(key, (3,))` changes nothing |
# | the next call gives other numbers | the same key gives the same numbers; `split` makes new keys |
#
# So there is no hidden state: what a function draws depends on the key that you hand it, and not on what ran before.
# The rule that follows: use a key once, and split it if you need more.

# %%
key = jax.random.key(0)
assert jax.random.normal(key).item() == jax.random.normal(key).item()
image_key, kernel_key = jax.random.split(key)
assert jax.random.normal(image_key).item() != jax.random.normal(kernel_key).item()

# %% [markdown]
# **Several input channels.** The kernel has a slice for each channel. Each slice is slid over its own channel, and the
# results are added. However many channels go in, one kernel makes one feature map. It moves along height and width
# only, never along the channels: that is why it is called a two-dimensional convolution, though the kernel has three.

# %%
colours = jax.random.uniform(image_key, (6, 6, 3))
kernel = jax.random.normal(kernel_key, (3, 3, 3))  # height, width, input channels

one_map = convolve(colours[None], kernel[:, :, :, None])
assert one_map.shape == (1, 4, 4, 1)

added = sum(convolve_slowly(colours[:, :, channel], kernel[:, :, channel]) for channel in range(3))
np.testing.assert_allclose(one_map[0, :, :, 0], added, atol=1e-5)

# %% [markdown]
# **Several kernels.** Each kernel makes a feature map of its own, and the maps are the channels of the output. So a
# layer from C to F channels has F kernels of size k x k x C, and one bias for each kernel.
#
# | PyTorch | Flax |
# | --- | --- |
# | `nn.Conv2d(3, 5, kernel_size=3, padding=1)` | `nn.Conv(features=5, kernel_size=(3, 3), padding=1)` |
# | `conv.weight`: (F, C, k, k) = (5, 3, 3, 3) | `params["kernel"]`: (k, k, C, F) = (3, 3, 3, 5) |
# | `conv.bias`: (F,) = (5,) | `params["bias"]`: (F,) = (5,) |
# | the layer holds its weights: `conv(x)` | the layer holds none: `conv.apply({"params": params}, x)` |
# | weights are drawn when the layer is made | weights are drawn by `conv.init(key, x)`, for the channels that `x` has |

# %%
conv = nn.Conv(features=5, kernel_size=(3, 3), padding=1)
params = conv.init(kernel_key, colours[None])["params"]
maps = conv.apply({"params": params}, colours[None])

assert params["kernel"].shape == (3, 3, 3, 5)
assert params["bias"].shape == (5,)
assert maps.shape == (1, 6, 6, 5)
for f in range(5):
    alone = convolve(colours[None], params["kernel"][:, :, :, f : f + 1], padding=1) + params["bias"][f]
    np.testing.assert_allclose(maps[:, :, :, f : f + 1], alone, atol=1e-5)

torch_weight = params["kernel"].transpose(3, 2, 0, 1)  # as PyTorch lays it out
assert torch_weight.shape == (5, 3, 3, 3)

# %% [markdown]
# ## 4. Pooling
#
# Pooling makes a map smaller. It takes windows of 2x2 that do not overlap (the stride is 2 as well) and keeps one
# number of each: the largest (**max-pooling**) or the mean (**average-pooling**). It has no weights, and it treats each
# channel alone. A stroke that moves by one pixel often stays in its window, so the network need not care where exactly
# it was.
#
# | PyTorch | Flax |
# | --- | --- |
# | `nn.MaxPool2d(2)(x)` | `nn.max_pool(x, (2, 2), strides=(2, 2))` |
# | `nn.AvgPool2d(2)(x)` | `nn.avg_pool(x, (2, 2), strides=(2, 2))` |
#
# PyTorch's stride is the window's size unless you say otherwise. Flax's is 1, so `strides` must be given.

# %%
numbers = jnp.array([[1, 3, 2, 0], [5, 7, 1, 1], [0, 2, 8, 4], [2, 0, 6, 2]], jnp.float32)
windows = numbers.reshape(2, 2, 2, 2)  # window's row, row in it, window's column, column in it
largest, mean = windows.max(axis=(1, 3)), windows.mean(axis=(1, 3))
assert largest.tolist() == [[7, 2], [2, 8]]
assert mean.tolist() == [[4, 1], [1, 5]]

as_images = numbers.reshape(1, 4, 4, 1)
np.testing.assert_allclose(nn.max_pool(as_images, (2, 2), strides=(2, 2))[0, :, :, 0], largest)
np.testing.assert_allclose(nn.avg_pool(as_images, (2, 2), strides=(2, 2))[0, :, :, 0], mean)
assert map_size(28, 2, 0, 2) == 14  # the formula holds for pooling as well
assert map_size(14, 2, 0, 2) == 7

edges = jnp.abs(convolve(digit[None], upright[:, :, None, None], padding=1))
pooled = {
    "feature map, 28x28": edges,
    "max-pooled, 14x14": nn.max_pool(edges, (2, 2), strides=(2, 2)),
    "average-pooled, 14x14": nn.avg_pool(edges, (2, 2), strides=(2, 2)),
}
figure, axes = plt.subplots(1, 3, figsize=(7.5, 2.7), layout="constrained")
for panel, (title, image) in zip(axes, pooled.items(), strict=True):
    panel.imshow(image[0, :, :, 0])
    panel.set_title(title)
    panel.axis("off")
plt.show()

# %% [markdown]
# ## 5. A convolution is a dense layer that shares its weights
#
# Take an image of 3x3 and a kernel of 2x2. The feature map has 2x2 numbers. A dense layer from 9 numbers to 4 would
# have a 9x4 matrix of 36 weights. The convolution is such a matrix too, only a very special one: column j holds the
# kernel's four numbers at the pixels of window j, and zeros elsewhere.


# %%
def as_matrix(kernel, height, width):
    """Return the matrix, (pixels, outputs), that does to a flattened image what the kernel does to the image."""
    k = len(kernel)
    matrix = np.zeros((height, width, height - k + 1, width - k + 1), np.float32)
    for i in range(matrix.shape[2]):
        for j in range(matrix.shape[3]):
            matrix[i : i + k, j : j + k, i, j] = kernel
    return matrix.reshape(height * width, -1)


small_image = jnp.array([[3, 1, 4], [1, 5, 9], [2, 6, 5]], jnp.float32)
small_kernel = jnp.array([[1, 2], [3, 4]], jnp.float32)
matrix = as_matrix(small_kernel, 3, 3)
print(matrix)

assert matrix.shape == (9, 4)
assert (matrix != 0).sum() == 16  # of 36: the other 20 are zero
assert set(matrix[matrix != 0].tolist()) == {1, 2, 3, 4}  # four weights, each used four times
dense = small_image.reshape(9) @ matrix
np.testing.assert_allclose(dense.reshape(2, 2), convolve_slowly(small_image, small_kernel))

# %% [markdown]
# JAX can find that matrix by itself. The convolution is a function from 9 numbers to 4. Its derivatives are a matrix of
# 4x9, and as the function is linear, they are its weights. (4x9 is how PyTorch's `nn.Linear(9, 4)` lays its weight out;
# Flax's `nn.Dense(4)` has 9x4.)

# %%
derivatives = jax.jacobian(lambda row: convolve_slowly(row.reshape(3, 3), small_kernel).reshape(4))(
    small_image.reshape(9)
)
assert derivatives.shape == (4, 9)
np.testing.assert_allclose(derivatives, matrix.T)

figure, axes = plt.subplots(1, 2, figsize=(6, 3.6), layout="constrained", width_ratios=(1, 2))
for panel, values, title in ((axes[0], np.asarray(small_kernel), "kernel"), (axes[1], matrix, "the same as a matrix")):
    panel.imshow(values, cmap="Reds", vmax=6, aspect="auto" if values is matrix else "equal")
    for (i, j), value in np.ndenumerate(values):
        panel.text(j, i, f"{value:g}", ha="center", va="center", color="black" if value else "silver")
    panel.set(title=title, xticks=[], yticks=[])
axes[1].set(xlabel="4 outputs", ylabel="9 pixels")
plt.show()

# %% [markdown]
# Two things follow.
#
# **Few weights.** The network's first convolution goes from 28x28 pixels to 28x28 numbers in each of 32 maps. As a
# dense layer it would need almost 20 million weights. It has 288.
#
# **What is learned in one place is known in all.** Move the image, and the feature map moves along.

# %%
assert 784 * (784 * 32) == 19_668_992
assert 3 * 3 * 1 * 32 == 288

moved = jnp.roll(digit, 3, axis=1)  # three pixels to the right
here, there = (convolve(image[None], upright[:, :, None, None]) for image in (digit, moved))
np.testing.assert_allclose(there[:, :, 3:], here[:, :, :-3], atol=1e-5)

# %% [markdown]
# ## 6. The network, shape by shape
#
# | layer | PyTorch | Flax | shape after it |
# | --- | --- | --- | --- |
# | images | (N, 1, 28, 28) | | (N, 28, 28, 1) |
# | block 1 | `Conv2d(1, 32, 3, padding=1)` | `Conv(32, (3, 3), padding=1)` | (N, 28, 28, 32) |
# | | `ReLU()`, `MaxPool2d(2)` | `relu(x)`, `max_pool(x, (2, 2), strides=(2, 2))` | (N, 14, 14, 32) |
# | block 2 | `Conv2d(32, 64, 3, padding=1)` | `Conv(64, (3, 3), padding=1)` | (N, 14, 14, 64) |
# | | `ReLU()`, `MaxPool2d(2)` | `relu(x)`, `max_pool(x, (2, 2), strides=(2, 2))` | (N, 7, 7, 64) |
# | flatten | `x.view(x.size(0), -1)` | `x.reshape(x.shape[0], -1)` | (N, 3136) |
# | head | `Linear(3136, 10)` | `Dense(10)` | (N, 10) |
#
# In this project that is `CNN` in `cnn_jax/core/model.py`. `init` draws the weights from a key, and returns them.
#
# They come as a **pytree**. That is JAX's word for arrays in dicts, lists, tuples and the like, nested as you please.
# `jax.tree.map` applies a function to every array and keeps the nesting; `jax.tree.leaves` lists the arrays. In PyTorch
# it would be the `state_dict()`, except that here it is plain data beside the network, and not inside it.

# %%
init_key, order_key, _ = make_keys(777)
model = CNN()
params = model.init(init_key, jnp.zeros((1, 28, 28, 1)))["params"]

for layer, shapes in jax.tree.map(jnp.shape, params).items():
    print(layer, shapes)
sizes = {layer: sum(leaf.size for leaf in jax.tree.leaves(arrays)) for layer, arrays in params.items()}
assert sizes == {
    "layer1": 3 * 3 * 1 * 32 + 32,  # 320
    "layer2": 3 * 3 * 32 * 64 + 64,  # 18,496
    "fc": 7 * 7 * 64 * 10 + 10,  # 31,370
}
assert sum(sizes.values()) == 50_186

# %% [markdown]
# Now each line alone, with the function that we know from chapter 2. In the end it must give what `CNN` gives, because
# it is the same function of the same weights. (`CNN` computes a whole block at once, in a way that is fast in a loop.)

# %%
x = scale_pixels(train_images[:100])
assert x.shape == (100, 28, 28, 1)
x = convolve(x, params["layer1"]["kernel"], padding=1) + params["layer1"]["bias"]
assert x.shape == (100, 28, 28, 32)
x = nn.relu(x)  # max(x, 0)
x = nn.max_pool(x, (2, 2), strides=(2, 2))
assert x.shape == (100, 14, 14, 32)
x = convolve(x, params["layer2"]["kernel"], padding=1) + params["layer2"]["bias"]
assert x.shape == (100, 14, 14, 64)
x = nn.relu(x)
x = nn.max_pool(x, (2, 2), strides=(2, 2))
assert x.shape == (100, 7, 7, 64)
x = x.reshape(x.shape[0], -1)
assert x.shape == (100, 3136)
logits = x @ params["fc"]["kernel"] + params["fc"]["bias"]
assert logits.shape == (100, 10)

np.testing.assert_allclose(model.apply({"params": params}, scale_pixels(train_images[:100])), logits, atol=1e-4)

# %% [markdown]
# There is no softmax at the end. As with PyTorch's `nn.CrossEntropyLoss`, it is in the loss.
#
# One warning if you carry weights over: flattening goes through (height, width, channel) here and through (channel,
# height, width) in PyTorch. The 3136 rows of the head come in another order. `python -m cnn_jax import-torch` takes
# care of it.
#
# ## 7. Loss, gradient, step
#
# | PyTorch | JAX |
# | --- | --- |
# | `loss = nn.CrossEntropyLoss()(logits, labels)` | `optax.softmax_cross_entropy_with_integer_labels(...).mean()` |
# | `optimizer.zero_grad(); loss.backward()` | `loss, gradients = jax.value_and_grad(loss_fn)(params)` |
# | gradients are in `weight.grad` | gradients are returned: a pytree like `params` |
# | `optimizer.step()` changes the weights | a new pytree of weights is computed; the old one is still there |
# | `with torch.no_grad():` | nothing: without `grad`, nothing is differentiated |
#
# The loss of an image is minus the logarithm of the probability that the network gives to its label. A network that
# knows nothing gives each of ten classes a tenth: its loss is ln 10, about 2.3. Training has to bring it down from
# there.

# %%
pixels, labels = scale_pixels(train_images[:100]), train_labels[:100]


def loss_fn(params):
    """Return the mean loss of a hundred images."""
    logits = model.apply({"params": params}, pixels)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


probabilities = jax.nn.softmax(model.apply({"params": params}, pixels))
np.testing.assert_allclose(loss_fn(params), -jnp.log(probabilities[jnp.arange(100), labels]).mean(), rtol=1e-5)
print(f"loss before training {loss_fn(params):.3f}, ln 10 is {jnp.log(10):.3f}")
assert abs(loss_fn(params) - jnp.log(10)) < 0.3

# %% [markdown]
# `jax.value_and_grad(loss_fn)` is a new function. It returns the loss and its derivative with respect to the first
# argument. Nothing is recorded on the arrays, as PyTorch does for `backward()`, so there is nothing to set to zero
# either.
#
# Of one layer we know the gradient with pencil and paper: for the head's bias it is the mean over the images of
# (probabilities - one-hot label). And a step against the gradient, weight by weight, is one `tree.map`.

# %%
loss, gradients = jax.value_and_grad(loss_fn)(params)
assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, params)
np.testing.assert_allclose(
    gradients["fc"]["bias"], (probabilities - jax.nn.one_hot(labels, 10)).mean(axis=0), atol=1e-6
)

downhill = jax.tree.map(lambda weight, gradient: weight - 0.1 * gradient, params, gradients)
print(f"loss {loss:.3f}, after one step {loss_fn(downhill):.3f}")
assert loss_fn(downhill) < loss
assert loss_fn(params) == loss  # the old weights are what they were

# %% [markdown]
# A better way down is Adam, as in `optim.Adam(model.parameters(), lr=0.001)`. It remembers two more numbers for each
# weight. Weights, Adam's numbers and the count of steps go together in a **training state**, which is a pytree again.
# `create_train_state` makes it, and `train_step` takes a state and a batch, and returns the next state and the loss.
# The state is arrays alone, so `train_step` also needs the network and the recipe: `functools.partial` fills them in.
# Open `cnn_jax/core/training.py` beside this page: you know every part of `train_step` now.

# %%
recipe = tutorial(0.001)
take_step = functools.partial(train_step, model=model, recipe=recipe)
state = create_train_state(init_key, model, (28, 28, 1), recipe)
after, loss = take_step(state, train_images[:100], train_labels[:100])

assert (int(state.step), int(after.step)) == (0, 1)
np.testing.assert_allclose(loss, loss_fn(params), rtol=1e-5)
# Adam's first step moves every weight by the learning rate, whatever the size of its gradient.
np.testing.assert_allclose(jnp.abs(after.params["fc"]["bias"] - state.params["fc"]["bias"]), 0.001, rtol=1e-2)

# %% [markdown]
# ## 8. `jit`: the whole step as one program
#
# PyTorch runs one operation after the other, as Python reaches them. JAX can do so too, and did in the cells above. But
# `train_step` is decorated with `jax.jit`: at its first call JAX runs the Python code once with stand-ins for the
# arrays, notes every operation, and compiles them all into one program. Later calls run that program. Python is not
# asked again, unless the arrays come with other shapes or types.
#
# So a jitted function must not depend on anything but its arguments. A `print` in it happens once, at the first call,
# and an `if` on an array's value is refused. That is why a step here returns a new state in place of changing the old
# one.

# %%
looked_at_by_python = []


@jax.jit
def double(x):
    """Return 2x, and take note when Python runs this."""
    looked_at_by_python.append(x.shape)
    return 2 * x


for size in (3, 3, 3, 4):
    double(jnp.ones(size))
assert looked_at_by_python == [(3,), (4,)]

# %% [markdown]
# ## 9. Training
#
# | PyTorch | here |
# | --- | --- |
# | `DataLoader(train, batch_size=100, shuffle=True, drop_last=True)` | `batches = batch_indices(order_key, epoch)` |
# | `for X, Y in data_loader:` | `run_steps((state, SeedEpoch(batches)), images, labels, 0, 600, ...)` |
# | `avg_cost += cost / total_batch` | `losses.mean()` |
#
# The order of the images is a function of a key and the number of the epoch: 600 rows of 100 numbers, each naming an
# image. Nothing else decides it, so the third epoch can be had without the two before.

# %%
sizes = {"num_examples": 60_000, "batch_size": 100}
batches = batch_indices(order_key, 0, **sizes)
assert batches.shape == (600, 100)
np.testing.assert_array_equal(jnp.sort(batches.reshape(-1)), np.arange(60_000))  # each image once
assert (batch_indices(order_key, 0, **sizes) == batches).all()
assert (batch_indices(order_key, 1, **sizes) != batches).any()

# %% [markdown]
# `run_steps` is `train_step` in a loop, and the loop is inside the compiled program (`lax.fori_loop`). The images are
# on the device already, so a step takes its batch by index, and Python waits for the whole epoch. First the proof that
# it is the same loop as the one you would write in Python:

# %%
by_python, costs = state, []
for batch in batches[:5]:
    by_python, cost = take_step(by_python, train_images[batch], train_labels[batch])
    costs.append(float(cost))

take_steps = functools.partial(run_steps, model=model, recipe=recipe)
_, losses = take_steps((state, SeedEpoch(batches)), train_images, train_labels, 0, 5)
np.testing.assert_allclose(losses[:5], costs, rtol=1e-4)

# %% [markdown]
# Then two epochs of all 60,000 images. A `SeedEpoch` is what a seed decides of an epoch: here the batches. A recipe
# that changes its images at random also needs a key.

# %%
history = []
for epoch in range(2):
    batches = batch_indices(order_key, epoch, **sizes)
    state, losses = take_steps((state, SeedEpoch(batches)), train_images, train_labels, 0, len(batches))
    history.append(losses)
    print(f"[Epoch: {epoch + 1:>4}] cost = {float(losses.mean()):>.9}")

assert int(state.step) == 1200
assert history[1].mean() < history[0].mean() < 0.5

figure, panel = plt.subplots(figsize=(7, 2.6), layout="constrained")
panel.semilogy(np.concatenate(history), linewidth=0.6)
panel.set(xlabel="step", ylabel="loss of its batch")
plt.show()

# %% [markdown]
# ## 10. Testing
#
# `evaluate` goes over all 10,000 test images, counts those whose largest logit is that of their label, and divides
# once.
#
# | PyTorch | here |
# | --- | --- |
# | `prediction = model(X_test)` | `logits = model.apply({"params": state.params}, pixels)` |
# | `(prediction.argmax(1) == Y_test).float().mean()` | `evaluate(model, state.eval_variables, images, labels)` |

# %%
tested = evaluate(model, state.eval_variables, test_images, test_labels)
print(f"Accuracy: {tested.accuracy:.4f}")
assert tested.count == 10_000
assert tested.accuracy > 0.975

# %% [markdown]
# Some that it gets wrong among the first thousand. Would you have known?

# %%
logits = model.apply({"params": state.params}, scale_pixels(test_images[:1000]))
guesses = np.asarray(logits.argmax(axis=1))
wrong = np.flatnonzero(guesses != dataset.test_labels[:1000])[:6]

figure, axes = plt.subplots(1, 6, figsize=(9, 1.9), layout="constrained")
for panel in axes:
    panel.axis("off")
for panel, index in zip(axes, wrong, strict=False):
    panel.imshow(dataset.test_images[index, :, :, 0])
    panel.set_title(f"not {guesses[index]} but {dataset.test_labels[index]}")
plt.show()

# %% [markdown]
# And the kernels that it found, with what each makes of a digit. Several have come to look for edges. Nobody told them
# to.

# %%
kernel, bias = state.params["layer1"]["kernel"], state.params["layer1"]["bias"]
maps = nn.relu(convolve(digit[None], kernel, padding=1) + bias)

figure, axes = plt.subplots(2, 8, figsize=(9, 2.6), layout="constrained")
for f, (above, below) in enumerate(axes.T):
    above.imshow(kernel[:, :, 0, f])
    below.imshow(maps[0, :, :, f])
    above.axis("off")
    below.axis("off")
plt.show()

# %% [markdown]
# ## 11. What the PyTorch tutorial tested
#
# Now back to the line that scales pixels. The PyTorch tutorial trains on `ToTensor()`'s pixels, from 0 to 1. But it
# tests on `mnist_test.test_data`, which are the raw bytes, from 0 to 255. The network has never seen such images. All
# of them are 255 times as bright as any in training. It ought to fail, should it not?

# %%
unscaled = evaluate(model, state.eval_variables, test_images, test_labels, unscaled=True)
print(f"pixels in [0, 1]:  accuracy {tested.accuracy:.4f}, loss {tested.loss:.4f}")
print(f"pixels in 0..255:  accuracy {unscaled.accuracy:.4f}, loss {unscaled.loss:.4f}")
assert unscaled.accuracy > 0.93
assert unscaled.loss > 10 * tested.loss

# %% [markdown]
# It does not. Almost as many are right, though the loss is many times as large. The reason is in the layers.
#
# - A convolution and a dense layer are sums of products: without their bias, an input 255 times as large gives an
#   output 255 times as large.
# - ReLU keeps that: max(255 x, 0) = 255 max(x, 0). So does max-pooling: the largest of 255 times some numbers is 255
#   times the largest. So does average-pooling.
#
# A function f with f(c x) = c f(x) for every c > 0 is called **scale-equivariant**. This network is that, but for its
# biases, which do not grow along. Put exactly, with b for all biases together,
#
# $$f(255\,x;\; b) = 255 \cdot f(x;\; b / 255)$$
#
# The factor in front does not change which of ten logits is the largest. So the tutorial's test measures the network
# **with its biases made 255 times smaller**. Here they matter little. Let us check the equation, and then count.


# %%
def with_biases_times(factor, params):
    """Return the same weights with all biases multiplied by a factor."""
    return {layer: {"kernel": arrays["kernel"], "bias": factor * arrays["bias"]} for layer, arrays in params.items()}


small_biases = with_biases_times(1 / 255, state.params)
pixels = scale_pixels(test_images[:1000])
left = model.apply({"params": state.params}, 255 * pixels)
right = 255 * model.apply({"params": small_biases}, pixels)
np.testing.assert_allclose(left, right, rtol=1e-3, atol=0.05)  # of numbers in the thousands

shrunk = evaluate(model, {"params": small_biases}, test_images, test_labels)
print(f"pixels in [0, 1], biases / 255: accuracy {shrunk.accuracy:.4f}")
assert abs(shrunk.correct - unscaled.correct) <= 3  # but for rounding, the same images

# %% [markdown]
# The loss shows what accuracy hides. Logits that are hundreds of times too large make the softmax certain of
# everything, also of what it gets wrong, and certainty in a mistake is what the loss punishes.

# %%
certainty = jax.nn.softmax(model.apply({"params": state.params}, pixels)).max(axis=1)
certainty_unscaled = jax.nn.softmax(left).max(axis=1)
sure, sure_unscaled = (certainty > 0.999).mean(), (certainty_unscaled > 0.999).mean()
print(f"surer than 99.9 %: of {sure:.0%} of the images, and unscaled, of {sure_unscaled:.0%}")
assert sure < 0.9 < 0.99 < sure_unscaled

# %% [markdown]
# Other layers would not have let it pass. A tanh or a sigmoid saturates, and a batch normalisation subtracts the mean
# that it remembers from training: none of them is scale-equivariant.

# %%
sample = jnp.linspace(-1, 1, 11)
assert jnp.allclose(nn.relu(255 * sample), 255 * nn.relu(sample))
assert not jnp.allclose(jnp.tanh(255 * sample), 255 * jnp.tanh(sample))

# %% [markdown]
# This project tests on scaled pixels, and `python -m cnn_jax evaluate RUN --unscaled` gives the tutorial's number as
# well.
#
# ## Where to go from here
#
# - `python train.py --epochs 15` trains the same network in full, and writes down how it went.
# - Give `CNN(pool="avg")` in chapter 6, or `CNN(features=(8, 16))`, and run the page again. What changes, and which
#   `assert` tells you so?
# - Begin chapter 9 with `recipe = fast(0.01, steps=1200)` from `cnn_jax.core.recipes`, and make `take_step` and `state`
#   anew as in chapter 7. How far do two epochs get then?
# - Test with all biases set to zero: `with_biases_times(0, state.params)`. How much do they do for this network?
# - [research.md](research.md) shows how to change the network, the recipe and the data in earnest.
