"""Images and labels as arrays.

dataset.py  image classification sets as arrays
idx.py      the IDX format
mnist/      MNIST itself, its licence and its tfds builder
"""
