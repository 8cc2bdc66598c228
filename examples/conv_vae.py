"""A causal 3-D convolutional video decoder, in plain torch and then on cogvx_kernels.

Such a decoder runs on chunks of a clip, and prepends the last frames of the previous chunk before
each temporal convolution. In plain torch every layer needs a norm, an activation, a `torch.cat` and
a `clone`, each a pass over the chunk and most of them a tensor of its size. On cogvx_kernels

- norm and SiLU are one call, `spatial_norm_silu(..., cache=)`: the result is written behind the
  cached frames, where the convolution reads it, and the cache is updated in place;
- a convolution without a norm before it uses `frame_cache_append`; a temporal one is
  `temporal_conv`, which reads the cache without a copy, and then `frame_cache_push`;
- `conv3d` is `F.conv3d` with workarounds for known bugs and for excessive memory.

Weights and their names are the same, only `forward` changes. Norms are per frame, or results would
depend on the length of chunks. A cache updated in place is for inference; `frame_cache_join` is
differentiable. Run: python -m examples.conv_vae
"""

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvx.memory import LiveBytes
from cogvx_kernels import (
    conv3d,
    frame_cache_append,
    frame_cache_push,
    spatial_norm_silu,
    temporal_conv,
)

Cache = dict[nn.Module, Tensor]  # the last two frames that each convolution has read

# --- plain torch -----------------------------------------------------------------------------


class BeforeConv(nn.Conv3d):
    """Causal convolution over three frames; the first frame of a clip is replicated."""

    def __init__(self, channels: int, out_channels: int, side: int = 3) -> None:
        super().__init__(channels, out_channels, (3, side, side), padding=(0, side // 2, side // 2))

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        if self in cache:
            x = torch.cat([cache[self], x], 2)
        else:
            x = F.pad(x, (0, 0, 0, 0, 2, 0), mode="replicate")
        cache[self] = x[:, :, -2:].clone()
        return super().forward(x)


class BeforeNormConv(nn.Module):
    """Group norm per frame, SiLU and a causal convolution."""

    make_conv = BeforeConv

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels, eps=1e-6)
        self.conv = self.make_conv(channels, out_channels)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        pictures = self.norm(x.transpose(1, 2).flatten(0, 1))
        return self.conv(F.silu(pictures.unflatten(0, (len(x), -1)).transpose(1, 2)), cache)


class BeforeUpsample(nn.Module):
    """Double the frames, except the first, then height and width."""

    make_time_conv = BeforeConv

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.time_conv = self.make_time_conv(channels, 2 * channels, side=1)
        self.conv = nn.Conv3d(channels, out_channels, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        begins = self.time_conv not in cache
        pairs = self.time_conv(x, cache).unflatten(1, (2, -1))
        return self.in_space(pairs.movedim(1, 3).flatten(2, 3)[:, :, begins:])

    def in_space(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=(1.0, 2.0, 2.0)))


class BeforeDecoder(nn.Module):
    """Decode latents (batch, 8, n, h, w) to video (batch, 3, 4n - 3, 4h, 4w)."""

    make_conv, make_norm_conv, make_upsample = BeforeConv, BeforeNormConv, BeforeUpsample

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = self.make_conv(8, 64)
        self.block1 = self.make_norm_conv(64, 64)
        self.upsample1 = self.make_upsample(64, 32)
        self.block2 = self.make_norm_conv(32, 32)
        self.upsample2 = self.make_upsample(32, 16)
        self.block3 = self.make_norm_conv(16, 16)
        self.out = self.make_norm_conv(16, 3)

    def forward(self, latents: Tensor, cache: Cache) -> Tensor:
        """Decode one chunk, and update the cache, which is empty before the first."""
        x = self.conv_in(latents, cache)
        x = self.upsample1(x + self.block1(x, cache), cache)
        x = self.upsample2(x + self.block2(x, cache), cache)
        return self.out(x + self.block3(x, cache), cache)


# --- on cogvx_kernels ------------------------------------------------------------------------


class AfterConv(BeforeConv):
    def slot(self, x: Tensor, cache: Cache) -> tuple[Tensor, str | None]:
        """Buffer of the cached frames, and how to pad where the clip begins."""
        if self in cache:
            return cache[self], None
        frames = x.new_empty((len(x), 2, *x.shape[3:], x.shape[1]))  # channels last in memory
        cache[self] = frames.movedim(-1, 1)
        return cache[self], "replicate"

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        past, start = self.slot(x, cache)
        x = frame_cache_append(past, x, start=start, memory_format=torch.channels_last_3d)
        return conv3d(x, self.weight, self.bias)


class AfterTimeConv(AfterConv):
    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        past, start = self.slot(x, cache)
        out = temporal_conv(x, self.weight, self.bias, cache=None if start else past)
        frame_cache_push(past, x, start=start)
        return out


class AfterNormConv(BeforeNormConv):
    make_conv = AfterConv

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        norm, conv = self.norm, self.conv
        past, start = conv.slot(x, cache)
        x = spatial_norm_silu(
            x, norm.weight, norm.bias, num_groups=norm.num_groups, eps=norm.eps, per_frame=True,
            cache=past, start=start,
        )  # fmt: skip
        return conv3d(x, conv.weight, conv.bias)


class AfterUpsample(BeforeUpsample):
    make_time_conv = AfterTimeConv

    def in_space(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last_3d)  # before it is upsampled
        x = F.interpolate(x, scale_factor=(1.0, 2.0, 2.0))
        return conv3d(x, self.conv.weight, self.conv.bias)


class AfterDecoder(BeforeDecoder):
    make_conv, make_norm_conv, make_upsample = AfterConv, AfterNormConv, AfterUpsample


# --- comparison ------------------------------------------------------------------------------


@torch.no_grad()
def decode(decoder: BeforeDecoder, latents: Tensor, chunks: list[int]) -> tuple[Tensor, int]:
    """Decode latents in chunks of these lengths; returns the video and the peak of live bytes."""
    cache: Cache = {}
    with LiveBytes() as live:
        pieces = [decoder(chunk, cache) for chunk in latents.split(chunks, dim=2)]
    return torch.cat(pieces, 2), live.peak


def main() -> None:
    torch.manual_seed(0)
    before, after = BeforeDecoder(), AfterDecoder()
    print("the same weights:", after.load_state_dict(before.state_dict()))
    latents = torch.randn(1, 8, 5, 12, 12)
    exact, _ = decode(deepcopy(before).double(), latents.double(), [5])

    clips, errors, peaks, same = [], [], [], []
    for decoder in (before, after):
        whole, peak = decode(decoder, latents, [5])
        joined, peak_in_chunks = decode(decoder, latents, [1, 2, 2])
        clips.append(whole)
        errors.append((whole - exact).square().mean().sqrt().item())
        peaks.append((peak, peak_in_chunks))
        same.append(torch.equal(joined, whole))
        print(f"{type(decoder).__name__}: error against fp64 {errors[-1]:.1e}")
        print(f"  peak of live bytes: {peak:,} whole, {peak_in_chunks:,} in chunks")
        print(f"  chunks equal the whole bit for bit: {same[-1]}")
    print(f"largest difference: {(clips[0] - clips[1]).abs().max().item():.1e}")

    assert same[1], "chunks give the bits of the whole"
    assert errors[1] <= 2 * errors[0], "the error is that of plain torch"
    assert peaks[1][0] < peaks[0][0] and peaks[1][1] < peaks[0][1], "and the memory is less"


if __name__ == "__main__":
    main()
