"""Models by their names on the hub: what is downloaded, from where it is read, and the errors
when it cannot be. A server on loopback stands for the hub."""

import errno
import json
import os
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import torch

from cogvx import CheckpointError, CogVideoX, load_transformer, load_vae
from cogvx.assets import located
from cogvx.checkpoint import load_scheduler
from cogvx.cli import main
from cogvx.hub import is_hub_name, needed
from cogvx.text import T5TextEncoder

from .hub_server import COMMIT, Hub

NAME = "owner/model"
CLIP = {"steps": 1, "num_frames": 9, "height": 32, "width": 32, "seed": 0}
SMALL = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/added_tokens.json",
    "tokenizer/special_tokens_map.json",
    "tokenizer/spiece.model",
    "tokenizer/tokenizer_config.json",
}


def names_under(folder, *parts):
    """The files of a model that are in some of its folders."""
    paths = [path for part in parts for path in (folder / part).iterdir()]
    return {path.relative_to(folder).as_posix() for path in paths}


def point_to(monkeypatch, url, cache):
    """Effect of HF_ENDPOINT, HF_HUB_CACHE and HF_HUB_OFFLINE=0, which are read at import."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the hub's own attempts


@pytest.fixture
def hub(released, tmp_path, monkeypatch):
    with Hub(released, NAME) as server:
        point_to(monkeypatch, server.url, tmp_path / "cache")
        yield server


@pytest.fixture
def own(released, tmp_path, hub):
    """A copy of the folder, which a test may change, on the server instead."""
    hub.folder = tmp_path / "served"
    shutil.copytree(released, hub.folder)
    return hub.folder


def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_a_model_by_its_name_is_the_model_of_the_folder(hub, own, released, monkeypatch):
    for extra in ("README.md", "transformer/notes.txt", "vae/diffusion_pytorch_model.bin"):
        (own / extra).write_text("not needed")
    expected = CogVideoX.from_pretrained(released).generate("a", **CLIP)
    assert not hub.requests  # a folder never touches the network
    got = CogVideoX.from_pretrained(NAME).generate("a", **CLIP)
    assert torch.equal(got, expected)
    parts = ("transformer", "vae", "text_encoder")
    needed = names_under(released, *parts) - {"text_encoder/generation_config.json"}
    assert hub.files == sorted(SMALL | needed)  # each once
    # links from snapshots to blobs, and no connection
    cache = huggingface_hub.constants.HF_HUB_CACHE
    weights = f"{cache}/models--owner--model/snapshots/{COMMIT}/vae/config.json"
    assert os.path.islink(weights)
    count = len(hub.requests)
    offline(monkeypatch)
    assert torch.equal(CogVideoX.from_pretrained(NAME).generate("a", **CLIP), expected)
    again = CogVideoX.from_pretrained(NAME, local_files_only=True)
    assert torch.equal(again.generate("a", **CLIP), expected)
    assert len(hub.requests) == count


def test_a_name_on_the_command_line(hub, released, tmp_path):
    size = ("--steps", "1", "--frames", "9", "--height", "32", "--width", "32")
    for model, out in ((NAME, "name.mp4"), (str(released), "folder.mp4")):
        options = ("--model", model, "--out", str(tmp_path / out), *size, "--seed", "0", "--quiet")
        assert main(["generate", "--prompt", "a", *options]) == 0
    assert (tmp_path / "name.mp4").read_bytes() == (tmp_path / "folder.mp4").read_bytes()


def test_a_part_alone_is_downloaded(hub, released, tmp_path):
    index = {"model_index.json"}
    load_vae(NAME, cache_dir=tmp_path / "elsewhere")
    assert hub.files == sorted(index | names_under(released, "vae"))
    assert os.listdir(tmp_path / "elsewhere") and not (tmp_path / "cache").exists()
    for load, parts in (
        (load_transformer, ["transformer"]),
        (load_scheduler, ["scheduler"]),
        (T5TextEncoder.from_pretrained, ["text_encoder", "tokenizer"]),
    ):
        hub.requests.clear()
        load(NAME)
        found = names_under(released, *parts) - {"text_encoder/generation_config.json"}
        assert set(hub.files) - index == found
    hub.requests.clear()
    pipe = CogVideoX.from_pretrained(NAME, text_encoder=False, cache_dir=tmp_path / "third")
    assert pipe.text_encoder is None
    assert not any(file.startswith("text_encoder/") for file in hub.files)


def test_the_files_of_one_component_may_lie_at_the_top(hub, own):
    for part in ("transformer", "scheduler", "tokenizer", "text_encoder"):
        shutil.rmtree(own / part)
    os.remove(own / "model_index.json")
    for path in (own / "vae").iterdir():
        path.rename(own / path.name)
    (own / "vae").rmdir()
    load_vae(NAME)
    assert hub.files == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_a_revision(hub):
    assert located(NAME, parts=["vae"], revision=COMMIT).name == COMMIT
    with pytest.raises(FileNotFoundError, match=f"{NAME}: revision must be .* got 'v9'"):
        load_vae(NAME, revision="v9")


def test_a_variant(hub, own):
    plain = own / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copy(plain, own / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    load_vae(NAME, variant="fp16")
    wanted = ["vae/config.json", "vae/diffusion_pytorch_model.fp16.safetensors"]
    assert hub.files == ["model_index.json", *wanted]
    # a part without it is read without, of T5's shards too
    hub.requests.clear()
    CogVideoX.from_pretrained(NAME, variant="fp16")
    shards = {f for f in names_under(own, "transformer", "text_encoder") if "generation" not in f}
    assert set(hub.files) == shards | SMALL - {"model_index.json"}
    hub.requests.clear()
    with pytest.raises(FileNotFoundError, match='variant="bf16"; it has none'):
        CogVideoX.from_pretrained(NAME, variant="bf16")
    assert not {file for file in hub.files if "/diffusion" in file}


@pytest.mark.parametrize(
    ("files", "variant", "wanted"),
    [
        (["m.safetensors", "m.fp16.safetensors", "m.bin"], None, ["m.safetensors"]),
        (["m.safetensors", "m.fp16.safetensors", "m.bin"], "fp16", ["m.fp16.safetensors"]),
        (
            ["m.fp16-00001-of-00001.safetensors", "m.safetensors.index.fp16.json", "m.safetensors"],
            "fp16",
            ["m.fp16-00001-of-00001.safetensors", "m.safetensors.index.fp16.json"],
        ),
        (
            ["m-00001-of-00001.safetensors", "m.safetensors.index.json", "m.fp16.safetensors"],
            None,
            ["m-00001-of-00001.safetensors", "m.safetensors.index.json"],
        ),
    ],
)
def test_weights_are_chosen_by_their_names(files, variant, wanted):
    def spelled(names):
        return [f"text_encoder/{name.replace('m', 'model', 1)}" for name in names]

    assert needed(NAME, spelled(files), None, variant) == spelled(wanted)


def test_pickles_and_variants_alone_are_refused_with_what_there_is():
    with pytest.raises(FileNotFoundError, match="vae/: it has diffusion_pytorch_model.bin"):
        needed(NAME, ["vae/config.json", "vae/diffusion_pytorch_model.bin"], None, None)
    with pytest.raises(FileNotFoundError, match='pass variant="fp16"'):
        needed(NAME, ["vae/diffusion_pytorch_model.fp16.safetensors"], ["vae"], None)


def test_a_download_that_breaks_off_goes_on(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    name = "vae/diffusion_pytorch_model.safetensors"
    hub.broken = name
    load_vae(NAME)
    half = (hub.folder / name).stat().st_size // 2
    [(again, begin)] = hub.ranges
    assert again == name and half - 1000 < begin <= half


def test_a_download_that_was_stopped_is_completed(hub, monkeypatch):
    """Files that are whole are not downloaded again; without a connection the error has advice."""
    located(NAME, parts=["scheduler"])
    offline(monkeypatch)
    with pytest.raises(CheckpointError, match="not complete: run it again, with a connection"):
        load_vae(NAME)
    snapshot = located(NAME)
    (snapshot / "text_encoder").mkdir()
    with pytest.raises(FileNotFoundError, match="tokenizer/ is missing; the download"):
        T5TextEncoder.from_pretrained(NAME)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub.requests.clear()
    load_vae(NAME)
    load_scheduler(NAME)
    assert not any(file.startswith("scheduler/") for file in hub.files)


@pytest.mark.parametrize("how", ["local_files_only=True", "HF_HUB_OFFLINE is set"])
def test_offline_and_not_in_the_cache(how, hub, monkeypatch):
    if how.startswith("HF"):
        offline(monkeypatch)
    with pytest.raises(FileNotFoundError, match=f"{how}.*hf download {NAME}"):
        load_vae(NAME, local_files_only=not how.startswith("HF"))
    assert not hub.requests


def test_no_connection(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        ConnectionError, match="is no folder here, and .*:9 cannot be reached.*hf d"
    ):
        load_vae(NAME)


def test_a_cache_is_enough_when_the_hub_is_down(hub):
    load_vae(NAME)
    hub.down = True
    load_vae(NAME)
    with pytest.raises(ConnectionError, match="HTTP 503.*[Tt]ry again later"):
        load_vae("owner/other")


def test_a_name_that_is_not_there(hub):
    with pytest.raises(FileNotFoundError, match="models/mine: is no folder here, and no model at"):
        load_transformer("models/mine")


def test_a_gated_model(hub):
    hub.gated = True
    with pytest.raises(PermissionError) as raised:
        CogVideoX.from_pretrained(NAME)
    for words in ("gated", f"{hub.url}/{NAME}", "accept its licence", "hf auth login"):
        assert words in str(raised.value)


def test_a_token(hub):
    hub.token = "hf_secret"
    with pytest.raises(FileNotFoundError, match="private one needs `hf auth login`"):
        load_vae(NAME)
    with pytest.raises(PermissionError, match="HTTP 401.*hf auth login") as raised:
        load_vae(NAME, token="hf_other")
    assert "hf_other" not in str(raised.value)
    load_vae(NAME, token="hf_secret")


def test_a_disk_that_is_too_small_is_reported_before_the_download(hub, monkeypatch):
    usage = type(shutil.disk_usage("."))(10**6, 10**6, 1000)
    monkeypatch.setattr("cogvx.hub.shutil.disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"needs 0\.\d MB more in .*0\.0 MB are free.*cache_dir"):
        load_vae(NAME)
    assert not hub.files


def test_a_disk_that_fills_up(hub, monkeypatch):
    def full(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(OSError, match=r"the disk of .*cache is full. Free 0\.\d MB"):
        load_vae(NAME)


def test_a_cache_that_cannot_be_written(hub, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file cannot be written: .* Pass cache_dir"):
        load_vae(NAME, cache_dir=tmp_path / "file")


def test_blobs_of_the_whole_cache(hub, monkeypatch):
    """huggingface_hub 2 moves large files to `blobs` of the cache, and links to them from there."""
    folder = located(NAME, parts=["vae"])
    cache = folder.parents[2]
    link = folder / "vae" / "diffusion_pytorch_model.safetensors"
    blob = folder / "vae" / os.readlink(link)
    shared = cache / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    os.replace(blob, shared)
    os.symlink(os.path.relpath(shared, os.path.realpath(blob.parent)), blob)
    offline(monkeypatch)
    load_vae(NAME)
    os.replace(shared, cache / "stray")
    blob.unlink()
    os.symlink(cache / "stray", blob)
    with pytest.raises(CheckpointError, match="must lie in its folder"):
        load_vae(NAME)


def test_what_is_missing_is_reported_before_the_large_files(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "google.protobuf", None)
    with pytest.raises(ModuleNotFoundError, match=r"protobuf is not installed; .*cogvx\[text\]"):
        CogVideoX.from_pretrained(NAME)
    assert set(hub.files) == SMALL


@pytest.mark.parametrize("name", ["./a/b", "/a/b", "a", "a/b/c", "a/", "a--b/c", "a/..", "~/a", ""])
def test_names_that_are_not_of_the_hub(name):
    assert not is_hub_name(name)
    with pytest.raises(
        CheckpointError, match="on the Hugging Face hub, such as THUDM/CogVideoX-5b"
    ):
        load_vae(name or "nowhere")


def test_a_folder_goes_before_a_name(released, tmp_path, monkeypatch):
    (tmp_path / "owner").mkdir()
    (tmp_path / NAME).symlink_to(released)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cogvx.assets.download", None)
    load_vae(NAME)
    assert is_hub_name(NAME) and located(NAME) == located(tmp_path / NAME).relative_to(tmp_path)


def test_by_the_environment(hub, tmp_path):
    """HF_ENDPOINT and HF_HOME, in a process of its own; nothing else is printed."""
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    env.pop("HF_HUB_OFFLINE", None)
    code = f"from cogvx.assets import located; print(located({NAME!r}, parts=['scheduler']))"
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")  # no terminal, no progress bar
    assert ran.stdout.strip().startswith(str(tmp_path / "home" / "hub"))
    values = json.loads((hub.folder / "scheduler" / "scheduler_config.json").read_text())
    file = f"{ran.stdout.strip()}/scheduler/scheduler_config.json"
    with open(file, encoding="utf-8") as copy:
        assert json.load(copy) == values
