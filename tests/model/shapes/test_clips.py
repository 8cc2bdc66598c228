"""Procedural clips: drawing, recognition, captions and the data set."""

import importlib
import itertools
import random
import sys

import pytest
import torch
import torch.nn.functional as F

from cogvx.shapes import (
    ProceduralClips,
    Scene,
    Thing,
    WordTextEncoder,
    describe,
    parse,
    score,
    vocabulary,
)
from cogvx.shapes.drawing import TRAVEL, draw, place
from cogvx.shapes.procedural import held_out, random_scene
from cogvx.shapes.reading import read, score_things
from cogvx.shapes.scenes import COLORS, DIRECTIONS, GROUNDS, SHAPES, SIZES
from tests.harness.selection import rest

CLIPS = 120
EVERY_THING = [Thing(*words) for words in itertools.product(COLORS, SHAPES, SIZES, DIRECTIONS)]


def clips(split="test", count=CLIPS, **options):
    return [ProceduralClips(split, **options)[i] for i in range(count)]


def test_drawn_clips_are_recognised():
    for clip in clips():
        seen = read(clip.video)
        assert score_things(seen.things, clip.scene).all, clip.caption
        assert seen.ground == clip.scene.ground
        assert sorted(t.size for t in seen.things) == sorted(t.size for t in clip.scene.things)


@pytest.mark.parametrize("size", [(9, 64, 96), (33, 96, 64), rest((17, 128, 128))], ids=str)
def test_clips_of_any_size_are_recognised(size):
    frames, height, width = size
    for clip in clips(count=40, frames=frames, height=height, width=width):
        assert clip.video.shape == (frames, 3, height, width)
        assert score(clip.video, clip.scene).all, clip.caption


def test_recognition_with_noise_and_blur():
    """Generated clips are not quite clean."""
    generator = torch.Generator().manual_seed(0)
    right = []
    for clip in clips():
        soft = F.avg_pool2d(F.pad(clip.video, (1, 1, 1, 1), mode="replicate"), 3, 1)
        noise = 0.06 * torch.randn(soft.shape, generator=generator)
        right.append(score(soft + noise, clip.scene).all)
    assert sum(right) >= 0.98 * len(right)


def test_scores_of_another_clip_are_low():
    """Compared with the caption of another clip, hardly anything is right."""
    all_of_them = clips()
    others = [score(a.video, b.scene) for a, b in itertools.pairwise(all_of_them)]
    assert sum(s.all for s in others) <= 0.05 * len(others)
    assert sum(s.color for s in others) <= 0.35 * len(others)
    blank = torch.zeros(17, 3, 64, 64)
    assert not any(vars(score(blank, all_of_them[0].scene)).values())


@pytest.mark.parametrize(
    ("name", "other"), [("color", "blue"), ("shape", "square"), ("motion", "left"), ("count", None)]
)
def test_each_score_finds_its_own_mistake(name, other):
    thing = Thing("red", "circle", "", "right")
    scene = Scene((thing, Thing("green", "cross")))
    words = {"color": thing.color, "shape": thing.shape, "size": "", "direction": thing.direction}
    if other is None:
        wrong = Scene((thing,))
    else:
        words["direction" if name == "motion" else name] = other
        wrong = Scene((Thing(**words), scene.things[1]))
    generator = torch.Generator().manual_seed(3)
    found = vars(score(draw(place(wrong, generator), wrong.ground, 17, 64, 64), scene))
    assert not found[name]
    assert all(right for key, right in found.items() if key != name) or name == "count"


@pytest.mark.parametrize("sizes", [*itertools.combinations_with_replacement(SIZES, 2)], ids=str)
def test_things_stay_apart_and_in_the_picture(sizes):
    for seed, (left, right) in enumerate(itertools.product(DIRECTIONS, DIRECTIONS)):
        red, blue = zip(sizes, (left, right), strict=True)
        scene = Scene((Thing("red", "square", *red), Thing("blue", "cross", *blue)))
        placed = place(scene, torch.Generator().manual_seed(seed))
        for one in placed:
            dx, dy = DIRECTIONS[one.thing.direction]
            for at in (one.x, one.y, one.x + dx * TRAVEL, one.y + dy * TRAVEL):
                assert SIZES[one.thing.size] <= at <= 1 - SIZES[one.thing.size]
            for at in (one.x, one.x + dx * TRAVEL):
                assert (at < 0.5) == (one is placed[0])
        seen = read(draw(placed, "black", 17, 64, 64)).things
        assert {(t.color, t.direction) for t in seen} == {("red", left), ("blue", right)}


def test_things_start_in_cells_and_move_a_pixel_per_frame():
    """All frames are the first one, shifted, and so are their latents."""
    scene = Scene((Thing("red", "triangle", "small", "left"),), "white")
    for seed in range(20):
        (placed,) = place(scene, torch.Generator().manual_seed(seed))
        assert (placed.x * 4 - 0.5).is_integer() and (placed.y * 4 - 0.5).is_integer()
        video = draw((placed,), "white", 17, 64, 64)
        for frame in range(17):
            shifted = video[frame].roll(frame, -1)
            torch.testing.assert_close(shifted, video[0], atol=1e-5, rtol=0)


# --- sentences -------------------------------------------------------------------------------


def test_parse_is_the_inverse_of_describe():
    numbers = random.Random(1)
    pairs = [Scene((numbers.choice(EVERY_THING), numbers.choice(EVERY_THING))) for _ in range(500)]
    alike = [random_scene(numbers) for _ in range(500)]
    for scene in [*(Scene((t,), g) for t in EVERY_THING for g in GROUNDS), *pairs, *alike]:
        caption = describe(scene)
        assert parse(caption) == scene, caption
        assert set(caption.replace(",", " ,").split()) <= set(vocabulary()), caption
    assert parse("  A red circle  moves right. ") == Scene((Thing("red", "circle", "", "right"),))
    assert parse("two small blue squares on white, one moving up") == Scene(
        (Thing("blue", "square", "small", "up"), Thing("blue", "square", "small")), "white"
    )


@pytest.mark.parametrize(
    "caption", ["", "a red dog moves right", "red circle", "a circle moves up"]
)
def test_parse_lists_the_words_of_the_grammar(caption):
    with pytest.raises(ValueError, match=r"parse: caption must.*red, green.*circle, squ"):
        parse(caption)


def test_unknown_values_are_refused():
    with pytest.raises(ValueError, match="color must be one of red, .*; got 'pink'"):
        Thing("pink", "circle")
    with pytest.raises(ValueError, match="ground must be one of black, gray, white; got 'sea'"):
        Scene((Thing("red", "circle"),), "sea")
    with pytest.raises(ValueError, match="things must be one or two; got 0"):
        Scene(())


# --- the set ---------------------------------------------------------------------------------


def test_clips_are_reproducible():
    one, again, other = (ProceduralClips(seed=s)[7] for s in (5, 5, 6))
    assert torch.equal(one.video, again.video) and one.caption == again.caption
    assert not torch.equal(one.video, other.video)
    golden = [ProceduralClips("test")[i].caption for i in range(2)]
    assert golden == [
        "a small purple circle stands still and a large yellow square moves right",
        "a large green circle stands still and a green cross moves down on gray",
    ]
    clip = ProceduralClips("test")[0].video
    assert clip.min() >= -1 and clip.max() <= 1 and clip.dtype == torch.float32


def test_splits_share_no_caption():
    train = {clip.caption for clip in clips("train")}
    test = {clip.caption for clip in clips("test")}
    assert not train & test
    assert all(map(held_out, test)) and not any(map(held_out, train))
    assert len(train) > 0.8 * CLIPS


def test_length_and_split_are_checked():
    few = ProceduralClips(length=3)
    assert len(few) == len(list(few)) == 3
    with pytest.raises(IndexError, match=r"index must be in \[0, 3\); got 3"):
        few[3]
    with pytest.raises(ValueError, match="split must be train or test; got 'dev'"):
        ProceduralClips("dev")


def test_former_names_warn():
    with pytest.warns(DeprecationWarning, match=r"now cogvx\.shapes\.ProceduralClips"):
        assert importlib.import_module("cogvx.data").ProceduralClips is ProceduralClips
    sys.modules.pop("cogvx.words", None)
    with pytest.warns(DeprecationWarning, match=r"now cogvx\.shapes"):
        assert importlib.import_module("cogvx.words").WordTextEncoder is WordTextEncoder
