"""Locations of models: in this package, on disk, or on the Hugging Face hub."""

import os
from collections.abc import Sequence
from pathlib import Path

from ..hub import download, is_hub_name

PathLike = str | os.PathLike[str]

SHIPPED = ("tiny",)


def located(
    name: PathLike,
    *,
    parts: Sequence[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: PathLike | None = None,
    variant: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """Find the folder of a model by its name; download it if the name is one of the hub.

    name              "tiny", the packaged model; else an existing file or folder, without network
                      ("./tiny" is a folder); else a str owner/name of the Hugging Face hub, such
                      as "THUDM/CogVideoX-5b". Any other path is returned unchanged
    parts             of a model on the hub, the component folders to download: some of "scheduler",
                      "text_encoder", "tokenizer", "transformer", "vae"; all by default
    revision          branch, tag or commit on the hub
    token             of the hub, for gated and private models; by default that of `hf auth login`
    cache_dir         instead of the hub's cache, which is in HF_HOME (~/.cache/huggingface)
    variant           of the weights, as in "fp16": those files, for the parts that have them
    local_files_only  use only the cache, as with HF_HUB_OFFLINE

    Only safetensors and the JSON and tokenizer files beside them are downloaded.

    Raises FileNotFoundError for a model, revision or variant that does not exist, PermissionError
    if a login or an accepted licence is required, ConnectionError if the hub cannot be reached, and
    OSError, with the missing space, if the disk is full.
    """
    if name in SHIPPED:
        return Path(__file__).parent / name
    if not is_hub_name(name) or os.path.lexists(name):
        return Path(name)
    return download(
        str(name),
        parts=parts,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        variant=variant,
        local_files_only=local_files_only,
    )
