"""The tutorial's network with batch normalisation after each block.

Run: python train.py --model docs/examples/batch_norm.py:BatchNorm --recipe fast --seeds 5
Test accuracy: 0.9907 ± 0.0008 over 5 seeds, without it 0.9914; no difference is shown, with a
95 % interval from -0.0018 to +0.0004.
"""

from flax import linen as nn

from cnn_jax.core.model import ConvBlock, Dense


class BatchNorm(nn.Module):
    num_classes: int = 10

    @nn.compact
    def __call__(self, images, train: bool = False):
        x = images  # (N, 28, 28, 1)
        for features in (32, 64):
            x = ConvBlock(features=features)(x)  # (N, 14, 14, 32), then (N, 7, 7, 64)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return Dense(self.num_classes)(x.reshape(x.shape[0], -1))  # (N, 10)
