"""Arguments that several commands share, and what they stand for."""

import argparse
import re
from pathlib import Path
from typing import Any

import torch

from cogvx_kernels import BACKENDS

from ..assets import located
from ..checkpoint import load_vae
from ..config import TransformerConfig, VAEConfig
from ..data.scoring import GUIDANCE, STEPS
from ..factorized import build_vae
from ..files import CONFIG_BYTES, read_json
from ..vae import CausalVAE, Tiling

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
RANDOM_CHANNELS = 16


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not re.fullmatch(r"\d{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1; got {text!r}")
    return int(text)


def whole(text: str) -> int:
    """A whole number, 0 too."""
    if not re.fullmatch(r"\d{1,9}", text):
        raise argparse.ArgumentTypeError(f"must be a whole number, not negative; got {text!r}")
    return int(text)


def seed(text: str) -> int:
    """What a torch.Generator takes for a seed."""
    if not re.fullmatch(r"\d{1,19}", text) or int(text) >= 1 << 63:
        raise argparse.ArgumentTypeError(f"must be a whole number below 2^63; got {text!r}")
    return int(text)


def size_in_bytes(text: str) -> int:
    """10G, 10GiB, 512M, 1.5G, or plain bytes."""
    found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?)\s*([KMGT]?)(?:iB|B)?", text, re.IGNORECASE)
    if not found:
        raise argparse.ArgumentTypeError(f"must be bytes, such as 10G or 512M; got {text!r}")
    return int(float(found[1]) * UNITS[found[2].upper()])


def tiling(text: str) -> Tiling:
    """HEIGHTxWIDTH of a tile, in pixels."""
    found = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text)
    if not found:
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH, such as 240x360; got {text!r}")
    try:
        return Tiling(int(found[1]), int(found[2]))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_model(parser: Any, default: str | None = None, required: bool = True) -> None:
    parser.add_argument(
        "--model", type=located, metavar="DIR|tiny", default=default,
        required=required and default is None,
        help="a model's folder, or the model that comes with the package",
    )  # fmt: skip


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Of commands that make the same procedural clips each time."""
    parser.add_argument("--steps", type=count, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help="how much the text weighs")
    parser.add_argument("--seed", type=seed, default=0)


def add_size(parser: argparse.ArgumentParser, fps: str | None = None) -> None:
    group = parser.add_argument_group("the clip")
    for name in ("frames", "height", "width"):
        group.add_argument(f"--{name}", type=count)
    if fps is not None:
        group.add_argument("--fps", type=float, help=fps)


def add_machine(parser: argparse.ArgumentParser, tiles: bool = True) -> None:
    group = parser.add_argument_group("how it runs")
    group.add_argument("--device", help="cpu, cuda, cuda:1, …; a GPU if there is one")
    group.add_argument(
        "--dtype", choices=DTYPES, help="of the weights; float32 on a CPU, else bfloat16"
    )
    if tiles:
        add_tiling(group)


def add_tiling(parser: Any) -> None:
    parser.add_argument(
        "--tiling", nargs="?", const=Tiling(), type=tiling, metavar="HxW",
        help="run the VAE in tiles (240x360), which need less memory and are not the same as whole",
    )  # fmt: skip


def add_vae(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the VAE")
    which = group.add_mutually_exclusive_group(required=True)
    add_model(which, required=False)
    which.add_argument(
        "--vae", metavar="DIR|random", help="a VAE's folder; random: a factorised one, untrained"
    )
    group.add_argument("--base-channels", type=count, default=RANDOM_CHANNELS, help="of a random")
    group.add_argument("--seed", type=seed, default=0, help="of a random VAE, and of --sample")
    group.add_argument("--backend", choices=BACKENDS, default="auto", help="of the kernels")


def add_output(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help=what)
    parser.add_argument("--force", action="store_true", help="replace the output if it is there")


def check_output(path: Path, force: bool, suffixes: tuple[str, ...]) -> None:
    """Before anything is computed: that the file can be written and nothing is lost by it."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{path}: must end in {' or '.join(suffixes)}")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: must be a file in a folder that exists")
    if path.exists() and not force:
        raise ValueError(f"{path}: exists already; --force replaces it")


def device_of(options: argparse.Namespace) -> torch.device:
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device must be one that is here; got {name}, and torch sees no GPU")
    return device


def dtype_of(options: argparse.Namespace) -> torch.dtype:
    if options.dtype is not None:
        return DTYPES[options.dtype]
    return torch.float32 if device_of(options).type == "cpu" else torch.bfloat16


def open_vae(options: argparse.Namespace) -> CausalVAE:
    """The VAE of `add_vae`, on its device."""
    device, dtype = device_of(options), dtype_of(options)
    if options.vae != "random":
        return load_vae(options.model or Path(options.vae), dtype, device, options.backend)
    with torch.device("meta"):
        config = build_vae(base_channels=options.base_channels)[0].config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        vae = CausalVAE(config, options.backend)
    return vae.to(device, dtype).eval()


def read_configs(folder: Path) -> tuple[TransformerConfig | None, VAEConfig | None]:
    """The configs in a model's folder; no weights are read."""
    found: list[Any] = []
    for name, kind in (("transformer", TransformerConfig), ("vae", VAEConfig)):
        path = folder / name / "config.json"
        there = path.is_file()
        found.append(kind.from_dict(read_json(path, CONFIG_BYTES)) if there else None)
    if not any(found):
        raise ValueError(f"{folder}: must be a model's folder, with transformer/ or vae/ in it")
    return found[0], found[1]


def text_encoder_bytes(folder: Path) -> int:
    """Bytes of the text encoder's weights, as they are in the files."""
    return sum(path.stat().st_size for path in folder.glob("text_encoder/*.safetensors"))
