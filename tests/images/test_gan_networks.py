"""The GAN's networks: the course's layers, other sizes, saving, and a pipeline that samples the same when loaded."""

import pytest
import torch

from pipelines.images.gan_networks import BatchNorm, GANDiscriminator, GANGenerator
from pipelines.images.gan_pipeline import GANPipeline


def layers(model, *kinds):
    return [module for module in model.modules() if isinstance(module, kinds)]


def test_the_courses_networks():
    generator, discriminator = GANGenerator(), GANDiscriminator()
    linear, conv = torch.nn.Linear, torch.nn.Conv2d
    assert [tuple(m.weight.shape) for m in layers(generator, linear)] == [(512, 64), (64 * 7 * 7, 512)]
    assert [tuple(m.weight.shape) for m in layers(generator, conv)] == [(32, 16, 3, 3), (1, 8, 3, 3)]
    assert [m.num_features for m in layers(generator, BatchNorm)] == [512, 64 * 7 * 7, 32]
    assert [tuple(m.weight.shape) for m in layers(discriminator, conv)] == [(32, 1, 4, 4), (64, 32, 4, 4)]
    assert all(m.stride == (2, 2) for m in layers(discriminator, conv))
    assert [tuple(m.weight.shape) for m in layers(discriminator, linear)] == [(512, 64 * 7 * 7), (1, 512)]


@pytest.mark.parametrize(("size", "channels", "stages"), [(8, 1, 2), (28, 1, 2), (32, 3, 3), (12, 3, 1)])
def test_sizes_and_colours(size, channels, stages):
    generator = GANGenerator(sample_size=size, channels=channels, stages=stages, hidden=16, width=16, latent_dim=4)
    discriminator = GANDiscriminator(sample_size=size, channels=channels, stages=stages, hidden=16, width=16)
    images = generator(torch.randn(5, 4))
    assert images.shape == (5, channels, size, size)
    assert images.abs().max() <= 1
    assert discriminator(images).shape == (5,)


def test_batch_norm_alone_is_torchs():
    ours, torchs = BatchNorm(3), torch.nn.BatchNorm2d(3)
    for _ in range(3):
        x = torch.randn(4, 3, 5, 5)
        assert torch.equal(ours(x), torchs(x))
    assert torch.equal(ours.running_var, torchs.running_var)
    assert torch.equal(ours.eval()(x), torchs.eval()(x))


def test_settled_statistics_belong_to_the_weights():
    torch.manual_seed(0)
    generator = GANGenerator(sample_size=8, hidden=32, width=16, latent_dim=8)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    noise = torch.randn(4000, 8)
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    settled = generator.settled(batches=40)
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())
    with torch.no_grad():
        unsettled = generator.eval()(noise)
        wanted = generator.train()(noise)  # by the statistics of this large batch
        errors = [float((wanted - found).abs().mean()) for found in (settled(noise), unsettled)]
    assert 10 * errors[0] < errors[1]
    again = generator.settled(batches=40).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in settled.state_dict().items())
    assert not settled.training


def test_spectral_norm_bounds_every_layer():
    discriminator = GANDiscriminator(sample_size=8, hidden=16, width=16, spectral_norm=True)
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.mul_(10)
    for _ in range(30):  # one power iteration each
        discriminator(torch.randn(2, 1, 8, 8))
    for layer in layers(discriminator, torch.nn.Linear, torch.nn.Conv2d):
        assert float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("spectral", [False, True])
def test_a_saved_pipeline_samples_the_same(tmp_path, spectral):
    torch.manual_seed(0)
    generator = GANGenerator(sample_size=8, hidden=16, width=16).settled()
    discriminator = GANDiscriminator(sample_size=8, hidden=16, width=16, spectral_norm=spectral)
    pipeline = GANPipeline(generator, discriminator)
    pipeline.save_pretrained(tmp_path)
    loaded = GANPipeline.from_pretrained(tmp_path)
    noise = torch.Generator().manual_seed(3)
    first = pipeline(batch_size=6, generator=noise, output_type="pt").images
    second = loaded(batch_size=6, generator=noise.manual_seed(3), output_type="pt").images
    assert torch.equal(first, second)
    assert 0 <= first.min() < first.max() <= 1
    x = 2 * first - 1
    assert torch.equal(discriminator.eval()(x), loaded.discriminator.eval()(x))
    pictures = loaded(batch_size=2).images
    assert pictures[0].size == (8, 8)
    both = loaded(batch_size=2, generator=noise.manual_seed(4), output_type="np", return_dict=False)[0]
    assert both.shape == (2, 8, 8, 1)


def test_a_generator_alone_is_a_pipeline(tmp_path):
    GANPipeline(GANGenerator(sample_size=8, hidden=16, width=16)).save_pretrained(tmp_path)
    assert GANPipeline.from_pretrained(tmp_path).discriminator is None
