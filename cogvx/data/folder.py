"""Data set of a folder of videos with captions.

Clips are all files in the folder and its subfolders, links included, with a suffix that
`cogvx.video.open_video` reads. Images are clips of one frame. Captions are either in
`metadata.jsonl`, a line {"file_name": …, "text": …} per clip, or in text files: `cat.txt` for
`cat.mp4`.
"""

import os
import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from ..config import VAEConfig
from ..files import CheckpointError, open_regular, parse_json
from ..validation import format_list, short_repr
from ..video import PICTURE_SUFFIXES, SUFFIXES, open_video

PathLike = str | os.PathLike[str]
CAPTION_BYTES = 1 << 16
METADATA = "metadata.jsonl"
METADATA_BYTES = 1 << 28


@dataclass(frozen=True)
class Clip:
    """A video (frames, 3, height, width) in [-1, 1] with its caption."""

    video: Tensor
    caption: str


class FolderClips(Dataset[Clip]):
    """Clips of a folder, all of one size, sorted by name.

    Args:
        folder: see the module.
        frames, height, width: size of clips, cut and scaled by `cogvx.video.open_video`. Images
            are clips if `frames` is 1.
        vae: config of the VAE, which restricts `frames`.

    `left_out` lists the files that are neither clips nor captions, of which a warning is given.
    Raises ValueError, with the names, for clips without captions, captions without clips, and an
    empty folder; VideoError, on reading, for a clip that is too short.
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
        self.captions, self.left_out = _read(self.folder, pictures=frames == 1)
        self.names = sorted(self.captions)
        self.size = frames, height, width
        self.vae = vae or VAEConfig()
        if self.left_out:
            warnings.warn(
                f"{self.folder}: {len(self.names)} clips; left out, being neither clips nor "
                f"captions:{format_list(self.left_out, 100)}",
                stacklevel=2,
            )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Clip:
        name = self.names[index]
        frames, height, width = self.size
        clip = open_video(
            self.folder / name, frames=frames, height=height, width=width, vae=self.vae
        )
        return Clip(clip.read()[0], self.captions[name])


def read_captions(folder: PathLike, *, pictures: bool = False) -> dict[str, str]:
    """Captions by the clip's path in a folder; pictures: images are clips too."""
    return _read(Path(folder), pictures)[0]


def _read(folder: Path, pictures: bool) -> tuple[dict[str, str], list[str]]:
    """Captions by clip, and the names of other files."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: must be a folder of clips with captions; it is none")
    names = sorted(_names(folder))
    suffixes = [suffix for suffix in SUFFIXES if pictures or suffix not in PICTURE_SUFFIXES]
    clips = {name for name in names if _suffix(name) in suffixes}
    if METADATA in names:
        captions, used = _from_metadata(folder / METADATA, clips), {METADATA}
    else:
        captions, used = _from_files(folder, clips, names)
    left_out = [name for name in names if name not in clips | used]
    no_caption, no_video = sorted(clips - captions.keys()), sorted(captions.keys() - clips)
    if no_caption or no_video or not clips:
        lines = [f"{name}: no caption" for name in no_caption]
        lines += [f"{name}: no video" for name in no_video]
        lines += [f"{name}: neither video nor caption" for name in left_out]
        raise ValueError(
            f"{folder}: must hold videos ({' '.join(suffixes)}), each with a caption in {METADATA} "
            f"or in a .txt of its name; got {len(clips)} videos{format_list(lines)}"
        )
    return captions, left_out


def _names(folder: Path) -> Iterator[str]:
    """Yield POSIX paths of files in a folder and its subfolders.

    Hidden files only if they may be clips. Linked folders, which are not entered, end with /.
    """
    for root, folders, files in os.walk(folder):
        inside = Path(root).relative_to(folder)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if os.path.islink(os.path.join(root, name)):
                yield f"{(inside / name).as_posix()}/"
        for name in files:
            clip = Path(name).suffix.lower() in SUFFIXES and not name.startswith("._")
            if clip or not name.startswith("."):  # ._name is metadata of macOS
                yield (inside / name).as_posix()


def _suffix(name: str) -> str:
    """Lower-case suffix; "" for hidden files and folders."""
    hidden = name.endswith("/") or Path(name).name.startswith(".")
    return "" if hidden else Path(name).suffix.lower()


def _composed(name: str) -> str:
    """Normalise a name to NFC, because file systems differ."""
    return unicodedata.normalize("NFC", name)


def _from_metadata(path: Path, clips: set[str]) -> dict[str, str]:
    captions: dict[str, str] = {}
    spelled = {_composed(clip): clip for clip in clips}
    for number, line in enumerate(_text(path, METADATA_BYTES).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        values = parse_json(line.encode(), where)
        name, text = values.get("file_name"), values.get("text")
        if not isinstance(name, str) or not isinstance(text, str):
            raise CheckpointError(
                f"{where}: must have the texts file_name and text; got {short_repr(values)}"
            )
        parts = name.replace("\\", "/").split("/")
        if parts[0] == "" or ".." in parts or ":" in parts[0]:
            raise CheckpointError(
                f"{where}: file_name must be a plain name or a path inside the folder; got "
                f"{short_repr(name)}"
            )
        name = "/".join(part for part in parts if part not in ("", "."))
        name = spelled.get(_composed(name), name)
        if name in captions:
            raise CheckpointError(
                f"{where}: must name each clip once; got {short_repr(name)} again"
            )
        captions[name] = text
    return captions


def _from_files(folder: Path, clips: set[str], names: list[str]) -> tuple[dict[str, str], set[str]]:
    """Captions by clip, and the names of their files."""
    texts = {_stem(name): name for name in names if _suffix(name) == ".txt"}
    found = {clip: texts.get(_stem(clip)) for clip in clips}
    files = {clip: text for clip, text in found.items() if text is not None}
    captions = {clip: _text(folder / text, CAPTION_BYTES).strip() for clip, text in files.items()}
    return captions, set(files.values())


def _stem(name: str) -> str:
    return _composed(os.path.splitext(name)[0])


def _text(path: Path, limit: int) -> str:
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path}: must have at most {limit:,} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be text in UTF-8; {error}") from error
