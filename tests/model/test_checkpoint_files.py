"""Files that are damaged or meant to harm, and files that a crash must not spoil."""

import errno
import json
import math
import os
import pickle
import random
import stat
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogvx.checkpoint import (
    CheckpointError,
    atomic_path,
    load_transformer,
    read_tensors,
    save_transformer,
    write_tensors,
)
from cogvx.checkpoint import tensors as tensor_files
from cogvx.checkpoint.weights import SHARD_LIMIT
from cogvx.config import TransformerConfig
from cogvx.files import parse_json
from cogvx.transformer import ExpertTransformer

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = WEIGHTS + ".index.json"
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


def every_kind_of_tensor():
    names = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64"
    kinds = {name: torch.arange(6).reshape(2, 3).to(getattr(torch, name)) for name in names.split()}
    twice = torch.arange(12.0)
    turned = torch.view_as_complex(torch.arange(8.0).view(4, 2)).conj()  # a flag, not other bits
    assert turned.is_conj() and turned.imag.is_neg()
    return {
        **kinds,
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "a\"name\\ with 'everything' é": torch.ones(1, dtype=torch.int8),
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "expanded": torch.ones(1, 1).expand(3, 2),
        "part": torch.arange(10.0)[3:7],
        "whole": twice,
        "same": twice.view(3, 4),
        "end": twice[6:],
        "conj": turned,
        "neg": turned.imag,
    }


def assert_equal(tensors, others):
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype is others[name].dtype
        assert torch.equal(tensor, others[name])


def test_tensors_both_ways_with_the_library(tmp_path):
    tensors = every_kind_of_tensor()
    write_tensors(tmp_path / "ours", tensors, {"fps": "8", "é": ""})
    assert_equal(load_file(tmp_path / "ours"), tensors)
    plain = {
        name: tensor.resolve_conj().resolve_neg().contiguous().clone()
        for name, tensor in tensors.items()
    }
    save_file(plain, tmp_path / "theirs", {"fps": "8", "é": ""})
    for name in ("ours", "theirs"):
        again, metadata = read_tensors(tmp_path / name)
        assert_equal(again, tensors)
        assert metadata == {"fps": "8", "é": ""}


def test_what_was_read_does_not_hang_on_the_file(tmp_path):
    write_tensors(tmp_path / "x", {"a": torch.ones(1000)})
    tensors, metadata = read_tensors(tmp_path / "x")
    os.truncate(tmp_path / "x", 0)
    assert metadata == {}
    assert torch.equal(tensors["a"], torch.ones(1000))
    tensors["a"] += 1


def test_what_is_read_lies_where_torch_puts_tensors(tmp_path):
    """At multiples of 64 bytes, which a kernel may choose its way by."""
    sizes = 1, 15, 16, 100, 10_000, 100_000
    write_tensors(tmp_path / "x", {str(size): torch.ones(size) for size in sizes})
    for _ in range(5):
        tensors, _ = read_tensors(tmp_path / "x")
        assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors.values())


def test_what_is_read_does_not_hang_on_the_settings_of_torch(tmp_path):
    write_tensors(tmp_path / "x", {"a": torch.ones(3), "b": torch.ones(2).half()})
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            tensors, _ = read_tensors(tmp_path / "x")
    finally:
        torch.set_default_dtype(before)
    assert_equal(tensors, {"a": torch.ones(3), "b": torch.ones(2).half()})


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    write_tensors(tmp_path / "x", {"a": torch.ones(100_000)})
    with tensor_files.TensorFile(tmp_path / "x") as file:
        os.truncate(tmp_path / "x", 1000)
        with pytest.raises(CheckpointError, match="x: 'a' cannot be read"):
            file.read("a")


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"a": torch.ones(1, device="meta")}, {}),
        ({"a": torch.ones(1, dtype=torch.complex128)}, {}),
        ({"a": torch.eye(2).to_sparse()}, {}),
        ({"a": [1.0]}, {}),
        ({1: torch.ones(1)}, {}),
        ({"__metadata__": torch.ones(1)}, {}),
        ({"a": torch.ones(1)}, {"fps": 8}),
    ],
)
def test_what_safetensors_cannot_hold(tensors, metadata, tmp_path):
    with pytest.raises(TypeError, match="write_tensors: .* must be .*; got"):
        write_tensors(tmp_path / "x", tensors, metadata)
    assert not os.listdir(tmp_path)


def test_a_header_that_could_not_be_read_is_not_written(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(ValueError, match="the length of its header, at most 8,388,608"):
        write_tensors(tmp_path / "x", {"x" * (9 << 20): torch.ones(1)})
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_text() == "old"


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


def written(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def twice(first, second, *others):
    """A header that says "a" twice, which JSON lets it."""
    pairs = [("a", first), ("a", second), *others]
    return (
        "{" + ", ".join(f'"{name}": {json.dumps(value)}' for name, value in pairs) + "}"
    ).encode()


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({"a": entry(end=4)}, "invalid shape, data type, or offset"),
        ({"a": entry(begin=8, end=16)}, "must be .* bytes .*invalid offset"),
        ({"a": entry(), "b": entry()}, "invalid offset"),
        ({"a": entry(), "b": entry(begin=4, end=12)}, "must be .* bytes .*invalid offset"),
        ({"a": entry(), "b": entry(begin=8, end=16)}, "must be .* bytes .*not fully covered"),
        ({"a": entry(shape=(1,), end=4)}, "must be .* bytes .*not fully covered"),
        ({}, "not fully covered"),
        ({"a": entry(begin=8, end=0)}, "invalid offset"),
        ({"a": entry(begin=-8, end=0)}, "expected usize"),
        ({"a": entry(shape=(-2,))}, "expected usize"),
        ({"a": entry(shape=(2.0,))}, "expected usize"),
        ({"a": entry(shape=(True, 2))}, "expected usize"),
        ({"a": entry(shape=(1 << 40, 1 << 40, 0), end=0), "b": entry()}, "overflow"),
        ({"a": entry(shape=(0, 1 << 40, 1 << 40), end=0), "b": entry()}, "'a' cannot be read"),
        ({"a": entry(shape=(1 << 63, 0), end=0), "b": entry()}, "'a' cannot be read"),
        ({"a": entry(shape=(1 << 61,))}, "overflow"),
        ({"a": entry(dtype="F7")}, "unknown variant"),
        ({"a": entry(dtype="F4", shape=(16,))}, "'a' cannot be read"),
        ({"a": entry(dtype="F6_E2M3", shape=(4,), end=3), "b": entry("U8", (5,), 3)}, "cannot be"),
        ({"a": entry(dtype=["F32"])}, "expected string or map"),
        ({"a": 1}, "expected struct TensorInfo"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "missing field"),
        ({"__metadata__": {"a": 1}, "a": entry()}, "expected a string"),
        ({"__metadata__": []}, "expected a map"),
        (twice(entry(), entry(shape=(1,), end=4)), "not fully covered"),
        (twice(entry(), entry(begin=8, end=16)), "invalid offset"),
        (b"[]", "invalid type: sequence"),
        (b"{", "EOF while parsing"),
        (b'{"a": NaN}', "invalid JSON"),
        (b'{"a": 1e999}', "invalid JSON"),
        (b'{"a": 1' + b"0" * 30 + b"}", "invalid JSON"),
        (b'{"a": "\xff"}', "invalid UTF-8"),
        (b'{"\\ud800": 1}', "invalid JSON"),
        (b"{}x", "trailing characters"),
        (b'{"a":' * 100_000, "recursion limit"),
        (b'{"a":[' + b"[]," * 200_000 + b"[]]}", "invalid type: sequence"),
        ({"\33[2J" + "x" * 10_000: entry(end=4)}, r"tensor"),
        (b" " * (8 << 20) + b"{}", "must begin with the length of its header, at most 8,388,608"),
    ],
)  # fmt: skip
def test_headers_that_lie(header, match, tmp_path):
    with pytest.raises(CheckpointError, match=match) as raised:
        read_tensors(written(tmp_path / "x", header, bytes(8)))
    assert str(tmp_path / "x") in str(raised.value)
    assert len(str(raised.value)) < 1000
    assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry()},
        {"a": {**entry(), "more": 1}},
        {"a": entry(), "__metadata__": None},
        twice(entry(), entry()),
        twice(entry(shape=(1,), end=4), entry()),
        twice(entry("I64", (99,), 7, 5), entry()),
    ],
)
def test_headers_that_say_too_much_change_nothing(header, tmp_path):
    """The last of two counts, as it does for every reader of JSON; and it must fit the file."""
    data = torch.tensor([1.5, -2.0])
    path = written(tmp_path / "x", header, data.numpy().tobytes())
    assert_equal(read_tensors(path)[0], {"a": data})
    assert_equal(load_file(path), {"a": data})


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
    for said in header.values():
        end = here + math.prod(said["shape"]) * bits.get(said["dtype"], 8) // 8
        said["data_offsets"], here = [here, end], end
    written(folder / WEIGHTS, header, bytes(here))
    wanted = f"proj_out.bias in {WEIGHTS}: expected F64, F32, F16, BF16; got {dtype}"
    with pytest.raises(CheckpointError, match=wanted) as raised:
        load_transformer(folder)
    assert len(str(raised.value)) < 1000


def test_a_header_as_long_as_it_says(tmp_path):
    for length in (0, 1 << 63, (1 << 64) - 1, 1 << 30):
        with pytest.raises(CheckpointError, match="must "):
            read_tensors(written(tmp_path / "x", {}, length=length))
    assert read_tensors(written(tmp_path / "x", {})) == ({}, {})


def test_json_is_bounded():
    assert parse_json(b'{"a": [1, -2.5e3, null, true, "x"]}', "x") == {
        "a": [1, -2500.0, None, True, "x"]
    }
    for text, match in (
        (b"[]", "must hold a JSON object"),
        (b"{", "must be JSON"),
        (b'{"a": NaN}', "NaN is not a finite number"),
        (b'{"a": 1e999}', "1e999 is not a finite number"),
        (b'{"a": 1, "a": 1}', "the key 'a' comes twice"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "must be JSON; a number of 5,001 characters is too long"),
        (b'{"a": "\xff"}', "must be JSON"),
        (b'{"a":' * 100_000, "must not nest so deeply"),
        (b'{"a":[' + b"[]," * 200_000 + b"[]]}", "must hold at most 400,000 items"),
    ):
        with pytest.raises(CheckpointError, match=f"x: .*{match}"):
            parse_json(text, "x")


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_files_are_bounded(name, folder):
    (folder / name).write_bytes(b'{"a": "' + b"x" * (9 << 20) + b'"}')
    with pytest.raises(CheckpointError, match="must be JSON of at most"):
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
        assert "It looks like a pickle, not safetensors" in str(raised.value)
    elif not name.endswith(".json"):
        assert f"got {name}, which is pickle" in str(raised.value)
        assert "use_safetensors=False).save_pretrained(new)" in str(raised.value)
    pickle.loads(pickle.dumps(Payload(str(marker)))).close()
    assert marker.exists()  # it would have


def test_atomic_path_keeps_the_suffix_and_leaves_one_file(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_text("old")
    umask = os.umask(0o027)
    try:
        with atomic_path(path) as part:
            assert part.parent.parent == tmp_path
            assert part.name == "clip.mp4"
            assert stat.S_IMODE(part.parent.stat().st_mode) == 0o700
            part.write_text("new")
            os.chmod(part, 0o600)
            assert path.read_text() == "old"
    finally:
        os.umask(umask)
    assert os.listdir(tmp_path) == ["clip.mp4"]
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_atomic_path_leaves_nothing_of_a_failure(error, tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(error), atomic_path(path) as part:
        part.write_text("half")
        raise error
    assert os.listdir(tmp_path) == ["x.json"]
    assert path.read_text() == "old"


@pytest.mark.parametrize("name", ["replace", "fsync", "chmod"])
def test_atomic_path_survives_a_disk_that_does_not(name, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fails)
        with pytest.raises(OSError, match="Input/output"), atomic_path(tmp_path / "x") as part:
            part.write_text("half")
    assert not os.listdir(tmp_path)


def test_atomic_path_replaces_links_and_not_what_they_lead_to(tmp_path):
    (tmp_path / "other").write_text("untouched")
    (tmp_path / "x").symlink_to(tmp_path / "other")
    with atomic_path(str(tmp_path / "x")) as part:
        part.write_text("new")
    assert not (tmp_path / "x").is_symlink()
    assert (tmp_path / "x").read_text() == "new"
    assert (tmp_path / "other").read_text() == "untouched"


def test_atomic_path_lets_the_body_replace_the_file_or_leave_others(tmp_path):
    """As safetensors does: it writes another, and renames it."""
    with atomic_path(tmp_path / "x.json") as part:
        (part.parent / "other").write_text("new")
        os.replace(part.parent / "other", part)
        (part.parent / "left").write_text("by a body without care")
        with atomic_path(tmp_path / "x.json") as second:
            assert part.exists()
            second.write_text("second")
    assert os.listdir(tmp_path) == ["x.json"]
    assert (tmp_path / "x.json").read_text() == "new"
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "y"):
        pass
    assert os.listdir(tmp_path) == ["x.json"]


def test_atomic_path_clears_up_after_the_dead_and_not_after_the_living(tmp_path):
    for name in (".x.abc.part.json", ".y.abc.part.json"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.json").write_text("left by one that was killed")
    with atomic_path(tmp_path / "x.json") as first:
        assert not (tmp_path / ".x.abc.part.json").exists()
        first.write_text("first")
        with atomic_path(tmp_path / "x.json") as second:
            assert first.exists()
            second.write_text("second")
    assert (tmp_path / "x.json").read_text() == "first"
    assert sorted(os.listdir(tmp_path)) == [".y.abc.part.json", "x.json"]


def test_atomic_path_clears_up_nothing_that_a_stranger_made_look_so(tmp_path):
    """A link to a folder, a pipe that would block, a file."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").touch()
    (tmp_path / ".x.link.part.json").symlink_to(tmp_path / "folder")
    os.mkfifo(tmp_path / ".x.pipe.part.json")
    (tmp_path / ".x.file.part.json").touch()
    before = os.listdir(tmp_path)
    with atomic_path(tmp_path / "x.json") as part:
        part.touch()
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "x.json"])
    assert os.listdir(tmp_path / "folder") == ["kept"]


def test_atomic_path_works_without_locks(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", fails)
    (tmp_path / ".x.abc.part.json").mkdir()
    with atomic_path(tmp_path / "x.json") as part:
        part.write_text("new")
    assert sorted(os.listdir(tmp_path)) == [".x.abc.part.json", "x.json"]  # whose is it?


def test_atomic_path_names_what_is_wrong(tmp_path):
    with pytest.raises(IsADirectoryError, match="must name a file; got the folder"):
        atomic_path(tmp_path).__enter__()
    with pytest.raises(FileNotFoundError, match="must lie in a folder that exists"):
        atomic_path(tmp_path / "a" / "b").__enter__()
    with atomic_path(tmp_path / ("x" * 240 + ".json")) as part:
        part.write_text("a long name fits")
    assert len(os.listdir(tmp_path)) == 1
