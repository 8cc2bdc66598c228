"""VAE weight initialisation: variance-preserving, and every frame on its own.

torch's default gives a convolution's output a third of its input's variance. A factorised
convolution is two in a row, and the down- and upsampling ones have no residual path around them, so
that latents would be mostly biases, and it would take thousands of steps to learn images.
"""

import torch
from torch import nn

from ..vae import CausalVAE

FIRST_LOGVAR = -6.0  # little noise at first, so that the decoder soon uses the latents
# Output variance over input variance by name, 1 for all others. SiLU before conv1 and conv2 halves
# the variance, and conv2 ends a residual branch that starts small; conv_y and conv_b modulate a
# norm of the decoder, little at first.
GAINS = {"conv1": 2.0, "conv2": 0.2, "conv_y": 0.01, "conv_b": 0.01}


@torch.no_grad()
def init_vae(vae: CausalVAE) -> None:
    """Initialise the convolutions of a VAE from torch's random numbers.

    Temporal kernels are 1 at the current frame and 0 before it. Spatial ones are normal with the
    variances of arXiv 1502.01852, times a gain; biases are 0.
    """
    for name, conv in vae.named_modules():
        if not isinstance(conv, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            continue
        weight, bias = conv.weight, conv.bias
        assert bias is not None
        bias.fill_(float(".conv_y" in name))
        frame = weight if isinstance(conv, nn.Conv2d) else weight.zero_()[:, :, -1]
        if isinstance(conv, nn.Conv1d):
            frame.copy_(torch.eye(len(frame)))
        else:
            gain = next((GAINS[key] for key in GAINS if f".{key}" in name), 1.0)
            frame.normal_(0, (gain / frame[0].numel()) ** 0.5)
    *_, last = vae.encoder.conv_out.parameters()
    last[vae.config.latent_channels :] = FIRST_LOGVAR
