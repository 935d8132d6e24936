"""The tutorial's network with dropout before its dense layer.

Run: python train.py --model docs/examples/dropout.py:Dropout --recipe fast --seeds 5
Test accuracy: 0.9897 ± 0.0002 over 5 seeds, without dropout 0.9914; the difference is -0.0016, with a 95 % interval
from -0.0024 to -0.0008.
"""

from flax import linen as nn

from cnn_jax.core.model import ConvBlock, Dense


class Dropout(nn.Module):
    rate: float = 0.3
    num_classes: int = 10

    @nn.compact
    def __call__(self, images, train: bool = False):
        x = ConvBlock(features=32)(images)  # (N, 14, 14, 32)
        x = ConvBlock(features=64)(x)  # (N, 7, 7, 64)
        x = x.reshape(x.shape[0], -1)  # (N, 3136)
        x = nn.Dropout(self.rate, deterministic=not train)(x)
        return Dense(self.num_classes)(x)  # (N, 10)
