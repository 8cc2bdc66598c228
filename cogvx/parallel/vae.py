"""A VAE on several ranks: chunks in relay, or tiles."""

from typing import TYPE_CHECKING, Any

from torch import nn

from ..vae import Decoder, Encoder
from ..vae.ranks import GATHERS, METHODS, VAERanks
from ..validation import check_choice

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


def vae_parallel(
    target: Any,
    ranks: "DeviceMesh | ProcessGroup | None",
    *,
    method: str = "relay",
    gather: str = "first",
) -> None:
    """Let several ranks encode and decode one clip together; without gradients.

    From then on every rank calls `encode`, `decode`, `stream_encode`, `stream_decode` or
    `CogVideoX.generate` alike, with the same arguments, and takes a stream to its end. A stream
    needs the whole clip, as one tensor or with `total`, and no state.

    Args:
        target: a `CausalVAE`, `Encoder` or `Decoder`; or a pipeline, of which only the decoder is
            changed, since one rank encodes the image or video that `generate` is given.
        ranks: a mesh of `start`, all its dimensions but "data"; or a process group. None undoes it.
        method: "relay": chunk i on rank i, round by round, and each convolution passes the frames
            that the next chunk needs to the next rank: bit for bit the result of one process.
            It helps up to as many ranks as there are chunks (6 of 49 frames). "tiles": the tiles of
            `tiling`, which must be given, on the ranks in turn: bit for bit the *tiled* result of
            one process, which is not that of whole frames; for few chunks of large frames.
        gather: who gets a decoded video: "first", rank 0, while the others get one of 0 frames; or
            "all". Latents are small, and every rank gets them.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    where = "vae_parallel"
    check_choice(where, "method", method, METHODS)
    check_choice(where, "gather", gather, GATHERS)
    part = target.vae.decoder if hasattr(target, "vae") else target
    modules = part.modules() if isinstance(part, nn.Module) else ()
    coders = [module for module in modules if isinstance(module, (Encoder, Decoder))]
    if not coders:
        raise TypeError(
            f"{where}: target must be a pipeline, CausalVAE, Encoder or Decoder; got "
            f"{type(target).__name__}"
        )
    group = None if ranks is None else _group(ranks)
    for coder in coders:
        to = gather if isinstance(coder, Decoder) else "all"
        coder.ranks = None if group is None else VAERanks(group, method, to)


def _group(ranks: "DeviceMesh | ProcessGroup") -> "ProcessGroup":
    """The process group of a mesh, without its dimension of different prompts, or as given."""
    found: Any = ranks
    if not hasattr(found, "get_group"):
        return found
    names = tuple(name for name in found.mesh_dim_names or () if name != "data")
    mesh = found[names] if names else found
    return mesh._flatten().get_group() if mesh.ndim > 1 else mesh.get_group()
