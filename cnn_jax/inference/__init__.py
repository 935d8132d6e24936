"""A trained network at work.

pretrained.py    a trained network and what it is for: of a run, or the packaged one
torch_layout.py  weights in PyTorch's names and axes, there and back
pictures.py      pictures of digits as the network wants them
predict.py       which digits are in pictures
export.py        networks as files for other programs, each tested before it is kept
demo/            the page to draw digits on
trained/         the packaged weights
"""
