"""The tutorial in PyTorch, and the comparison with it. Needs the extra `torch`.

tutorial.py        the tutorial's network and its training step in PyTorch
import_weights.py  a file of PyTorch's weights, and the run that is made from it
equivalence.py     how closely both frameworks compute the same function
variants.py        each variant of a training step that is timed, in PyTorch and in JAX
processes.py       what runs in new processes, and how they are started
benchmark.py       all variants against each other and against the machine's limit
compare.py         the same training in both frameworks from several seeds, and the report
"""
