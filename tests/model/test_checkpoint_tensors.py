"""Files of tensors: compatible with the library; wrong headers."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogvx.checkpoint import CheckpointError, read_tensors, write_tensors
from cogvx.checkpoint import tensors as tensor_files

from .checkpoints import assert_equal, written


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


def test_tensors_and_the_library_read_each_other(tmp_path):
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
    """At multiples of 64 bytes, by which a kernel may be chosen."""
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


def test_a_header_as_long_as_it_says(tmp_path):
    for length in (0, 1 << 63, (1 << 64) - 1, 1 << 30):
        with pytest.raises(CheckpointError, match="must "):
            read_tensors(written(tmp_path / "x", {}, length=length))
    assert read_tensors(written(tmp_path / "x", {})) == ({}, {})
