"""`generate` on ranks: the result, what is shared, and what is refused."""

import functools
import os
import signal
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from cogvx import CogVideoX
from cogvx.parallel import Ranks, context_parallel, start, vae_parallel
from tests.harness.selection import rest

from . import models, ranks

PROMPT = "two small blue squares on white, one moving down"
OPTIONS = {"steps": 3, "guidance": 2.0, "output": "latents", "num_frames": 5, "solver": "dpm"}


@functools.cache
def tiny():
    return CogVideoX.from_pretrained("tiny", backend="reference")


@functools.cache
def one_process(**options):
    return tiny().generate(PROMPT, **{"seed": 0, "cfg": "two_pass", **OPTIONS, **options})


def generated(groups, prompt=PROMPT, **options):
    """Latents of this rank; the text encoder is the first rank's alone."""
    pipe = tiny()
    context_parallel(pipe, start(guidance=groups, device="cpu"))
    if not pipe.ranks.first:
        pipe.text_encoder = None
    if callable(prompt):
        prompt = prompt(dist.get_rank())
    return pipe.generate(prompt, **{**OPTIONS, **options})


@pytest.mark.parametrize("size, guidance", [(2, 2), (2, 1), (4, 2), rest(3, 1), rest(1, 1)])
def test_ranks_generate_what_one_process_does(size, guidance):
    expected = one_process()
    found = ranks.run(functools.partial(generated, guidance, seed=0), size)
    assert all(torch.equal(latents, found[0]) for latents in found)
    if size == guidance:
        assert torch.equal(found[0], expected)
    else:
        assert (found[0] - expected).norm() < 1e-5 * expected.norm()


def test_without_a_seed_ranks_take_that_of_the_first():
    def run():
        torch.manual_seed(dist.get_rank())
        return generated(2)

    torch.manual_seed(0)
    expected = tiny().generate(PROMPT, cfg="two_pass", **OPTIONS)
    assert all(torch.equal(latents, expected) for latents in ranks.run(run, 2))


def test_embeddings_without_a_text_are_taken():
    embeds = tiny().text_encoder.encode([PROMPT], tiny().transformer.config.max_text_seq_length)
    run = functools.partial(
        generated, 1, None, seed=0, prompt_embeds=embeds, negative_prompt_embeds=0 * embeds
    )
    first, second = ranks.run(run, 2)
    assert torch.equal(first, second)


def refusal(function):
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_ranks_whose_inputs_differ_are_refused_by_name():
    run = functools.partial(generated, 1, lambda rank: f"{rank} squares", seed=0)
    for message in ranks.run(refusal, 2, run):
        assert "ValueError: CogVideoX.generate: prompt must be the same on each rank" in message
        assert "['0 squares'] on the first and ['1 squares'] on rank 1" in message

    def seeds():
        generated(2, seed=dist.get_rank())

    for message in ranks.run(refusal, 2, seeds):
        assert "seed must be the same on each rank; got seed 0 on the first" in message

    def latents():
        generated(2, seed=0, latents=torch.full((1, 2, 8, 16, 16), 1.0 + dist.get_rank()))

    for message in ranks.run(refusal, 2, latents):
        assert "latents must be the same on each rank" in message


def test_an_error_of_the_first_rank_is_raised_on_all():
    def run():
        tiny().text_encoder.encode = None
        generated(1, seed=0)

    for message in ranks.run(refusal, 2, run):
        assert "TypeError: 'NoneType' object is not callable" in message


def failing(how):
    """Rank 1 fails after the first step."""

    def callback(index, timestep, latents):
        if dist.get_rank() == 1:
            if how == "raise":
                raise ValueError("no luck")
            os.kill(os.getpid(), getattr(signal, how))

    generated(1, seed=0, callback=callback)


@pytest.mark.parametrize(
    "how, cause",
    [
        ("SIGSTOP", "RuntimeError: rank 1 does not answer, it is frozen or lost: "),
        ("raise", "RuntimeError: rank 1 failed with ValueError: no luck: "),
        rest("SIGKILL", "RuntimeError: rank 1 does not answer, it is frozen or lost: "),
    ],
)
def test_ranks_name_the_one_that_fails(how, cause, monkeypatch):
    monkeypatch.setattr("cogvx.parallel.ranks.GRACE", timedelta(seconds=0.5))
    monkeypatch.setattr(ranks, "GRACE", 0.5 if how == "SIGSTOP" else 5.0)  # frozen, it takes all
    with pytest.raises(ranks.RankFailure) as caught:
        ranks.run(at_end, 2, failing, how, deadline=20.0, timeout=2.0)
    assert cause in str(caught.value)


def at_end(function, *arguments):
    """Print the error at once, since the other rank's is the one that is reported."""
    try:
        function(*arguments)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        raise


def with_shared_vae(whole, steps, **options):
    """Video of this rank, from one whose VAE is shared too; `steps` gets what was denoised."""
    pipe, mesh = tiny(), start(device="cpu")
    context_parallel(pipe, mesh)
    vae_parallel(pipe.vae if whole else pipe, mesh, method="relay" if whole else "tiles")

    def callback(index, timestep, latents):
        steps.append(index)

    return pipe.generate(
        PROMPT, seed=0, callback=callback, **{**OPTIONS, "output": "video", **options}
    )


def test_a_video_is_encoded_by_the_first_rank_alone_though_the_encoder_is_shared():
    frames = {"video": torch.rand(1, 5, 3, 64, 64) * 2 - 1, "num_frames": None, "strength": 0.7}
    expected = one_process.__wrapped__(output="video", **frames)
    found = ranks.run(lambda: with_shared_vae(True, [], **frames), 2, timeout=10.0)
    assert (found[0] - expected).norm() < 1e-5 * expected.norm()
    assert found[1].shape[1] == 0


def test_a_tiling_that_does_not_fit_the_shared_vae_is_refused_before_the_first_step():
    def run():
        steps = []
        return refusal(lambda: with_shared_vae(False, steps)), steps

    for message, steps in ranks.run(run, 2):
        assert "CogVideoX.generate: tiling must be given for a VAE whose tiles are on" in message
        assert steps == []


def test_a_file_that_cannot_be_written_is_refused_on_each_rank(tmp_path):
    run = functools.partial(generated, 1, seed=0, save_latents=tmp_path / "no" / "run.safetensors")
    for message in ranks.run(refusal, 2, run):
        assert "save_latents must be a file in a folder that exists" in message


def test_a_compiled_transformer_is_shared():
    def run():
        mesh, pipe = start(device="cpu"), tiny()
        transformer = pipe.transformer
        pipe.transformer = torch.compile(transformer, backend="eager")
        context_parallel(pipe, mesh)
        assert pipe.ranks is not None and transformer.context.size == 2
        context_parallel(pipe.transformer, None)
        assert transformer.context is None
        pipe.transformer = torch.nn.Linear(1, 1)
        return refusal(lambda: context_parallel(pipe, mesh))

    assert "got CogVideoX of Linear" in ranks.run(run, 2)[0]


def test_groups_for_guidance_need_guidance():
    run = functools.partial(generated, 2, guidance=1.0, seed=0)
    for message in ranks.run(refusal, 2, run):
        assert "guidance must be above 1 on two groups of ranks" in message


def saved_and_resumed(folder):
    path = folder / "run.latents.safetensors"
    halted = functools.partial(generated, 1, seed=0, save_latents=path, checkpoint_every=1)

    def stop(index, timestep, latents):
        if index == 1:
            raise KeyboardInterrupt

    try:
        halted(callback=stop)
    except KeyboardInterrupt:
        pass
    dist.barrier()
    return generated(1, seed=0, resume=path)


def test_a_run_is_saved_by_the_first_rank_and_resumed_by_all(tmp_path):
    whole = ranks.run(functools.partial(generated, 1, seed=0), 2)
    for latents in ranks.run(saved_and_resumed, 2, tmp_path):
        assert torch.equal(latents, whole[0])


def refused_meshes():
    transformer = models.build("5B")
    mesh = start(device="cpu")
    context_parallel(transformer, mesh)
    assert transformer.context.size == 2
    context_parallel(transformer, None)
    assert transformer.context is None
    return [
        refusal(lambda: start(context=3, device="cpu")),
        refusal(lambda: start(guidance=3)),
        refusal(lambda: start(device="tpu")),
        refusal(lambda: context_parallel(torch.nn.Linear(1, 1), mesh)),
        refusal(lambda: context_parallel(transformer.to("meta"), mesh)),
        refusal(lambda: Ranks(mesh["context"])),
    ]


def test_what_does_not_fit_is_refused_by_name():
    messages = ranks.run(refused_meshes, 2)[0]
    wanted = [
        "data x guidance x context must be the number of processes, 2; got 1 x 1 x 3 = 3",
        "guidance must be 1 or 2, the predictions of guidance; got 3",
        'device must be "cpu", "cuda" or None; got \'tpu\'',
        "model must be a CogVideoX or an ExpertTransformer; got Linear",
        "model must be on the mesh's device, cpu; got meta",
        "mesh must have the dimensions guidance and context, as of parallel.start; got context",
    ]
    for message, part in zip(messages, wanted, strict=True):
        assert part in message


def test_without_torchrun_the_command_is_named(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RuntimeError, match="RANK.* not set. Type torchrun --nproc-per-node GPUS"):
        start(guidance=2)
