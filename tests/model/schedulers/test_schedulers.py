"""Schedulers against the golden values of `docs/model.md` and, step by step, against diffusers."""

import math
import random

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

from cogvx.config import SchedulerConfig
from cogvx.schedulers import (
    DDIM,
    SOLVERS,
    DPMSolver,
    NoiseSchedule,
    dynamic_guidance,
    timestep_schedule,
)

ONE, THREE = SchedulerConfig(snr_shift_scale=1.0), SchedulerConfig(snr_shift_scale=3.0)
THEIRS = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}
STEPS = (1, 2, 3, 7, 12, 30, 48, 50, 60, 64, 333, 1000)
SHAPE = (2, 3, 4, 5, 6)


def theirs(name, config):
    return THEIRS[name].from_config({**config.to_dict(), "clip_sample": False})


def listed_by_diffusers(config, num_steps, name="ddim"):
    scheduler = theirs(name, config)
    scheduler.set_timesteps(num_steps)
    return scheduler, scheduler.timesteps


# As printed in `docs/model.md`, section 5.1.
TIMESTEPS = (0, 19, 99, 199, 299, 399, 499, 599, 699, 799, 899, 979, 998, 999)
ALPHAS = {
    1.0: ".99915 .981010457 .888085895 .738700107 .566515754 .393544058 .242359167 .128447724 "
    ".05578332 .0178831639 .00303307237 8.57878434e-5 1.96788806e-7 0",
    3.0: ".997454328 .946572979 .730866867 .490373107 .306367939 .178615234 .0959695617 "
    ".046161374 .0188306238 .00582107549 .000968787982 2.71943604e-5 6.23078847e-8 0",
}


@pytest.mark.parametrize("config", [ONE, THREE])
def test_alphas_are_the_published_ones(config):
    table = NoiseSchedule(config).alphas_cumprod
    assert table.dtype == torch.float64 and table.device.type == "cpu"
    golden = torch.tensor([float(a) for a in ALPHAS[config.snr_shift_scale].split()]).double()
    torch.testing.assert_close(table[list(TIMESTEPS)], golden, rtol=1e-7, atol=0)
    assert table[-1] == 0
    # Torch's roots against Python's: the tables differ in the last bits, and steps must not.
    torch.testing.assert_close(table, theirs("ddim", config).alphas_cumprod, rtol=1e-12, atol=1e-18)


def test_snr_shift_divides_the_signal_to_noise_ratio():
    shifted, plain = (
        NoiseSchedule(
            SchedulerConfig(snr_shift_scale=scale, rescale_betas_zero_snr=False)
        ).alphas_cumprod
        for scale in (3.0, 1.0)
    )
    torch.testing.assert_close(shifted / (1 - shifted), plain / (1 - plain) / 3)
    assert plain[-1] > 0


def test_ddim_coefficients():
    golden = {
        ONE: {
            999: (0.9999571, 0.0092622),
            979: (0.9998553, 0.0101080),
            499: (0.9816182, 0.0363232),
            39: (0.6912973, 0.3130364),
            19: (0, 1),
        },
        THREE: {
            999: (0.9999864, 0.0052148),
            499: (0.9924884, 0.0234453),
            39: (0.7044267, 0.3074952),
        },
    }
    for config, rows in golden.items():
        solver = DDIM(config)
        for timestep, row in rows.items():
            next_timestep = timestep - 20 if timestep > 19 else -1
            assert solver.coefficients(timestep, next_timestep) == pytest.approx(row, abs=6e-8)


def test_dpm_coefficients():
    solver = DPMSolver(ONE)
    golden = {  # x factor, -(x0 factor), noise factor, slope: `docs/model.md`, section 5.4
        979: (0.47806040, -0.01494100, 0.87812454, 0.0),
        959: (0.63775546, -0.01800118, 0.76973970, 0.30460986),
        499: (0.91299371, -0.07010698, 0.31385666, 0.4909493),
        39: (0.47281169, -0.52713708, 0.10053115, 0.80629502),
    }
    for timestep, (x, x0, noise, slope) in golden.items():
        came = solver.coefficients(timestep, timestep - 20, timestep + 20)
        assert came == pytest.approx((x, -x0, noise, slope), rel=2e-6)
    assert solver.coefficients(19, -1, 39) == (0, 1, 0, 0)
    first = solver.coefficients(999, 979)
    alpha = solver.schedule.alpha(979)
    assert first == (0, math.sqrt(alpha), math.sqrt(1 - alpha), 0)


def test_dynamic_guidance_is_as_published():
    golden = (
        "2.2915 2.5435 6.9744 6.4204 2.7881 4.2719 1.0376 4.1704 1.618 6.9831 1.0048 2.872 6.9768 "
        "1.6331 4.3297 2.4366 6.3773 6.0068 3.4479 3.1981 1.6548 6.61 1.1947 4.2953 6.9854 1.5213 "
        "1.7616 1.0579 4.1275 1.4823 2.0026 5.9477 4.1432 6.5305 6.1398 6.9999 6.1684 1.1199 "
        "2.0975 6.685 6.9992 2.3432 6.2128 1.2505 6.9996 6.8644 1.0636 1.0 1.0 1.1234"
    )
    came = [dynamic_guidance(6, timestep, 50) for timestep in DDIM(ONE).timesteps(50)]
    assert came == pytest.approx([float(g) for g in golden.split()], abs=5.1e-5)


def test_timesteps_are_those_of_diffusers_for_every_number_of_steps():
    longer = []
    for num_steps in range(1, 1001):
        _, expected = listed_by_diffusers(ONE, num_steps)
        came = timestep_schedule(num_steps)
        if len(expected) > num_steps:
            longer.append(num_steps)
            assert expected[-1] == -1  # a step at the noisiest of all, because tables wrap around
            expected = expected[:-1]
        assert list(came.timesteps) == expected.tolist()
        # Each step ends where the next begins, and the last in no noise.
        assert came.next_timesteps == (*came.timesteps[1:], -1)
        assert came.timesteps[-1] >= 0 and came.timesteps[0] == 999
        assert came == timestep_schedule(num_steps, compat=True) or 1000 % num_steps
    assert len(longer) == 62 and longer[0] == 61


def steps_beside_diffusers(
    name, config, num_steps, dtype=torch.float32, device="cpu", rejoin=False
):
    """Yields x of ours and of diffusers after every step, from one seed and one set of answers.

    rejoin  after each step diffusers goes on from where we are
    """
    solver = SOLVERS[name](config, compat=True)
    steps = solver.timestep_schedule(num_steps)
    scheduler, timesteps = listed_by_diffusers(config, num_steps, name)
    seed = random.randrange(2**31)
    ours, other = (torch.Generator().manual_seed(seed) for _ in range(2))
    x = expected = torch.randn(SHAPE).to(device, dtype)
    prev_x0 = old_x0 = None
    for index, t in enumerate(timesteps):
        v = torch.randn(SHAPE).to(device)
        x, prev_x0 = solver.step(x, v, index, steps, prev_x0, ours)
        if name == "ddim":
            expected = scheduler.step(v, t, expected, generator=other, return_dict=False)[0]
        else:
            prev_timestep = timesteps[index - 1] if index else None
            expected, old_x0 = scheduler.step(
                v, old_x0, t, prev_timestep, expected, generator=other
            )
            assert prev_x0.dtype == old_x0.dtype
        expected = expected.to(dtype)
        assert x.dtype == dtype
        yield x, expected
        if rejoin:
            expected, old_x0 = x, prev_x0
    assert torch.equal(ours.get_state(), other.get_state())


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("config", [ONE, THREE])
@pytest.mark.parametrize("num_steps", STEPS)
def test_steps_are_those_of_diffusers(name, config, num_steps):
    """Bit for bit, and with as many draws of noise."""
    pairs = list(steps_beside_diffusers(name, config, num_steps))
    assert len(pairs) == num_steps
    for index, (x, expected) in enumerate(pairs):
        assert torch.equal(x, expected), f"step {index}: {(x - expected).abs().max()}"


@pytest.mark.parametrize("name", SOLVERS)
def test_steps_in_bfloat16_are_those_of_diffusers_but_for_its_coefficients(name):
    """On a CPU diffusers rounds its coefficients to bfloat16 too, a relative 2^-9 of each term; the
    other roundings are the same. The terms of a step are below 8 and there are four of them."""
    pairs = list(steps_beside_diffusers(name, ONE, 50, torch.bfloat16, rejoin=True))
    assert len(pairs) == 50
    for x, expected in pairs:
        torch.testing.assert_close(x.float(), expected.float(), rtol=0, atol=4 * 8 * 2**-9)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("num_steps", [1, 7, 50])
def test_steps_in_bfloat16_are_those_of_diffusers_on_a_gpu(name, num_steps, device):
    """Bit for bit: there a coefficient that is a CPU scalar stays in float32."""
    for x, expected in steps_beside_diffusers(name, ONE, num_steps, torch.bfloat16, device):
        assert torch.equal(x, expected)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("num_steps", [7, 30, 50, 60, 61, 999, 1000])
def test_the_last_step_gives_x0(name, num_steps):
    solver = SOLVERS[name](ONE)
    steps = solver.timestep_schedule(num_steps)
    x, v, prev_x0 = torch.randn(3, *SHAPE).unbind()
    last = len(steps) - 1
    came, _ = solver.step(x, v, last, steps, prev_x0)
    assert torch.equal(came, solver.schedule.x0_from_v(x, v, steps.timesteps[last]))


def test_compat_leaves_noise_after_60_steps():
    """The default corrects diffusers, whose last step of 60 ends at timestep 0."""
    assert timestep_schedule(60, compat=True).next_timesteps[-1] == 0
    assert timestep_schedule(60).next_timesteps[-1] == -1
    mismatched = zip(
        timestep_schedule(30, compat=True).next_timesteps[:-1],
        timestep_schedule(30).timesteps[1:],
        strict=True,
    )
    assert sum(next_timestep != timestep for next_timestep, timestep in mismatched) == 10


@pytest.mark.parametrize("num_steps", [1, 7, 50, 60])
def test_ddim_returns_x0_for_the_exact_v(num_steps):
    """With the exact v every step lies on the line from noise to x0."""
    solver = DDIM(THREE)
    steps = solver.timestep_schedule(num_steps)
    x0, noise = torch.randn(2, *SHAPE, dtype=torch.float64).unbind()
    x, prev_x0 = noise, None
    for index, timestep in enumerate(steps.timesteps):
        v = solver.schedule.velocity(x0, noise, timestep)
        x, prev_x0 = solver.step(x, v, index, steps, prev_x0)
        expected = solver.schedule.add_noise(x0, noise, steps.next_timesteps[index])
        torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x, x0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_steps", [1, 7, 50, 60])
def test_dpm_keeps_the_marginals_of_the_schedule(num_steps):
    """With the exact x0 = 0 the steps are noise only: their variance is 1 - ᾱ after each."""
    solver = DPMSolver(ONE)
    variance, steps = 1.0, solver.timestep_schedule(num_steps)
    for index, timestep in enumerate(steps.timesteps):
        prev_timestep = steps.timesteps[index - 1] if index else None
        c = solver.coefficients(timestep, steps.next_timesteps[index], prev_timestep)
        variance = c.x_factor**2 * variance + c.noise_factor**2
        assert variance == pytest.approx(
            1 - solver.schedule.alpha(steps.next_timesteps[index]), rel=1e-9
        )


def test_at_the_noisiest_timestep():
    x, v = torch.randn(2, *SHAPE).unbind()
    schedule = NoiseSchedule(ONE)
    assert torch.equal(schedule.x0_from_v(x, v, 999), -v)
    solver = DPMSolver(ONE)
    steps = solver.timestep_schedule(50)
    one, _ = solver.step(x, v, 0, steps, generator=torch.Generator().manual_seed(1))
    two, _ = solver.step(-x, v, 0, steps, generator=torch.Generator().manual_seed(1))
    assert torch.equal(one, two)  # of x nothing is left


def test_noise_and_velocity_are_those_of_diffusers():
    """diffusers rounds ᾱ to float32, 3e-8 off, before it takes √(1-ᾱ), which is 0.029 at least: so
    that is 5e-7 off at worst, and noise reaches 5."""
    timesteps = torch.tensor([0, 1, 19, 499, 998, 999])
    x0, noise = torch.randn(2, len(timesteps), 3, 4, 5, 6).unbind()
    for config in (ONE, THREE):
        schedule, scheduler = NoiseSchedule(config), theirs("dpm", config)
        x, v = (method(x0, noise, timesteps) for method in (schedule.add_noise, schedule.velocity))
        close = {"rtol": 1e-6, "atol": 3e-6}
        torch.testing.assert_close(x, scheduler.add_noise(x0, noise, timesteps), **close)
        torch.testing.assert_close(v, scheduler.get_velocity(x0, noise, timesteps), **close)
        for i, timestep in enumerate(timesteps.tolist()):  # an int is the same for the whole batch
            one = schedule.add_noise(x0[i : i + 1], noise[i : i + 1], timestep)
            torch.testing.assert_close(one, x[i : i + 1], **close)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_x0_comes_back_from_noise_and_velocity(dtype):
    schedule = NoiseSchedule(THREE)
    timesteps = torch.tensor([0, 19, 499, 999])
    x0, noise = torch.randn(2, 4, 3, 4, 5, 6, dtype=torch.float64).to(dtype).unbind()
    x = schedule.add_noise(x0, noise, timesteps)
    v = schedule.velocity(x0, noise, timesteps)
    assert x.dtype == v.dtype == dtype
    came = schedule.x0_from_v(x.double(), v.double(), timesteps)
    # x and v are each within half an ulp of numbers that reach 8, and √ᾱ + √(1-ᾱ) < 1.5.
    torch.testing.assert_close(came, x0.double(), rtol=0, atol=8 * 1.5 * torch.finfo(dtype).eps)


def test_the_first_timesteps_have_noise_in_bfloat16():
    x0, noise = torch.zeros(SHAPE).bfloat16(), torch.ones(SHAPE).bfloat16()
    x = NoiseSchedule(ONE).add_noise(x0, noise, 0)
    sigma = math.sqrt(1 - NoiseSchedule(ONE).alpha(0))
    assert x.float().mean() == pytest.approx(sigma, rel=2**-8)
    timestep = torch.zeros(2, dtype=torch.long)
    assert theirs("ddim", ONE).add_noise(x0, noise, timestep).abs().max() == 0


def test_strength_keeps_the_last_steps():
    whole, part = timestep_schedule(50), timestep_schedule(50, strength=0.8)
    assert len(part) == 40 and part.timesteps == whole.timesteps[10:]
    assert part.next_timesteps == whole.next_timesteps[10:]
    assert timestep_schedule(7, strength=0.3, compat=True).next_timesteps == (143, 0)
    assert DDIM(ONE).timestep_schedule(50, 1.0) == whole


@pytest.mark.parametrize("num_steps", [0, -1, 1001, 2.0, True, "50", None])
def test_wrong_numbers_of_steps_are_refused(num_steps):
    with pytest.raises(ValueError, match=r"num_steps must be an integer in \[1, 1000\]"):
        timestep_schedule(num_steps)


@pytest.mark.parametrize("strength", [0, -0.1, 1.01, 0.01, math.nan])
def test_wrong_strengths_are_refused(strength):
    with pytest.raises(ValueError, match="strength must be at most 1 and leave one of 50 steps"):
        timestep_schedule(50, strength=strength)


def test_wrong_timesteps_are_refused():
    schedule, x = NoiseSchedule(ONE), torch.randn(SHAPE)
    for timestep in (-2, 1000):
        with pytest.raises(ValueError, match=r"timestep must be in \[0, 999\]"):
            schedule.alpha(timestep)
    for timestep in (torch.tensor(3), torch.zeros(3, dtype=torch.long), torch.zeros(2)):
        with pytest.raises(ValueError, match=r"integers of shape \(batch,\) = \(2,\)"):
            schedule.add_noise(x, x, timestep)


def test_dpm_asks_for_its_memory():
    solver, x = DPMSolver(ONE), torch.randn(SHAPE)
    with pytest.raises(ValueError, match="prev_x0 must be what step 3 returned; got None"):
        solver.step(x, x, 4, solver.timestep_schedule(50))


def test_steps_share_no_memory_with_their_inputs():
    for name, solver in ((name, make(ONE)) for name, make in SOLVERS.items()):
        x, v, prev_x0 = torch.randn(3, *SHAPE).unbind()
        kept = [t.clone() for t in (x, v, prev_x0)]
        for index in (0, 1, 49):
            solver.step(x, v, index, solver.timestep_schedule(50), prev_x0)
        assert all(torch.equal(*pair) for pair in zip((x, v, prev_x0), kept, strict=True)), name


def test_one_trajectory_of_another_schedule():
    """10 training timesteps allow 1 to 10 steps and no more."""
    config = SchedulerConfig(num_train_timesteps=10)
    assert DDIM(config).timesteps(10) == list(range(9, -1, -1))
    assert DPMSolver(config).timesteps(3) == [9, 6, 2]
    with pytest.raises(ValueError, match=r"\[1, 10\]; got 11"):
        DDIM(config).timesteps(11)
