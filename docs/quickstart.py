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
# # Train a network and use it, in five cells
#
# This page trains the network, draws how that went, reads a picture, and shows what the network is most wrong about. It
# runs as it is on your own machine and on Colab, on a CPU, a GPU or a TPU. [The tutorial](tutorial.ipynb) explains how
# the network works.
#
# The first cell installs the package where it is missing, with JAX for the accelerator that it finds. If you have a
# clone of the repository, make its folder the `SOURCE`.

# %%
import importlib.util
import pathlib
import shutil
import subprocess
import sys

SOURCE = "cnn-jax"

if importlib.util.find_spec("cnn_jax") is None:
    has_tpu = pathlib.Path("/dev/accel0").exists() or pathlib.Path("/dev/vfio/0").exists()
    extra = "[cuda]" if shutil.which("nvidia-smi") else "[tpu]" if has_tpu else ""
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", SOURCE + extra], check=True)

# %% [markdown]
# ## Train
#
# `train` takes the options of `python train.py`, and tells you after each epoch where it is. A pass over the 60,000
# images takes seconds on two cores, and less on an accelerator. Run the cell again and nothing is trained: the run in
# `checkpoints/quickstart` is finished. `fresh=True` begins anew, and `seeds=10` trains ten networks at once.

# %%
import cnn_jax

training = cnn_jax.train(epochs=3, run_name="quickstart")

# %% [markdown]
# ## How it went
#
# `metrics` has a dictionary for each epoch. The cost is the mean loss of the epoch's batches. The network has never
# trained on the test images.

# %%
import matplotlib.pyplot as plt

epochs = [epoch["epoch"] for epoch in training.metrics]
figure, panels = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
for panel, name in zip(panels, ("cost", "test_accuracy"), strict=True):
    panel.plot(epochs, [epoch[name] for epoch in training.metrics], "o-")
    panel.set(xlabel="epoch", ylabel=name.replace("_", " "), xticks=epochs)
plt.show()

# %% [markdown]
# ## Read a picture
#
# `load` takes the name of a run. Without one it loads the network in the package, which has trained longer.
# `predict` takes files, such as `network.predict("photo.jpg")`, or arrays. It finds the digits and lays them out as
# MNIST does, so you may draw in any size and colour.

# %%
import numpy as np
from PIL import Image, ImageDraw

picture = Image.new("RGB", (300, 200), "ivory")
ImageDraw.Draw(picture).line([(140, 30), (110, 110), (190, 110)], fill="navy", width=10)
ImageDraw.Draw(picture).line([(170, 70), (165, 170)], fill="navy", width=10)

network = cnn_jax.load("quickstart")
(answer,) = network.predict([np.asarray(picture)])

plt.figure(figsize=(3, 2))
plt.imshow(picture)
plt.title(f"{answer.text} with {answer.symbols[0].probability:.1%}")
plt.axis("off")
plt.show()

# %% [markdown]
# ## The most confident mistakes
#
# Of the 10,000 test images, these are the ones where the network was surest of a wrong answer. Some would fool you,
# too.

# %%
from cnn_jax.data.loading import load_dataset

dataset = load_dataset("mnist", None, None)
digits = [answer.symbols[0] for answer in network.predict(list(dataset.test_images))]
mistakes = [i for i, label in enumerate(dataset.test_labels) if digits[i].index != label]
mistakes.sort(key=lambda i: digits[i].probability, reverse=True)
print(f"{len(mistakes)} of {len(digits):,} test images are wrong")

figure, panels = plt.subplots(1, 6, figsize=(9, 2.2), layout="constrained")
for panel, i in zip(panels, mistakes, strict=False):
    panel.imshow(dataset.test_images[i, :, :, 0], cmap="gray_r")
    panel.set_title(f"not {digits[i].class_name} but {dataset.test_labels[i]}\n{digits[i].probability:.1%}")
    panel.axis("off")
plt.show()

# %% [markdown]
# ## Where to go from here
#
# - The run's own page, `checkpoints/quickstart/report.html`, has all of this and more.
# - [From Python](python.md) describes `train` and `load` in full, and [using a network](using-a-network.md) the
#   commands.
# - [research.md](research.md) shows how to change the network, the recipe and the data.
