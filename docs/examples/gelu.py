"""GELU in place of ReLU, after the pooling.

Run: python train.py --model docs/examples/gelu.py:Gelu --recipe fast --seeds 5
Test accuracy: 0.9900 ± 0.0005 over 5 seeds, with ReLU 0.9914; the difference is -0.0013, with a 95 % interval
from -0.0017 to -0.0009.
"""

from flax import linen as nn

from cnn_jax.core.conv_block import conv_block
from cnn_jax.core.model import Dense, torch_uniform

# `conv_block` applies ReLU, which changes nothing of values that this has made positive; it cuts off what is below -32.
# After the pooling, only an activation that never falls, such as leaky ReLU, gives the same as before it.
SHIFT = 32.0


class Gelu(nn.Module):
    num_classes: int = 10

    @nn.compact
    def __call__(self, images):
        x = images  # (N, 28, 28, 1)
        for number, features in enumerate((32, 64), start=1):
            init = torch_uniform(fan_in=3 * 3 * x.shape[-1])
            kernel = self.param(f"kernel{number}", init, (3, 3, x.shape[-1], features))
            bias = self.param(f"bias{number}", init, (features,))
            x = nn.gelu(conv_block(x, kernel, bias + SHIFT) - SHIFT)  # (N, 14, 14, 32), then (N, 7, 7, 64)
        return Dense(self.num_classes)(x.reshape(x.shape[0], -1))  # (N, 10)
