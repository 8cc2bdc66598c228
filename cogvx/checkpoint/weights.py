"""Weights of a component's folder: one file, or shards with an index."""

import contextlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import (
    INDEX_BYTES,
    CheckpointError,
    atomic_path,
    member,
    read_json,
    remove_abandoned,
    sync,
    unfinished,
)
from ..hub import PARTS
from ..validation import format_list, short_repr
from .tensors import TensorFile, fill, write_tensors

STEM = "diffusion_pytorch_model"
SHARD_LIMIT = 512  # all are open at once
FLOATING = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class Weights:
    """Open weight files of a folder; only their headers are read.

    stem: start of the file names; "model" in folders of transformers.

    Raises CheckpointError for names that lead out of the folder, damaged files, an index that does
    not match its files, and a folder that has only pickles.
    """

    def __init__(self, folder: Path, variant: str | None = None, stem: str = STEM) -> None:
        word = variant if isinstance(variant, str) else ""
        if variant is not None and not re.fullmatch(r"[A-Za-z0-9_-]{1,32}", word):
            raise ValueError(f"variant must be a short word, as in fp16; got {short_repr(variant)}")
        self.folder = folder
        self.files: list[TensorFile] = []
        self.place: dict[str, TensorFile] = {}
        self._stack = ExitStack()
        index, weights = _names(stem, variant)
        with self._stack:
            if _is_there(folder / index):
                self._open_shards(index)
            elif _is_there(folder / weights):
                self._open([weights])
            else:
                raise CheckpointError(_no_weights(folder, weights, stem))
            self._stack = self._stack.pop_all()

    def _open(self, names: list[str]) -> None:
        for path in [member(self.folder, name) for name in names]:  # all, before any is opened
            file = self._stack.enter_context(TensorFile(path))
            self.files.append(file)
            for name in file.entries:
                self.place.setdefault(name, file)

    def _open_shards(self, index: str) -> None:
        path = member(self.folder, index)
        weight_map = read_json(path, INDEX_BYTES).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(
                f"{path}: weight_map must name files; got {short_repr(weight_map)}"
            )
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or not shard.endswith(".safetensors"):
                raise CheckpointError(
                    f"{path}: {short_repr(name)} must be in a .safetensors file; got "
                    f"{short_repr(shard)}"
                )
        shards = sorted(set(weight_map.values()))
        if len(shards) > SHARD_LIMIT:
            raise CheckpointError(
                f"{path}: must name at most {SHARD_LIMIT} files; got {len(shards)}"
            )
        self._open(shards)
        held = {file.path.name: file.entries for file in self.files}
        counts = Counter(name for entries in held.values() for name in entries)
        faults = [
            f"{name}: must be in {shard}, as the index says; it is not there"
            for name, shard in weight_map.items()
            if name not in held[shard]
        ] + [
            f"{name}: must be in the index, because {shard} holds it; it is not"
            if name not in weight_map
            else f"{name}: must be in one file; {counts[name]} hold it, {shard} too"
            for shard, entries in held.items()
            for name in entries
            if weight_map.get(name) != shard and (name not in weight_map or counts[name] > 1)
        ]
        if faults:
            raise CheckpointError(f"{path}: does not agree with its files:{format_list(faults)}")

    def __enter__(self) -> "Weights":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def numel(self) -> int:
        """Number of values in the files."""
        entries = [entry for file in self.files for entry in file.entries.values()]
        return sum(math.prod(entry.shape) for entry in entries)

    def dtype(self) -> torch.dtype:
        """Dtype of most of the values, in which a model of mixed dtypes is run."""
        counts: Counter[str] = Counter()
        for file in self.files:
            for entry in file.entries.values():
                counts[entry.dtype] += math.prod(entry.shape)
        return FLOATING[max(FLOATING, key=lambda name: counts[name])]

    def children(self, prefix: str) -> int:
        """Number of different names between `prefix` and the next dot."""
        begin = len(prefix)
        return len({n[begin:].split(".", 1)[0] for n in self.place if n.startswith(prefix)})

    def check(self, model: nn.Module) -> None:
        """Raises CheckpointError unless the files hold exactly the model's tensors."""
        wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        missing = [
            f"{name}: expected {list(shape)}; got nothing"
            for name, shape in wanted.items()
            if name not in self.place
        ]
        unexpected, misshapen, mistyped = [], [], []
        for name, file in self.place.items():
            entry, where = file.entries[name], f"{short_repr(name)[1:-1]} in {file.path.name}"
            shape = short_repr(list(entry.shape))
            if name not in wanted:
                unexpected.append(f"{where}: expected nothing; got {shape}")
            elif entry.shape != wanted[name]:
                misshapen.append(f"{where}: expected {list(wanted[name])}; got {shape}")
            if entry.dtype not in FLOATING:
                mistyped.append(f"{where}: expected {', '.join(FLOATING)}; got {entry.dtype}")
        kinds = {
            "missing": missing,
            "unexpected": unexpected,
            "of another shape": misshapen,
            "of a dtype that weights do not have": mistyped,
        }
        report = "".join(
            f"\n  {len(lines)} {kind}:{format_list(lines)}"
            for kind, lines in kinds.items()
            if lines
        )
        if report:
            names = [file.path.name for file in self.files]
            raise CheckpointError(
                f"{self.folder}: {', '.join(names[:3])}{' …' * (len(names) > 3)} must hold the "
                f"{len(wanted)} tensors of the model that config.json describes; got "
                f"{len(self.place)}{report}"
            )

    def load_into(
        self,
        model: nn.Module,
        dtype: torch.dtype | None,
        device: torch.device,
        check_finite: bool = False,
    ) -> None:
        """Load the weights into a model on the meta device, one tensor at a time.

        dtype: of all weights; None for that of most of them in the files.
        """
        dtype = dtype or self.dtype()
        state: dict[str, Tensor] = {}
        bad = []
        for file in self.files:
            for name in file.entries:
                tensor = file.read(name)
                if check_finite and not tensor.isfinite().all():
                    count = int(tensor.isfinite().logical_not().sum())
                    bad.append(f"{name} in {file.path.name}: {count:,} of {tensor.numel():,}")
                state[name] = tensor.to(device, dtype)
        if bad:
            raise CheckpointError(
                f"{self.folder}: all weights must be finite; got NaN or infinity in {len(bad)} "
                f"tensors:{format_list(bad)}"
            )
        model.load_state_dict(state, assign=True)


def _is_there(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def _names(stem: str, variant: str | None) -> tuple[str, str]:
    """File names (index, single file) of a variant."""
    dot = f".{variant}" if variant else ""
    return f"{stem}.safetensors.index{dot}.json", f"{stem}{dot}.safetensors"


def variants_of(model: Path, variant: str | None) -> dict[str, str | None]:
    """Variant to read of each part of a model: `variant`, or None for a part without it.

    If no part has it, it is returned for all, so that loading fails with the variants that exist.
    """
    stems = {part: stem for part, (_, stem) in PARTS.items() if stem is not None}
    have = {
        part
        for part, stem in stems.items()
        if any(_is_there(model / part / name) for name in _names(stem, variant))
    }
    return {part: variant if part in have or not have else None for part in stems}


def _no_weights(folder: Path, wanted: str, stem: str) -> str:
    there = sorted(path.name for path in itertools.islice(folder.iterdir(), 1000))
    pickles = [name for name in there if name.endswith(PICKLES)]
    others = [name for name in there if name.endswith((".safetensors", ".index.json"))]
    pattern = re.compile(
        rf"{re.escape(stem)}\.(?:safetensors\.index\.)?([A-Za-z0-9_-]+?)"
        r"(?:-\d+-of-\d+)?\.(?:safetensors|json)"
    )
    variants = sorted({found[1] for found in map(pattern.fullmatch, there) if found})
    if variants:
        hint = f"; pass variant={' or '.join(map(repr, variants))}, which is what there is"
    elif any(_is_there(folder / name) for name in _names(stem, None)):
        hint = f"; leave variant out: there is {_names(stem, None)[1]}, or its shards"
    elif pickles:
        hint = (
            f"; got {', '.join(pickles[:3])}, which is pickle, and a pickle can run any code, so "
            "it is not opened. Convert it where you trust it: with diffusers, "
            "from_pretrained(folder, use_safetensors=False).save_pretrained(new); or, if it is a "
            "SAT checkpoint, with `cogvx convert`"
        )
    elif others:
        hint = f"; there is {', '.join(others[:3])}: rename it if it holds them"
    else:
        hint = unfinished(folder)
    return f"{folder}: must hold {wanted}, or an index of shards{hint}"


def save(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    max_shard_bytes: int,
    dtype: torch.dtype | None = None,
) -> None:
    """Write config.json and the weights of a component, atomically; see `save_transformer`.

    Everything is written under temporary names first. One rename makes it the new model: of the
    weights, or of their index, which is read in preference to a single file. If the configs differ,
    the old one is removed just before, so that it is never read with the new weights.
    """
    if type(max_shard_bytes) is not int or max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be a positive integer; got {max_shard_bytes!r}")
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(tensors, max_shard_bytes, dtype)
    names = _unused_names(folder, len(shards))
    index, single, spelled = (
        folder / f"{STEM}.safetensors.index.json",
        folder / f"{STEM}.safetensors",
        folder / "config.json",
    )
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    about = {"format": "pt"}
    unfinished = names
    try:
        with atomic_path(spelled) as config_part:
            config_part.write_text(text, encoding="utf-8")
            with atomic_path(index if names else single) as part:
                if names:
                    for name, shard in zip(names, shards, strict=True):
                        chosen = {key: tensors[key] for key in shard}
                        write_tensors(folder / name, chosen, about, dtype=dtype)
                    part.write_text(_index(names, shards, tensors, dtype), encoding="utf-8")
                else:
                    fill(part, tensors, about, dtype)
                sync(part)  # now, so that the next lines are fast
                if not (spelled.is_file() and spelled.read_bytes() == text.encode()):
                    spelled.unlink(missing_ok=True)
            unfinished = []
            (single if names else index).unlink(missing_ok=True)
    except BaseException:
        for name in unfinished:
            with contextlib.suppress(OSError):
                (folder / name).unlink(missing_ok=True)
        raise
    remove_abandoned(folder, f".{STEM}*.part.*")
    for path in folder.glob(f"{STEM}-*.safetensors"):
        if path.name not in names:
            path.unlink(missing_ok=True)


def _size(tensor: Tensor, dtype: torch.dtype | None) -> int:
    kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return tensor.numel() * kind.itemsize


def _shards(
    tensors: Mapping[str, Tensor], max_shard_bytes: int, dtype: torch.dtype | None
) -> list[list[str]]:
    """Split names, in order, into shards of at most `max_shard_bytes`."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        size = _size(tensor, dtype)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) > SHARD_LIMIT:
        raise ValueError(
            f"max_shard_bytes must be large enough for {SHARD_LIMIT} shards; got {max_shard_bytes}"
        )
    return shards


def _unused_names(folder: Path, count: int) -> list[str]:
    """Unused names of shards, the hub's if possible; none for a single file."""
    if count == 1:
        return []
    for attempt in itertools.count(1):
        again = f"-{attempt}" if attempt > 1 else ""
        names = [f"{STEM}{again}-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
        if not any(_is_there(folder / name) for name in names):
            return names
    raise AssertionError


def _index(
    names: list[str],
    shards: list[list[str]],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None,
) -> str:
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    total = sum(_size(tensor, dtype) for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return json.dumps(index, indent=2, sort_keys=True) + "\n"
