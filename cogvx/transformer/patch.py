"""Split latents into patches and back."""

from torch import Tensor


def patchify(latents: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Split latents into patches, one token each; frames slowest, width fastest.

    latents  (batch, frames, channels, height, width)
    patch    (frames, height, width) of a patch; each divides its side of the latents
    returns  (batch, video_len, channels · patch frames · patch height · patch width), in this
             order, channels slowest

    Source: `docs/model.md`, sections 2.2 and 2.6. `unpatchify` is the inverse.
    """
    patch_frames, patch_height, patch_width = patch
    x = latents.unflatten(4, (-1, patch_width)).unflatten(3, (-1, patch_height))
    x = x.unflatten(1, (-1, patch_frames))
    # (batch, frames, patch frames, channels, height, patch height, width, patch width)
    return x.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4).flatten(1, 3)


def unpatchify(x: Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """Join patches to latents, the inverse of `patchify`.

    x        (batch, video_len, channels · patch frames · patch height · patch width)
    grid     (frames, height, width) in tokens; their product is video_len
    returns  (batch, frames, channels, height, width)
    """
    x = x.unflatten(2, (-1, *patch)).unflatten(1, grid)
    # (batch, frames, height, width, channels, patch frames, patch height, patch width)
    x = x.permute(0, 1, 5, 4, 2, 6, 3, 7)
    return x.flatten(6, 7).flatten(4, 5).flatten(1, 2)
