"""How a VAE begins that is made anew: as one of pictures, in which signals keep their size.

torch's own weights let a convolution give a third of the variance that it gets. A factorised one is
two in a row, and those that change the size have no way around them: what reaches the latents is
mostly biases then, and it takes thousands of steps to make pictures of them.
"""

import torch
from torch import nn

from ..vae import CausalVAE

FIRST_LOGVAR = -6.0  # latents that begin as little noise are soon worth being read
# Variance that convolutions of these names give, of what they get; all others keep it. The first
# two of a resnet come after SiLU, which leaves half, as ReLU does, and the second begins a branch
# that adds little. With the last two the latents change a norm of the decoder, little at first.
GAINS = {"conv1": 2.0, "conv2": 0.2, "conv_y": 0.01, "conv_b": 0.01}


@torch.no_grad()
def begin_vae(vae: CausalVAE) -> None:
    """New weights for the convolutions of a VAE, from torch's random numbers.

    Every frame goes through alone: kernels in time are 1 at the frame itself and 0 before it.
    Those in space are normal, with variances as arXiv 1502.01852 has them, and biases are 0.
    """
    for name, conv in vae.named_modules():
        if not isinstance(conv, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            continue
        weight, bias = conv.weight, conv.bias
        assert bias is not None
        bias.fill_(float(".conv_y" in name))
        now = weight if isinstance(conv, nn.Conv2d) else weight.zero_()[:, :, -1]
        if isinstance(conv, nn.Conv1d):
            now.copy_(torch.eye(len(now)))
        else:
            gain = next((GAINS[key] for key in GAINS if f".{key}" in name), 1.0)
            now.normal_(0, (gain / now[0].numel()) ** 0.5)
    *_, last = vae.encoder.conv_out.parameters()
    last[vae.config.latent_channels :] = FIRST_LOGVAR
