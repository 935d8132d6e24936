"""A network without convolutions: two hidden layers of 256.

Run: python train.py --model docs/examples/mlp.py:MLP --recipe fast --seeds 5
Test accuracy: 0.9753 ± 0.0008 over 5 seeds, the tutorial's network 0.9914; the difference is -0.0161, with a 95 %
interval from -0.0170 to -0.0152.
"""

from flax import linen as nn


class MLP(nn.Module):
    num_classes: int = 10

    @nn.compact
    def __call__(self, images):
        x = images.reshape(images.shape[0], -1)  # (N, 784)
        x = nn.relu(nn.Dense(256)(x))  # (N, 256)
        x = nn.relu(nn.Dense(256)(x))  # (N, 256)
        return nn.Dense(self.num_classes)(x)  # (N, 10)
