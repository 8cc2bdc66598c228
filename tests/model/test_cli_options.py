"""The options: their help, what they suggest after a typo, and how errors name them."""

import argparse
import re
import subprocess

import pytest

import cogvx
from cogvx import cli
from cogvx.cli import arguments
from cogvx.cli.parser import FAMILY, make
from cogvx.config import TransformerConfig
from cogvx.generation import CHOICES
from cogvx.schedulers import SOLVERS
from cogvx.shapes import scoring
from cogvx.training import STAGES
from cogvx.vae import Tiling
from cogvx.validation import unknown_key
from cogvx.video.container import RATES
from cogvx_kernels import BACKENDS

[COMMANDS] = [a.choices for a in make()._actions if isinstance(a.choices, dict)]


def run(capsys, *words):
    status = cli.main([str(word) for word in words])
    seen = capsys.readouterr()
    return status, seen.out, seen.err


def test_constants_are_the_librarys():
    """The parser imports no torch, so that it cannot import these."""
    assert arguments.BACKENDS == BACKENDS
    assert CHOICES["solver"] == tuple(sorted(SOLVERS))
    assert arguments.STAGES == STAGES
    assert arguments.FPS_LIMIT == RATES[1]
    assert arguments.TILE == (Tiling().height, Tiling().width)
    sampling = arguments.SAMPLING_STEPS, arguments.SAMPLING_GUIDANCE
    assert sampling == (scoring.STEPS, scoring.GUIDANCE)
    assert set(FAMILY) < set(cogvx.recommended_defaults()) | {"latent_channels"}


def test_version(capsys):
    assert run(capsys, "--version")[:2] == (0, f"cogvx {cogvx.__version__}\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option(name):
    """A sentence for each, its default where it has one, and an example that parses."""
    parser = COMMANDS[name]
    for action in parser._actions:
        if action.help == argparse.SUPPRESS:  # an old name
            assert isinstance(action, arguments.Deprecated)
            continue
        assert action.help, action.dest
        takes_value = action.option_strings and action.nargs != 0
        if takes_value and not action.required and action.dest not in FAMILY:
            optional = ("model", "vae", "preset", "image", "video", "out", "clip", "base_channels",
                        "prompt", "prompts")  # fmt: skip
            assert "default" in action.help or action.dest in optional, action.dest
    assert parser.description.endswith(".") and len(parser.description) > 20
    for example in re.findall(r"^  (cogvx .*)$", parser.epilog, re.MULTILINE):
        words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', example.split(" > ")[0])]
        assert callable(make().parse_args(words[1:]).run)


@pytest.mark.parametrize(
    "words, hint",
    [
        (["genrate"], "did you mean generate?"),
        (["generate", "--promt", "x"], "unknown option --promt; did you mean --prompt?"),
        (["encode", "a", "--tilling=8x8"], "unknown option --tilling; did you mean --tiling?"),
        (["plan", "-preset", "5b"], "unknown option -preset; did you mean --preset?"),
        (["plan", "--preset", "5b-i2"], "did you mean 5b-i2v?"),
        (["decode", "a", "--dtype", "float61"], "did you mean float16?"),
        (["score", "--prompts", "0"], "must be a whole number from 1 to 10000; got '0'"),
        (["score", "--skip", "10001"], "must be a whole number from 0 to 10000"),
    ],
)
def test_typos(capsys, words, hint):
    status, out, err = run(capsys, *words)
    assert (status, out) == (2, "") and hint in err


def test_a_deprecated_option_is_not_suggested(capsys):
    status, _, err = run(capsys, "generate", "--schedulr", "ddim")
    assert status == 2 and "unknown option --schedulr" in err and "--scheduler" not in err


@pytest.mark.parametrize(
    "key, near", [("modle", "model"), ("transformer_trainin", "transformer_training")]
)
def test_keys_of_a_recipe(capsys, tmp_path, key, near):
    path = tmp_path / "recipe.toml"
    path.write_text(f"{key} = 1\n")
    status, _, err = run(capsys, "train", path, "--out", tmp_path / "run")
    assert status == 1 and f"unknown key '{key}'; did you mean {near}? The keys are data, " in err


def test_keys_of_a_table(capsys, tmp_path):
    status, _, err = run(capsys, "train", "tiny", "--out", tmp_path / "run",
                          "--set", "transformer_training.step=1")  # fmt: skip
    assert status == 1 and "unknown key 'step'; did you mean steps? The keys are" in err
    status, _, err = run(capsys, "train", "tiny", "--out", tmp_path / "run", "--set", "seed.a=1")
    assert status == 1 and "seed is no table" in err
    assert str(unknown_key("it", "zzz", ["b", "a"])) == "it: unknown key 'zzz'. The keys are a, b"
    with pytest.raises(ValueError, match="unknown key 'num_layer'; did you mean num_layers"):
        TransformerConfig.from_dict({"num_layer": 2})


@pytest.mark.parametrize(
    "message, typed",
    [
        (
            "timestep_schedule: num_steps must be in [1, 2]; got 3",
            "--steps must be in [1, 2]; got 3",
        ),
        ("CogVideoX.generate: num_frames must have 1", "--frames must have 1"),
        ("CogVideoX.generate: height and width must be 8", "--height and --width must be 8"),
        ("CogVideoX.generate: negative_prompt must be one", "--negative must be one"),
        ("cogvx: tiling must have a height", "--tiling must have a height"),
        ("WordTextEncoder.encode: a prompt must be", "a prompt must be"),
        ("CogVideoX.generate: step 3 gave NaN", "step 3 gave NaN"),
        ("out/a.mp4: width must be even", "out/a.mp4: width must be even"),
        ("nowhere: must be a folder", "nowhere: must be a folder"),
        ("steps are few", "steps are few"),
    ],
)
def test_errors_name_options(message, typed):
    options = make().parse_args(["generate", "--model", "m", "--prompt", "x", "--out", "a.mp4"])
    assert cli.message_of(ValueError(message), options) == typed


@pytest.mark.parametrize("text", ["0", "-1", "1001", "nan", "inf", "x", ""])
def test_rates_that_are_none(text):
    with pytest.raises(argparse.ArgumentTypeError):
        arguments.rate(text)
    assert arguments.rate("1000") == 1000 and arguments.rate("23.976") == 23.976


@pytest.mark.parametrize("text, dtype", arguments.DTYPES.items())
def test_short_names_of_dtypes(text, dtype):
    options = make().parse_args(["plan", "--preset", "2b", "--dtype", text])
    assert arguments.DTYPES[options.dtype] == dtype


def test_old_names_of_options(capsys):
    words = ["generate", "--model", "m", "--prompt", "x", "--out", "a.mp4", "--scheduler", "dpm"]
    assert make().parse_args(words).solver == "dpm"
    assert "--scheduler is deprecated; use --solver" in capsys.readouterr().err


def completed(script, *words):
    """Suggestions of bash for the last word."""
    line = " ".join(f"'{word}'" for word in words)
    ask = f'COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _cogvx; echo "${{COMPREPLY[@]}}"'
    return subprocess.run(
        ["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, check=True
    ).stdout.split()


def test_completion(capsys):
    status, script, _ = run(capsys, "completion", "bash")
    assert status == 0
    assert completed(script, "cogvx", "re") == ["reconstruct"]
    assert completed(script, "cogvx", "generate", "--prompt") == ["--prompt", "--prompts"]
    assert completed(script, "cogvx", "generate", "--solver", "d") == ["ddim", "dpm"]
    assert completed(script, "cogvx", "generate", "--image", "x") == []
    assert completed(script, "cogvx", "generate", "--sch") == []
    assert "bashcompinit" in run(capsys, "completion", "zsh")[1]
    fish = run(capsys, "completion", "fish")[1]
    assert "'__fish_seen_subcommand_from generate' -l solver -x -a 'ddim dpm'" in fish
