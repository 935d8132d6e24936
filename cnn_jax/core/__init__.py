"""What a learner reads, in this order.

model.py           the network
conv_block.py      convolution, ReLU and pooling as one differentiable operation, made fast
recipes.py         how to train: optimiser, schedule, augmentation, loss, averaged weights
training.py        one step, and the compiled run of many
evaluation.py      accuracy and loss over a whole test set
sharding.py        many seeds in one program, over all devices
input_pipeline.py  how training images reach the devices
"""
