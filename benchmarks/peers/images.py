"""One side of benchmarks/images.py: trains a small image model on random images, ``steps`` optimizer steps a turn.

Read by interpreters with unlike libraries: a side imports its own only.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import sys
import tempfile
import types
from collections.abc import Callable, Iterator

import torch
import workload

LATENT, HIDDEN = 64, 300
"""Of the course's VAE: 784-300-300-2×64 and its mirror image."""


def pixels(job: dict) -> torch.Tensor:
    """(n, 1, side, side) uint8, the same on every side: bright blobs, as digits are."""
    draw = torch.Generator().manual_seed(0)
    noise = torch.rand(job["images"], 1, job["side"] // 4, job["side"] // 4, generator=draw)
    return torch.nn.functional.interpolate(noise, scale_factor=4, mode="bilinear").pow(3).mul(255).byte()


def by_hand(job: dict, turns: workload.Turns, step: Callable[[], None]) -> None:
    """Turns of steps that the side does by itself."""
    turns.wait()
    for number in range(job["turns"]):
        for _ in range(job["steps"]):
            step()
        turns.wait("steps" if number else "first")


def project(job: dict, turns: workload.Turns) -> int:
    """This project's loop, as its stages run it (no checkpoints, no pictures)."""
    from pipelines.config import validate
    from pipelines.images.data import Images, ImageSet
    from pipelines.images.loop import Loop, new_accelerator
    from pipelines.memory import keep_freed_memory

    keep_freed_memory()  # as every stage does

    class InTurns(Loop):
        """Ends a turn with every entry of the log."""

        entries = 0

        def _write_log(self):
            super()._write_log()
            self.entries += 1
            turns.wait("steps" if self.entries > 1 else "first")

    images = Images(pixels(job), torch.zeros(job["images"], dtype=torch.int64))
    total = job["steps"] * job["turns"]
    fields = {"batch_size": job["batch"], "logging_steps": job["steps"], "save_steps": 2**20 * job["steps"]}
    fields |= {"precision": "bf16" if job["bf16"] else "fp32", "report_to": "none", "max_steps": total}
    if job["model"] == "vae":
        from pipelines.images.vae import VAEConfig
        from pipelines.images.vae_method import VAEMethod

        fields |= {"architecture": "mlp", "hidden": HIDDEN, "latent_dim": LATENT}
        cls, method = VAEConfig, VAEMethod
    else:
        from pipelines.images.ddpm import DDPMConfig
        from pipelines.images.ddpm_method import DDPMMethod

        fields |= {"channels": job["channels"], "timesteps": 1000, "ema_decay": 0.995, "max_grad_norm": 1.0}
        fields |= {"lr_scheduler": "constant", "warmup_ratio": 0.0, "learning_rate": 1e-4}
        cls, method = DDPMConfig, DDPMMethod
    with tempfile.TemporaryDirectory() as folder:
        config = validate(cls, fields | {"output_dir": folder})
        made = method(config, ImageSet(images, images, ("none",)))
        loop = InTurns(made, images, images, config, new_accelerator(config), total)
        loop._save = lambda: None  # nothing is kept
        turns.wait()
        loop.run()
    return sum(p.numel() for part in made.parts.values() for p in part.parameters())


def loader(job: dict, turns: workload.Turns) -> int:
    """A plain loop over a DataLoader: images made one by one as torchvision's MNIST and ToTensor make them, then Adam.

    Network and loss are this project's own functions.
    """
    import numpy as np
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    from pipelines.images.vae_math import negative_elbo_bound
    from pipelines.images.vae_networks import ImageVAE

    class Pictures(Dataset):
        """One image at a time, as a float tensor in [0, 1]."""

        def __init__(self):
            self.levels = pixels(job)[:, 0]

        def __len__(self):
            return len(self.levels)

        def __getitem__(self, index):
            picture = Image.fromarray(self.levels[index].numpy())
            levels = torch.from_numpy(np.array(picture, np.uint8, copy=True)).view(*picture.size, 1)
            return levels.permute(2, 0, 1).contiguous().to(torch.get_default_dtype()).div(255), 0

    network = ImageVAE(image_size=job["side"], latent_dim=LATENT, architecture="mlp", hidden=HIDDEN)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    batches = endless(DataLoader(Pictures(), batch_size=job["batch"], shuffle=True, drop_last=True))

    def step() -> None:
        x = torch.bernoulli(next(batches)[0])
        optimizer.zero_grad()
        negative_elbo_bound(*network(x, torch.randn(len(x), LATENT))).negative_elbo.mean().backward()
        optimizer.step()

    by_hand(job, turns, step)
    return sum(p.numel() for p in network.parameters())


def endless(batches) -> Iterator:
    """Epoch after epoch."""
    while True:
        yield from batches


def pythae(job: dict, turns: workload.Turns) -> int:
    """pythae's trainer with its VAE and an encoder and decoder of the same layers; its data are floats in memory."""
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE
    from pythae.models import VAEConfig as PeerConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig
    from pythae.trainers.training_callbacks import TrainingCallback
    from torch import nn

    size = job["side"] ** 2

    class Encoder(BaseEncoder):
        """784-300-300-2×64."""

        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(size, HIDDEN), nn.ELU(), nn.Linear(HIDDEN, HIDDEN), nn.ELU())
            self.mean, self.variance = nn.Linear(HIDDEN, LATENT), nn.Linear(HIDDEN, LATENT)

        def forward(self, x):
            found = self.layers(x.flatten(1))
            return ModelOutput(embedding=self.mean(found), log_covariance=self.variance(found))

    class Decoder(BaseDecoder):
        """64-300-300-784."""

        def __init__(self):
            super().__init__()
            layers = [nn.Linear(LATENT, HIDDEN), nn.ELU(), nn.Linear(HIDDEN, HIDDEN), nn.ELU(), nn.Linear(HIDDEN, size)]
            self.layers = nn.Sequential(*layers, nn.Sigmoid())

        def forward(self, z):
            return ModelOutput(reconstruction=self.layers(z).view(-1, 1, job["side"], job["side"]))

    class InTurns(TrainingCallback):
        """Ends a turn after every ``steps`` optimizer steps."""

        done = 0

        def on_train_begin(self, *args, **kwargs):
            turns.wait()

        def on_train_step_end(self, *args, **kwargs):
            self.done += 1
            if self.done % job["steps"] == 0:
                turns.wait("steps" if self.done > job["steps"] else "first")

    shape = (1, job["side"], job["side"])
    settings = PeerConfig(input_dim=shape, latent_dim=LATENT, reconstruction_loss="bce")
    model = VAE(model_config=settings, encoder=Encoder(), decoder=Decoder())
    data = pixels(job).float() / 255
    epochs = -(-job["steps"] * job["turns"] // (len(data) // job["batch"]))
    with tempfile.TemporaryDirectory() as folder:
        arguments = BaseTrainerConfig(
            output_dir=folder,
            num_epochs=epochs,
            learning_rate=1e-3,
            per_device_train_batch_size=job["batch"],
            optimizer_cls="Adam",
            no_cuda=True,
        )
        dataset = BaseDataset(data, torch.zeros(len(data)))
        BaseTrainer(model, dataset, None, arguments, callbacks=[InTurns()]).train()
    return sum(p.numel() for p in model.parameters())


def lucidrains(job: dict, turns: workload.Turns) -> int:
    """denoising-diffusion-pytorch's network and loss, stepped as its Trainer steps them, with its EMA.

    Its Trainer reads image files one by one; here it is given batches from memory, which only helps it.
    """
    for name in ("torchvision", "torchvision.transforms", "torchvision.utils"):  # for reading and writing files only
        sys.modules.setdefault(name, types.ModuleType(name))
    for name in ("transforms", "utils"):
        setattr(sys.modules["torchvision"], name, sys.modules[f"torchvision.{name}"])
    from denoising_diffusion_pytorch.denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    network = Unet(dim=job["dim"], dim_mults=(1, 2), channels=1, flash_attn=False)
    diffusion = GaussianDiffusion(network, image_size=job["side"], timesteps=1000, objective="pred_noise")
    average = EMA(diffusion, beta=0.995, update_every=10)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    data = pixels(job).float() / 255

    def step() -> None:
        rows = torch.randint(0, len(data), (job["batch"],))
        with torch.autocast("cpu", torch.bfloat16, enabled=job["bf16"]):
            loss = diffusion(data[rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update()

    by_hand(job, turns, step)
    return sum(p.numel() for p in network.parameters())


SIDES = {"project": project, "loader": loader, "pythae": pythae, "lucidrains": lucidrains}

if __name__ == "__main__":
    asked = workload.job()
    imported = workload.peak_megabytes()
    torch.manual_seed(0)
    interval = workload.Turns()
    parameters = SIDES[asked["side_name"]](asked, interval)
    interval.done(imported=imported, gpu_peak=None, parameters=parameters)
