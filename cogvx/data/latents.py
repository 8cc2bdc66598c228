"""Data set of encoded clips: latents, and embeddings of captions, for training a transformer.

Files `latents-00000.safetensors`, …, hold up to 500 clips each: the encoder's moments (frames,
2 · channels, height, width) in float16 and, with a text encoder, embeddings of the captions and of
the empty one. The metadata holds the captions and a record of the VAE; latents of another VAE are
refused.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ..checkpoint.record import check_record, record_of_model
from ..checkpoint.tensors import TensorFile, write_tensors
from ..files import CheckpointError, parse_json
from ..text import TextEncoder
from ..vae import CausalVAE
from .folder import Clip

PathLike = str | os.PathLike[str]
FORMAT = "cogvx latents of clips 1"
CLIPS_PER_FILE = 500
BATCH = 8


class LatentClip(NamedTuple):
    """Moments (frames, 2 · channels, height, width) in float16, and text (text_len, dim)."""

    moments: Tensor
    caption: str
    text: Tensor | None


def encode_clips(
    clips: Dataset[Clip],
    vae: CausalVAE,
    folder: PathLike,
    *,
    text_encoder: TextEncoder | None = None,
    text_length: int = 226,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
    process: int = 0,
    processes: int = 1,
    wait: Callable[[], None] | None = None,
) -> "LatentClips":
    """Encode the clips that the folder lacks, and open it.

    clips         of one size
    text_encoder  also store embeddings of the captions, if it is too large for training
    progress      called with the number of clips done and of all
    process       index of this one of `processes`, which share the files
    wait          barrier of all processes

    It can be interrupted and repeated. Raises CheckpointError if the folder has latents of another
    VAE, or of another number of clips.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    total = len(clips)  # type: ignore[arg-type]
    record = {**record_of_model("vae", vae), "clips": total}
    for first in range(process * CLIPS_PER_FILE, total, processes * CLIPS_PER_FILE):
        path = folder / f"latents-{first // CLIPS_PER_FILE:05}.safetensors"
        last = min(first + CLIPS_PER_FILE, total)
        if path.exists():
            with TensorFile(path) as file:
                _metadata(file, record)
            continue
        tensors: dict[str, Tensor] = {}
        captions: list[str] = []
        if text_encoder is not None:
            tensors["empty.text"] = text_encoder.encode([""], text_length)[0].half()
        part = Subset(clips, range(first, last))
        for batch in DataLoader(part, BATCH, collate_fn=list, num_workers=workers):
            moments = _encoded(vae, [clip.video for clip in batch])
            texts = [clip.caption for clip in batch]
            for number, one in enumerate(moments, first + len(captions)):
                tensors[f"{number}.moments"] = one
            if text_encoder is not None:
                embeddings = text_encoder.encode(texts, text_length).half()
                for number, one in enumerate(embeddings, first + len(captions)):
                    tensors[f"{number}.text"] = one
            captions += texts
            if progress is not None:
                progress(first + len(captions), total)
        metadata = {"captions": json.dumps(captions), "record": json.dumps(record)}
        write_tensors(path, tensors, {"format": FORMAT, "first": str(first), **metadata})
    if wait is not None:
        wait()
    return LatentClips(folder, vae)


class LatentClips(Dataset[LatentClip]):
    """Clips of a folder that `encode_clips` wrote, all of them, by the same VAE."""

    def __init__(self, folder: PathLike, vae: CausalVAE) -> None:
        self.folder = Path(folder)
        record = record_of_model("vae", vae)
        paths = sorted(self.folder.glob("latents-*.safetensors"))
        if not paths:
            raise CheckpointError(
                f"{self.folder}: must hold latents-00000.safetensors and so on, as cogvx encode "
                "writes them for a folder of videos; got none"
            )
        self.files = [TensorFile(path) for path in paths]
        self.captions: list[str] = []
        self.file_of: list[TensorFile] = []
        wanted = 0
        for file in self.files:
            values = _metadata(file, record)
            captions = json.loads(file.metadata["captions"])
            if int(file.metadata["first"]) != len(self.captions):
                raise CheckpointError(
                    f"{file.path}: must begin with clip {len(self.captions)}; got "
                    f"{file.metadata['first']}: a file before it is missing"
                )
            self.captions += captions
            self.file_of += [file] * len(captions)
            wanted = values["clips"]
        if len(self.captions) != wanted:
            raise CheckpointError(
                f"{self.folder}: must hold {wanted} clips; got {len(self.captions)}: go on with "
                "cogvx encode"
            )
        first = self.files[0]
        self.empty = first.read("empty.text") if "empty.text" in first.entries else None

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> LatentClip:
        file = self.file_of[index]
        text = file.read(f"{index}.text") if self.empty is not None else None
        return LatentClip(file.read(f"{index}.moments"), self.captions[index], text)


@torch.no_grad()
def _encoded(vae: CausalVAE, videos: Sequence[Tensor]) -> Sequence[Tensor]:
    weight = next(vae.parameters())
    return vae.encode(torch.stack(list(videos)).to(weight)).moments.cpu().half().unbind(0)


def _metadata(file: TensorFile, record: dict[str, Any]) -> dict[str, Any]:
    """Read the record of a file, and check it."""
    if file.metadata.get("format") != FORMAT:
        raise CheckpointError(f"{file.path}: must be latents of clips, as cogvx encode writes them")
    values = parse_json(file.metadata["record"].encode(), f"{file.path}: its record")
    check_record(file.path, values, record)
    return values
