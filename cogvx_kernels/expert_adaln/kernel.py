"""Triton kernels and launchers for expert_adaln, gated_residual and the two fused.

A strip is a run of tokens with the same modulation: of one sample, one modality and one group. A
program loads the modulation of a strip once, as a factor and a term, and loops over its tokens:
gate, residual, norm and modulation in one pass. Text and video strips are programs of one launch.
A row is a tuple of vectors of a power of two: of 3 · 1024 for 3072, in which no lane is idle.
The backward loops over the same strips, recomputes the norm's statistics, which are not stored, and
sums dout and dout·x̂ in registers; the gradients of modulation, weight and bias follow from these
two vectors. Each program writes its sums to a row of a buffer, which is summed at the end, without
atomics, so the same input gives the same bits.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import (
    LAST,
    Rows,
    alignment,
    as_rows,
    cdiv,
    contiguous,
    new,
    next_power_of_2,
    on_device,
)

# Not yet measured. Large enough that the modulation and its gradients are at most a twentieth of a
# strip's bytes; small enough that a real sequence has some 900 programs, six or seven for each
# multiprocessor of a large GPU, all resident at once.
TOKENS = 40
BACKWARD_TOKENS = 40
# Most lanes of a warp: 24 a thread, three 16-byte loads of bf16. Fewer warps reduce in less.
LANES_PER_WARP = 768
MOST_PARTS = 5  # of a row
FEWEST_LANES = 256  # of a part, if there are several


class Modulation(NamedTuple):
    """Modulation of a modality, each (batch, groups, dim), (batch, dim), or None."""

    shift: Tensor | None = None
    scale: Tensor | None = None
    gate: Tensor | None = None

    @property
    def groups(self) -> int:
        """The number of groups; 0 without modulation."""
        for x in self:
            if x is not None:
                return x.shape[1] if x.dim() == 3 else 1
        return 0


class Settings(NamedTuple):
    """norm: "layer", "rms" or "none"."""

    text_len: int
    norm: str
    eps: float


class Tensors(NamedTuple):
    """Tensors of a launch, forward or backward; weight and bias are vectors (dim,) or None."""

    stream: Rows
    y: Rows
    weight: Tensor | None
    bias: Tensor | None = None
    x: Rows | None = None
    out: Rows | None = None
    dx: Rows | None = None
    dy: Rows | None = None
    dout: Rows | None = None
    dstream: Rows | None = None
    last: None = LAST


class Modality(NamedTuple):
    """The tokens of one modality, and their strips.

    shift, scale, gate  Rows (batch, groups, dim), the second stride is that of a group
    first               the first token
    run                 tokens of a group, which share a modulation
    strips              strips of a group
    programs            strips of a sample
    """

    shift: Rows
    scale: Rows
    gate: Rows
    first: int
    run: int
    strips: int
    programs: int
    last: None = LAST


class Plan(NamedTuple):
    """Compile-time constants of a launch."""

    DIM: int
    PARTS: int  # of a row, each of LANES; one part has lanes to spare
    LANES: int  # a power of two
    TOKENS: int  # of a strip
    ALIGN: int  # elements that strides are multiples of
    NORM: str  # "layer", "rms" or "none"
    GATED: bool  # x + gate·y comes first
    EPS: float
    COMPUTE: tl.dtype


@triton.jit
def _columns(P: tl.constexpr):
    """The columns of each part."""
    LANES: tl.constexpr = P.LANES
    PARTS: tl.constexpr = P.PARTS
    lanes = tl.arange(0, LANES).to(tl.int64)
    cols = (lanes,)
    for part in tl.static_range(1, PARTS):
        cols = cols + (lanes + part * LANES,)  # noqa: RUF005 (no starred tuples in Triton)
    return cols


@triton.jit
def _zeros(cols, P: tl.constexpr):
    """A row of zeros."""
    LANES: tl.constexpr = P.LANES
    return [tl.zeros((LANES,), P.COMPUTE) for _ in cols]


@triton.jit
def _load_part(ptr, col, P: tl.constexpr):
    if P.PARTS * P.LANES == P.DIM:
        x = tl.load(ptr)
    else:
        x = tl.load(ptr, mask=col < P.DIM, other=0.0)
    return x.to(P.COMPUTE)


@triton.jit
def _store_part(ptr, col, x, P: tl.constexpr):
    """Store a part, rounded to the tensor's dtype; return the rounded values, widened."""
    rounded = x.to(ptr.dtype.element_ty)
    if P.PARTS * P.LANES == P.DIM:
        tl.store(ptr, rounded)
    else:
        tl.store(ptr, rounded, mask=col < P.DIM)
    return rounded.to(P.COMPUTE)


@triton.jit
def _row(rows, batch, index, P: tl.constexpr):
    """The address of one row, in 64 bits from the first product on."""
    start = tl.cast(batch, tl.int64) * rows.batch + tl.cast(index, tl.int64) * rows.seq
    return rows.ptr + start * P.ALIGN


@triton.jit
def _load(rows, batch, index, cols, P: tl.constexpr):
    ptr = _row(rows, batch, index, P)
    return [_load_part(ptr + col * rows.dim, col, P) for col in cols]


@triton.jit
def _store(rows, batch, index, cols, x, P: tl.constexpr):
    """Store a row; return the rounded values, widened."""
    PARTS: tl.constexpr = P.PARTS
    ptr = _row(rows, batch, index, P)
    rounded = (_store_part(ptr + cols[0] * rows.dim, cols[0], x[0], P),)
    for i in tl.static_range(1, PARTS):
        part = _store_part(ptr + cols[i] * rows.dim, cols[i], x[i], P)
        rounded = rounded + (part,)  # noqa: RUF005
    return rounded


@triton.jit
def _add(a, b, P: tl.constexpr):
    PARTS: tl.constexpr = P.PARTS
    out = (a[0] + b[0],)
    for i in tl.static_range(1, PARTS):
        out = out + (a[i] + b[i],)  # noqa: RUF005
    return out


@triton.jit
def _multiply(a, b, P: tl.constexpr):
    PARTS: tl.constexpr = P.PARTS
    out = (a[0] * b[0],)
    for i in tl.static_range(1, PARTS):
        out = out + (a[i] * b[i],)  # noqa: RUF005
    return out


@triton.jit
def _mean(x, P: tl.constexpr):
    """The mean of a row: its parts are added first, which takes one reduction."""
    PARTS: tl.constexpr = P.PARTS
    total = x[0]
    for part in tl.static_range(1, PARTS):
        total += x[part]
    return tl.sum(total, axis=0) * (1.0 / P.DIM)


@triton.jit
def _normalise(x, cols, P: tl.constexpr):
    """The normalised row, and 1 / its standard deviation or root mean square."""
    if P.NORM == "layer":
        mean = _mean(x, P)
        x = [part - mean for part in x]
        if P.PARTS * P.LANES != P.DIM:
            x = (tl.where(cols[0] < P.DIM, x[0], 0.0),)
    rstd = tl.rsqrt(_mean(_multiply(x, x, P), P) + P.EPS)
    return [part * rstd for part in x], rstd


@triton.jit
def _forward_strip(tensors, modality, batch, place, P: tl.constexpr):
    """Compute one strip; `place` is its index within the sample and modality."""
    cols = _columns(P)
    group = tl.cast(place // modality.strips, tl.int64)
    begin = tl.cast(place % modality.strips, tl.int64) * P.TOKENS
    if P.NORM != "none":
        factor = [1.0 + part for part in _load(modality.scale, batch, group, cols, P)]
        term = _load(modality.shift, batch, group, cols, P)
        if tensors.bias is not None:
            bias = [_load_part(tensors.bias + col, col, P) for col in cols]
            term = _add(term, _multiply(bias, factor, P), P)
        if tensors.weight is not None:
            weight = [_load_part(tensors.weight + col, col, P) for col in cols]
            factor = _multiply(factor, weight, P)
    if P.GATED:
        gate = _load(modality.gate, batch, group, cols, P)
    first = modality.first + group * modality.run + begin
    for step in range(0, tl.minimum(modality.run - begin, P.TOKENS)):
        token = first + step
        row = _load(tensors.x, batch, token, cols, P)
        if P.GATED:
            row = _add(row, _multiply(gate, _load(tensors.y, batch, token, cols, P), P), P)
            row = _store(tensors.stream, batch, token, cols, row, P)
        if P.NORM != "none":
            xhat, _ = _normalise(row, cols, P)
            out = _add(term, _multiply(xhat, factor, P), P)
            _store(tensors.out, batch, token, cols, out, P)


@triton.jit(do_not_specialize=["programs"])
def _expert_adaln_fwd_kernel(tensors, text, video, programs, P: tl.constexpr):
    """Grid (batch · programs,); in each sample text strips come first."""
    batch = tl.program_id(0) // programs
    place = tl.program_id(0) % programs
    if place < text.programs:
        _forward_strip(tensors, text, batch, place, P)
    else:
        place -= text.programs
        _forward_strip(tensors, video, batch, place, P)


@triton.jit
def _norm_grad(grad, xhat, rstd, P: tl.constexpr):
    """The gradient of the norm's input from that of the normalised row."""
    along = _mean(_multiply(grad, xhat, P), P) * rstd
    if P.NORM == "layer":
        mean = _mean(grad, P) * rstd
        away = [part * -along - mean for part in xhat]
    else:
        away = [part * -along for part in xhat]
    return _add([part * rstd for part in grad], away, P)


@triton.jit
def _backward_strip(tensors, sums_ptr, modality, batch, place, P: tl.constexpr):
    """Gradients of one strip; its sums of dout, dout·x̂ and dx·y go to a row of `sums`."""
    cols = _columns(P)
    group = tl.cast(place // modality.strips, tl.int64)
    begin = tl.cast(place % modality.strips, tl.int64) * P.TOKENS
    sum_dout = _zeros(cols, P)
    sum_dout_xhat = _zeros(cols, P)
    sum_dx_y = _zeros(cols, P)
    if P.NORM != "none":
        factor = [1.0 + part for part in _load(modality.scale, batch, group, cols, P)]
        if tensors.weight is not None:
            weight = [_load_part(tensors.weight + col, col, P) for col in cols]
            factor = _multiply(factor, weight, P)
    if P.GATED:
        gate = _load(modality.gate, batch, group, cols, P)
    first = modality.first + group * modality.run + begin
    for step in range(0, tl.minimum(modality.run - begin, P.TOKENS)):
        token = first + step
        if P.NORM != "none":
            row = _load(tensors.stream, batch, token, cols, P)
            xhat, rstd = _normalise(row, cols, P)
            grad = _load(tensors.dout, batch, token, cols, P)
            sum_dout = _add(sum_dout, grad, P)
            sum_dout_xhat = _add(sum_dout_xhat, _multiply(grad, xhat, P), P)
            grad = _norm_grad(_multiply(grad, factor, P), xhat, rstd, P)
            if P.GATED:
                grad = _add(grad, _load(tensors.dstream, batch, token, cols, P), P)
            _store(tensors.dx, batch, token, cols, grad, P)
        else:
            grad = _load(tensors.dstream, batch, token, cols, P)
        if P.GATED:
            y = _load(tensors.y, batch, token, cols, P)
            sum_dx_y = _add(sum_dx_y, _multiply(grad, y, P), P)
            _store(tensors.dy, batch, token, cols, _multiply(grad, gate, P), P)
    PARTS: tl.constexpr = P.PARTS
    for i in tl.static_range(PARTS):
        ptr = sums_ptr + cols[i]
        if P.NORM != "none":
            _store_part(ptr, cols[i], sum_dout[i], P)
            _store_part(ptr + P.DIM, cols[i], sum_dout_xhat[i], P)
            ptr += 2 * P.DIM
        if P.GATED:
            _store_part(ptr, cols[i], sum_dx_y[i], P)


@triton.jit(do_not_specialize=["programs"])
def _expert_adaln_bwd_kernel(
    tensors, sums_ptr, text, video, programs, VECTORS: tl.constexpr, P: tl.constexpr
):
    """Grid as in the forward. sums_ptr: (programs of all samples, VECTORS, dim)."""
    batch = tl.program_id(0) // programs
    place = tl.program_id(0) % programs
    sums_ptr += tl.program_id(0).to(tl.int64) * (VECTORS * P.DIM)
    if place < text.programs:
        _backward_strip(tensors, sums_ptr, text, batch, place, P)
    else:
        place -= text.programs
        _backward_strip(tensors, sums_ptr, video, batch, place, P)


def _modalities(
    text: Modulation, video: Modulation, text_len: int, seqlen: int, plan: Plan
) -> tuple[Modality, Modality]:
    """The launch's text and video.

    An absent one has the modulation of the other, which is not read: both branches are compiled.
    """
    of_text, of_video = text.groups, video.groups
    if not of_text or not of_video:
        text = video = text if of_text else video
        of_text = of_video = of_text or of_video
    both = (text, of_text, 0, text_len), (video, of_video, text_len, seqlen - text_len)
    modalities = []
    for (shift, scale, gate), groups, first, tokens in both:
        run = tokens // max(groups, 1)
        strips = cdiv(run, plan.TOKENS)
        rows = as_rows(shift, plan), as_rows(scale, plan), as_rows(gate, plan)
        modalities.append(Modality(*rows, first, run, strips, groups * strips))
    return modalities[0], modalities[1]


def _split(dim: int) -> tuple[int, int]:
    """(parts, lanes of each) of a row: 3 · 1024 for 3072, and no lane of 4096 idle."""
    lanes = dim & -dim
    if lanes >= FEWEST_LANES and dim // lanes <= MOST_PARTS:
        return dim // lanes, lanes
    return 1, next_power_of_2(dim)


def _plan(x: Tensor, tokens: int, gated: bool, settings: Settings, *others: Tensor | None) -> Plan:
    """The constants of a launch over x and others, outputs and modulation included."""
    parts, lanes = _split(x.shape[2])
    return Plan(
        DIM=x.shape[2],
        PARTS=parts,
        LANES=lanes,
        TOKENS=tokens,
        ALIGN=alignment(x, *others),
        NORM=settings.norm,
        GATED=gated,
        EPS=settings.eps,
        COMPUTE=tl.float64 if x.dtype is torch.float64 else tl.float32,
    )


def _num_warps(plan: Plan) -> int:
    return min(16, next_power_of_2(cdiv(plan.PARTS * plan.LANES, LANES_PER_WARP)))


def expert_adaln_fwd(
    x: Tensor, y: Tensor | None, video: Modulation, text: Modulation,
    weight: Tensor | None, bias: Tensor | None, settings: Settings, *, inplace: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(x + gate·y, its modulated norm).

    Without y the first is x itself; with norm="none" the second is empty. `inplace` writes the
    residual stream over x.
    """
    stream = x if y is None or inplace else new(x)
    out = x.new_empty((0,)) if settings.norm == "none" else new(x)
    if x.numel() == 0:
        return stream, out
    batch, seqlen, _ = x.shape
    written = None if settings.norm == "none" else out
    plan = _plan(x, TOKENS, y is not None, settings, y, stream, written, *video, *text)
    of_text, of_video = _modalities(text, video, settings.text_len, seqlen, plan)
    programs = of_text.programs + of_video.programs
    of_stream, of_y, of_x, of_out = (as_rows(z, plan) for z in (stream, y, x, written))
    with on_device(x):
        _expert_adaln_fwd_kernel[(batch * programs,)](
            Tensors(of_stream, of_y, contiguous(weight), contiguous(bias), of_x, of_out),
            of_text, of_video, programs, P=plan, num_warps=_num_warps(plan), enable_fp_fusion=True,
        )  # fmt: skip
    return stream, out


def expert_adaln_bwd(
    dstream: Tensor | None, dout: Tensor | None, stream: Tensor, y: Tensor | None,
    video: Modulation, text: Modulation, weight: Tensor | None, settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dy, sums), where sums are (batch, groups, vectors, dim), text's groups first.

    Vectors, summed over the tokens of a group: dout and dout·x̂ with a norm, then dx·y with a gate;
    in fp32 (fp64 for fp64 inputs). `stream` is the norm's input. Without a norm dx is empty,
    because it is dstream; without a gate dy is empty. A shift is not read.
    """
    gated, normed = y is not None, settings.norm != "none"
    dx, dy = (new(stream) if wanted else stream.new_empty((0,)) for wanted in (normed, gated))
    batch, seqlen, dim = stream.shape
    vectors = 2 * normed + gated
    grads = (dx if normed else None, dy if gated else None, dout, dstream)
    plan = _plan(stream, BACKWARD_TOKENS, gated, settings, y, *grads, *video, *text)
    of_text, of_video = _modalities(text, video, settings.text_len, seqlen, plan)
    programs = of_text.programs + of_video.programs
    wide = torch.promote_types(dx.dtype, torch.float32)
    sums = torch.empty((batch, programs, vectors, dim), dtype=wide, device=dx.device)
    if stream.numel():
        with on_device(stream):
            _expert_adaln_bwd_kernel[(batch * programs,)](
                Tensors(
                    as_rows(stream, plan), as_rows(y, plan), contiguous(weight), None, None, None,
                    *(as_rows(z, plan) for z in grads),
                ),
                sums, of_text, of_video, programs, VECTORS=vectors, P=plan,
                num_warps=_num_warps(plan), enable_fp_fusion=True,
            )  # fmt: skip
    of_groups = [
        sums.narrow(1, first, modality.programs).unflatten(1, (groups, modality.strips)).sum(2)
        for first, modality, groups in (
            (0, of_text, text.groups), (of_text.programs, of_video, video.groups)
        )
        if groups
    ]  # fmt: skip
    return dx, dy, torch.cat([sums[:, :0], *of_groups], 1)
