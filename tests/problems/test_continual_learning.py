"""Continual learning: the Fisher information against loops and closed forms, EWC's penalty, measures, and the stage."""

import json

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from pipelines.config import validate
from pipelines.errors import UserError
from pipelines.problems import continual_math as math
from pipelines.problems.continual_learning import ContinualLearningConfig, best_lambda, continual_learning
from pipelines.problems.continual_study import softmax_regression_fisher, study_fisher
from pipelines.problems.continual_training import Permutation, Rehearsal, Run
from pipelines.problems.exercise import Answer
from pipelines.problems.image_data import Labelled, load_labelled
from pipelines.problems.small_networks import convolutional, perceptron
from tests.problems.pages import assert_page_is_filled


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, 1, 6, 6, generator=generator, dtype=torch.float64)


def network(kind, seed=0):
    torch.manual_seed(seed)
    made = perceptron((1, 6, 6), 3, 5) if kind == "mlp" else convolutional((1, 6, 6), 3, 2)
    return made.double()


def score(made, image, label):
    """∇ log p(label|image) by one back-propagation."""
    loss = -cross_entropy(made(image[None]), torch.tensor([label]))
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(made.parameters()))])


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_fisher_is_the_mean_of_squared_gradients_one_by_one(kind, images):
    made, labels = network(kind), torch.arange(40) % 3
    by_data = torch.stack([score(made, x, int(y)).square() for x, y in zip(images, labels, strict=True)]).mean(0)
    torch.testing.assert_close(math.fisher_diagonal(made, images, labels, "data"), by_data, atol=1e-13, rtol=1e-10)
    p = made(images).softmax(1).detach()
    expected = sum(p[n, c] * score(made, images[n], c).square() for n in range(40) for c in range(3)) / 40
    found = math.fisher_diagonal(made, images, labels, "expected")
    torch.testing.assert_close(found, expected, atol=1e-13, rtol=1e-10)


def test_fisher_of_softmax_regression_is_its_closed_form(images):
    torch.manual_seed(1)
    layer, flat = nn.Linear(36, 4).double(), images.flatten(1)
    found = math.fisher_diagonal(layer, flat, torch.zeros(40, dtype=torch.int64), "expected")
    p = (flat @ layer.weight.T + layer.bias).softmax(1).detach()
    wanted = torch.zeros(4, 36, dtype=torch.float64)
    for n in range(40):
        for c in range(4):
            wanted[c] += p[n, c] * (1 - p[n, c]) * flat[n] ** 2 / 40
    torch.testing.assert_close(found[:-4].reshape(4, 36), wanted, atol=1e-14, rtol=1e-12)
    closed = softmax_regression_fisher(flat, layer.weight.detach(), layer.bias.detach())
    torch.testing.assert_close(found, closed, atol=1e-14, rtol=1e-12)


def test_sampled_labels_are_unbiased(images):
    made, labels = network("mlp"), torch.zeros(40, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([math.fisher_diagonal(made, images, labels, "sampled", generator).sum() for _ in range(200)])
    wanted = math.fisher_diagonal(made, images, labels, "expected").sum()
    assert float(draws.mean()) == pytest.approx(float(wanted), abs=4 * float(draws.std()) / 200**0.5)


def test_the_shortcut_is_a_batch_too_small(images):
    made, labels = network("mlp"), torch.zeros(40, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [math.shortcut_diagonal(made, images, labels, 10, "sampled", generator).sum() for _ in range(300)]
    )
    wanted = math.fisher_diagonal(made, images, labels, "expected").sum() / 10
    error = 4 * float(draws.std()) / 300**0.5
    assert float(draws.mean()) == pytest.approx(float(wanted), abs=error)
    assert error < 0.5 * float(wanted)  # it tells F/10 from F
    whole = math.shortcut_diagonal(made, images, labels, 40, "data")
    mean = torch.stack([score(made, x, 0) for x in images]).mean(0)
    torch.testing.assert_close(whole, mean.square(), atol=1e-14, rtol=1e-10)


def test_fisher_is_the_curvature_of_the_divergence(images):
    made = network("mlp")
    fisher = math.fisher_diagonal(made, images, torch.zeros(40, dtype=torch.int64), "expected")
    weights = math.flat_parameters(made).detach()
    here = made(images).log_softmax(1).detach()
    for place in fisher.argsort(descending=True)[[0, 10, 60]]:
        total = 0.0
        for sign in (-1, 1):
            moved = weights.clone()
            moved[place] += sign * 1e-4
            nn.utils.vector_to_parameters(moved, made.parameters())
            there = made(images).log_softmax(1).detach()
            total += float((here.exp() * (here - there)).sum(1).mean()) / 1e-8
        assert total == pytest.approx(float(fisher[place]), rel=1e-3)


@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_the_penalty_is_the_sum_over_tasks(tasks):
    generator = torch.Generator().manual_seed(tasks)
    fishers = torch.rand(tasks, 7, generator=generator, dtype=torch.float64) * torch.tensor([0.0] + [1.0] * 6)
    anchors = torch.randn(tasks, 7, generator=generator, dtype=torch.float64)
    weights = torch.randn(7, generator=generator, dtype=torch.float64, requires_grad=True)
    penalty = math.QuadraticPenalty(2.5, 7, weights.detach())
    for fisher, anchor in zip(fishers, anchors, strict=True):
        penalty.add(fisher, anchor)
    written = 2.5 * sum((f * (weights - a) ** 2).sum() for f, a in zip(fishers, anchors, strict=True))
    assert float(penalty(weights)) == pytest.approx(float(written), rel=1e-12)
    (one,), (two,) = torch.autograd.grad(penalty(weights), weights), torch.autograd.grad(written, weights)
    torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("share", "holds"), [(0.97, True), (1.03, False)])
def test_sgd_holds_below_the_largest_strength_and_diverges_above_it(share, holds):
    fisher = torch.tensor([0.5, 7.0, 0.1], dtype=torch.float64)
    strength = share * math.largest_strength(fisher, 0.01, 0.9)
    penalty = math.QuadraticPenalty(strength, 3, fisher)
    penalty.add(fisher, torch.zeros(3, dtype=torch.float64))
    weights = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = torch.optim.SGD([weights], lr=0.01, momentum=0.9)
    for _ in range(2000):
        optimizer.zero_grad()
        penalty(weights).backward()
        optimizer.step()
    assert (float(weights.detach().abs().max()) < 1) == holds


def test_measures_of_a_matrix_worked_out_by_hand():
    matrix = torch.tensor([[0.9, 0.1, 0.1], [0.7, 0.8, 0.2], [0.5, 0.6, 0.7]], dtype=torch.float64)
    assert math.average_accuracy(matrix) == pytest.approx((0.5 + 0.6 + 0.7) / 3)
    assert math.forgetting(matrix) == pytest.approx(((0.9 - 0.5) + (0.8 - 0.6)) / 2)
    assert math.plasticity(matrix) == pytest.approx((0.9 + 0.8 + 0.7) / 3)
    assert math.stability(matrix) == pytest.approx((0.5 + 0.6) / 2)


def test_tasks_are_permutations_and_the_first_is_none(images):
    part = Labelled(images, torch.zeros(40, dtype=torch.int64))
    first, second, again = (Permutation(36, 3, number, torch.device("cpu"))(part).images for number in (0, 1, 1))
    assert torch.equal(first, images)
    assert torch.equal(second, again)
    assert not torch.equal(second, images)
    assert torch.equal(second.flatten(1).sort(1).values, images.flatten(1).sort(1).values)


def test_rehearsal_keeps_some_of_every_task(images):
    method, generator = Rehearsal(4, 6), torch.Generator().manual_seed(0)
    assert method.replay(generator) is None
    for label in range(3):
        method.end_task(nn.Identity(), Labelled(images, torch.full((40,), label)), generator)
    seen = torch.cat([method.replay(generator).labels for _ in range(40)])
    assert len(method.replay(generator)) == 6
    assert seen.bincount().tolist() == pytest.approx([80, 80, 80], abs=40)
    assert len(method._kept) == 12


def test_lambda_is_chosen_on_the_validation_images():
    results = {
        Run("mlp", "ewc", 1.0, 3, 0): {"validation": [[0.0], [0.8, 0.9]], "test": [[0.0], [0.1, 0.1]]},
        Run("mlp", "ewc", 2.0, 3, 0): {"validation": [[0.0], [0.5, 0.9]], "test": [[0.0], [0.9, 0.9]]},
    }
    assert best_lambda(results, "mlp", 3) == 1.0
    results[Run("mlp", "ewc", 2.0, 3, 1)] = {"validation": [[0.0], [1.0, 1.0]]}
    assert best_lambda(results, "mlp", 3) == 1.0  # 0.85 both: the smaller
    results[Run("mlp", "ewc", 2.0, 3, 2)] = {"validation": [[0.0], [1.0, 1.0]]}
    assert best_lambda(results, "mlp", 3) == 2.0


def small(folder, **fields):
    base = {"output_dir": str(folder), "tasks": 2, "long_tasks": 2, "hidden": 24, "channels": 3, "epochs": 6}
    base |= {"lambdas": [1.0, 10.0], "memories": [5, 60], "seeds": 2, "fisher_examples": 64, "learning_rate": 0.03}
    base |= {"max_train": 400, "max_test": 200, "batch_size": 16}
    return validate(ContinualLearningConfig, base | fields)


def test_the_stage_compares_and_goes_on_where_it_was_killed(tmp_path):
    metrics = continual_learning(small(tmp_path / "a"))
    assert metrics["continual_learning/checks_failed"] == 0
    assert_page_is_filled(tmp_path / "a")
    assert metrics["continual_learning/mlp_rehearsal_accuracy"] > metrics["continual_learning/mlp_naive_accuracy"]
    assert metrics["continual_learning/mlp_ewc_forgetting"] < metrics["continual_learning/mlp_naive_forgetting"]
    whole = tmp_path / "a" / "checkpoints" / "short"
    other = tmp_path / "b" / "checkpoints" / "short"
    other.mkdir(parents=True)
    for file in sorted(whole.glob("*.json"))[:-3]:
        (other / file.name).write_bytes(file.read_bytes())
    assert continual_learning(small(tmp_path / "b")) == metrics
    one, two = (json.loads((tmp_path / x / "exercise.json").read_text()) for x in "ab")
    assert one == two


def test_the_fisher_is_studied_where_a_batch_is_larger_than_its_images(tmp_path):
    """As of MNIST's files, whose batches are of 256 images and whose Fisher is of 200."""
    config = small(tmp_path, batch_size=64, fisher_examples=24)
    answer = Answer(config, "continual_learning", "A title")
    study_fisher(answer, load_labelled(config), config)
    assert (answer.values["fisher_batch"], answer.values["fisher_count"]) == (24, 24)
    assert [check.statement for check in answer.checks if not check.passed] == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"lambdas": [3.0, 1.0]}, "do not rise"),
        ({"memories": [0, 5]}, "do not rise"),
        ({"networks": ["mlp", "mlp"]}, "names one twice"),
        ({"networks": ["transformer"]}, "networks"),
        ({"dataset": "/no/such"}, "no such"),
        ({"tasks": 1}, "tasks"),
    ],
)
def test_wrong_input_is_one_line(fields, said):
    with pytest.raises(UserError, match=said) as error:
        validate(ContinualLearningConfig, fields)
    assert str(error.value).count("\n") == 0


def test_too_few_images_are_one_line(tmp_path):
    with pytest.raises(UserError, match="one step takes 32 images"):
        continual_learning(small(tmp_path, max_train=20, batch_size=32))
