"""Folders that are damaged or meant to harm: cuts, links, pickles, an index that leads astray."""

import json
import math
import os
import pickle
import random
import stat

import pytest
import torch

from cogvx.checkpoint import CheckpointError, load_transformer, save_transformer
from cogvx.checkpoint import tensors as tensor_files
from cogvx.checkpoint.weights import SHARD_LIMIT
from cogvx.config import TransformerConfig
from cogvx.transformer import ExpertTransformer

from .checkpoints import INDEX, WEIGHTS, assert_equal, written

TINY = TransformerConfig(
    num_attention_heads=2,
    attention_head_dim=8,
    in_channels=2,
    out_channels=2,
    time_embed_dim=2,
    text_embed_dim=2,
    num_layers=1,
    sample_width=4,
    sample_height=4,
    sample_frames=5,
)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    save_transformer(ExpertTransformer(TINY), folder)
    return folder


def test_every_cut_and_every_tail_is_refused(folder, seed):
    whole = (folder / WEIGHTS).read_bytes()
    chance = random.Random(seed)
    header = 8 + int.from_bytes(whole[:8], "little")
    cuts = [0, 1, 7, 8, 9, header - 1, header, header + 1, len(whole) - 1]
    cuts += [chance.randrange(len(whole)) for _ in range(191)]
    for cut in cuts:
        (folder / WEIGHTS).write_bytes(whole[:cut])
        with pytest.raises(CheckpointError) as raised:
            load_transformer(folder)
        assert str(folder / WEIGHTS) in str(raised.value)
        assert f"{cut:,}" in str(raised.value)
    for tail in (b"\0", b" ", b"x" * 1000):
        (folder / WEIGHTS).write_bytes(whole + tail)
        with pytest.raises(CheckpointError, match=f"must be {len(whole):,} bytes of safetensors"):
            load_transformer(folder)


def test_a_changed_header_is_refused_or_changes_nothing(folder, seed):
    whole = (folder / WEIGHTS).read_bytes()
    before = load_transformer(folder).state_dict()
    chance = random.Random(seed)
    header = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(500):
        damaged = bytearray(whole)
        damaged[chance.randrange(header)] = chance.randrange(256)
        (folder / WEIGHTS).write_bytes(damaged)
        try:
            model = load_transformer(folder)
        except CheckpointError as error:
            assert str(folder) in str(error)
        else:
            assert_equal(model.state_dict(), before)


@pytest.mark.parametrize("dtype", ["I32", "BOOL", "C64", "U64", "F8_E4M3", "F8_E8M0", "F4"])
@pytest.mark.parametrize("shape", [[4], [1] * 100_000 + [2]])
def test_weights_of_a_strange_dtype_or_shape_are_refused(dtype, shape, folder):
    """Nothing is read: the file says so itself, and has the bytes that it says."""
    header = {
        name: {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": None}
        for name, tensor in ExpertTransformer(TINY).state_dict().items()
    }
    header["proj_out.bias"] |= {"dtype": dtype, "shape": shape}
    bits = {"F32": 32, "I32": 32, "C64": 64, "U64": 64, "F4": 4}
    here = 0
    for entry in header.values():
        end = here + math.prod(entry["shape"]) * bits.get(entry["dtype"], 8) // 8
        entry["data_offsets"], here = [here, end], end
    written(folder / WEIGHTS, header, bytes(here))
    wanted = f"proj_out.bias in {WEIGHTS}: expected F64, F32, F16, BF16; got {dtype}"
    with pytest.raises(CheckpointError, match=wanted) as raised:
        load_transformer(folder)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_files_are_bounded(name, folder):
    (folder / name).write_bytes(b'{"a": "' + b"x" * (9 << 20) + b'"}')
    with pytest.raises(CheckpointError, match="must be JSON of at most"):
        load_transformer(folder)


def test_a_byte_order_mark_is_named(folder):
    path = folder / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    with pytest.raises(CheckpointError, match="got a byte-order mark before it: save it as UTF-8"):
        load_transformer(folder)


def outside(folder, name="outside.safetensors"):
    """The weights, where an index must not reach; if it does, they load."""
    os.replace(folder / WEIGHTS, folder.parent / name)
    return folder.parent / name


def index_to(folder, shard):
    names = ExpertTransformer(TINY).state_dict()
    text = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, shard)})
    (folder / INDEX).write_text(text)


def link_out(folder):
    (folder / "x.safetensors").symlink_to(outside(folder))
    return "x.safetensors"


def link_to_device(folder):
    (folder / "x.safetensors").symlink_to("/dev/zero")
    return "x.safetensors"


def pipe(folder):
    os.mkfifo(folder / "x.safetensors")
    return "x.safetensors"


def device_node(folder):
    try:
        os.mknod(folder / "x.safetensors", 0o600 | stat.S_IFCHR, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("no right to make a device node")
    return "x.safetensors"


def directory(folder):
    (folder / "x.safetensors").mkdir()
    return "x.safetensors"


def loop(folder):
    (folder / "x.safetensors").symlink_to("x.safetensors")
    return "x.safetensors"


def below(folder):
    (folder / "sub").mkdir()
    os.replace(folder / WEIGHTS, folder / "sub" / WEIGHTS)
    return f"sub/{WEIGHTS}"


@pytest.mark.parametrize(
    "lead",
    [
        lambda folder: f"../{outside(folder).name}",
        lambda folder: str(outside(folder)),
        lambda folder: f"a/../../{outside(folder).name}",
        lambda folder: f"./{WEIGHTS}",
        below,
        link_out,
        lambda folder: "..\\" + outside(folder, "..\\x.safetensors").name[3:],
        lambda folder: "",
        lambda folder: ".safetensors",
        lambda folder: f"{WEIGHTS}\0.safetensors",
        lambda folder: "x" * 100_000 + ".safetensors",
        lambda folder: "x" * 240 + ".safetensors",
        pipe,
        device_node,
        link_to_device,
        directory,
        loop,
        lambda folder: ["x.safetensors"],
        lambda folder: None,
        lambda folder: "x.bin",
        lambda folder: "~/x.safetensors",
        lambda folder: "file:x.safetensors",
        lambda folder: "missing.safetensors",
    ],
)
def test_an_index_leads_nowhere_else(lead, folder, monkeypatch):
    index_to(folder, lead(folder))
    opened = []
    monkeypatch.setattr(tensor_files, "open_regular", opened.append)
    with pytest.raises(CheckpointError) as raised:
        load_transformer(folder)
    assert str(folder) in str(raised.value)
    assert len(str(raised.value)) < 1000
    assert not opened


def test_an_index_may_not_say_a_thing_twice(folder):
    (folder / INDEX).write_text(f'{{"weight_map": {{"a": "{WEIGHTS}", "a": "{WEIGHTS}"}}}}')
    with pytest.raises(CheckpointError, match="the key 'a' comes twice"):
        load_transformer(folder)
    for weight_map in ("{}", "[]", "null", "1"):
        (folder / INDEX).write_text(f'{{"weight_map": {weight_map}}}')
        with pytest.raises(CheckpointError, match="weight_map must name files"):
            load_transformer(folder)
    many = {str(n): f"{n}.safetensors" for n in range(SHARD_LIMIT + 1)}
    (folder / INDEX).write_text(json.dumps({"weight_map": many}))
    with pytest.raises(CheckpointError, match="must name at most 512 files; got 513"):
        load_transformer(folder)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, INDEX])
def test_every_file_of_the_folder_must_lie_in_it(name, folder):
    index_to(folder, WEIGHTS)
    assert load_transformer(folder)
    os.replace(folder / name, folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")
    with pytest.raises(CheckpointError, match="must lie in its folder; it is a link to"):
        load_transformer(folder)
    os.remove(folder / name)
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError):
        load_transformer(folder)


def test_the_links_of_a_hub_cache_are_followed(folder):
    """models--x/snapshots/1/transformer/config.json -> ../../../blobs/…"""
    cache = folder.parent / "models--x"
    inner = cache / "snapshots" / "1" / "transformer"
    inner.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for name in os.listdir(folder):
        os.replace(folder / name, cache / "blobs" / f"blob-of-{name}")
        (inner / name).symlink_to(f"../../../blobs/blob-of-{name}")
    assert load_transformer(inner.parent)
    (inner / WEIGHTS).unlink()
    (inner / WEIGHTS).symlink_to(f"../../../../blob-of-{WEIGHTS}")
    os.replace(cache / "blobs" / f"blob-of-{WEIGHTS}", folder.parent / f"blob-of-{WEIGHTS}")
    with pytest.raises(CheckpointError, match="must lie in its folder"):
        load_transformer(inner.parent)


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (self.marker, "w")


def dumped(obj, path):
    path.write_bytes(pickle.dumps(obj))


@pytest.mark.parametrize("dump", [dumped, torch.save])
@pytest.mark.parametrize(
    "name",
    [
        "diffusion_pytorch_model.bin",
        "diffusion_pytorch_model.pt",
        "diffusion_pytorch_model.pth",
        "diffusion_pytorch_model.ckpt",
        "diffusion_pytorch_model.pkl",
        "mp_rank_00_model_states.pt",
        WEIGHTS,
        INDEX,
        "config.json",
    ],
)
def test_no_pickle_is_ever_opened(name, dump, folder):
    marker = folder / "marker"
    if not name.endswith(".json"):
        os.remove(folder / WEIGHTS)
    dump({"a": Payload(str(marker))}, folder / name)
    with pytest.raises(CheckpointError) as raised:
        load_transformer(folder)
    assert not marker.exists()
    if name == WEIGHTS:
        assert "must be a safetensors file; got a" in str(raised.value)
        assert "it is not opened, because a pickle can run any code" in str(raised.value)
    elif not name.endswith(".json"):
        assert f"got {name}, which is pickle" in str(raised.value)
        assert "use_safetensors=False).save_pretrained(new)" in str(raised.value)
    pickle.loads(pickle.dumps(Payload(str(marker)))).close()
    assert marker.exists()  # it would have


OTHER_KINDS = {
    "a git-lfs pointer.*git lfs pull.*hf download": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"
    ),
    "an MP4 or MOV video.*cogvx encode": b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41",
    "a WebM or Matroska video": b"\x1aE\xdf\xa3" + b"\x01" * 40,
    "a GGUF file": b"GGUF\3\0\0\0" + bytes(40),
    r"a web page \(HTML\)": b"\n<!DOCTYPE html>\n<html><head><title>Log in</title>",
    "text, which begins 'Entry not found'": b"Entry not found",
    "text, which begins ": b'{"error": "Invalid token"}',
    "an empty file": b"",
    "zeros: a download": bytes(1000),
    "gzip: unpack": b"\x1f\x8b\x08" + b"\x01" * 40,
    "a PNG image": b"\x89PNG\r\n\x1a\n" + bytes(40),
    "a zip archive, such as torch.save": b"PK\3\4" + bytes(40),
}


@pytest.mark.parametrize("what", OTHER_KINDS)
def test_files_of_another_kind_are_named(what, folder):
    (folder / WEIGHTS).write_bytes(OTHER_KINDS[what])
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: must be a safetensors file; got {what}"):
        load_transformer(folder)
    if not OTHER_KINDS[what].startswith(b"{"):
        (folder / "config.json").write_bytes(OTHER_KINDS[what])
        with pytest.raises(CheckpointError, match=r"config.json: must be JSON; got \w"):
            load_transformer(folder)


@pytest.mark.parametrize("suffix", [".part", ".incomplete", ".crdownload"])
def test_a_download_that_is_not_finished_is_named(suffix, folder):
    part = folder / f"{WEIGHTS}{suffix}"
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).rename(part)
    with pytest.raises(CheckpointError, match=rf"; {part.name} is a download that is not finished"):
        load_transformer(folder)
    for size in (100, len(whole) - 10):
        part.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="by its name, a download that is not finished"):
            tensor_files.read_tensors(part)
    part.unlink()
    (folder / f"config.json{suffix}").write_text("")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=rf"config\.json\{suffix} is a download"):
        load_transformer(folder)
