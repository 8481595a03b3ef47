"""Bit-flip diffusion: brute force against the scheduler's mathematics, two routes at a time; the stage."""

import json

import numpy as np
import pytest
import torch

from pipelines.config import validate
from pipelines.errors import UserError
from pipelines.images import bitflip_math
from pipelines.problems import bit_flip_math as brute
from pipelines.problems.bit_flip import BitFlipExerciseConfig
from pipelines.runner import load_recipe
from tests.problems.pages import assert_page_is_filled

DELTAS = [0.02, 0.1, 0.3, 0.07]


def test_replaced_by_enumeration_and_by_coins():
    formula = 1 - np.prod([1 - 2 * d for d in DELTAS])
    assert brute.replaced_by_enumeration(DELTAS) == pytest.approx(formula, abs=1e-12)
    thrown = brute.stage_by_stage(np.random.default_rng(0), 100_000, DELTAS)
    assert thrown.replaced.mean() == pytest.approx(formula, abs=4 * (formula * (1 - formula) / 1e5) ** 0.5)
    assert brute.replaced_by_enumeration([0.1] * 12) == pytest.approx(1 - 0.8**12, abs=1e-12)


def test_two_coins_do_what_all_stages_do():
    keep = brute.keeps_by_products(DELTAS)[-1]
    values, probability = brute.paths(DELTAS)
    assert probability.sum() == pytest.approx(1.0, abs=1e-12)
    exact = probability[values[:, -1] == 1].sum()
    assert exact == pytest.approx((1 + np.prod(1 - 2 * np.array(DELTAS))) / 2, abs=1e-12)
    draw = np.random.default_rng(1)
    for coins in (brute.stage_by_stage(draw, 100_000, DELTAS), brute.one_shot(draw, 100_000, keep)):
        assert (coins.values == 1).mean() == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 1e5) ** 0.5)
    assert coins.coins.max() == 2
    assert coins.coins.mean() == pytest.approx(2 - keep, abs=4 * (keep * (1 - keep) / 1e5) ** 0.5)


def test_keep_probabilities_and_posteriors_of_the_scheduler():
    deltas = torch.tensor(DELTAS, dtype=torch.float64)
    keeps = bitflip_math.keep_probabilities(deltas)
    np.testing.assert_allclose(keeps, brute.keeps_by_products(DELTAS), atol=1e-12)
    table = brute.posteriors_by_matrices(DELTAS)
    one = torch.ones((), dtype=torch.float64)
    for t in range(1, len(DELTAS) + 1):
        exact = brute.posterior_by_paths(DELTAS, t)
        for place, y in enumerate(brute.SIDES.tolist()):
            assert table[t - 1, place] == pytest.approx(exact[y], abs=1e-12)
            found = bitflip_math.posterior_probability(y * one, one, keeps[t - 1], keeps[t])
            assert float(found) == pytest.approx(exact[y], abs=1e-12)
    assert brute.posterior_by_paths(DELTAS, 1) == {-1: 1.0, 1: 1.0}


def test_log_odds_of_a_pixel_are_its_own_and_what_the_others_say():
    world = brute.World.random(3, seed=2)
    assert world.data.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(world.kernel(0.2).sum(1), 1.0, atol=1e-12)
    before = world.marginals([0.1, 0.2])[1]
    whole, others = world.previous(before, 0.2), world.from_others(before, 0.2)
    own = np.log(0.8 / 0.2) * world.images
    np.testing.assert_allclose(brute.log_odds(whole), brute.log_odds(others) + own, atol=1e-9)
    # Pixel i of Y_t does not matter for what the others say of it.
    flipped = [int(np.flatnonzero((world.images == row * [-1, 1, 1]).all(1))[0]) for row in world.images]
    np.testing.assert_allclose(others[:, 0], others[flipped, 0], atol=1e-12)


def test_generation_with_exact_posteriors_nears_the_data():
    world = brute.World.random(3, seed=0)
    distances = []
    for count in (1, 8, 64):
        generated = world.generated(brute.cosine_deltas(count))
        assert generated.sum() == pytest.approx(1.0)
        distances.append(brute.total_variation(generated, world.data))
    assert distances[0] > 4 * distances[1] > 24 * distances[2]
    # Pixels that are independent lose nothing, in one stage or many.
    apart = np.where(world.images == 1, [0.9, 0.2, 0.6], [0.1, 0.8, 0.4]).prod(1)
    alone = brute.World(world.images, apart)
    assert brute.total_variation(alone.generated([0.4999] * 3), apart) < 1e-6


def test_divergence_of_coins():
    p, q = np.array([0.3, 1.0, 0.0]), np.array([0.6, 0.25, 0.5])
    by_hand = 0.3 * np.log(0.3 / 0.6) + 0.7 * np.log(0.7 / 0.4)
    np.testing.assert_allclose(brute.bernoulli_kl(p, q), [by_hand, -np.log(0.25), np.log(2)], atol=1e-12)


def test_the_stage_through_its_recipe(finished, tmp_path):
    words = [f"bitflip={finished / 'bitflip'}", "stages=5", "pixels=3", "draws=20000", f"output_dir={tmp_path / 'out'}"]
    with pytest.raises(SystemExit) as ended:
        load_recipe("problems/bit_flip")(words)
    assert ended.value.code == 0
    found = json.loads((tmp_path / "out" / "exercise.json").read_text())
    assert_page_is_filled(tmp_path / "out")
    assert len(found["checks"]) >= 20
    assert found["values"]["replaced"] == pytest.approx(1 - 0.84**5)
    assert (tmp_path / "out" / "figures" / "generated.png").read_bytes().startswith(b"\x89PNG")


def test_another_stage_is_refused(finished, tmp_path):
    with pytest.raises(
        UserError, match=r"bitflip=.*images\.vae\.vae; give the folder of a finished stage of images/bitflip"
    ):
        validate(BitFlipExerciseConfig, {"bitflip": str(finished / "vae")})
    with pytest.raises(UserError, match="no stage's folder"):
        validate(BitFlipExerciseConfig, {"bitflip": str(tmp_path)})
    with pytest.raises(UserError, match="bitflip=: a value is needed"):
        validate(BitFlipExerciseConfig, {})
