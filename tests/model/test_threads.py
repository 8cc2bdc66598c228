"""Small models on a CPU run on one thread, whatever torch was set to; and leave it as it was."""

import pytest
import torch

from cogvx import CogVideoX, threads
from cogvx.shapes import ProceduralClips
from cogvx.threads import suited_threads
from cogvx.transformer import ExpertTransformer
from cogvx.vae import Decoder, Encoder


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def seen(monkeypatch, two_threads):
    """The threads of each call of a module."""
    calls: dict[str, set[int]] = {}
    for module in (ExpertTransformer, Encoder, Decoder):

        def forward(self, *args, _own=module.forward, **kwargs):
            calls.setdefault(type(self).__name__, set()).add(torch.get_num_threads())
            return _own(self, *args, **kwargs)

        monkeypatch.setattr(module, "forward", forward)
    return calls


@pytest.fixture(scope="module")
def pipe():
    return CogVideoX.from_pretrained("tiny")


def run(pipe):
    """Everything that computes: a step, the VAE's encoder and decoder, and streams."""
    pipe.generate("a red circle moves right", steps=1, guidance=1, seed=0, output="latents")
    with torch.no_grad():
        clip = ProceduralClips("test", 1)[0].video[None, :1]
        latents = pipe.vae.encode(clip).mode()
        for _ in pipe.vae.stream_decode(latents):
            assert torch.get_num_threads() == 2  # whoever takes the chunks has all
        list(pipe.vae.stream_encode(clip))


def test_a_small_model_takes_one_thread(pipe, seen):
    run(pipe)
    assert seen == {"ExpertTransformer": {1}, "Encoder": {1}, "Decoder": {1}}
    assert torch.get_num_threads() == 2


def test_a_large_model_takes_all(pipe, seen, monkeypatch):
    monkeypatch.setattr(threads, "SMALL", 10_000)  # less than tiny's sequence of 96 tokens
    run(pipe)
    assert seen == {"ExpertTransformer": {2}, "Encoder": {2}, "Decoder": {2}}


def test_training_takes_all(pipe, seen):
    with torch.enable_grad():
        pipe.vae.encode(torch.zeros(1, 1, 3, 64, 64))
    assert seen == {"Encoder": {2}}


def test_an_error_leaves_the_threads_as_they_were(two_threads):
    with pytest.raises(KeyError), torch.no_grad(), suited_threads(1, torch.device("cpu")):
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == 2


def test_a_gpu_needs_no_other_threads(two_threads):
    with torch.no_grad(), suited_threads(1, torch.device("cuda")):
        assert torch.get_num_threads() == 2
