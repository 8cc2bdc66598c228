"""A text encoder without weights: one-hot words, positions and neighbouring words.

The transformer's first layer over the text is linear. Over one-hot vectors it is the sum of a word
embedding and a position embedding, so that nothing has to be downloaded or trained apart from the
transformer. A window of neighbouring words tells two things of a caption apart.
"""

import difflib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..files import CONFIG_BYTES, CheckpointError, atomic_path, member, read_json
from ..validation import short_repr

PathLike = str | os.PathLike[str]

CLASS = "WordTextEncoder"
WORD = re.compile(r"[a-z]+|,")
WORDS_LIMIT, PLACES_LIMIT, WINDOW_LIMIT = 4096, 512, 8


class WordTextEncoder:
    """One-hot vectors of the words of a prompt.

    words   the vocabulary: words of lower-case letters, and the comma
    places  the most words that a prompt may have
    window  number of neighbours on each side that are encoded with a word

    A vector has `dim` = (1 + 2·window)·(1 + len(words)) + places entries: the word, its position,
    the word before, the word after, and so outwards. Index 0 of a word is padding.
    Raises ValueError for words that are none, and for numbers out of range.
    """

    def __init__(self, words: Sequence[str], places: int, window: int = 0) -> None:
        bad = [w for w in words if not isinstance(w, str) or not WORD.fullmatch(w)]
        if bad or not 1 <= len(set(words)) == len(words) <= WORDS_LIMIT:
            raise ValueError(
                f"{CLASS}: words must be 1 to {WORDS_LIMIT} different ones of small letters, or a "
                f"comma; got {len(words)}" + (f", with {short_repr(bad[0])}" if bad else "")
            )
        if not isinstance(places, int) or not 1 <= places <= PLACES_LIMIT:
            raise ValueError(
                f"{CLASS}: places must be an integer in [1, {PLACES_LIMIT}]; got "
                f"{short_repr(places)}"
            )
        if not isinstance(window, int) or not 0 <= window <= WINDOW_LIMIT:
            raise ValueError(
                f"{CLASS}: window must be an integer in [0, {WINDOW_LIMIT}]; got "
                f"{short_repr(window)}"
            )
        self.words = tuple(words)
        self.places = places
        self.window = window
        self.dim = (1 + 2 * window) * (1 + len(words)) + places
        self._indices = {word: index for index, word in enumerate(words, 1)}

    def encode(self, prompts: Sequence[str], max_length: int) -> Tensor:
        """Encode prompts as (len(prompts), max_length, dim) float32 on the CPU.

        prompts     case, spaces, full stops and line ends are ignored; "" is padding alone
        max_length  at most `places`

        Raises ValueError for an unknown word, listing the vocabulary, and for a prompt of more than
        max_length words.
        """
        if not 1 <= max_length <= self.places:
            raise ValueError(
                f"{CLASS}.encode: max_length must be in [1, {self.places}], the places that it "
                f"knows; got {max_length}"
            )
        indices = torch.zeros(len(prompts), max_length, dtype=torch.long)
        for row, prompt in zip(indices, prompts, strict=True):
            found = self._split(prompt)
            if len(found) > max_length:
                raise ValueError(
                    f"{CLASS}.encode: prompt must have at most {max_length} words, commas "
                    f"included; got {len(found)} in {short_repr(prompt)}"
                )
            row[: len(found)] = torch.tensor(found, dtype=torch.long)
        padded = F.pad(indices, (self.window, self.window))
        shifted = padded.unfold(1, max_length, 1)  # (prompts, 1 + 2 window, max_length)
        outwards = [self.window + side * by for by in range(1, self.window + 1) for side in (-1, 1)]
        onehot = F.one_hot(shifted[:, [self.window, *outwards]], 1 + len(self.words)).float()
        word, *neighbours = onehot.unbind(1)
        place = torch.eye(self.places)[:max_length].expand(len(prompts), -1, -1)
        return torch.cat([word, place, *neighbours], 2)

    def _split(self, prompt: str) -> list[int]:
        """Vocabulary indices of the words of a prompt."""
        found = re.findall(r"[^\s.,]+|,", prompt.lower())
        unknown = [word for word in found if word not in self._indices]
        if unknown:
            known = ", ".join(sorted(word for word in self.words if word != ","))
            raise ValueError(
                f"{CLASS}.encode: prompt must be of the words that this model knows; got "
                f"{', '.join(map(self._suggested, dict.fromkeys(unknown)))}. It knows: {known}"
                f"{' and commas' * (',' in self.words)}"
            )
        return [self._indices[word] for word in found]

    def _suggested(self, word: str) -> str:
        like = difflib.get_close_matches(word, self.words, n=1)
        return short_repr(word) + (f" (did you mean {like[0]}?)" if like else "")

    def save_pretrained(self, folder: PathLike) -> None:
        """Write `folder/text_encoder/config.json`, which `from_pretrained` reads."""
        inner = Path(folder) / "text_encoder"
        inner.mkdir(parents=True, exist_ok=True)
        values = {
            "_class_name": CLASS,
            "words": self.words,
            "places": self.places,
            "window": self.window,
        }
        with atomic_path(inner / "config.json") as part:
            part.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: PathLike) -> "WordTextEncoder":
        """Load `folder/text_encoder`. Raises CheckpointError for an encoder of another class."""
        values = _config(Path(folder))
        if values.get("_class_name") != CLASS or not isinstance(values.get("words"), list):
            raise CheckpointError(
                f"{folder}/text_encoder/config.json: must be of a {CLASS} with its words; got "
                f"{short_repr(values.get('_class_name'))}"
            )
        try:
            return cls(values["words"], values.get("places", 0), values.get("window", 0))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{folder}/text_encoder/config.json: {error}") from error

    def __repr__(self) -> str:
        return f"{CLASS}({len(self.words)} words, {self.places} places, window {self.window})"


def has_word_encoder(folder: PathLike) -> bool:
    """Return True if the text encoder in a model's folder is a `WordTextEncoder`."""
    inner = Path(folder) / "text_encoder"
    return (inner / "config.json").is_file() and _config(Path(folder)).get("_class_name") == CLASS


def _config(folder: Path) -> dict[str, Any]:
    return read_json(member(folder / "text_encoder", "config.json"), CONFIG_BYTES)
