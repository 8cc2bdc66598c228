"""A folder of videos and what is said of them.

Beside the videos lies either `metadata.jsonl`, with a line {"file_name": …, "text": …} for each, or
a text file for each, of its name: `cat.mp4` and `cat.txt`.
"""

import os
from pathlib import Path

from torch.utils.data import Dataset

from ..config import VAEConfig
from ..files import CheckpointError, listed, member, parse_json, shown
from ..video import open_video
from .procedural import Clip

PathLike = str | os.PathLike[str]
SUFFIXES = (".avi", ".gif", ".mkv", ".mov", ".mp4", ".webm")
CAPTION_BYTES = 1 << 16
METADATA = "metadata.jsonl"


class FolderClips(Dataset[Clip]):
    """The videos of a folder as clips of one size, in the order of their names.

    Args:
        folder: see the module.
        frames, height, width: of every clip: cut and scaled as `cogvx.video.open_video` does.
        vae: whose rule the frames are held to.

    Raises ValueError, with the names, for videos without captions and captions without videos, and
    if there are none; VideoError, when it is read, for a video that is shorter.
    """

    def __init__(
        self,
        folder: PathLike,
        frames: int,
        height: int,
        width: int,
        vae: VAEConfig | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.captions = read_captions(self.folder)
        self.names = sorted(self.captions)
        self.size = frames, height, width
        self.vae = vae or VAEConfig()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Clip:
        name = self.names[index]
        frames, height, width = self.size
        clip = open_video(
            self.folder / name, frames=frames, height=height, width=width, vae=self.vae
        )
        return Clip(clip.read()[0], self.captions[name])


def read_captions(folder: PathLike) -> dict[str, str]:
    """What is said of each video of a folder, by its file's name."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: must be a folder of videos with captions; it is none")
    videos = {p.name for p in folder.iterdir() if p.suffix.lower() in SUFFIXES}
    captions = _of_metadata(folder) if (folder / METADATA).exists() else _of_files(folder, videos)
    silent, gone = sorted(videos - captions.keys()), sorted(captions.keys() - videos)
    if silent or gone or not videos:
        lines = [f"{name}: no caption" for name in silent] + [f"{name}: no video" for name in gone]
        raise ValueError(
            f"{folder}: must hold videos ({', '.join(SUFFIXES)}), each with a caption in "
            f"{METADATA} or in a .txt of its name; got {len(videos)} videos{listed(lines)}"
        )
    return captions


def _of_metadata(folder: Path) -> dict[str, str]:
    captions = {}
    path = member(folder, METADATA)
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        values = parse_json(line.encode(), where)
        name, text = values.get("file_name"), values.get("text")
        if not isinstance(name, str) or not isinstance(text, str):
            raise CheckpointError(
                f"{where}: must have the texts file_name and text; got {shown(values)}"
            )
        captions[member(folder, name).name] = text
    return captions


def _of_files(folder: Path, videos: set[str]) -> dict[str, str]:
    captions = {}
    for name in videos:
        path = folder / Path(name).with_suffix(".txt")
        if path.exists():
            with open(member(folder, path.name), encoding="utf-8") as file:
                captions[name] = file.read(CAPTION_BYTES).strip()
    return captions
