"""Train as `python train.py` does, but for the report, which takes half of a short run: where it is not the claim."""

import sys
import types

sys.modules["cnn_jax.analysis.report"] = types.SimpleNamespace(write_report=lambda *arguments: None)

from cnn_jax.__main__ import program  # noqa: E402

if __name__ == "__main__":
    program("train")
