"""Prompts to embeddings: what a pipeline asks of a text encoder, and T5 from a folder."""

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .extras import extra

PathLike = str | os.PathLike[str]


class TextEncoder(Protocol):
    """Anything that turns prompts into embeddings.

    dim  width of an embedding, the transformer's `text_embed_dim`
    """

    dim: int

    def encode(self, prompts: Sequence[str], max_length: int) -> Tensor:
        """(len(prompts), max_length, dim): every prompt padded or cut to max_length tokens."""
        ...


class T5TextEncoder:
    """T5's encoder over the tokens of a prompt, padding included.

    As CogVideoX was trained, prompts are padded to the full length and encoded *without* an
    attention mask, so that the padding takes part and all of the states are used. The model knows
    English and long, detailed captions; it was trained on such.

    model, tokenizer  of transformers: a T5EncoderModel and a T5 tokenizer; see `from_pretrained`
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.dim: int = model.config.d_model

    @classmethod
    def from_pretrained(
        cls,
        folder: PathLike,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> "T5TextEncoder":
        """The encoder in `folder/text_encoder` with the tokenizer in `folder/tokenizer`.

        Reads local files only, weights from safetensors only; nothing is downloaded and no code of
        the folder is run. dtype None keeps that of the files.

        Raises ModuleNotFoundError if transformers is not installed, and FileNotFoundError if a
        folder is missing.
        """
        transformers = extra("transformers", "T5TextEncoder", "cogvx[text]")
        folders = [Path(folder) / name for name in ("text_encoder", "tokenizer")]
        for path in folders:
            if not path.is_dir():
                raise FileNotFoundError(
                    f"T5TextEncoder.from_pretrained: folder must hold text_encoder/ and "
                    f"tokenizer/; got {folder}, where {path.name}/ is missing"
                )
        with _bars_on_a_terminal_only(transformers):
            model = transformers.T5EncoderModel.from_pretrained(
                folders[0],
                dtype="auto" if dtype is None else dtype,
                local_files_only=True,
                use_safetensors=True,
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folders[1], local_files_only=True)
        return cls(model.to(device), tokenizer)

    def save_pretrained(self, folder: PathLike) -> None:
        """Writes `folder/text_encoder` and `folder/tokenizer`, which `from_pretrained` reads."""
        self.model.save_pretrained(Path(folder) / "text_encoder")
        self.tokenizer.save_pretrained(Path(folder) / "tokenizer")

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], max_length: int) -> Tensor:
        """The last states of the encoder, (len(prompts), max_length, dim), in the model's dtype.

        max_length  in tokens, the closing one included; 226 for every released model in diffusers

        Warns, with what was left out, if a prompt is longer.
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
        for index, whole in enumerate(self.tokenizer(prompts, add_special_tokens=True).input_ids):
            if len(whole) > max_length:
                left_out = self.tokenizer.decode(whole[max_length - 1 : -1])
                warnings.warn(
                    f"prompt {index} has {len(whole)} tokens, of which the model sees "
                    f"{max_length}; left out: {left_out!r}",
                    stacklevel=4,
                )


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
