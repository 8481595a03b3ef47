"""Log-probabilities, divergences, advantages and bounds are float32 under bf16 autocast: in type, and in value.

Where a function widens its arguments itself, it is given bfloat16 ones. In the training loops every call of these
functions is watched: what they return is at least float32, and what float64 gives of the same arguments.
"""

import inspect
import sys
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from pipelines.images import bitflip_bound, gan_losses, vae_math
from pipelines.seq2seq import losses, ppo_math

ROWS, LENGTH, WORDS = 6, 300, 400


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def log_probs(key: int = 0) -> Tensor:
    return -5 * torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(key))


MASK = (torch.arange(LENGTH) < torch.tensor([300, 7, 150, 299, 1, 200])[:, None]).long()
TOKENS = torch.randint(0, WORDS, (ROWS, LENGTH), generator=torch.Generator().manual_seed(2))
RANKING = torch.tensor([[0, 2, 1, 3]] * ROWS)

# Name -> function and its arguments; the floating ones are rounded to bfloat16 first.
WIDENING = {
    "token_log_probs": (losses.token_log_probs, (normal(ROWS, LENGTH, WORDS, scale=8.0), TOKENS)),
    "entropy": (losses.entropy, (normal(ROWS, LENGTH, WORDS, scale=4.0),)),
    "sequence_sum": (losses.sequence_sum, (log_probs(), MASK)),
    "masked_mean": (losses.masked_mean, (log_probs(), MASK)),
    "bradley_terry_loss": (losses.bradley_terry_loss, (normal(ROWS, scale=9.0), normal(ROWS, 1, scale=9.0)[:, 0])),
    "dpo_loss": (losses.dpo_loss, tuple(log_probs(key)[:, 0] * 40 for key in range(4))),
    "plackett_luce_loss": (losses.plackett_luce_loss, (normal(ROWS, 4, scale=30.0), RANKING)),
    **{
        f"kl_estimate {kind}": (lambda *given, kind=kind: losses.kl_estimate(*given, kind), (log_probs(), log_probs(1)))
        for kind in ("k1", "k2", "k3")
    },
    "masked_moments": (ppo_math.masked_moments, (log_probs() + 100, MASK)),
    "whiten": (ppo_math.whiten, (log_probs() + 100, MASK)),
    "token_rewards": (ppo_math.token_rewards, (normal(ROWS), normal(ROWS, LENGTH), MASK, 0.05)),
    "gae": (ppo_math.gae, (normal(ROWS, LENGTH, scale=0.1), log_probs(), MASK, 1.0, 0.95)),
    "policy_loss": (ppo_math.policy_loss, (log_probs(), log_probs() + 0.01, normal(ROWS, LENGTH), 0.2)),
    "approximate_kl": (ppo_math.approximate_kl, (log_probs(), log_probs(1), MASK)),
    "explained_variance": (ppo_math.explained_variance, (log_probs(), log_probs() + 0.5 * log_probs(1), MASK)),
}


def tensors_of(value) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [found for item in value for found in tensors_of(item)] if isinstance(value, (tuple, list)) else []


def converted(value, dtype):
    """A floating tensor in another type; anything else as it is."""
    return value.detach().to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("name", WIDENING)
def test_a_widening_function_gives_float32_of_bfloat16(name):
    function, arguments = WIDENING[name]
    rounded = [converted(value, torch.bfloat16) for value in arguments]
    with torch.autocast("cpu", torch.bfloat16):
        found = tensors_of(function(*rounded))
    wanted = tensors_of(function(*(converted(value, torch.float64) for value in rounded)))
    assert {tensor.dtype for tensor in found} == {torch.float32}
    for mine, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine.double(), exact.double(), rtol=2e-5, atol=2e-5)


RANDOM = {"sample_gaussian", "generator_gradients", "r1_penalty"}
"""Draws, or gradients of what cannot be done again."""


@contextmanager
def watched(*modules):
    """Every call that the project makes of a public function of these modules: (function, arguments, result)."""
    calls, undo = [], []
    for module in modules:
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if name.startswith("_") or function.__module__ != module.__name__:
                continue

            def spy(*given, function=function, **named):
                result = function(*given, **named)
                calls.append((function, inspect.signature(function).bind(*given, **named), result))
                return result

            for holder in [m for n, m in list(sys.modules.items()) if n.startswith("pipelines")]:
                if getattr(holder, name, None) is function:
                    undo.append((holder, name, function))
                    setattr(holder, name, spy)
    try:
        yield calls
    finally:
        for holder, name, function in undo:
            setattr(holder, name, function)


def check(calls, *, names: set[str]) -> None:
    """The result of every call is at least float32, and what float64 gives of the same arguments."""
    assert names <= {function.__name__ for function, _, _ in calls}
    for function, bound, result in calls:
        for tensor in tensors_of(result):
            if tensor.is_floating_point():
                assert torch.finfo(tensor.dtype).bits >= 32, f"{function.__name__} works in {tensor.dtype}"
        if function.__name__ in RANDOM:
            continue
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            wide = [converted(value, torch.float64) for value in bound.args]
            exact = tensors_of(function(*wide, **{k: converted(v, torch.float64) for k, v in bound.kwargs.items()}))
        for mine, wanted in zip(tensors_of(result), exact, strict=True):
            torch.testing.assert_close(mine.detach().double(), wanted.double(), rtol=1e-4, atol=1e-4)


def one_step(config_class, method_class, tmp_path, **values):
    """A method's loss and measures under bf16 autocast, on the embedded digits."""
    from pipelines.config import validate
    from pipelines.images.data import load_images
    from pipelines.images.evaluation import measure
    from pipelines.images.loop import Loop, new_accelerator

    plain = {"precision": "bf16", "report_to": "none", "max_train": 64, "max_test": 16, "batch_size": 16}
    plain |= {"logging_steps": 1, "max_steps": 2, "output_dir": str(tmp_path), "eval_batch_size": 16}
    config = validate(config_class, plain | values)
    images = load_images(config)
    torch.manual_seed(0)
    accelerator = new_accelerator(config)
    assert accelerator.mixed_precision == "bf16"
    method = method_class(config, images)
    Loop(method, images.train, images.test, config, accelerator, 2).run()
    measure(method, images.test.to(accelerator.device), config, accelerator)


def test_the_bounds_of_an_autoencoder(tmp_path):
    from pipelines.images.vae import VAEConfig
    from pipelines.images.vae_method import VAEMethod

    with watched(vae_math) as calls:
        one_step(VAEConfig, VAEMethod, tmp_path, architecture="mlp", hidden=16, latent_dim=4, importance_samples=3)
    check(calls, names={"negative_elbo_bound", "gaussian_kl", "log_weights", "importance_weighted_bound"})


def test_the_bound_of_bit_flip_diffusion(tmp_path):
    from pipelines.images import bitflip_math
    from pipelines.images.bitflip import BitFlipConfig
    from pipelines.images.bitflip_method import BitFlipMethod

    with watched(bitflip_math) as calls:
        one_step(BitFlipConfig, BitFlipMethod, tmp_path, timesteps=4, channels=[8], bound_stages=2)
    check(calls, names={"stage_kl", "prior_kl"})
    assert bitflip_bound.stage_kl is bitflip_math.stage_kl


def test_the_losses_of_a_gan(tmp_path):
    from pipelines.images.gan import GANConfig
    from pipelines.images.gan_method import GANMethod

    with watched(gan_losses) as calls:
        one_step(GANConfig, GANMethod, tmp_path, hidden=16, width=8, latent_dim=4)
    check(calls, names={"discriminator_loss", "generator_loss"})


@pytest.mark.parametrize("separate_critic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_advantages_and_losses_of_ppo(tmp_path, separate_critic, fp32_afterwards):
    from tests.seq2seq.ppo_environment import make_trainer

    trainer = make_trainer(tmp_path, bf16=True, separate_critic=separate_critic, rollouts=1, ppo_epochs=1)
    with watched(losses, ppo_math) as calls:
        trainer.train()
    names = {"gae", "whiten", "token_rewards", "policy_loss", "value_loss", "kl_estimate", "token_log_probs"}
    check(calls, names=names)
