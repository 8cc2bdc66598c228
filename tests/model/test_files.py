"""Atomic writes, and JSON of untrusted files."""

import errno
import os
import stat

import pytest

from cogvx.checkpoint import CheckpointError, atomic_path
from cogvx.files import check_writable, parse_json


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


def test_atomic_path_removes_nothing_else_of_similar_name(tmp_path):
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


def test_a_path_is_checked_without_being_written(tmp_path, monkeypatch):
    (tmp_path / "x.json").write_text("old")
    check_writable(tmp_path / "x.json")
    check_writable(tmp_path / "y.json")
    assert os.listdir(tmp_path) == ["x.json"]

    def fails(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system", "/a/temporary/name")

    monkeypatch.setattr("tempfile.mkdtemp", fails)
    for check in (check_writable, lambda path: atomic_path(path).__enter__()):
        with pytest.raises(OSError, match=r"folder cannot be .*\(Read-only.*'.*x\.json'") as caught:
            check(tmp_path / "x.json")
        assert caught.value.errno == errno.EROFS


def test_atomic_path_names_what_is_wrong(tmp_path):
    with pytest.raises(IsADirectoryError, match="must name a file; got the folder"):
        atomic_path(tmp_path).__enter__()
    with pytest.raises(FileNotFoundError, match="must lie in a folder that exists"):
        atomic_path(tmp_path / "a" / "b").__enter__()
    with atomic_path(tmp_path / ("x" * 240 + ".json")) as part:
        part.write_text("a long name fits")
    assert len(os.listdir(tmp_path)) == 1
