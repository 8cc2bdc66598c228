"""Every model that `patch` knows, small: the model, a tensor, and what the model makes of it."""

from tests.patching import double_stream, small, wan


def cogvideox(kind):
    model = small.transformer(kind)
    arguments = small.inputs(model, batch=1)
    return model, arguments, "hidden_states"


def wan_transformer():
    return wan.transformer(), wan.tokens(batch=1), "hidden_states"


def two_streams(kind):
    model = double_stream.transformer(kind).eval()
    return model, double_stream.inputs(kind), "hidden_states"


def transformer_of(model, arguments, name):
    return (
        model,
        arguments[name],
        lambda x: model(**{**arguments, name: x, "return_dict": False})[0],
    )


def decoder_of(model, latents):
    return model, latents, lambda z: model.decode(z, return_dict=False)[0]


def encoder_of(model, clip):
    return model, clip, lambda x: model.encode(x).latent_dist.parameters


EVERY = {
    "CogVideoX 2B": lambda: transformer_of(*cogvideox("2b")),
    "CogVideoX 5B": lambda: transformer_of(*cogvideox("5b")),
    "CogVideoX decoder": lambda: decoder_of(small.vae(), small.latents(3, side=2)),
    "CogVideoX encoder": lambda: encoder_of(small.vae(), small.clip(9, side=16)),
    "Wan": lambda: transformer_of(*wan_transformer()),
    "Wan decoder": lambda: decoder_of(wan.vae(), wan.latents(frames=2)),
    "Wan encoder": lambda: encoder_of(wan.vae(residual=True), wan.clip(frames=5)),
    "HunyuanVideo": lambda: transformer_of(*two_streams("text")),
    "HunyuanVideo I2V": lambda: transformer_of(*two_streams("image")),
    "FramePack": lambda: transformer_of(*two_streams("framepack")),
    "Mochi": lambda: transformer_of(*two_streams("mochi")),
}
