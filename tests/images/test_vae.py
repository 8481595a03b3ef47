"""The variational autoencoder: bounds against closed forms, networks, the stage, and its pipeline in a new process."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence

from pipelines.config import validate
from pipelines.errors import UserError
from pipelines.images import vae_math
from pipelines.images.data import load_images
from pipelines.images.method import Batch, Draws
from pipelines.images.saved import check_family, load_parts, load_pipeline
from pipelines.images.vae import VAEConfig
from pipelines.images.vae_blur import VAEBlurConfig
from pipelines.images.vae_method import VAEMethod
from pipelines.images.vae_networks import ImageVAE, halvings
from pipelines.images.vae_pipeline import VAEPipeline
from tests.chain.test_whole import documented


def random_gaussians(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    m = torch.randn(*shape, generator=draw, dtype=torch.float64)
    return m, torch.rand(*shape, generator=draw, dtype=torch.float64) * 3 + 0.01


def small(**values) -> VAEConfig:
    plain = {"architecture": "mlp", "hidden": 12, "latent_dim": 3, "importance_samples": 7, "max_train": 64}
    return validate(VAEConfig, plain | {"max_test": 24, "report_to": "none", "precision": "fp32"} | values)


# ------------------------------------------------------------------------------------------------------ the mathematics


def test_divergence_of_gaussians():
    (m, v), (pm, pv) = random_gaussians(40, 5), random_gaussians(40, 5, seed=1)
    exact = kl_divergence(Normal(m, v.sqrt()), Normal(pm, pv.sqrt()))
    assert torch.allclose(vae_math.gaussian_kl(m, v, pm, pv), exact, rtol=1e-12)
    standard = kl_divergence(Normal(m, v.sqrt()), Normal(torch.zeros_like(m), torch.ones_like(v)))
    assert torch.allclose(vae_math.gaussian_kl(m, v), standard, rtol=1e-12)
    assert vae_math.gaussian_kl(torch.zeros(3), torch.ones(3)).tolist() == [0.0, 0.0, 0.0]


def test_log_densities():
    (m, v), (x, _) = random_gaussians(6, 5), random_gaussians(6, 5, seed=1)
    exact = Independent(Normal(m, v.sqrt()), 1).log_prob(x)
    assert torch.allclose(vae_math.gaussian_log_density(x, m, v), exact, rtol=1e-12)
    images, means = x.reshape(3, 1, 2, 5), m.reshape(3, 1, 2, 5)
    variance = torch.tensor(0.3, dtype=torch.float64)
    exact = -Normal(means, variance.sqrt()).log_prob(images).sum((1, 2, 3))
    assert torch.allclose(vae_math.gaussian_nll(images, means, variance), exact, rtol=1e-12)


def test_bernoulli_pixels():
    draw = torch.Generator().manual_seed(0)
    images = (torch.rand(4, 1, 5, 5, generator=draw, dtype=torch.float64) < 0.5).double()
    logits = torch.randn(3, 4, 1, 5, 5, generator=draw, dtype=torch.float64) * 5
    exact = -Bernoulli(logits=logits).log_prob(images).sum((-3, -2, -1))
    assert torch.allclose(vae_math.bernoulli_nll(images, logits), exact, rtol=1e-12)
    one = torch.ones(1, 1, 1, 1)
    assert vae_math.bernoulli_nll(one, one * -1e4).item() == 1e4
    assert vae_math.bernoulli_nll(one, one * 1e4).item() == 0.0


def test_samples_have_the_mean_and_variance_and_carry_gradients():
    m = torch.tensor([1.0, -2.0], requires_grad=True)
    v = torch.tensor([4.0, 0.25], requires_grad=True)
    noise = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0))
    z = vae_math.sample_gaussian(m, v, noise)
    assert torch.allclose(z.mean(0), m, atol=0.02)
    assert torch.allclose(z.var(0), v, rtol=0.02)
    z[0].sum().backward()
    assert m.grad.tolist() == [1.0, 1.0]
    assert torch.allclose(v.grad, noise[0] / (2 * v.detach().sqrt()))
    assert vae_math.sample_gaussian(m, v).shape == (2,)


def test_the_bound_is_the_sum_of_its_terms():
    m, v = random_gaussians(8, 5)
    reconstruction = torch.rand(8, dtype=torch.float64) * 100
    bound = vae_math.negative_elbo_bound(reconstruction, m, v)
    assert torch.allclose(bound.negative_elbo, bound.kl + bound.reconstruction)
    assert torch.allclose(bound.kl, vae_math.gaussian_kl(m, v).sum(1))
    heavier = vae_math.negative_elbo_bound(reconstruction, m, v, beta=4.0)
    assert torch.allclose(heavier.negative_elbo - bound.negative_elbo, 3 * bound.kl)
    assert torch.equal(heavier.kl, bound.kl)


def test_free_bits():
    m, v = random_gaussians(8, 5)
    each = kl_divergence(Normal(m, v.sqrt()), Normal(torch.zeros_like(m), torch.ones_like(v)))
    expected = torch.tensor([sum(max(0.4, float(d)) for d in row) for row in each], dtype=torch.float64)
    assert torch.allclose(vae_math.free_bits_kl(m, v, 0.4), expected)
    assert torch.allclose(vae_math.free_bits_kl(m, v, 0.0), each.sum(1))


class Linear:
    """x = W z + ε with z ~ N(0, I), ε ~ N(0, σ² I): everything is known (Tipping and Bishop 1999)."""

    def __init__(self, latents: int = 2, pixels: int = 6, variance: float = 0.4):
        draw = torch.Generator().manual_seed(5)
        self.w = torch.randn(pixels, latents, generator=draw, dtype=torch.float64)
        self.variance = torch.tensor(variance, dtype=torch.float64)
        z = torch.randn(9, latents, generator=draw, dtype=torch.float64)
        self.x = z @ self.w.T + self.variance.sqrt() * torch.randn(9, pixels, generator=draw, dtype=torch.float64)
        covariance = self.w @ self.w.T + self.variance * torch.eye(pixels, dtype=torch.float64)
        marginal = torch.distributions.MultivariateNormal(torch.zeros(pixels, dtype=torch.float64), covariance)
        self.nll = -marginal.log_prob(self.x)
        self.precision = torch.eye(latents, dtype=torch.float64) + self.w.T @ self.w / self.variance
        self.m = self.x @ self.w @ self.precision.inverse() / self.variance

    def bounds(self, v: torch.Tensor, k: int, seed: int = 0) -> torch.Tensor:
        """(9,) importance-weighted bounds with q(z|x) = N(posterior mean, diag v)."""
        noise = torch.randn(k, *self.m.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        z = vae_math.sample_gaussian(self.m, v, noise)
        means = (z @ self.w.T)[:, :, None, None]
        reconstruction = vae_math.gaussian_nll(self.x[:, None, None], means, self.variance)
        weights = vae_math.log_weights(reconstruction, z, self.m, v.expand_as(self.m))
        return vae_math.importance_weighted_bound(weights)


def test_with_the_true_posterior_one_sample_gives_the_likelihood():
    model = Linear(latents=1)  # in one dimension a diagonal Gaussian is the posterior
    exact = model.bounds(1 / model.precision[0, 0].expand(9, 1), k=1)
    assert torch.allclose(exact, model.nll, rtol=1e-10)


def test_importance_weighted_bounds_come_down_to_the_likelihood():
    model = Linear()
    v = 2.5 * model.precision.diag().reciprocal().expand(9, 2)  # wider than the posterior: there is a gap
    means = {k: np.mean([model.bounds(v, k, seed).numpy() for seed in range(500 // k + 20)]) for k in (1, 5, 50, 500)}
    truth = model.nll.mean().item()
    assert means[1] > means[5] > means[50] > truth - 0.01
    assert means[1] - truth > 0.05
    assert means[500] == pytest.approx(truth, abs=0.01)


def test_blur_lowers_sharpness():
    images = torch.rand(3, 1, 20, 20, generator=torch.Generator().manual_seed(0))
    blurred = torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1)
    assert (vae_math.sharpness(blurred) < 0.2 * vae_math.sharpness(images)).all()
    board = (torch.arange(6)[:, None] + torch.arange(6)) % 2
    assert vae_math.sharpness(board[None].double()).item() == 2.0  # every neighbour differs by one, both ways
    assert vae_math.sharpness(torch.full((1, 4, 4), 0.3)).item() == 0.0


# ---------------------------------------------------------------------------------------------------- networks, method


def test_the_mlp_has_the_weights_it_should():
    network = ImageVAE()
    sizes = [(784, 300), (300, 300), (300, 128), (64, 300), (300, 300), (300, 784)]
    assert sum(p.numel() for p in network.parameters()) == sum(a * b + b for a, b in sizes)
    images = torch.rand(5, 1, 28, 28)
    m, v = network.encode(images)
    assert m.shape == v.shape == (5, 64)
    assert (v > 0).all()
    assert torch.allclose(v, torch.nn.functional.softplus(network.encoder(images)[:, 64:]), atol=1e-6)


@pytest.mark.parametrize("architecture", ["mlp", "conv"])
@pytest.mark.parametrize(("size", "channels"), [(4, 1), (8, 1), (9, 3), (28, 1), (32, 3)])
def test_networks_for_any_size(architecture, size, channels):
    likelihood = "gaussian" if channels == 3 else "bernoulli"
    network = ImageVAE(
        size, channels, latent_dim=3, architecture=architecture, hidden=8, width=4, likelihood=likelihood
    )
    images = (torch.rand(2, channels, size, size) < 0.5).float()
    nats, m, v = network(images, torch.randn(2, 3))
    assert nats.shape == (2,)
    assert network.decode(torch.randn(4, 2, 3)).shape == (4, 2, channels, size, size)
    assert network.expected(m).min() >= 0
    (nats + v.sum(1)).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_sides_are_halved_twice_where_they_can_be():
    assert [halvings(size) for size in (4, 7, 8, 12, 14, 16, 28, 32, 64)] == [0, 0, 1, 1, 1, 2, 2, 2, 2]


def digits(config: VAEConfig, rows: int = 16) -> tuple[VAEMethod, Batch, Draws]:
    images = load_images(config)
    torch.manual_seed(0)
    method = VAEMethod(config, images)
    batch = images.train.batch(slice(0, rows), Draws(torch.Generator().manual_seed(1), rows), config)
    return method, batch, Draws(torch.Generator().manual_seed(2), rows)


def test_the_loss_is_the_bound_and_its_variants():
    method, batch, draws = digits(small())
    loss, logs = method.loss("vae", batch, draws, 0)
    network = method.parts["vae"]
    m, v = network.encode(batch.images)
    noise = torch.randn(16, 3, generator=torch.Generator().manual_seed(2))
    nats = vae_math.bernoulli_nll(batch.images, network.decode(m + v.sqrt() * noise)).mean()
    kl = vae_math.gaussian_kl(m, v).sum(1).mean()
    assert loss.item() == pytest.approx((nats + kl).item(), rel=1e-5)
    assert {name: value.item() for name, value in logs.items()} == pytest.approx(
        {"negative_elbo": (nats + kl).item(), "kl": kl.item(), "reconstruction": nats.item()}, rel=1e-5
    )
    for values, step, weight in (({"beta": 3.0}, 0, 3.0), ({"kl_warmup_steps": 10, "beta": 2.0}, 4, 1.0)):
        method, batch, draws = digits(small(**values))
        assert method.loss("vae", batch, draws, step)[0].item() == pytest.approx((nats + weight * kl).item(), rel=1e-5)
    method, batch, draws = digits(small(free_bits=5.0))
    assert method.loss("vae", batch, draws, 0)[0].item() == pytest.approx((nats + 15).item(), rel=1e-5)


def test_what_is_measured_of_an_image():
    method, batch, draws = digits(small())
    with torch.no_grad():
        found = method.evaluate(batch, draws)
    assert set(found) == {
        "negative_elbo",
        "kl",
        "reconstruction",
        "bits_per_pixel",
        "active_units",
        "importance_weighted",
    }
    assert torch.allclose(found["negative_elbo"], found["kl"] + found["reconstruction"])
    assert torch.allclose(found["bits_per_pixel"], found["negative_elbo"] / 64 / math.log(2))
    assert ((found["active_units"] >= 0) & (found["active_units"] <= 3)).all()
    assert found["importance_weighted"].mean() < found["negative_elbo"].mean() + 0.5
    pictures = dict(method.pictures(batch, torch.Generator()))
    shapes = {name: tuple(picture.shape[:2]) for name, picture in pictures.items()}
    assert shapes == {"reconstructions": (2, 16), "traversals": (3, 11), "interpolations": (8, 11)}
    assert torch.equal(pictures["reconstructions"][0], batch.images)
    ends = pictures["interpolations"][0, [0, -1]]
    assert torch.allclose(ends, pictures["reconstructions"][1, [0, 8]], atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- pipeline

READER = """
import sys, torch
from diffusers import DiffusionPipeline
from pipelines.images.vae_pipeline import VAEPipeline
pipe = VAEPipeline.from_pretrained(sys.argv[1])
assert isinstance(pipe, DiffusionPipeline)
images = pipe(batch_size=3, generator=torch.Generator().manual_seed(7), output_type="np").images
print(images.shape, images.astype("float64").tobytes().hex())
assert not {"trl", "datasets", "accelerate.data_loader_"} & set(sys.modules)
"""


def test_a_saved_pipeline_gives_the_same_samples_in_another_process(tmp_path):
    torch.manual_seed(3)
    pipe = VAEPipeline(ImageVAE(8, 1, latent_dim=4, architecture="conv", hidden=8, width=4))
    pipe.save_pretrained(tmp_path / "vae")
    images = pipe(batch_size=3, generator=torch.Generator().manual_seed(7), output_type="np").images
    done = subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path / "vae")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split(") ")[1].strip() == images.astype("float64").tobytes().hex()
    assert not list(tmp_path.rglob("*.bin"))
    pipe = load_pipeline(tmp_path / "vae")
    pictures = pipe(batch_size=2, generator=torch.Generator().manual_seed(7)).images
    assert np.array_equal(np.asarray(pictures[1]), (images[1, ..., 0] * 255).round().astype("uint8"))


def test_the_pipeline_draws_pixels_encodes_and_reconstructs():
    pipe = VAEPipeline(ImageVAE(8, 1, latent_dim=4, hidden=8))
    draw = torch.Generator().manual_seed(0)
    pixels = pipe(batch_size=4, generator=draw, draw_pixels=True, output_type="pt").images
    assert set(pixels.unique().tolist()) == {0.0, 1.0}
    images = (torch.rand(5, 1, 8, 8, generator=draw) < 0.5).float()
    m, _ = pipe.vae.encode(images)
    assert torch.equal(pipe.encode(images), m)
    assert not torch.equal(pipe.encode(images, draw), m)
    assert torch.allclose(pipe.reconstruct(images), pipe.vae.expected(m))
    grey = VAEPipeline(ImageVAE(8, 1, latent_dim=4, hidden=8, likelihood="gaussian", variance=0.01))
    noisy = grey(batch_size=4, generator=torch.Generator().manual_seed(0), draw_pixels=True, output_type="pt").images
    plain = grey(batch_size=4, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert 0.01 < (noisy - plain).abs().mean() < 0.2


def test_what_is_no_pipeline_of_this_family_is_refused_in_one_line(tmp_path):
    VAEPipeline(ImageVAE(8, 1, latent_dim=4, hidden=8)).save_pretrained(tmp_path / "vae")
    other = tmp_path / "other"
    other.mkdir()
    (other / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    cases = [
        (lambda: small(model=str(other)), r"model=.*/other: holds a ddpm, not a vae; give the folder of a vae"),
        (lambda: small(model=str(tmp_path)), r"no saved pipeline \(it has no model_index.json\); give the folder of a"),
        (lambda: check_family(tmp_path / "vae", "model", "gan"), "holds a vae, not a gan"),
        (lambda: load_parts({"vae": ImageVAE(8, 1, 4, hidden=9)}, str(tmp_path / "vae")), "its vae is not the network"),
        (lambda: load_parts({"unet": ImageVAE(8, 1, 4)}, str(tmp_path / "vae")), "has no weights of unet"),
    ]
    for action, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            action()
        assert len(str(caught.value).splitlines()) == 1
    same = ImageVAE(8, 1, latent_dim=4, hidden=8)
    load_parts({"vae": same}, str(tmp_path / "vae"))
    assert load_pipeline(tmp_path / "vae").vae.encoder[1].weight.equal(same.encoder[1].weight)
    (tmp_path / "vae" / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="damaged"):
        load_parts({"vae": same}, str(tmp_path / "vae"))
    with pytest.raises(UserError, match="the pipeline cannot be loaded"):
        load_pipeline(tmp_path / "vae")


def test_training_goes_on_from_a_saved_pipeline(stages, tmp_path):
    words = ["architecture=mlp", "hidden=16", "latent_dim=4", "max_test=40", "importance_samples=0", "logging_steps=5"]
    words += ["save_steps=100", "report_to=none", "max_steps=60"]
    code, printed, errors = stages.answer("--recipe", "images/vae", *words, f"output_dir={tmp_path / 'first'}")
    assert code == 0, printed + errors
    words += ["max_steps=5", f"model={tmp_path / 'first'}", f"output_dir={tmp_path / 'second'}"]
    code, printed, errors = stages.answer("--recipe", "images/vae", *words)
    assert code == 0, printed + errors
    losses = [json.loads((tmp_path / name / "log_history.json").read_text()) for name in ("first", "second")]
    first, last, after = losses[0][0]["loss"], losses[0][-1]["loss"], losses[1][0]["loss"]
    assert last < first - 5
    assert abs(after - last) < abs(after - first)


def test_sharpness_follows_the_nats_that_the_latent_carries(stages, root, tmp_path):
    out = tmp_path / "blur"
    words = ["architecture=mlp", "hidden=64", "latent_dim=8", "max_train=300", "max_test=60", "max_steps=100"]
    words += ["betas=[0.05,1,30]", "save_steps=100", "precision=fp32", "learning_rate=0.003", f"output_dir={out}"]
    code, printed, errors = stages.answer("--recipe", "images/vae_blur", *words)
    assert code == 0, printed + errors
    assert {path.name for path in out.iterdir()} >= {"sweep.json", "sharpness.svg", "reconstructions.png", "stage.json"}
    assert not (out / "checkpoints").exists()
    rows = json.loads((out / "sweep.json").read_text())
    assert [(row["likelihood"], row["beta"]) for row in rows] == [
        (likelihood, beta) for likelihood in ("bernoulli", "gaussian") for beta in (0.05, 1, 30)
    ]
    for three in (rows[:3], rows[3:]):
        assert three[0]["kl"] > three[1]["kl"] > three[2]["kl"]
        assert three[0]["sharpness"] > three[1]["sharpness"] > three[2]["sharpness"] > 0
    metrics = json.loads((out / "stage.json").read_text())["metrics"]
    assert metrics["vae_blur/rank_correlation"] > 0.7
    assert metrics["vae_blur/bernoulli_0_05_kl"] == rows[0]["kl"]
    patterns = documented(root)
    assert all(any(pattern.fullmatch(key) for pattern in patterns) for key in metrics)


def test_wrong_sweeps_are_one_line_each(tmp_path):
    cases = [
        ({"betas": [1, 1.0]}, r"betas=\[1.0, 1.0\]: one of them stands twice"),
        ({"betas": [-1]}, "betas=.*a weight is below 0"),
        ({"binarize": "none"}, "likelihoods=.*grey levels are not binary; give binarize=threshold"),
    ]
    for values, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            validate(VAEBlurConfig, values)
        assert len(str(caught.value).splitlines()) == 1


def test_every_metric_is_explained(root, stages, tmp_path):
    out = tmp_path / "vae"
    words = ["max_train=100", "max_steps=1", "max_test=20", "hidden=8", "width=4", "report_to=none", "batch_size=10"]
    code, printed, errors = stages.answer("--recipe", "images/vae", *words, f"output_dir={out}")
    assert code == 0, printed + errors
    patterns = documented(root)
    for key in json.loads((out / "stage.json").read_text())["metrics"]:
        plain = key.removesuffix("_ci_low").removesuffix("_ci_high").removesuffix("_se")
        assert any(pattern.fullmatch(plain) for pattern in patterns), f"docs/metrics.md does not explain {plain}"
    sizes = {path.name: path.stat().st_size for path in out.glob("*.png")}
    assert set(sizes) == {"samples.png", "reconstructions.png", "traversals.png", "interpolations.png"}
