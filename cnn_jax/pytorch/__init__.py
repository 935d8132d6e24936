"""The tutorial in PyTorch, and the comparison with it. Needs the extra `torch`, but for weights in safetensors.

tutorial.py        the tutorial's network and its training step in PyTorch
import_weights.py  makes a run from a file of PyTorch weights
equivalence.py     measures how closely both frameworks compute the same function
keras.py           the network in Keras, and its training step in TensorFlow, where that is installed
variants.py        the variants of a training step that are timed, in every framework
processes.py       starts the processes in which each framework is measured
benchmark.py       times all variants, and compares them with the machine's limit
compare.py         trains in both frameworks from several seeds, and reports the differences
"""
