"""Policy gradients by enumeration against autograd, differences and sampling; the stage on a finished chain."""

import json

import pytest
import torch

from pipelines.config import validate
from pipelines.errors import UserError
from pipelines.problems import policy_gradient_math as pg
from pipelines.problems.policy_gradient import PolicyGradientConfig
from pipelines.runner import load_recipe
from pipelines.seq2seq.enumerable import make_world
from tests.problems.pages import assert_page_is_filled


@pytest.fixture(scope="module")
def world():
    return make_world(vocabulary=4, length=2, sources=2, spread=1.0, seed=3)


@pytest.fixture(scope="module")
def model(world):
    return pg.make_model(world, seed=1)


@pytest.fixture(scope="module")
def scored(world, model):
    return pg.scores(world, model)


def test_scores_are_gradients_of_log_probabilities(world, model, scored):
    probabilities, score = scored
    assert torch.allclose(probabilities.sum(1), torch.ones(2, dtype=torch.float64), atol=1e-12)
    log_probs = world.log_probs(model, gradient=True)
    total = pg.flat_gradient((log_probs * probabilities).sum(), pg.parameters_of(model))
    assert torch.allclose(total, torch.einsum("sn,snd->d", probabilities, score), atol=1e-12)
    assert total.abs().max() < 1e-12  # E[∇ log π] = 0


@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_the_estimators_mean_is_the_gradient_with_any_baseline(world, model, scored, offset):
    probabilities, score = scored
    rewards = world.rewards + offset
    exact = -pg.flat_gradient(
        pg.expected_reward(world.log_probs(model, gradient=True), rewards), pg.parameters_of(model)
    )
    for baseline in (0.0, 7.0, pg.mean_reward(probabilities, rewards), pg.best_baseline(probabilities, score, rewards)):
        each = pg.estimates(score, rewards, baseline)
        mean = torch.einsum("sn,snd->d", probabilities / 2, each)
        assert torch.allclose(mean, exact, atol=1e-11)


def test_variance_against_samples_and_the_best_baseline_against_others(world, scored):
    probabilities, score = scored
    rewards = world.rewards + 2.0
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(2, (20_000,), generator=draw)
    picked = torch.multinomial(probabilities[prompts], 1, generator=draw)[:, 0]
    each = pg.estimates(score, rewards)
    share = torch.zeros_like(probabilities).index_put_((prompts, picked), torch.tensor(1 / 20_000).double(), True)
    mean = torch.einsum("sn,snd->d", share, each)  # of the 20,000, each of which is one of a few
    squares = (each - mean).square().sum(-1)[prompts, picked]
    error = 4 * float(squares.std()) / 20_000**0.5
    assert float(squares.mean()) == pytest.approx(pg.total_variance(probabilities, score, rewards), abs=error)
    best = pg.best_baseline(probabilities, score, rewards)
    least = pg.total_variance(probabilities, score, rewards, best)
    for other in (0.0, pg.mean_reward(probabilities, rewards), best + 0.1, best - 0.1):
        assert pg.total_variance(probabilities, score, rewards, other) > least
    # An offset costs nothing when it is taken off again.
    assert pg.total_variance(probabilities, score, rewards + 9.0, best + 9.0) == pytest.approx(least)


def test_gradients_are_whole(world, model):
    """Against central differences in every embedding's first row, which transformers keeps out of training."""
    log_probs = world.log_probs(model, gradient=True)
    value = pg.expected_reward(log_probs, world.rewards)
    table = model.get_input_embeddings().weight
    (gradient,) = torch.autograd.grad(value, table)
    for place in ((0, 0), (0, 5), (2, 3)):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                table[place] += sign * 1e-5
                ends.append(float(pg.expected_reward(world.log_probs(model), world.rewards)))
                table[place] -= sign * 1e-5
        assert float(gradient[place]) == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-8)


def test_reward_one_on_the_data_is_cross_entropy(world, model, scored):
    probabilities, score = scored
    data = torch.softmax(torch.randn(probabilities.shape, generator=torch.Generator().manual_seed(0)).double(), 1)
    likelihood = pg.cross_entropy_gradient(world, model, data)
    on_data = torch.einsum("sn,snd->d", data / 2, pg.estimates(score, torch.ones_like(data)))
    on_policy = torch.einsum("sn,snd->d", probabilities / 2, pg.estimates(score, data / probabilities))
    assert torch.allclose(likelihood, on_data, atol=1e-11)
    assert torch.allclose(likelihood, on_policy, atol=1e-11)


def chain_words(finished) -> list[str]:
    return [f"reward={finished / 'reward'}", f"ppo={finished / 'ppo'}", f"evaluation={finished / 'evaluate'}"]


def test_the_stage_through_its_recipe(finished, tmp_path):
    words = [*chain_words(finished), "length=2", "draws=4000", "steps=12", "seeds=2", f"output_dir={tmp_path / 'out'}"]
    with pytest.raises(SystemExit) as ended:
        load_recipe("problems/policy_gradient")(words)
    assert ended.value.code == 0
    found = json.loads((tmp_path / "out" / "exercise.json").read_text())
    assert_page_is_filled(tmp_path / "out")
    assert len(found["checks"]) >= 14
    assert found["values"]["variance"] > found["values"]["variance_mean_baseline"]
    assert found["values"]["rollouts"] == 4
    metrics = json.loads((finished / "evaluate" / "stage.json").read_text())["metrics"]
    assert found["values"]["win_rate"] == pytest.approx(100 * metrics["ppo/gold_win_rate"])


def test_wrong_stages_and_sizes_are_refused(finished):
    given = dict(word.split("=") for word in chain_words(finished))
    with pytest.raises(UserError, match=r"ppo=.*finished stage of summarization/ppo"):
        validate(PolicyGradientConfig, given | {"ppo": given["reward"]})
    with pytest.raises(UserError, match="at most 200 completions"):
        validate(PolicyGradientConfig, given | {"vocabulary": 8, "length": 4})
