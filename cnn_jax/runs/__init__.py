"""A run on disk and in time.

own_code.py     a network or a recipe in a Python file of the user's
settings.py     every setting of a training: its default, its meaning, the values that it may have
program.py      a run's compiled functions, from its settings and the sizes of its data
train.py        train_run and train_epoch: a run from its data to its result; train_together: several at a time
summary.py      what a run shows and writes about itself: its task, its progress, its result
restore.py      a run's data by its settings, and a run as its newest checkpoint left it
folder.py       a run's config.json, metrics.jsonl, result.json, TensorBoard's scalars and lock
checkpoint.py   Orbax, and nowhere else
"""
