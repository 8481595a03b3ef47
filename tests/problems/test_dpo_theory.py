"""DPO's derivation: a table of a policy against the enumeration, known minima, rankings by noise; the stage."""

import itertools
import math

import pytest
import torch

from pipelines.config import validate
from pipelines.errors import UserError
from pipelines.problems import dpo_theory_math as theory
from pipelines.problems.dpo_theory import DPOTheoryConfig
from pipelines.problems.search import minimized
from pipelines.runner import load_recipe
from pipelines.seq2seq.enumerable import make_world
from pipelines.seq2seq.known_optimum import KnownOptimumConfig, completion_count, known_optimum
from pipelines.stage import execute
from tests.problems.pages import assert_page_is_filled


@pytest.fixture(scope="module")
def world():
    return make_world(vocabulary=4, length=3, sources=1, spread=1.0)


@pytest.fixture(scope="module")
def tree(world):
    return theory.tree(world.completions, world.vocabulary)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_table_is_a_policy(world, tree):
    logits = random(tree.prefixes, 4)
    found = tree.log_probs(logits)
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-12)
    rows = {(): 0}
    for completion in world.completions:
        for size in range(1, len(completion)):
            rows.setdefault(tuple(completion[:size]), len(rows))
    for number in (0, 5, 39):
        completion, total = world.completions[number], 0.0
        for place, token in enumerate(completion):
            row = logits[rows[tuple(completion[:place])]].tolist()
            total += row[token] - math.log(sum(map(math.exp, row)))
        assert found[number].item() == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize(("vocabulary", "length"), [(4, 1), (4, 3), (5, 2)])
def test_completions_are_counted(vocabulary, length):
    words = [w for size in range(1, length + 1) for w in itertools.product(range(vocabulary), repeat=size)]
    ended = [w for w in words if 1 not in w[:-1] and (w[-1] == 1 or len(w) == length)]
    assert completion_count(vocabulary, length) == len(ended)


def test_the_optimum_is_where_a_search_ends(world, tree):
    start = random(tree.prefixes, 4)
    reference, rewards, beta = tree.log_probs(start), world.rewards[0], 0.7

    def loss(logits):
        policy = tree.log_probs(logits)
        return theory.kl(policy, reference) * beta - policy.exp() @ rewards

    best = minimized(loss, start)
    assert theory.kl(tree.log_probs(best), world.optimum(reference[None], beta)[0]).item() < 1e-9
    assert -loss(best).item() == pytest.approx(beta * theory.log_partition(reference, rewards, beta).item(), abs=1e-9)


def test_the_error_of_a_sampled_partition(world, tree):
    reference, rewards = tree.log_probs(random(tree.prefixes, 4)), world.rewards[0]
    for beta in (0.3, 1.0):
        values = (rewards / beta).exp()
        mean = (reference.exp() * values).sum()
        spread = ((reference.exp() * (values - mean) ** 2).sum().sqrt() / mean).item()
        assert theory.relative_error_of_z(reference, rewards, beta) == pytest.approx(spread, rel=1e-9)
    assert theory.relative_error_of_z(reference, torch.zeros_like(rewards), 1.0) == pytest.approx(0, abs=1e-7)


def test_noise_ranks_by_plackett_luce():
    """Against the product written out, 4 standard errors."""
    rewards, count = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64), 100_000
    drawn = theory.gumbel_rankings(rewards, count, torch.Generator().manual_seed(0))
    for ranking in theory.all_rankings(3).tolist():
        weights = [math.exp(rewards[i]) for i in ranking]
        exact = weights[0] / sum(weights) * weights[1] / (weights[1] + weights[2])
        found = (drawn == torch.tensor(ranking)).all(1).double().mean().item()
        assert found == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / count))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A known-optimum stage of few steps."""
    folder = tmp_path_factory.mktemp("known") / "known_optimum"
    fields = {"methods": ["dpo", "listwise"], "preference_steps": 3, "pairs_per_step": 32, "lists_per_step": 16}
    execute(known_optimum, validate(KnownOptimumConfig, fields | {"output_dir": str(folder)}))
    return str(folder)


@pytest.mark.parametrize("fields", [{}, {"vocabulary": 5, "length": 2, "beta": 0.2, "list_size": 3, "seed": 2}])
def test_the_stage_and_its_page(trained, fields, tmp_path):
    fields |= {"known_optimum": trained, "samples": 20_000, "output_dir": str(tmp_path / "out")}
    metrics = execute(load_recipe("problems/dpo_theory").function, validate(DPOTheoryConfig, fields))
    assert metrics["dpo_theory/checks_failed"] == 0
    assert metrics["dpo_theory/population_kl"] < 1e-7
    assert_page_is_filled(tmp_path / "out")


def test_wrong_folders_and_sizes_are_refused(trained, tmp_path):
    for fields, said in (
        ({"known_optimum": str(tmp_path)}, "no stage's folder"),
        ({"known_optimum": trained, "vocabulary": 8, "length": 4}, "2,801 completions"),
        ({}, "a value is needed"),
    ):
        with pytest.raises(UserError, match=said):
            validate(DPOTheoryConfig, fields)
