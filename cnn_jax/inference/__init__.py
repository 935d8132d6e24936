"""A trained network at work.

pretrained.py    a trained network and how it was trained: a run's, or the packaged one
torch_layout.py  weights in PyTorch's names and axes, there and back
pictures.py      files with pictures as arrays, and every way in which such a file can be bad
preprocess.py    a picture of a digit, laid out as MNIST's
predict.py       the command `predict`
export.py        a network as a file for another program, tested before it is kept
demo/            the page to draw digits on: Python, board (HTML and JavaScript), style, and the answer's template
trained/         the packaged weights
"""
