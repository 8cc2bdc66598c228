"""Predict a clip on several GPUs, for every mesh of data x guidance x context ranks.

Bytes follow from the shapes of the exchanges, and a run counts the same. Times are predictions:
they follow from the rates of a `Machine`, without overlap of computation and communication, and
nothing of them was measured.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cogvx_kernels.context_parallel import split_sizes

from ..config import TransformerConfig, VAEConfig
from ..vae import Tiling
from ..validation import check_integer, invalid
from .flops import token_weights, vae_flops
from .stages import Plan, forecast, size

PREDICTIONS = 2  # of a step with guidance
# Passes over (tokens, dim) that are bound by memory, of a block; those that pack and unpack the
# exchanges.
PASSES, PACKING = 12.2, 8.0
TRAINING_BYTES = 20  # a parameter: weight, gradient, two of AdamW and a moving average, in fp32
MOST_GPUS = 4096


@dataclass(frozen=True)
class Machine:
    """Assumed rates of GPUs and of what connects them, per second.

    products, attention, convolutions  floating-point operations, as reached
    memory, link, network  bytes of a GPU's memory, of its link to the others of its machine and of
        its network card to those of other machines
    latency  seconds of an exchange
    gpus  of a machine
    """

    name: str
    products: float
    attention: float
    convolutions: float
    memory: float
    link: float
    network: float = 0.8 * 50e9
    latency: float = 20e-6
    gpus: int = 8

    def seconds(self, sent: float, exchanges: int, ranks: int, stride: int = 1) -> float:
        """Of exchanges among `ranks` ranks, each `stride` from the next, that each send `sent`
        bytes in all."""
        if ranks == 1:
            return 0.0
        near = max(1, min(ranks, self.gpus // stride))  # of them on a machine
        far = sent * (ranks - near) / (ranks - 1)
        return max((sent - far) / self.link, far / self.network) + exchanges * self.latency


MACHINES = (
    # H200, and cards such as L40 on PCIe 4 x16.
    Machine("NVLink", 0.55 * 989e12, 0.60 * 989e12, 0.40 * 989e12, 0.8 * 4.8e12, 0.75 * 450e9),
    Machine("PCIe", 90e12, 90e12, 65e12, 0.8 * 0.86e12, 20e9, latency=30e-6),
)
ASSUMPTIONS = "; ".join(
    f"{m.name}: {m.products / 1e12:.0f}, {m.attention / 1e12:.0f} and "
    f"{m.convolutions / 1e12:.0f} TFLOP/s in products, attention and convolutions, "
    f"{m.memory / 1e12:.2g} TB/s of memory, {m.link / 1e9:.0f} GB/s and {m.latency * 1e6:.0f} us "
    f"a message, {m.network / 1e9:.0f} GB/s between machines of {m.gpus} GPUs"
    for m in MACHINES
)


@dataclass(frozen=True)
class Mesh:
    """A mesh of data x guidance x context ranks, and what it costs.

    method      "heads": tokens are exchanged for heads; "tokens": keys and values are gathered,
                because there are more ranks than heads; "" without context parallelism
    first       bytes held by the first rank of a clip, with text encoder and whole video
    others      bytes held by each of the others; 0 if there is none
    sent        bytes that a rank sends to others in a step; the most of any rank
    relayed     bytes of the VAE's cache that a rank hands on while a clip is decoded
    step, clip  machine -> seconds of a step, and of a clip: all steps and the decode
    """

    data: int
    guidance: int
    context: int
    method: str
    first: int
    others: int
    sent: int
    relayed: int
    step: Mapping[str, float]
    clip: Mapping[str, float]

    @property
    def name(self) -> str:
        return f"{self.data}x{self.guidance}x{self.context}"


@dataclass(frozen=True)
class MeshForecast:
    """Meshes for a number of GPUs.

    meshes   those that are possible
    refused  name -> reason why a mesh is not
    shard    bytes of weights, gradients, optimizer and EMA that a rank holds in a training
             whose state is sharded over all GPUs
    """

    gpus: int
    steps: int
    meshes: tuple[Mesh, ...]
    refused: Mapping[str, str]
    shard: int

    @property
    def recommended(self) -> Mesh | None:
        """The mesh with the first clip; of equal ones that with less communication."""
        machine = MACHINES[0].name
        return min(self.meshes, key=lambda m: (m.clip[machine], m.sent), default=None)

    @property
    def most_clips(self) -> Mesh | None:
        """The mesh with the most clips an hour."""
        machine = MACHINES[0].name
        return max(self.meshes, key=lambda m: (m.data / m.clip[machine], -m.sent), default=None)

    def to_dict(self) -> dict[str, Any]:
        """The forecast as JSON values: bytes as integers, seconds as floats."""
        best, most = self.recommended, self.most_clips
        return {
            **dataclasses.asdict(self),
            "recommended": None if best is None else best.name,
            "most_clips": None if most is None else most.name,
            "assumptions": ASSUMPTIONS,
        }

    def __str__(self) -> str:
        titles = [f"{machine.name} step, clip" for machine in MACHINES]
        lines = [
            f"{self.gpus} GPUs as data x guidance x context",
            f"{'mesh':10} {'first rank':>10} {'others':>10} {'sent a step':>11} {'relayed':>10}"
            + "".join(f"{title:>22}" for title in titles),
        ]
        for mesh in self.meshes:
            numbers = (mesh.first, mesh.others, mesh.sent, mesh.relayed)
            a, b, c, d = (size(number) if number else "-" for number in numbers)
            times = "".join(
                f"{f'{mesh.step[m.name] * 1e3:.0f} ms, {mesh.clip[m.name]:.1f} s':>22}"
                for m in MACHINES
            )
            note = "  keys, values gathered" if mesh.method == "tokens" else ""
            lines.append(f"{mesh.name:10} {a:>10} {b:>10} {c:>11} {d:>10}{times}{note}")
        for reason in dict.fromkeys(self.refused.values()):
            names = [name for name, why in self.refused.items() if why == reason]
            lines.append(f"not {', '.join(names)}: {reason}")
        best, most = self.recommended, self.most_clips
        if best is not None and most is not None:
            hour = most.data * 3600 / most.clip[MACHINES[0].name]
            lines.append(
                f"recommended: {best.name}, the first clip soonest; for many prompts {most.name}, "
                f"{hour:.0f} clips an hour ({MACHINES[0].name}, {self.steps} steps)"
            )
        lines.append(
            f"training with shard: {size(self.shard)} a rank of weights, gradients, optimizer and "
            "EMA in fp32, besides activations"
        )
        lines.append(f"Times are PREDICTED, not measured; no overlap is counted. {ASSUMPTIONS}")
        return "\n".join(lines)


def forecast_meshes(
    transformer: TransformerConfig,
    vae: VAEConfig,
    *,
    gpus: int,
    steps: int = 50,
    guidance: bool = True,
    cfg: str = "batch",
    dtype: torch.dtype = torch.bfloat16,
    tiling: Tiling | None = None,
    budget: int | None = None,
    **clip: Any,
) -> MeshForecast:
    """Forecast a clip on every mesh of so many GPUs.

    budget: bytes of a GPU; a mesh of which a rank needs more is refused.
    tiling: of the VAE, with tiles on the ranks of a clip in turn; otherwise its chunks are.
    clip: other arguments of `forecast`.

    Raises as `forecast` does, and ValueError for `gpus` out of [1, 4096].
    """
    if not 1 <= check_integer("forecast_meshes", "gpus", gpus) <= MOST_GPUS:
        raise invalid("forecast_meshes", "gpus", f"in [1, {MOST_GPUS}]", gpus)
    options = {"guidance": guidance, "dtype": dtype, "tiling": tiling, **clip}
    one = forecast(transformer, vae, cfg=cfg, **options)
    tokens = one.text_tokens + one.video_tokens
    costs = _Clip(transformer, vae, PREDICTIONS if guidance else 1, steps, dtype.itemsize,
                  tiling)  # fmt: skip
    plans: dict[tuple[str, int], Plan] = {(cfg, 1): one}
    meshes, refused = [], {}
    for data, split, context in _shapes(gpus):
        name = f"{data}x{split}x{context}"
        if split > 1 and not guidance:
            refused[name] = "without guidance a step has one prediction"
        elif split > PREDICTIONS:
            refused[name] = f"a step has {PREDICTIONS} predictions, guidance must be 1 or 2"
        elif context > tokens:
            refused[name] = f"context must be at most the {tokens:,} tokens"
        else:
            which = ("two_pass" if split > 1 else cfg, context)
            if which not in plans:
                plans[which] = forecast(transformer, vae, cfg=which[0], context=context, **options)
            mesh = costs.mesh(plans[which], data, split, context)
            need = max(mesh.first, mesh.others)
            if budget is not None and need > budget:
                refused[name] = f"a rank must fit into {size(budget)}, and needs {size(need)}"
            else:
                meshes.append(mesh)
    parameters = one.stage("denoise").weights // dtype.itemsize
    return MeshForecast(gpus, steps, tuple(meshes), refused, parameters * TRAINING_BYTES // gpus)


def exchanged(
    config: TransformerConfig,
    text: int,
    video: int,
    context: int,
    *,
    batch: int = 1,
    itemsize: int = 2,
    method: str = "heads",
) -> int:
    """Bytes that a rank of a context sends to the others in a forward; the most of any rank.

    text, video  tokens
    itemsize     bytes of a number
    method       "heads": in each block q, k and v of its tokens and the output of its heads, about
                 4·(S/n)·D·(n-1)/n numbers of S tokens, D channels and n ranks; "tokens": its k and
                 v to each of the others. In the end the prediction of its video tokens to each
    """
    dim, most = config.hidden_size, 0
    tokens = split_sizes(text + video, context)
    heads = split_sizes(config.num_attention_heads, context)
    values = config.out_channels * config.patch_size**2 * (config.patch_size_t or 1)
    for rank, own in enumerate(tokens):
        mine = heads[rank] * config.attention_head_dim
        block = 3 * own * (dim - mine) + (text + video - own) * mine
        if method == "tokens":
            block = 2 * own * dim * (context - 1)
        end = sum(tokens[: rank + 1]) - text  # video tokens up to this part's last
        last = min(max(end, 0), own) * values * (context - 1)
        most = max(most, config.num_layers * block + last)
    return most * batch * itemsize


def _shapes(gpus: int) -> Iterator[tuple[int, int, int]]:
    """(data, guidance, context) of a product `gpus`."""
    for data in range(1, gpus + 1):
        for guidance in range(1, gpus // data + 1):
            if gpus % (data * guidance) == 0:
                yield data, guidance, gpus // (data * guidance)


@dataclass(frozen=True)
class _Clip:
    """What a forecast of one mesh needs of the clip."""

    transformer: TransformerConfig
    vae: VAEConfig
    predictions: int
    steps: int
    itemsize: int
    tiling: Tiling | None

    def mesh(self, plan: Plan, data: int, guidance: int, context: int) -> Mesh:
        """plan: of a rank of this context that decodes the whole video."""
        config, ranks = self.transformer, guidance * context
        enough = context <= config.num_attention_heads
        method = "" if context == 1 else "heads" if enough else "tokens"
        batch = plan.batch * self.predictions // guidance
        sent = exchanged(config, plan.text_tokens, plan.video_tokens, context, batch=batch,
                         itemsize=self.itemsize, method=method)  # fmt: skip
        ratio = self.vae.spatial_compression_ratio
        latent = plan.height // ratio * (plan.width // ratio) * config.out_channels
        other = 4 * plan.batch * plan.latent_frames * latent * (guidance - 1)  # fp32
        exchanges = (1 if method == "tokens" else 2) * config.num_layers + 1
        step = {
            m.name: self._seconds(m, plan, context, batch, method)
            + m.seconds(sent, exchanges, context)
            + m.seconds(other, 1, guidance, stride=context)
            for m in MACHINES
        }
        decode = plan.stage("decode")
        tiles = self._tiles(plan)
        relay = 1 if self.tiling is not None else min(ranks, len(decode.chunks))
        times = {m.name: self._decode_seconds(m, plan, relay) for m in MACHINES}
        if tiles > 1:  # on the ranks in turn
            times = {name: -(-tiles // ranks) / tiles * whole for name, whole in times.items()}
        text = sum(stage.weights for stage in plan.stages if stage.name == "text")
        rest = max(stage.activations for stage in plan.stages if stage.name != "decode")
        if relay > 1 or tiles > 1:
            rest = max(rest, decode.streamed or decode.activations)
        return Mesh(
            data, guidance, context, method,
            first=plan.total,
            others=plan.weights - text + rest if ranks > 1 else 0,
            sent=sent + other,
            relayed=0 if relay == 1 else decode.cache * -(-(len(decode.chunks) - 1) // relay),
            step=step,
            clip={name: self.steps * step[name] + times[name] for name in step},
        )  # fmt: skip

    def _tiles(self, plan: Plan) -> int:
        if self.tiling is None or not self.tiling.cuts(plan.height, plan.width):
            return 1
        return self.tiling.count(plan.height, plan.width, self.vae.spatial_compression_ratio)

    def _seconds(self, m: Machine, plan: Plan, context: int, batch: int, method: str) -> float:
        """Computation of a step, by the rank that has most of it."""
        config, dim = self.transformer, self.transformer.hidden_size
        seqlen = plan.text_tokens + plan.video_tokens
        tokens = -(-seqlen // context)
        pairs = seqlen * dim * tokens  # of a query's and a key's channel
        if method == "heads":
            heads = -(-config.num_attention_heads // context)
            pairs = seqlen * heads * config.attention_head_dim * seqlen
        weights = token_weights(config)
        products = max(
            2 * weights * tokens * batch / m.products, weights * self.itemsize / m.memory
        )
        passes = PASSES + (PACKING if context > 1 else 0)
        rows = tokens * dim * self.itemsize * batch
        return config.num_layers * (
            products + 4 * pairs * batch / m.attention + passes * rows / m.memory
        )

    def _decode_seconds(self, m: Machine, plan: Plan, ranks: int) -> float:
        """Of a clip whose chunks `ranks` ranks decode, each handing its cache on to the next."""
        decode, ratio = plan.stage("decode"), self.vae.spatial_compression_ratio
        flops = plan.batch * vae_flops(
            self.vae, plan.latent_frames, plan.height // ratio, plan.width // ratio, decode=True
        )
        if ranks == 1:
            return flops / m.convolutions
        rounds = [decode.chunks[i : i + ranks] for i in range(0, len(decode.chunks), ranks)]
        longest = sum(map(max, rounds)) / sum(decode.chunks)
        return flops * longest / m.convolutions + len(rounds) * m.seconds(decode.cache, 1, 2)
