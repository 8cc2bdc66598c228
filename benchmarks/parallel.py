"""One step of a transformer on the ranks of torchrun, against the same step on one of them.

torchrun --nproc-per-node 8 -m benchmarks.parallel --preset 5b --layers 42 --guidance 2

Prints, for the mesh: the error against one rank, the time of a step on one rank and on the mesh,
and of the exchanges of a step alone.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from cogvx.config import PRESETS
from cogvx.parallel import Ranks, context_parallel, start, stop
from cogvx.transformer import ExpertTransformer
from cogvx_kernels.context_parallel import Context


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the benchmark on this rank; times are the slowest rank's, in seconds."""
    mesh = start(options.guidance, device=options.device)
    device = torch.device(mesh.device_type)
    whole = PRESETS[options.preset].transformer
    layers = whole.num_layers if options.layers is None else options.layers
    config = replace(whole, num_layers=layers)
    torch.manual_seed(0)
    with torch.device(device):
        model = ExpertTransformer(config).to(torch.bfloat16).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    frames, height, width = options.latents
    latents = torch.randn(1, frames, config.in_channels, height, width)
    text = torch.randn(2, config.max_text_seq_length, config.text_embed_dim)
    latents, text = (x.to(device, torch.bfloat16) for x in (latents, text))
    ofs = None if config.ofs_embed_dim is None else torch.tensor(2.0)
    modulations = model.modulations(torch.tensor([500]), ofs).at(0)

    def step(guides: Context | None = None) -> torch.Tensor:
        """Both predictions of guidance, (2, ...)."""
        texts = text if guides is None else text[guides.rank : guides.rank + 1]
        both = latents.expand(len(texts), -1, -1, -1, -1)
        v: torch.Tensor = model(both, texts, modulations=modulations)
        return v if guides is None else guides.gather(v[None], [1, 1])[0]

    expected, one = step().float(), _seconds(step, device, options.repeats)
    context_parallel(model, mesh)
    on_mesh = partial(step, Ranks(mesh).along("guidance"))
    found, many = on_mesh().float(), _seconds(on_mesh, device, options.repeats)
    patch = config.patch_size
    seqlen = (frames // (config.patch_size_t or 1)) * (height // patch) * (width // patch)
    seqlen += config.max_text_seq_length
    batch = 2 // options.guidance
    q = torch.zeros(batch, seqlen, config.num_attention_heads, config.attention_head_dim)
    exchange = 0.0
    if model.context is not None:
        part = model.context.part(seqlen)
        own = part.narrow(q.to(device, torch.bfloat16), 1)

        def exchanges() -> torch.Tensor:
            return part.attention(own, own, own, lambda q, k, v: q)

        exchange = layers * _seconds(exchanges, device, options.repeats)
    return {
        "guidance": mesh["guidance"].size(),
        "context": mesh["context"].size(),
        "tokens": seqlen,
        "error": ((found - expected).norm() / expected.norm()).item(),
        "one_rank_s": _slowest(one),
        "mesh_s": _slowest(many),
        "exchanges_s": _slowest(exchange),
    }


def _seconds(function: Callable[[], torch.Tensor], device: torch.device, repeats: int) -> float:
    """Median time of a call, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        dist.barrier()
        began = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[repeats // 2]


def _slowest(seconds: float) -> float:
    several: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(several, seconds)
    return max(several)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.parallel")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="5b")
    parser.add_argument("--layers", type=int, help="by default the model's")
    parser.add_argument("--latents", type=int, nargs=3, default=(13, 60, 90))
    parser.add_argument("--guidance", type=int, choices=(1, 2), default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    return parser.parse_args(argv)


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    row = measure(parse(argv))
    if dist.get_rank() == 0:
        print(", ".join(f"{name} {value:.4g}" for name, value in row.items()))
    stop()


if __name__ == "__main__":
    main()
