"""Meshes of several GPUs: bytes by hand, times of the study, what is refused."""

import json

import pytest

from cogvx.config import PRESETS, TransformerConfig
from cogvx.plan import GIB, Mesh, MeshForecast, forecast_meshes
from cogvx.plan.meshes import MACHINES, exchanged
from cogvx.vae import Tiling

CLIP = {"frames": 49, "height": 480, "width": 720}
TEXT, VIDEO = 226, 17550  # tokens of it: 17,776
SMALL = TransformerConfig(
    num_attention_heads=3, attention_head_dim=16, num_layers=2, text_embed_dim=32,
    max_text_seq_length=2, sample_height=8, sample_width=8,
)  # fmt: skip
SMALL_CLIP = {"frames": 1, "height": 32, "width": 32}  # 2 + 4 tokens


def forecast(preset, **options):
    config = PRESETS[preset]
    return forecast_meshes(config.transformer, config.vae, **{**CLIP, **options})


@pytest.fixture(scope="module")
def eight():
    return forecast("5b", gpus=8, text_bytes=9 * GIB)


def named(found):
    return {mesh.name: mesh for mesh in found.meshes}


def test_heads_that_ranks_do_not_divide():
    """2B on 4 ranks: 4,444 tokens each, and 8, 8, 7, 7 of 30 heads of 64."""
    config = PRESETS["2b"].transformer
    third = 3 * 4444 * (1920 - 7 * 64) + 3 * 4444 * 7 * 64  # q, k, v of a rank; its heads' output
    values = 64 * 4444 * 3  # to three others
    assert exchanged(config, TEXT, VIDEO, 4) == 2 * (30 * third + values)


def test_the_bytes_are_those_of_the_formula():
    """8 · (S/n) · D · L · (n-1)/n of q, k, v and the output, and 64 values a token."""
    config = PRESETS["5b"].transformer
    blocks = 8 * 2222 * 3072 * 42 * 7 / 8
    assert exchanged(config, TEXT, VIDEO, 8) == blocks + 2 * 64 * 2222 * 7
    assert exchanged(config, TEXT, VIDEO, 8, batch=2, itemsize=4) == 4 * (
        blocks + 2 * 64 * 2222 * 7
    )
    gathered = exchanged(config, TEXT, VIDEO, 8, method="tokens")
    assert gathered == 4 * 2222 * 7 * 3072 * 42 + 2 * 64 * 2222 * 7
    assert exchanged(config, TEXT, VIDEO, 1) == 0


def test_text_is_not_gathered():
    """Of 6 tokens on 3 ranks 2 are text: the first rank has no values of video to send."""
    block = 3 * 2 * 32 + 4 * 16  # of 3 heads of 16
    assert exchanged(SMALL, 6, 0, 3, itemsize=1) == 2 * block
    assert exchanged(SMALL, 2, 4, 3, itemsize=1) == 2 * block + 2 * 64 * 2


def test_predicted_times_are_the_study_s(eight):
    """Milliseconds of a guided step of 5B on H200, computed apart from this code."""
    study = {"8x1x1": 1201, "4x2x1": 600, "4x1x2": 639, "2x2x2": 320, "2x1x4": 327,
             "1x2x4": 165, "1x1x8": 166}  # fmt: skip
    found = {name: mesh.step["NVLink"] * 1e3 for name, mesh in named(eight).items()}
    assert found == {name: pytest.approx(ms, rel=0.01) for name, ms in study.items()}
    for mesh in eight.meshes:
        assert mesh.step["PCIe"] > mesh.step["NVLink"]
        assert mesh.clip["NVLink"] > 50 * mesh.step["NVLink"]


def test_the_first_clip_and_the_most_clips(eight):
    assert eight.recommended.name == "1x2x4" and eight.most_clips.name == "8x1x1"
    assert forecast("5b", gpus=8, guidance=False).recommended.name == "1x1x8"


def test_messages_of_a_clip(eight):
    meshes = named(eight)
    predictions = 13 * 16 * 60 * 90 * 4  # in fp32: 4.5 MB
    assert meshes["4x2x1"].sent == predictions
    config = PRESETS["5b"].transformer
    assert meshes["1x2x4"].sent == exchanged(config, TEXT, VIDEO, 4) + predictions
    assert meshes["1x1x8"].sent == exchanged(config, TEXT, VIDEO, 8, batch=2)
    cache = meshes["1x1x8"].relayed  # 6 chunks: each rank has one
    assert 2600 << 20 < cache < 2680 << 20
    assert meshes["4x2x1"].relayed == 3 * cache and meshes["8x1x1"].relayed == 0


def test_memory_of_ranks(eight):
    meshes = named(eight)
    for mesh in eight.meshes:
        assert mesh.first > 9 * GIB + 2 * 5_570_283_072
        if mesh.name != "8x1x1":
            assert 2 * 5_570_283_072 < mesh.others < mesh.first - 9 * GIB
    assert meshes["8x1x1"].others == 0
    assert eight.shard == 20 * 5_570_283_072 // 8


def test_ranks_that_outnumber_heads_gather_keys_and_values():
    found = forecast_meshes(SMALL, PRESETS["2b"].vae, gpus=4, guidance=False, **SMALL_CLIP)
    assert {m.name: m.method for m in found.meshes} == {
        "1x1x4": "tokens", "2x1x2": "heads", "4x1x1": ""
    }  # fmt: skip
    assert "keys, values gathered" in str(found)


def test_what_is_not_possible_is_listed_with_the_reason(eight):
    assert set(eight.refused) == {"1x4x2", "1x8x1", "2x4x1"}
    assert "not 1x4x2, 1x8x1, 2x4x1: a step has 2 predictions" in str(eight)
    vae = PRESETS["2b"].vae
    alone = forecast_meshes(SMALL, vae, gpus=8, guidance=False, **SMALL_CLIP).refused
    assert alone["1x2x4"] == "without guidance a step has one prediction"
    assert alone["1x1x8"] == "context must be at most the 6 tokens"
    none = forecast_meshes(SMALL, vae, gpus=2, budget=1000, **SMALL_CLIP)
    assert none.recommended is None and none.most_clips is None and not none.meshes
    assert "must fit into" in none.refused["1x1x2"] and "recommended" not in str(none)
    for gpus in (0, 4097, True):
        with pytest.raises((ValueError, TypeError), match="forecast_meshes: gpus must be"):
            forecast_meshes(SMALL, vae, gpus=gpus, **SMALL_CLIP)


def test_tiles_are_on_the_ranks_in_turn():
    options = {"gpus": 3, "frames": 17, "height": 64, "width": 64}
    vae = PRESETS["2b"].vae
    whole = named(forecast_meshes(SMALL, vae, **options))["1x1x3"]
    tiled = named(forecast_meshes(SMALL, vae, tiling=Tiling(32, 32), **options))
    three, one = tiled["1x1x3"], tiled["3x1x1"]
    assert three.relayed == 0 < whole.relayed
    decode, alone = (m.clip["PCIe"] - 50 * m.step["PCIe"] for m in (three, one))
    assert Tiling(32, 32).count(64, 64, 8) == 4 and decode / alone == pytest.approx(2 / 4)
    uncut = named(forecast_meshes(SMALL, vae, tiling=Tiling(64, 64), **options))
    assert uncut["1x1x3"].relayed == 0  # one tile, on one rank
    three, one = (uncut[name] for name in ("1x1x3", "3x1x1"))
    decode, alone = (m.clip["PCIe"] - 50 * m.step["PCIe"] for m in (three, one))
    assert decode == pytest.approx(alone)


def test_between_machines_the_network_is_the_limit():
    machine = MACHINES[0]
    assert machine.seconds(8e9, 0, 8) == 8e9 / machine.link
    assert machine.seconds(15e9, 0, 16) == 15e9 * 8 / 15 / machine.network
    assert machine.seconds(15e9, 3, 2, stride=8) == 15e9 / machine.network + 3 * 20e-6
    assert machine.seconds(1, 1, 1) == 0


def test_it_can_be_read_by_people_and_programs():
    times = {machine.name: 0.5 for machine in MACHINES}
    mesh = Mesh(1, 2, 1, "", 3 * GIB, 2 * GIB, 1 << 20, 0, times, times)
    found = MeshForecast(2, 50, (mesh,), {"1x1x2": "why"}, GIB)
    text = str(found)
    assert "1x2x1        3.00 GiB   2.00 GiB       1 MiB          -         500 ms, 0.5 s" in text
    assert "not 1x1x2: why" in text and "recommended: 1x2x1" in text
    assert "PREDICTED, not measured" in text and "1.00 GiB a rank of weights" in text
    values = json.loads(json.dumps(found.to_dict()))
    assert values["recommended"] == "1x2x1" and values["meshes"][0]["step"] == times
