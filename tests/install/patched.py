"""One step of diffusers' pipeline, patched, and the report: `python -I patched.py MODEL…`."""

import sys

import torch
from diffusers import CogVideoXPipeline

import cogvx_kernels

SMALL = {"num_frames": 9, "height": 32, "width": 32, "max_sequence_length": 6}
for model in sys.argv[1:]:
    pipe = CogVideoXPipeline.from_pretrained(model, torch_dtype=torch.float32)
    report = cogvx_kernels.patch(pipe)
    prompt = "a panda plays the guitar"
    video = pipe(prompt, num_inference_steps=1, output_type="pt", **SMALL).frames
    assert video.shape == (1, 9, 3, 32, 32) and video.isfinite().all()
    print(report)
