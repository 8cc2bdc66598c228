"""Orientations of videos and photos: all eight, as players and `PIL.ImageOps` show them."""

import struct

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from cogvx.video import VideoError, probe, read_image, read_video

from .clips import write_levels

CORNERS = np.zeros((48, 64, 3), np.uint8)  # red, green, blue, white: no two orientations are alike
CORNERS[:24, :32, 0] = CORNERS[:24, 32:, 1] = CORNERS[24:, :32, 2] = CORNERS[24:, 32:] = 220
# (a, b, c, d) of x' = ax + cy, y' = bx + dy; corners as shown; rotation, mirrored
MATRICES = [
    ((1, 0, 0, 1), "RGBW", 0, False),
    ((-1, 0, 0, 1), "GRWB", 0, True),
    ((-1, 0, 0, -1), "WBGR", 2, False),
    ((1, 0, 0, -1), "BWRG", 2, True),
    ((0, 1, 1, 0), "RBGW", 1, True),
    ((0, 1, -1, 0), "BRWG", 3, False),
    ((0, -1, -1, 0), "WGBR", 3, True),
    ((0, -1, 1, 0), "GWRB", 1, False),
    ((0, 0, 0, 0), "RGBW", 0, False),  # no matrix
    ((2, 0, 0, 2), "RGBW", 0, False),
]


def names(picture):
    """The colours of the four quarters of (3, height, width), row by row."""
    height, width = picture.shape[1:]
    colours = [
        picture[:, y, x] for y in (height // 4, -height // 4) for x in (width // 4, -width // 4)
    ]
    return "".join("W" if c.min() > 0 else "RGB"[int(c.argmax())] for c in colours)


def write_corners(path, matrix):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        a, b, c, d = (round(value * (1 << 16)) for value in matrix)
        stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        picture = av.VideoFrame.from_ndarray(CORNERS, format="rgb24")
        container.mux([*stream.encode(picture), *stream.encode(None)])
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".3gp"])
@pytest.mark.parametrize(("matrix", "shown", "rotation", "mirrored"), MATRICES)
def test_display_matrices(tmp_path, suffix, matrix, shown, rotation, mirrored):
    path = write_corners(tmp_path / f"a{suffix}", matrix)
    info = probe(path)
    assert (info.rotation, info.mirrored) == (rotation, mirrored)
    assert (info.height, info.width) == ((64, 48) if rotation % 2 else (48, 64))
    picture = read_video(path, frames=1)[0, 0]
    assert names(picture) == shown and picture.shape == (3, info.height, info.width)


@pytest.mark.parametrize("matrix", [(0.7, 0.7, -0.7, 0.7), (1, 0.3, 0, 1), (1, 0, 0, 0)])
def test_other_matrices_are_refused(tmp_path, matrix):
    path = write_corners(tmp_path / "a.mp4", matrix)
    with pytest.raises(VideoError, match=r"a\.mp4: must be shown upright, .* matrix is "):
        probe(path)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tiff", ".avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos(tmp_path, suffix, orientation):
    path = tmp_path / f"a{suffix}"
    tags = Image.Exif()
    tags[274] = orientation
    Image.fromarray(CORNERS).save(path, exif=tags)
    with Image.open(path) as photo:
        shown = np.asarray(ImageOps.exif_transpose(photo).convert("RGB"))
    wanted = torch.from_numpy(shown.copy()).permute(2, 0, 1) / 127.5 - 1
    picture = read_image(path)[0]
    assert picture.shape == wanted.shape and names(picture) == names(wanted)


def test_a_photo_with_others_behind_it(tmp_path):
    """As phones keep a gain map or a depth map: the first is the photo."""
    photo, other = Image.fromarray(CORNERS), Image.new("L", (16, 16))
    photo.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[other])
    assert names(read_image(tmp_path / "a.jpg")[0]) == "RGBW"


def box(kind, *parts):
    data = b"".join(parts)
    return struct.pack(">I4s", len(data) + 8, kind) + data


def full_box(kind, version, *parts):
    return box(kind, bytes([version, 0, 0, 0]), *parts)


def find(data, *kinds):
    """The content of a box in boxes."""
    for kind in kinds:
        position = 0
        while data[position + 4 : position + 8] != kind:
            position += struct.unpack_from(">I", data, position)[0]
        data = data[position + 8 : position + struct.unpack_from(">I", data, position)[0]]
        data = data[4:] if kind == b"meta" else data
    return data


def write_heif(path, items, primary, references):
    """An AVIF file: `items` of (kind, data, properties), `references` of (kind, from, to)."""
    shared = sorted({one for *_, properties in items for one in properties})
    numbered = list(enumerate(items, 1))

    def meta(offsets):
        places = (
            struct.pack(">HHHII", number, 0, 1, offset, len(item[1]))
            for (number, item), offset in zip(numbered, offsets, strict=True)
        )
        kinds = (
            full_box(b"infe", 2, struct.pack(">HH4sB", number, 0, item[0], 0))
            for number, item in numbered
        )
        owners = (
            struct.pack(">HB", number, len(item[2])) + bytes(shared.index(p) + 1 for p in item[2])
            for number, item in numbered
        )
        count = struct.pack(">H", len(items))
        return full_box(
            b"meta",
            0,
            full_box(b"hdlr", 0, struct.pack(">I4s12sB", 0, b"pict", b"", 0)),
            full_box(b"pitm", 0, struct.pack(">H", primary)),
            full_box(b"iloc", 0, b"\x44\x00", count, *places),
            full_box(b"iinf", 0, count, *kinds),
            full_box(b"iref", 0, *(
                box(kind, struct.pack(f">HH{len(to)}H", source, len(to), *to))
                for kind, source, to in references
            )),
            box(b"iprp", box(b"ipco", *shared),
                full_box(b"ipma", 0, struct.pack(">I", len(items)), *owners)),
        )  # fmt: skip

    brand = box(b"ftyp", b"avif", bytes(4), b"avifmif1miaf")
    ends = len(brand) + len(meta([0] * len(items))) + 8
    offsets = [ends + sum(len(data) for _, data, _ in items[:n]) for n in range(len(items))]
    path.write_bytes(brand + meta(offsets) + box(b"mdat", *(data for _, data, _ in items)))
    return path


def coded(path, size, level):
    """The item of an AVIF picture of one level of gray."""
    write_levels(path, [level], size=size, codec="libsvtav1", format="avif")
    data = path.read_bytes()
    kept = (b"av1C", b"ispe", b"pixi", b"colr")
    properties, rest = [], find(data, b"meta", b"iprp", b"ipco")
    while rest:
        length = struct.unpack_from(">I", rest)[0]
        properties += [rest[:length]] if rest[4:8] in kept else []
        rest = rest[length:]
    return b"av01", find(data, b"mdat"), properties


def test_tiles_are_not_the_photo(tmp_path):
    """A grid is refused, with a thumbnail beside it or not; a whole photo with one is read."""
    tile, small = (
        coded(tmp_path / "t.avif", (64, 96), 200),
        coded(tmp_path / "s.avif", (64, 64), 20),
    )
    size = full_box(b"ispe", 0, struct.pack(">II", 192, 64))
    grid = (b"grid", struct.pack(">BBBBHH", 0, 0, 0, 1, 192, 64), [size])
    tiles = write_heif(tmp_path / "a.avif", [tile, tile, grid], 3, [(b"dimg", 3, [1, 2])])
    both = [(b"dimg", 4, [2, 3]), (b"thmb", 1, [4])]
    more = write_heif(tmp_path / "b.avif", [small, tile, tile, grid], 4, both)
    for path in (tiles, more):
        with Image.open(path) as photo:
            assert photo.size == (192, 64)
        with pytest.raises(VideoError, match="is a photo in 2 tiles .* Save it as JPEG or PNG"):
            read_image(path)
    whole = write_heif(tmp_path / "c.avif", [small, tile], 2, [(b"thmb", 1, [2])])
    picture = read_image(whole)
    assert picture.shape == (1, 3, 64, 96) and picture.mean() > 0.5
