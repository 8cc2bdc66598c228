"""Text encoders: the protocol, and T5."""

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .assets import located
from .checkpoint.weights import Weights
from .extras import extra, quiet_imports
from .files import (
    CONFIG_BYTES,
    CheckpointError,
    member,
    open_regular,
    read_json,
    recognized,
    unfinished,
)
from .hub import PARTS
from .validation import format_list, short_repr

PathLike = str | os.PathLike[str]
TOKENIZER_FILES = PARTS["tokenizer"][0]


class TextEncoder(Protocol):
    """Protocol of a text encoder.

    dim  width of an embedding, the transformer's `text_embed_dim`
    """

    dim: int

    def encode(self, prompts: Sequence[str], max_length: int) -> Tensor:
        """Encode prompts, padded or truncated: (len(prompts), max_length, dim)."""
        ...


class T5TextEncoder:
    """T5's encoder over the tokens of a prompt, padding included.

    As in the training of CogVideoX, prompts are padded to the full length and encoded *without* an
    attention mask, and all states are used. Captions in training were English, long and detailed.

    model, tokenizer  T5EncoderModel and T5 tokenizer of transformers; see `from_pretrained`
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.dim: int = model.config.d_model
        self._cut: set[tuple[str, int]] = set()  # prompts whose truncation has been reported

    @classmethod
    def from_pretrained(
        cls,
        folder: PathLike,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        *,
        variant: str | None = None,
        **hub: Any,
    ) -> "T5TextEncoder":
        """Load the encoder in `folder/text_encoder` and the tokenizer in `folder/tokenizer`.

        folder   or a model on the Hugging Face hub, such as "THUDM/CogVideoX-5b", of which only
                 these two are downloaded; an existing folder never touches the network
        dtype    of the weights; None for that of most of them in the files
        variant  reads `model.{variant}.safetensors`, or its shards, instead
        hub      revision, token, cache_dir, local_files_only: see `cogvx.assets.located`

        Weights are read from safetensors only, and no code of the folder is run.

        Raises ModuleNotFoundError, with what to install, for a missing package, FileNotFoundError
        for a missing folder, and CheckpointError for invalid files.
        """
        folder = located(folder, parts=["text_encoder", "tokenizer"], variant=variant, **hub)
        check_packages(folder)
        for path in (folder / "text_encoder", folder / "tokenizer"):
            if not path.is_dir():
                raise FileNotFoundError(
                    f"T5TextEncoder.from_pretrained: folder must hold text_encoder/ and "
                    f"tokenizer/; got {folder}, where {path.name}/ is missing{unfinished(folder)}"
                )
        tokenizer = _read_tokenizer(folder / "tokenizer")
        return cls(_read_model(folder / "text_encoder", dtype, variant).to(device), tokenizer)

    def save_pretrained(self, folder: PathLike) -> None:
        """Write `folder/text_encoder` and `folder/tokenizer`."""
        self.model.save_pretrained(Path(folder) / "text_encoder")
        self.tokenizer.save_pretrained(Path(folder) / "tokenizer")

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], max_length: int) -> Tensor:
        """Last hidden states, (len(prompts), max_length, dim), in the model's dtype.

        max_length  in tokens, with the closing one; 226 for every released model in diffusers

        Warns, with the text that was cut, if a prompt is longer.
        """
        prompts = list(prompts)
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            max_length=max_length,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        ).input_ids
        self._warn_of_cuts(prompts, max_length)
        states: Tensor = self.model(tokens.to(self.model.device))[0]
        return states

    def _warn_of_cuts(self, prompts: list[str], max_length: int) -> None:
        """Warn of every truncated prompt, once for each text and length."""
        tokens = self.tokenizer(prompts, add_special_tokens=True).input_ids
        for prompt, whole in zip(prompts, tokens, strict=True):
            if len(whole) > max_length and (prompt, max_length) not in self._cut:
                self._cut.add((prompt, max_length))
                left_out = self.tokenizer.decode(whole[max_length - 1 : -1])
                warnings.warn(
                    f"the prompt {short_repr(prompt, 40)} has {len(whole)} tokens, of which the "
                    f"model sees {max_length}; left out: {left_out!r}",
                    stacklevel=4,
                )


def check_packages(folder: Path) -> None:
    """Raises ModuleNotFoundError, with what to install, if a package for its T5 is missing.

    Without this check, transformers reports a missing protobuf as a missing tiktoken.
    """
    extra("transformers", "T5TextEncoder", "cogvx[text]")
    if not (folder / "tokenizer" / "tokenizer.json").is_file():  # as released
        extra("sentencepiece", "T5TextEncoder", "cogvx[text]")
        extra("google.protobuf", "T5TextEncoder", "cogvx[text]")


def _read_tokenizer(folder: Path) -> Any:
    """Load a T5 tokenizer: tokenizer.json, or spiece.model as released."""
    for name in sorted(TOKENIZER_FILES):
        if not os.path.lexists(folder / name):
            continue
        path = member(folder, name)
        with open_regular(path) as file:
            came = recognized(file.read(512))
        if came and not (path.suffix == ".json" and came.startswith("text")):
            raise CheckpointError(f"{path}: must be a file of a T5 tokenizer; got {came}")
    if not any((folder / name).is_file() for name in ("spiece.model", "tokenizer.json")):
        raise CheckpointError(
            f"{folder}: must hold spiece.model or tokenizer.json{unfinished(folder)}"
        )
    transformers = extra("transformers", "T5TextEncoder", "cogvx[text]")
    try:
        with quiet_imports():
            return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a damaged file can raise anything
        raise CheckpointError(
            f"{folder}: must hold a T5 tokenizer; transformers says: {str(error)[:300]}"
        ) from error


def _read_model(folder: Path, dtype: torch.dtype | None, variant: str | None) -> Any:
    """Load a T5EncoderModel; its files are checked before transformers reads them."""
    values = read_json(member(folder, "config.json"), CONFIG_BYTES)
    if values.get("model_type", "t5") != "t5":
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type must be t5; got "
            f"{short_repr(values['model_type'])}"
        )
    with Weights(folder, variant, "model") as weights:
        dtype = dtype or weights.dtype()
    transformers = extra("transformers", "T5TextEncoder", "cogvx[text]")
    with quiet_imports(), _bars_on_a_terminal_only(transformers):
        model, found = transformers.T5EncoderModel.from_pretrained(
            folder,
            dtype=dtype,
            variant=variant,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    if found["missing_keys"]:
        names = sorted(found["missing_keys"])
        raise CheckpointError(
            f"{folder}: must hold all weights of a T5 encoder; {len(names)} are missing:"
            f"{format_list(names)}"
        )
    return model


@contextmanager
def _bars_on_a_terminal_only(transformers: Any) -> Iterator[None]:
    logging = transformers.utils.logging
    hide = logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if hide:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            logging.enable_progress_bar()
