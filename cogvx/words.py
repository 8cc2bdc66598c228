"""Prompts of a small world as the words they are, each at its place: a text encoder of no weights.

The transformer's first layer over the text is a linear one. Over a vector that marks a word and a
place it *is* a table of words and a table of places, added up; whatever is to be learned of them is
learned there, and nothing has to be downloaded, or trained beside the transformer. A window of
neighbours says with each word of which thing it is told, as the states of a language model do.
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

from .files import CONFIG_BYTES, CheckpointError, atomic_path, member, read_json, short_repr

PathLike = str | os.PathLike[str]

CLASS = "WordTextEncoder"
WORD = re.compile(r"[a-z]+|,")
WORDS_LIMIT, PLACES_LIMIT, WINDOW_LIMIT = 4096, 512, 8


class WordTextEncoder:
    """One vector a word: 1 at the word, 1 at its place in the prompt, 1 at each of its neighbours,
    0 elsewhere.

    words   all that it knows, each of small letters, or a comma
    places  how many words a prompt may have
    window  how many neighbours are marked on each side

    `dim` is (1 + 2·window)·(1 + len(words)) + places: the word, the place, then the neighbours, the
    one before first, the one behind next, and so outwards. The first number of each is for what is
    before the first word and behind the last, where there is only padding.
    Raises TypeError or ValueError for words that are no words, and for numbers out of range.
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
        self._numbers = {word: number for number, word in enumerate(words, 1)}

    def encode(self, prompts: Sequence[str], max_length: int) -> Tensor:
        """(len(prompts), max_length, dim) float32, on the CPU.

        prompts     in any case, with spaces, full stops and line ends wherever; "" is only padding
        max_length  at most `places`

        Raises ValueError for a word that it does not know, with those it does, and for a prompt of
        more than max_length words.
        """
        if not 1 <= max_length <= self.places:
            raise ValueError(
                f"{CLASS}.encode: max_length must be in [1, {self.places}], the places that it "
                f"knows; got {max_length}"
            )
        numbers = torch.zeros(len(prompts), max_length, dtype=torch.long)
        for row, prompt in zip(numbers, prompts, strict=True):
            found = self._split(prompt)
            if len(found) > max_length:
                raise ValueError(
                    f"{CLASS}.encode: prompt must have at most {max_length} words, commas "
                    f"included; got {len(found)} in {short_repr(prompt)}"
                )
            row[: len(found)] = torch.tensor(found, dtype=torch.long)
        padded = F.pad(numbers, (self.window, self.window))
        seen = padded.unfold(1, max_length, 1)  # of every word, from the one `window` before
        outwards = [self.window + side * by for by in range(1, self.window + 1) for side in (-1, 1)]
        marked = F.one_hot(seen[:, [self.window, *outwards]], 1 + len(self.words)).float()
        word, *neighbours = marked.unbind(1)
        place = torch.eye(self.places)[:max_length].expand(len(prompts), -1, -1)
        return torch.cat([word, place, *neighbours], 2)

    def _split(self, prompt: str) -> list[int]:
        """The numbers of a prompt's words."""
        found = re.findall(r"[^\s.,]+|,", prompt.lower())
        unknown = [word for word in found if word not in self._numbers]
        if unknown:
            known = ", ".join(sorted(word for word in self.words if word != ","))
            raise ValueError(
                f"{CLASS}.encode: prompt must be of the words that this model knows; got "
                f"{', '.join(map(self._suggested, dict.fromkeys(unknown)))}. It knows: {known}"
                f"{' and commas' * (',' in self.words)}"
            )
        return [self._numbers[word] for word in found]

    def _suggested(self, word: str) -> str:
        like = difflib.get_close_matches(word, self.words, n=1)
        return short_repr(word) + (f" (did you mean {like[0]}?)" if like else "")

    def save_pretrained(self, folder: PathLike) -> None:
        """Writes `folder/text_encoder/config.json`, which `from_pretrained` reads."""
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
        """The encoder of `folder/text_encoder`. Raises CheckpointError if that is another one."""
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


def is_words(folder: PathLike) -> bool:
    """Whether the text encoder in a model's folder is one of words."""
    inner = Path(folder) / "text_encoder"
    return (inner / "config.json").is_file() and _config(Path(folder)).get("_class_name") == CLASS


def _config(folder: Path) -> dict[str, Any]:
    return read_json(member(folder / "text_encoder", "config.json"), CONFIG_BYTES)
