"""Latent variables: information and best decoders against brute force; the plain autoencoder; the stage."""

import json
import math
import re
from xml.etree import ElementTree

import pytest
import torch
from torch.distributions import Independent, Normal
from torch.nn.functional import binary_cross_entropy, mse_loss

from pipelines.config import validate
from pipelines.errors import UserError
from pipelines.problems import latent_variables_math as latent
from pipelines.problems.latent_diagram import Numbers, diagram
from pipelines.problems.latent_variables import LatentVariablesConfig
from pipelines.runner import load_recipe
from tests.problems.pages import assert_page_is_filled


def codes(count: int, dimensions: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    m = torch.randn(count, dimensions, generator=draw, dtype=torch.float64)
    return m, torch.rand(count, dimensions, generator=draw, dtype=torch.float64) + 0.05


def test_posterior_over_images_is_bayes():
    m, v = codes(7, 3)
    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    densities = torch.stack([Independent(Normal(a, b.sqrt()), 1).log_prob(z) for a, b in zip(m, v, strict=True)], 1)
    by_hand = densities.exp() / densities.exp().sum(1, keepdim=True)
    assert torch.allclose(latent.index_log_posterior(z, m, v).exp(), by_hand, atol=1e-12)
    images = torch.rand(7, 1, 2, 2, generator=torch.Generator().manual_seed(2))
    loops = torch.stack([sum(w * x for w, x in zip(row, images.double(), strict=True)) for row in by_hand])
    assert torch.allclose(latent.best_decoder(z, m, v, images), loops, atol=1e-12)


def test_no_answer_to_a_z_is_better_than_the_mean_of_what_stands_behind_it():
    """Squared error and cross-entropy, mean over the images: flat there by autograd, higher at every other answer."""
    m, v = codes(5, 2, seed=4)
    z = torch.randn(1, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    images = torch.rand(5, 1, 2, 3, generator=torch.Generator().manual_seed(6)).double()
    weight = latent.index_log_posterior(z, m, v).exp()[0]
    best = latent.best_decoder(z, m, v, images)[0]

    for loss in (binary_cross_entropy, mse_loss):

        def mean_loss(answer: torch.Tensor, loss=loss) -> torch.Tensor:
            return weight @ loss(answer.expand_as(images), images, reduction="none").sum((1, 2, 3))

        here = best.clone().requires_grad_()
        (slope,) = torch.autograd.grad(mean_loss(here), here)
        assert slope.abs().max() < 1e-12
        for other in (*images, *torch.rand(20, 1, 2, 3, generator=torch.Generator().manual_seed(7)).double()):
            assert mean_loss(other) > mean_loss(best)


def test_information_at_its_two_ends():
    draw = torch.Generator().manual_seed(0)
    same = torch.zeros(50, 2, dtype=torch.float64), torch.ones(50, 2, dtype=torch.float64)
    noise = torch.randn(50, 2, generator=draw, dtype=torch.float64)
    nothing = latent.carried(*same, noise)
    assert nothing == pytest.approx((0.0, 0.0, 50.0), abs=1e-9)
    apart = torch.arange(50.0, dtype=torch.float64)[:, None].expand(50, 2) * 100
    all_of_it = latent.carried(apart, torch.full((50, 2), 1e-4, dtype=torch.float64), noise)
    assert all_of_it.information == pytest.approx(math.log(50), abs=1e-9)
    assert all_of_it.behind == pytest.approx(1.0, abs=1e-9)


def test_information_in_one_dimension_against_quadrature():
    from scipy.integrate import quad

    m, v = codes(4, 1, seed=3)

    def q(z: float) -> list[float]:
        return [
            float(Normal(a, b.sqrt()).log_prob(torch.tensor(z, dtype=torch.float64)).exp())
            for a, b in zip(m[:, 0], v[:, 0], strict=True)
        ]

    def integrand(z: float) -> float:
        parts = q(z)
        whole = sum(parts) / 4
        return sum(p / 4 * math.log(p / whole) for p in parts if p > 0)

    exact = quad(integrand, -12, 12, points=[float(a) for a in m[:, 0]], epsabs=1e-8)[0]
    draw, found = torch.Generator().manual_seed(0), []
    for _ in range(1000):
        found.append(latent.carried(m, v, torch.randn(4, 1, generator=draw, dtype=torch.float64)).information)
    values = torch.tensor(found)
    assert float(values.mean()) == pytest.approx(exact, abs=4 * float(values.std()) / 1000**0.5)


def test_the_diagram_is_sound_svg_with_its_numbers():
    text = diagram(Numbers("1×8×8", 16, 12_345, 23_456, 7.25, 11.5))
    root = ElementTree.fromstring(text)
    shown = " ".join(node.text for node in root.iter() if node.tag.endswith("text"))
    for wanted in ("1×8×8", "16 numbers", "12,345 weights", "23,456 weights", "7.2 nats", "11.5 nats", "18.8 nats"):
        assert wanted in shown, wanted
    width, height = (float(n) for n in root.get("viewBox").split()[2:])
    for node in root.iter():
        if node.tag.endswith("rect"):
            x, y, w, h = (float(node.get(name)) for name in ("x", "y", "width", "height"))
            assert x >= 0
            assert x + w <= width
            assert y + h <= height
    assert not re.search(r'\bid="', text)


def test_the_stage_through_its_recipe(finished, tmp_path):
    words = [f"vae={finished / 'vae'}", "betas=[0.05,40]", "dimensions=[1,4]", "steps=150", "draws=2000"]
    with pytest.raises(SystemExit) as ended:
        load_recipe("problems/latent_variables")([*words, f"output_dir={tmp_path / 'out'}"])
    assert ended.value.code == 0
    found = json.loads((tmp_path / "out" / "exercise.json").read_text())
    assert_page_is_filled(tmp_path / "out")
    assert len(found["checks"]) == 9
    values = found["values"]
    assert values["rate_low"] > values["rate_high"]
    assert values["latent"] == 4
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_wrong_input_is_refused(finished):
    with pytest.raises(UserError, match="finished stage of images/vae"):
        validate(LatentVariablesConfig, {"vae": str(finished / "bitflip")})
    with pytest.raises(UserError, match="stands twice"):
        validate(LatentVariablesConfig, {"vae": str(finished / "vae"), "betas": [1.0, 1.0]})
