"""Download only the needed files of a model from the Hugging Face hub, into its cache."""

import errno
import os
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .extras import extra
from .validation import format_list

PathLike = str | os.PathLike[str]

# Component folders of a model: their small files, and the start of their weights' names.
PARTS: dict[str, tuple[frozenset[str], str | None]] = {
    "scheduler": (frozenset({"scheduler_config.json"}), None),
    "text_encoder": (frozenset({"config.json"}), "model"),
    "tokenizer": (
        frozenset(
            {
                "added_tokens.json",
                "special_tokens_map.json",
                "spiece.model",
                "tokenizer.json",
                "tokenizer_config.json",
            }
        ),
        None,
    ),
    "transformer": (frozenset({"config.json"}), "diffusion_pytorch_model"),
    "vae": (frozenset({"config.json"}), "diffusion_pytorch_model"),
}
INDEX = "model_index.json"
WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".gguf", ".msgpack")
_WORD = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?=.{{3,96}}$)(?!.*(?:--|\.\.)){_WORD}/{_WORD}")
_TRANSPORTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
TIMEOUT = 10.0  # seconds for the hub to answer, as long as huggingface_hub itself waits


def is_hub_name(name: object) -> bool:
    """True for a str of the form owner/name."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def download(
    name: str,
    *,
    parts: Sequence[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: PathLike | None = None,
    variant: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """Folder of a model in the hub's cache; missing files are downloaded.

    Arguments and errors: see `cogvx.assets.located`. Complete files are kept if a download is
    interrupted. Without a connection the cache is used.
    """
    hub = extra("huggingface_hub", name, "huggingface_hub")
    constants = extra("huggingface_hub.constants", name, "huggingface_hub")
    errors = extra("huggingface_hub.errors", name, "huggingface_hub")
    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    chosen = {"repo_id": name, "revision": revision, "cache_dir": cache}
    failure: Exception | None = None
    if not local_files_only:
        try:
            commit, sizes = _listing(hub, name, revision, token)
        except errors.RevisionNotFoundError as error:
            raise FileNotFoundError(
                f"{name}: revision must be a branch, tag or commit of this model; got {revision!r}"
            ) from error
        except Exception as error:
            if not _of_network(error):
                raise
            failure = error
        else:
            files = needed(name, sizes, parts, variant)
            missing = {
                file: sizes[file]
                for file in files
                if not isinstance(hub.try_to_load_from_cache(name, file, cache, commit), str)
            }
            _check_space(name, sum(missing.values()), cache)
            try:
                folder = hub.snapshot_download(
                    **chosen, token=token, allow_patterns=files, tqdm_class=_bar(name)
                )
            except Exception as error:
                if not (_of_network(error) or isinstance(error, RuntimeError)):
                    raise
                raise _readable(name, error, constants.ENDPOINT, errors, cache, missing) from error
            return Path(folder)
    try:
        # only the index is required here: the loaders name other missing files
        folder = hub.snapshot_download(**chosen, local_files_only=True, allow_patterns=[INDEX])
    except OSError as error:
        if failure is not None and not isinstance(failure, errors.OfflineModeIsEnabled):
            raise _readable(name, failure, constants.ENDPOINT, errors, cache, {}) from failure
        why = "local_files_only=True" if local_files_only else "HF_HUB_OFFLINE is set"
        raise FileNotFoundError(
            f"{name}: must be a folder, or in the cache {cache} because {why}; it is neither. "
            f"Download it first, with a connection: hf download {name}"
        ) from error
    return Path(folder)


def _listing(
    hub: Any, name: str, revision: str | None, token: str | bool | None
) -> tuple[str, dict[str, int]]:
    """List (commit, size in bytes of every file) of a model on the hub."""
    api = hub.HfApi(token=token)
    commit = api.repo_info(name, revision=revision or "main", timeout=TIMEOUT).sha
    entries = api.list_repo_tree(name, recursive=True, revision=commit)
    return commit, {entry.path: entry.size for entry in entries if hasattr(entry, "size")}


def needed(
    name: str, files: Iterable[str], parts: Sequence[str] | None, variant: str | None
) -> list[str]:
    """Select the files of a model that its parts are loaded from.

    parts    all by default. If the model is a single component, its files may lie at the top.
    variant  of the weights, for the parts that have it; FileNotFoundError if none has

    Raises FileNotFoundError if a part has no weights as safetensors.
    """
    files = set(files)
    chosen = files & {INDEX}
    found, without = False, []
    for part in parts or PARTS:
        small, stem = PARTS[part]
        top = not any(file.startswith(f"{part}/") for file in files)
        if top and (parts is None or len(parts) > 1):
            continue  # no such part, as a model without a text encoder
        begin = "" if top else f"{part}/"
        inside = {f.removeprefix(begin) for f in files if f.startswith(begin)}
        names = inside & small
        if stem is not None:
            special = weights_of(stem, inside, variant) if variant else set()
            weights = special or weights_of(stem, inside, None)
            found |= bool(special)
            others = sorted(file for file in inside if file.endswith(WEIGHTS))
            if others and not weights:
                without.append(f"{begin or name + '/'}: it has {', '.join(others[:4])}")
            names |= weights
        chosen |= {begin + file for file in names}
    if without:
        raise FileNotFoundError(
            f"{name}: must have weights as safetensors"
            f"{'' if variant else ', without a variant'}; not so:{format_list(without)}\n"
            + ("" if variant else 'If they end in .fp16.safetensors, pass variant="fp16"')
        )
    if variant and not found:
        raise FileNotFoundError(
            f'{name}: must have weights of variant="{variant}"; it has none. Leave variant out'
        )
    return sorted(chosen)


def weights_of(stem: str, names: Iterable[str], variant: str | None) -> set[str]:
    """Names of weight files of a variant: one file, or shards and their index."""
    dot = re.escape(f".{variant}" if variant else "")
    stem = re.escape(stem)
    pattern = re.compile(
        rf"{stem}{dot}(-\d+-of-\d+)?\.safetensors|{stem}\.safetensors\.index{dot}\.json"
    )
    return {name for name in names if pattern.fullmatch(name)}


def _bar(name: str) -> type:
    """The hub's progress bar, hidden without a terminal."""
    tqdm = extra("huggingface_hub.utils", name, "huggingface_hub").tqdm

    def begin(self: Any, *args: Any, **options: Any) -> None:
        hidden = options.pop("disable", None) or not sys.stderr.isatty()
        tqdm.__init__(self, *args, disable=hidden, **options)

    return type("Bar", (tqdm,), {"__init__": begin})


def _check_space(name: str, size: int, cache: Path) -> None:
    place = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if size > free:
        raise OSError(
            f"{name}: needs {_gigabytes(size)} more in {cache}, and {_gigabytes(free)} are free "
            f"there. Free {_gigabytes(size - free)}, or pass cache_dir on a larger disk (or set "
            "HF_HOME)"
        )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _of_network(error: Exception) -> bool:
    """True for errors of the hub, the connection or the disk, not for bugs."""
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in _TRANSPORTS


def _readable(
    name: str, error: Exception, endpoint: str, errors: Any, cache: Path, missing: dict[str, int]
) -> OSError:
    """Describe a failed download, and what to do."""
    page = f"{endpoint}/{name}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return PermissionError(
            f"{name}: is gated. Open {page} in a browser, log in and accept its licence; then run "
            "`hf auth login` here, or pass token="
        )
    if isinstance(error, errors.LocalTokenNotFoundError):
        return PermissionError(f"{name}: token=True, and no token is saved: run `hf auth login`")
    if isinstance(error, errors.RepositoryNotFoundError):
        return FileNotFoundError(
            f"{name}: is no folder here, and no model at {page}. Check the spelling; a private one "
            "needs `hf auth login`, or token="
        )
    message = (str(error).splitlines() or [""])[0][:200]
    if status in (401, 403):
        return PermissionError(
            f"{name}: the hub refuses access (HTTP {status}): the token is wrong, or its account "
            f"may not see {page}. Run `hf auth login`, or pass token="
        )
    if status is not None:
        return ConnectionError(
            f"{name}: the hub answers with an error (HTTP {status}): {message}. Try again later"
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return OSError(
            f"{name}: the disk of {cache} is full. Free {_gigabytes(sum(missing.values()))}, which "
            "is what was missing, or pass cache_dir on a larger disk (or set HF_HOME). Files that "
            "are whole are kept"
        )
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return OSError(f"{name}: {cache} cannot be written: {error.strerror}. Pass cache_dir")
    done = f"; {len(missing)} files were missing" if missing else ""
    return ConnectionError(
        f"{name}: is no folder here, and {endpoint} cannot be reached or broke off "
        f"({type(error).__name__}: {message}){done}. Files that are whole are kept: run "
        f"the same again, or download it elsewhere with `hf download {name} --local-dir FOLDER` "
        "and pass the folder"
    )
