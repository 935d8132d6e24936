"""A run on disk and in time.

settings.py     the settings of a training: defaults, meanings, and what each may be
train.py        a run from its settings to its report
restore.py      a run's data, seeds and states, from its settings or its newest checkpoint
folder.py       a run's config.json, metrics.jsonl, result.json and lock
checkpoint.py   Orbax, and nowhere else
tensorboard.py  TensorBoard's scalars
sweep.py        the search over settings, with Optuna
"""
