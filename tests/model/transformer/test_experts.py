"""Experts of text, experts of video, their routers, and models grown from others."""

import dataclasses

import pytest
import torch

from cogvx.transformer import ExpertTransformer, load_balancing_loss, upcycle
from cogvx.transformer.experts import ExpertFeedForward, Routing
from cogvx_kernels import module_backend

from .tiny import ROPE, shaken

TEXT_LEN, VIDEO_LEN, DIM = 5, 12, 6


def made(text=0, video=0, top_k=1):
    """A model with weights that are not what training begins with, many of which are zero."""
    config = dataclasses.replace(
        ROPE, num_text_experts=text, num_video_experts=video, expert_top_k=top_k
    )
    with module_backend("reference"):
        return shaken(ExpertTransformer(config))


def layer(text=2, video=3, top_k=1):
    return shaken(ExpertFeedForward(DIM, 11, text, video, top_k).double())


def tokens():
    return torch.randn(2, TEXT_LEN + VIDEO_LEN, DIM, dtype=torch.float64)


def inputs(batch=2):
    timestep = torch.tensor([999, 37])[:batch]
    return torch.randn(batch, 2, 4, 4, 6), torch.randn(batch, 5, 10), timestep


def written_out(x, experts, router, top_k):
    """Token by token, expert by expert."""
    y, fraction = torch.zeros_like(x), torch.zeros(len(experts), dtype=x.dtype)
    probability = (x @ router.weight.T).softmax(-1)
    for place in [(b, n) for b in range(x.shape[0]) for n in range(x.shape[1])]:
        ranked = sorted(range(len(experts)), key=lambda e: -probability[(*place, e)].item())
        total = sum(probability[(*place, e)] for e in ranked[:top_k])
        for e in ranked[:top_k]:
            y[place] += probability[(*place, e)] / total * experts[e](x[place])
            fraction[e] += 1 / (x.shape[0] * x.shape[1] * top_k)
    return y, fraction, probability.mean((0, 1))


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
def test_routing_written_out(top_k, called):
    """Experts are called, or their weights read, depending on whether one of them is wrapped."""
    ff, x = layer(2, 3, top_k), tokens()
    if called:
        ff.video[1].net[2].register_forward_hook(lambda *_: None)
    with torch.no_grad():
        y, routing = ff(x, TEXT_LEN)
        for part, experts, router, of_part in (
            (slice(0, TEXT_LEN), ff.text, ff.text_router, routing[0]),
            (slice(TEXT_LEN, None), ff.video, ff.video_router, routing[1]),
        ):
            wanted = written_out(x[:, part], experts, router, top_k)
            for got, want in zip((y[:, part], *of_part), wanted, strict=True):
                torch.testing.assert_close(got, want.to(got.dtype), rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(y[:, part], wanted[0], rtol=1e-12, atol=1e-12)


def test_one_expert_of_a_modality_needs_no_router():
    ff, x = layer(1, 1), tokens()
    y, routing = ff(x, TEXT_LEN)
    assert routing == () and not any("router" in name for name, _ in ff.named_parameters())
    torch.testing.assert_close(ff(x[:, :0], 0)[0], x[:, :0])
    torch.testing.assert_close(y[:, :TEXT_LEN], ff.text[0](x[:, :TEXT_LEN]))
    torch.testing.assert_close(y[:, TEXT_LEN:], ff.video[0](x[:, TEXT_LEN:]))


@pytest.mark.parametrize("modality, untouched", [("text", "video"), ("video", "text")])
def test_each_modality_meets_its_own_experts_alone(modality, untouched):
    ff, x = layer(2, 3), tokens()
    before, _ = ff(x, TEXT_LEN)
    shaken(getattr(ff, modality))
    after, _ = ff(x, TEXT_LEN)
    parts = {"text": slice(0, TEXT_LEN), "video": slice(TEXT_LEN, None)}
    assert torch.equal(after[:, parts[untouched]], before[:, parts[untouched]])
    assert (after[:, parts[modality]] != before[:, parts[modality]]).any(-1).all()


def test_a_single_expert_beside_several_has_weight_one():
    """And its tokens' further choices are nobody's."""
    ff, x = layer(1, 3, 2), tokens()
    y, routing = ff(x, TEXT_LEN)
    assert len(routing) == 1
    torch.testing.assert_close(y[:, :TEXT_LEN], ff.text[0](x[:, :TEXT_LEN]))
    swapped = layer(3, 1, 2)
    y, routing = swapped(x, TEXT_LEN)
    assert len(routing) == 1
    torch.testing.assert_close(y[:, TEXT_LEN:], swapped.video[0](x[:, TEXT_LEN:]))


def test_no_token_is_dropped_when_all_choose_one_expert():
    ff, x = layer(2, 3), tokens()
    with torch.no_grad():
        ff.video_router.weight.zero_()
        ff.video_router.weight[1] = 1000 * x[:, TEXT_LEN:].mean((0, 1))
        x[:, TEXT_LEN:] = x[:, TEXT_LEN:].mean((0, 1))
    y, (_, routing) = ff(x, TEXT_LEN)
    assert routing.fraction.tolist() == [0, 1, 0]
    torch.testing.assert_close(y[:, TEXT_LEN:], ff.video[1](x[:, TEXT_LEN:]))
    y.square().sum().backward()
    # An expert without tokens has a gradient, of zero: what all ranks of a training agree on.
    assert all(not p.grad.any() for e in (0, 2) for p in ff.video[e].parameters())


@pytest.mark.parametrize("top_k", [1, 2])
def test_routers_learn_from_the_output(top_k):
    ff, x = layer(3, 3, top_k), tokens()
    y, _ = ff(x, TEXT_LEN)
    y.square().sum().backward()
    assert ff.text_router.weight.grad.any() and ff.video_router.weight.grad.any()


def test_gradients_of_two_choices():
    """Against finite differences: of the tokens, and of the router through its weights."""
    ff, x = layer(2, 3, 2), tokens()[:1].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ff(x, TEXT_LEN)[0], x)


def test_gradient_of_one_choice():
    """Its weight is always 1; the gradient is that of its probability over what that is now."""
    ff, x = layer(2, 3), tokens()[:, TEXT_LEN:]
    weight = ff.video_router.weight
    y = ff(x, 0)[0]
    got = torch.autograd.grad(y.square().sum(), weight)[0]
    chosen = (x @ weight.T).softmax(-1).max(-1, keepdim=True).values
    wanted = torch.autograd.grad((y.detach() * chosen / chosen.detach()).square().sum(), weight)[0]
    torch.testing.assert_close(got, wanted)


def spread(fraction, probability):
    return Routing(torch.tensor(fraction), torch.tensor(probability))


def test_load_balancing_loss_in_numbers():
    even = spread([0.25] * 4, [0.25] * 4)
    assert load_balancing_loss([even]) == 1
    assert load_balancing_loss([spread([1.0, 0, 0, 0], [1.0, 0, 0, 0])]) == 4
    assert load_balancing_loss([spread([0.75, 0.25], [0.5, 0.5])]) == 1
    assert load_balancing_loss([spread([0.75, 0.25], [0.75, 0.25])]) == 1.25
    assert load_balancing_loss([even, spread([1.0, 0], [1.0, 0])]) == 1.5


def test_load_balancing_loss_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="load_balancing_loss: routing must hold.*got nothing"):
        load_balancing_loss([])


@pytest.mark.parametrize("experts, routers", [((1, 1), 0), ((2, 1), 1), ((1, 2), 1), ((2, 3), 2)])
def test_routing_is_filled_once_for_each_router(experts, routers):
    model, routing = made(*experts), []
    model(*inputs(), routing=routing)
    assert len(routing) == routers * ROPE.num_layers
    for of_one in routing:
        torch.testing.assert_close(of_one.fraction.sum(), torch.tensor(1.0))
        torch.testing.assert_close(of_one.probability.sum(), torch.tensor(1.0))


def test_the_loss_has_the_same_gradient_under_checkpointing():
    model, arguments, results = made(2, 3), inputs(), []
    for checkpointed in (False, True):
        model.gradient_checkpointing = checkpointed
        model.zero_grad()
        routing = []
        output = model(*arguments, routing=routing)
        assert len(routing) == 2 * ROPE.num_layers
        loss = load_balancing_loss(routing)
        (output.square().mean() + loss).backward()
        assert len(routing) == 2 * ROPE.num_layers
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for kept, again in zip(*results, strict=True):
        assert torch.equal(kept, again)


def test_the_loss_alone_spreads_the_tokens():
    torch.manual_seed(0)  # a training, of which one is enough
    ff, x = ExpertFeedForward(DIM, 8, 1, 4), torch.randn(1, 256, DIM)
    with torch.no_grad():
        ff.video_router.weight.normal_()
        x += 1  # so that some experts are the favourites of most tokens
    optimizer = torch.optim.Adam([ff.video_router.weight], lr=0.05)
    losses = []
    for _ in range(60):
        loss = load_balancing_loss(ff(x, 0)[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.2 and losses[-1] < 1.1


def test_keys():
    keys = ExpertTransformer(
        dataclasses.replace(ROPE, num_layers=1, num_text_experts=1, num_video_experts=2)
    ).state_dict()
    of_ff = {k.removeprefix("transformer_blocks.0.ff.") for k in keys if ".ff." in k}
    tensors = ("net.0.proj.weight", "net.0.proj.bias", "net.2.weight", "net.2.bias")
    experts = ("text.0", "video.0", "video.1")
    assert of_ff == {f"{e}.{t}" for e in experts for t in tensors} | {"video_router.weight"}


GROWTH = [((0, 0), (1, 1), 1), ((0, 0), (2, 3), 1), ((1, 1), (1, 4), 1), ((1, 1), (2, 2), 1)]


def on_whole_numbers(model):
    """Weights of -1, 0 and 1 in the feed-forwards: their products of whole numbers are exact."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ff." in name and "router" not in name:
                parameter.copy_(torch.randint(-1, 2, parameter.shape))
    return model


@pytest.mark.parametrize("before, after, top_k", GROWTH)
def test_upcycled_feed_forward_is_bit_equal(before, after, top_k):
    """On whole numbers, of which every order of summation makes the same sum.

    GELU leaves them whole where they are large: the first layer's bias is 30, and adds at most 20.
    """
    model = on_whole_numbers(made(*before))
    for name, parameter in model.named_parameters():
        if name.endswith("net.0.proj.bias"):
            parameter.data.fill_(30)
    grown = upcycle(model, num_text_experts=after[0], num_video_experts=after[1], top_k=top_k)
    x = torch.randint(-1, 2, (2, TEXT_LEN + VIDEO_LEN, ROPE.hidden_size)).float()
    x[..., 20:] = 0
    for old, new in zip(model.transformer_blocks, grown.transformer_blocks, strict=True):
        wanted = old.ff(x) if before == (0, 0) else old.ff(x, TEXT_LEN)[0]
        assert wanted.any()
        assert torch.equal(new.ff(x, TEXT_LEN)[0], wanted)


@pytest.mark.parametrize(
    "before, after, top_k", [*GROWTH, ((0, 0), (2, 3), 2), ((1, 1), (4, 1), 3)]
)
def test_upcycled_model_computes_the_same(before, after, top_k):
    model, arguments = made(*before), inputs()
    grown = upcycle(model, num_text_experts=after[0], num_video_experts=after[1], top_k=top_k)
    config = grown.config
    assert (config.num_text_experts, config.num_video_experts) == after
    assert config.expert_top_k == top_k
    wanted, got = model(*arguments), grown(*arguments)
    # Rows of a product may be summed in another order among other rows.
    assert (got - wanted).norm() <= 1e-6 * wanted.norm()


def test_upcycling_copies():
    model = made().to(torch.bfloat16).eval()
    model.gradient_checkpointing = True
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    grown = upcycle(model, num_text_experts=2, num_video_experts=2)
    assert (grown.backend, grown.training, grown.gradient_checkpointing) == (
        "reference", False, True,
    )  # fmt: skip
    assert all(p.dtype is torch.bfloat16 and p.requires_grad for p in grown.parameters())
    places = [p.data_ptr() for m in (model, grown) for p in m.state_dict().values()]
    assert len(set(places)) == len(places)
    with torch.no_grad():
        for parameter in grown.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_upcycled_experts_grow_apart():
    grown = upcycle(made(), num_text_experts=2, num_video_experts=3)
    optimizer = torch.optim.SGD(grown.parameters(), lr=1e-2)
    grown(*inputs()).square().mean().backward()
    optimizer.step()
    first, *others = (expert.net[2].weight for expert in grown.transformer_blocks[0].ff.video)
    assert not all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(
    "before, after, wrong",
    [
        ((2, 1), {"num_text_experts": 2, "num_video_experts": 2}, "model must have at most one"),
        ((0, 0), {"num_text_experts": 0, "num_video_experts": 2}, "num_text_experts must be at"),
        ((0, 0), {"num_text_experts": 2, "num_video_experts": 0}, "num_video_experts must be at"),
        ((0, 0), {"num_text_experts": 2, "num_video_experts": 1, "top_k": 3}, "expert_top_k must"),
    ],
)
def test_upcycle_refuses(before, after, wrong):
    with pytest.raises(ValueError, match=wrong):
        upcycle(made(*before), **after)
