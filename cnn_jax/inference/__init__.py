"""A trained network at work.

pretrained.py    loads a trained network and how it was trained, from a run or from the package, and reads with it
torch_layout.py  converts weights to PyTorch's names and layout, and back
pictures.py      reads picture files as arrays, and refuses bad ones; draws what is shown of them
preprocess.py    lays out a picture of a digit as MNIST does
characters.py    finds the characters in a picture, line by line
logits.py        computes its logits of any number of images, which pixels they come from, and how far to trust their
                 probabilities
predict.py       the command `predict`
export.py        writes a network for another program, and tests the file before it is kept
page/            the page that reads pictures in a browser without a server; its board and style, which demo shares, and
                 how templates become pages
demo/            the page to draw digits on that a server answers: Python, the answer's template, and guard.py, which
                 says what may reach the page
trained/         the packaged weights, and those that tell digits from everything else
"""
