"""A pipeline in memory, and the same one saved and loaded in a process of its own, draw the same images."""

import subprocess
import sys

import pytest
import torch

from tests.images import test_bitflip, test_ddpm, test_gan

READER = """
import sys, torch
from {module} import {name}
from diffusers import DiffusionPipeline
pipeline = {name}.from_pretrained(sys.argv[1])
assert isinstance(pipeline, DiffusionPipeline)
images = pipeline(generator=torch.Generator().manual_seed(7), output_type="pt", **{further}).images
torch.save(images, sys.argv[2])
assert not {{"pipelines.images.loop", "pipelines.images.training", "pipelines.runner"}} & set(sys.modules)
"""


def bitflip():
    return test_bitflip.method(prediction="previous", loss="bound")


def gan():
    made = test_gan.method(spectral_norm=True)
    made.parts["generator"].train()(torch.randn(64, 4))  # batch norms that have seen something
    return made


def conditional():
    return test_ddpm.method(class_conditional=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "module", "name", "further"),
    [
        (bitflip, "pipelines.images.bitflip_pipeline", "BitFlipPipeline", {"batch_size": 5}),
        (gan, "pipelines.images.gan_pipeline", "GANPipeline", {"batch_size": 5}),
        (
            conditional,
            "pipelines.images.ddpm_pipeline",
            "ClassConditionalDDPMPipeline",
            {"class_labels": [1, 7, 7], "guidance_scale": 2.0, "num_inference_steps": 5},
        ),
    ],
)
def test_another_process_draws_what_is_drawn_here(tmp_path, build, module, name, further):
    pipeline = build().pipeline()
    here = pipeline(generator=torch.Generator().manual_seed(7), output_type="pt", **further).images
    assert not torch.equal(here[1], here[2])
    pipeline.save_pretrained(tmp_path / "saved")
    code = READER.format(module=module, name=name, further=further)
    command = [sys.executable, "-c", code, str(tmp_path / "saved"), str(tmp_path / "images.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(torch.load(tmp_path / "images.pt", weights_only=True), here)
