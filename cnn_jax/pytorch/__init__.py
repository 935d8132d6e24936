"""The tutorial as PyTorch runs it, and what it takes to compare it with this program. Needs the extra `torch`.

tutorial.py        the tutorial's network and training, in PyTorch
import_weights.py  a file of PyTorch's weights as a run
equivalence.py     how closely both compute the same function
jax_loops.py       this program's side of the benchmark
variants.py        each way to train a step that is timed
benchmark.py       all variants against each other
compare.py         the same seeds in both frameworks, and the report
"""
