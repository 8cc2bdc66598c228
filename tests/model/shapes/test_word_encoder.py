"""WordTextEncoder: vectors, refused arguments, saving and loading."""

import json

import pytest
import torch

from cogvx.checkpoint import CheckpointError
from cogvx.shapes import ProceduralClips, WordTextEncoder, vocabulary
from cogvx.shapes.word_encoder import has_word_encoder

WORDS = ("a", "red", "circle", ",")


@pytest.fixture
def words():
    return WordTextEncoder(WORDS, places=6)


def test_vectors_mark_word_and_position(words):
    states = words.encode(["A red\ncircle, a.", ""], 6)
    assert states.shape == (2, 6, words.dim) == (2, 6, 1 + 4 + 6)
    marked = [state.nonzero().flatten().tolist() for state in states[0]]
    numbers = [1, 2, 3, 4, 1, 0]  # the last is padding
    assert marked == [[number, 5 + place] for place, number in enumerate(numbers)]
    assert [s.nonzero().flatten().tolist() for s in states[1]] == [[0, 5 + p] for p in range(6)]
    assert states.unique().tolist() == [0, 1]


def test_window_marks_neighbours_outwards():
    words = WordTextEncoder(WORDS, places=5, window=2)
    states = words.encode(["a red circle,", "a"], 5)
    assert states.shape == (2, 5, words.dim) == (2, 5, 5 + 5 + 4 * 5)
    assert torch.equal(
        states[..., :10], WordTextEncoder(WORDS, places=5).encode(["a red circle,", "a"], 5)
    )
    around = states[..., 10:].unflatten(2, (4, 5))  # before, behind, two before, two behind
    assert torch.equal(around.sum(3), torch.ones(2, 5, 4))
    assert around.argmax(3)[0].tolist() == [
        [0, 2, 0, 3], [1, 3, 0, 4], [2, 4, 1, 0], [3, 0, 2, 0], [4, 0, 3, 0]
    ]  # fmt: skip
    assert around.argmax(3)[1].tolist() == [[0] * 4, [1, 0, 0, 0], [0, 0, 1, 0], [0] * 4, [0] * 4]


def test_shorter_max_length_is_a_prefix(words):
    assert torch.equal(words.encode(["a red"], 3), words.encode(["a red"], 6)[:, :3])


@pytest.mark.parametrize(
    ("prompt", "length", "message"),
    [
        (
            "a green circle",
            6,
            "that this model knows; got 'green'. It knows: a, circle, red and commas$",
        ),
        ("a rad circle", 6, r"got 'rad' \(did you mean red\?\). It knows"),
        ("a circle on the moon", 6, "got 'on', 'the', 'moon'"),
        ("a a a a a a a", 6, "at most 6 words, commas included; got 7"),
        ("a red", 1, "at most 1 words"),
        ("a", 7, r"max_length must be in \[1, 6\]"),
        ("a", 0, "max_length must be"),
    ],
)
def test_bad_prompts_are_refused(words, prompt, length, message):
    with pytest.raises(ValueError, match=message):
        words.encode([prompt], length)


@pytest.mark.parametrize("bad", [[], ["a", "a"], ["A"], ["two words"], [""], [3]])
def test_bad_words_are_refused(bad):
    with pytest.raises(ValueError, match="words must be"):
        WordTextEncoder(bad, 4)


@pytest.mark.parametrize("places", [0, -1, 513, 2.0, "4"])
def test_bad_places_are_refused(places):
    with pytest.raises(ValueError, match="places must be"):
        WordTextEncoder(WORDS, places)


@pytest.mark.parametrize("window", [-1, 9, 1.0, "2"])
def test_bad_windows_are_refused(window):
    with pytest.raises(ValueError, match="window must be"):
        WordTextEncoder(WORDS, 4, window)


@pytest.mark.parametrize("window", [0, 3])
def test_save_and_load(window, tmp_path):
    words = WordTextEncoder(WORDS, 6, window)
    assert not has_word_encoder(tmp_path)
    words.save_pretrained(tmp_path)
    again = WordTextEncoder.from_pretrained(tmp_path)
    assert has_word_encoder(tmp_path) and vars(again) == vars(words)


@pytest.mark.parametrize(
    "values",
    [
        {"_class_name": "T5EncoderModel"},
        {"_class_name": "WordTextEncoder"},
        {"_class_name": "WordTextEncoder", "words": ["a"]},
        {"_class_name": "WordTextEncoder", "words": ["a", "a"], "places": 4},
        {"_class_name": "WordTextEncoder", "words": "a", "places": 4},
    ],
)
def test_other_text_encoders_are_refused(values, tmp_path):
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        WordTextEncoder.from_pretrained(tmp_path)


def test_vocabulary_covers_all_captions():
    words = WordTextEncoder(vocabulary(), 16)
    clips = ProceduralClips(length=300)
    captions = [clips[index].caption for index in range(300)]
    assert words.encode(captions, 16).shape == (300, 16, words.dim)
    assert max(len(caption.replace(",", " ,").split()) for caption in captions) >= 14
