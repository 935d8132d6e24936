"""Images and labels as arrays.

loading.py    a data set by its name or its folder, from wherever it is
dataset.py    image classification sets: what they are, how they are split, identified and scaled
tfds.py       a tfds set, MNIST among them, as arrays
published.py  what the files leave unsaid: the classes' names, and how EMNIST is stored
idx.py        the IDX format, and a folder of four IDX files
mnist/        MNIST itself, its licence and its tfds builder
"""
