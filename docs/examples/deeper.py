"""The tutorial's deeper network: a third block and two dense layers.

Run: python train.py --model docs/examples/deeper.py:Deeper --recipe fast --seeds 5
Test accuracy: 0.9934 ± 0.0003 over 5 seeds, the tutorial's first network 0.9914; the difference is +0.0020, with a
95 % interval from +0.0010 to +0.0030.
"""

from flax import linen as nn

from cnn_jax.core.model import ConvBlock, Dense


class Deeper(nn.Module):
    num_classes: int = 10

    @nn.compact
    def __call__(self, images):
        x = ConvBlock(features=32)(images)  # (N, 14, 14, 32)
        x = ConvBlock(features=64)(x)  # (N, 7, 7, 64)
        x = ConvBlock(features=128)(x)  # (N, 3, 3, 128)
        x = x.reshape(x.shape[0], -1)  # (N, 1152)
        x = nn.relu(Dense(625)(x))  # (N, 625)
        return Dense(self.num_classes)(x)  # (N, 10)
