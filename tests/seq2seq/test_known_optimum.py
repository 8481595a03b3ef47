"""Where all completions can be enumerated, every method must end at π* ∝ π_ref e^{r/β}."""

import dataclasses
import json
import math
import shutil

import pytest
import torch

from pipelines.reporting.run import Run, Stage
from pipelines.reporting.sections.known_optimum import known_optimum as known_optimum_section
from pipelines.seq2seq.enumerable import PAD, all_lists, all_pairs, divergence, make_world
from pipelines.seq2seq.known_optimum import LIMITS, KnownOptimumConfig, known_optimum
from pipelines.seq2seq.known_optimum_training import (
    Task,
    expected_dpo_loss,
    regularized_reward_loss,
    token_divergence_optimum,
    train_exactly,
    train_grpo,
)
from pipelines.seq2seq.view import as_view, encode, sequence_log_probs

# What all methods are trained for once, they are trained for in one process.
pytestmark = pytest.mark.xdist_group("known_optimum")


@pytest.fixture(scope="module")
def task():
    return Task(make_world(vocabulary=4, length=2, sources=2, spread=1.5))


@pytest.fixture(scope="module")
def larger():
    return Task(make_world(vocabulary=4, length=3, sources=2, spread=1.5))


@pytest.mark.parametrize("name", ["task", "larger"])
def test_the_completions_are_all_there_are(name, request):
    task = request.getfixturevalue(name)
    world = task.world
    assert len(world.completions) == sum(3**size for size in range(world.length)) + 3**world.length
    assert len(set(map(tuple, world.completions))) == len(world.completions)
    torch.testing.assert_close(task.reference.exp().sum(1), torch.ones(2, dtype=torch.float64))
    assert task.first_distance > 0.3  # or there would be nothing to learn
    plain = task.policy().eval()
    for number in (0, 5, len(world.completions) - 1):
        target = world.completions[number]
        with torch.no_grad():
            logits = plain(
                input_ids=torch.tensor([world.sources[1]]), decoder_input_ids=torch.tensor([[PAD, *target[:-1]]])
            ).logits[0]
        log_probs = torch.log_softmax(logits.double(), -1)[range(len(target)), target]
        assert task.reference[1, number].item() == pytest.approx(log_probs.sum().item(), abs=1e-4)


def test_the_optimum_is_where_the_regularized_reward_is_largest(task):
    """Its value is β log E_ref[e^{r/β}], and any other policy's is lower by β KL(π‖π*)."""
    best = -regularized_reward_loss(task, task.optimum).item()
    partition = (task.reference + task.world.rewards / task.beta).logsumexp(1) * task.beta
    assert best == pytest.approx(partition.mean().item())
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        other = torch.randn(task.reference.shape, generator=generator, dtype=torch.float64).log_softmax(1)
        gap = best + regularized_reward_loss(task, other).item()
        assert gap == pytest.approx(task.beta * divergence(other, task.optimum))


@pytest.mark.parametrize("loss", [expected_dpo_loss, regularized_reward_loss])
def test_the_gradient_is_zero_at_the_optimum_and_nowhere_near(task, loss):
    for where, at_optimum in ((task.optimum, True), (task.reference, False)):
        logits = where.clone().requires_grad_()
        loss(task, logits.log_softmax(1)).backward()
        assert (logits.grad.abs().max() < 1e-9) == at_optimum


@pytest.mark.parametrize("loss", [expected_dpo_loss, regularized_reward_loss])
def test_the_exact_gradient_leads_there(larger, loss):
    curve = train_exactly(larger, loss, steps=200, rate=1e-2)
    assert curve[-1][1] < 0.02


def test_the_policy_gradient_of_samples_is_that_of_the_enumeration(task):
    """E_y[(r − β log π/π_ref − b) ∇ log π(y|x)] over all y weighted by π, against autograd of the objective."""
    world, model = task.world, as_view(task.policy())
    parameters = [p for p in model.parameters() if p.requires_grad]

    def flat(value):
        found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        return torch.cat([g.flatten() for g in found if g is not None])

    exact = flat(regularized_reward_loss(task, world.log_probs(model, gradient=True)))
    log_probs = world.log_probs(model, gradient=True)
    advantages = world.rewards - task.beta * (log_probs.detach() - task.reference) - 0.7
    estimate = flat(-(log_probs.detach().exp() * advantages * log_probs).sum(1).mean())
    assert exact.norm() > 1e-2
    torch.testing.assert_close(estimate, exact, rtol=1e-3, atol=1e-5)


def test_the_pairs_are_as_often_as_bradley_terry_prefers_them(task):
    rows = all_pairs(task.world, copies=10)
    count = len(task.world.completions)
    assert len(rows) == 2 * 10 * count * (count - 1) // 2
    one, other = task.world.completions[0], task.world.completions[4]
    source = task.world.sources[1]
    won = [r for r in rows if (r["prompt_ids"], r["chosen_ids"], r["rejected_ids"]) == (source, one, other)]
    rewards = task.world.rewards[1]
    assert len(won) == round(10 / (1 + math.exp(rewards[4] - rewards[0])))


def test_the_lists_are_as_often_as_plackett_luce_has_them(task):
    rows = all_lists(task.world, size=3, copies=60)
    first = [row for row in rows if row["completion_ids"] == rows[0]["completion_ids"]]
    first = [row for row in first if row["prompt_ids"] == rows[0]["prompt_ids"]]
    assert len(first) == 60
    numbers = [task.world.completions.index(ids) for ids in rows[0]["completion_ids"]]
    wins = torch.tensor([sum(row["ranking"][0] == i for row in first) / 60 for i in range(3)], dtype=torch.float64)
    # The share of first places is the softmax of the rewards.
    torch.testing.assert_close(wins, task.world.rewards[0, numbers].softmax(0), rtol=0, atol=0.05)


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    folder = tmp_path_factory.mktemp("known_optimum")
    settings = KnownOptimumConfig(output_dir=str(folder), methods=list(LIMITS))
    return settings, folder, known_optimum(settings)


@pytest.mark.parametrize("method", LIMITS)
def test_every_method_finds_the_optimum(stage, task, method):
    _, folder, metrics = stage
    curve = json.loads((folder / "curves.json").read_text())["curves"][method]
    assert metrics[f"known_optimum/{method}"] == curve[-1][1] < LIMITS[method]
    assert metrics["known_optimum/start"] == curve[0][1] == pytest.approx(task.first_distance)
    assert len(curve) > 10


def test_the_stage_goes_on_after_a_kill(stage, tmp_path):
    """Finished methods are kept; the others train to the same numbers."""
    settings, folder, metrics = stage
    shutil.copytree(folder / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "methods" / "000001.json").unlink()
    assert known_optimum(dataclasses.replace(settings, output_dir=str(tmp_path))) == metrics
    assert (tmp_path / "curves.json").read_text() == (folder / "curves.json").read_text()


def test_the_report_shows_the_curves(stage):
    _, folder, metrics = stage
    made = Stage("known_optimum", folder, {"recipe": "summarization/known_optimum"})
    section = known_optimum_section(Run(folder, "x", "", "", 0, (made,), {}))
    body = str(section.body)
    for text in ("<svg", "share of the training", "listwise DPO", f"{metrics['known_optimum/ppo']:.4f}"):
        assert text in body
    assert section.stages == {"known_optimum"}
    assert known_optimum_section(Run(folder, "x", "", "", 0, (), {})) is None


def test_a_world_too_large_to_enumerate_is_refused():
    found = KnownOptimumConfig(vocabulary=8, length=4).problems()
    assert [(p.what, p.problem) for p in found] == [
        ("length", "with vocabulary=8 gives 2,801 completions to enumerate")
    ]
    for sizes in ({}, {"vocabulary": 5, "length": 3}):
        settings = KnownOptimumConfig(**sizes)
        world = make_world(vocabulary=settings.vocabulary, length=settings.length)
        assert settings.completions == len(world.completions)


def test_a_divergence_in_the_loss_ends_elsewhere(stage, task, tmp_path):
    """GRPO as published rests where a token does not see what its successors are charged, not at π*."""
    there = token_divergence_optimum(task)
    torch.testing.assert_close(there.exp().sum(1), torch.ones(2, dtype=torch.float64))
    gap = divergence(there, task.optimum)
    assert gap == pytest.approx(stage[2]["known_optimum/rest"])
    assert 0.01 < gap < 0.1
    model = task.policy()
    train_grpo(task, tmp_path, rollouts=50, samples=96, rate=5e-3, points=1, kl_in="loss", policy=model)
    found = task.world.log_probs(model)
    assert divergence(found, there) < 0.02 < gap
    assert divergence(found, there) < divergence(found, task.optimum)
    assert stage[2]["known_optimum/grpo"] < gap / 2  # with the divergence in the reward it comes far nearer to π*


def test_log_probs_of_the_world_go_through_the_view(task):
    """Two sources, a row: the table is not by chance that of another order."""
    world, model = task.world, as_view(task.policy())
    ids = torch.tensor([world.completions[7]])
    states = encode(model, torch.tensor([world.sources[1]]), None)
    with torch.no_grad():
        found = sequence_log_probs(model, states, None, ids, torch.ones_like(ids)).sum()
    assert found.item() == pytest.approx(task.reference[1, 7].item(), abs=1e-4)
