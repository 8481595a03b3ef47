"""0th-order optimization: estimators against enumeration and autograd; training by answers alone learns."""

import json

import pytest
import torch

from pipelines.config import validate
from pipelines.errors import UserError
from pipelines.problems import zeroth_order_math as math
from pipelines.problems.zeroth_order import METHODS, ZerothOrderConfig, zeroth_order
from pipelines.problems.zeroth_order_training import Baseline, BlackBox, gradient_at_logits
from tests.problems.pages import assert_page_is_filled


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    return logits, torch.rand(5, 3, generator=generator, dtype=torch.float64)


def autograd_gradient(logits, losses):
    z = logits.clone().requires_grad_(True)
    return torch.autograd.grad((z.softmax(1) * losses).sum(), z)[0]


def test_exact_gradient_is_that_of_the_expected_loss(problem):
    torch.testing.assert_close(math.exact_gradient(*problem), autograd_gradient(*problem), atol=1e-14, rtol=0)


@pytest.mark.parametrize("baseline", [0.0, 0.7, -3.0])
@pytest.mark.parametrize("samples", [1, 2, 3])
def test_any_constant_baseline_is_unbiased(problem, baseline, samples):
    mean, _ = math.moments_by_enumeration(
        lambda z, y, loss: math.score_gradient(z, y, loss, baseline), *problem, samples
    )
    torch.testing.assert_close(mean, autograd_gradient(*problem), atol=1e-13, rtol=0)


@pytest.mark.parametrize("samples", [2, 3, 4])
def test_leave_one_out_is_unbiased_and_what_its_formula_says(problem, samples):
    mean, _ = math.moments_by_enumeration(math.leave_one_out_gradient, *problem, samples)
    torch.testing.assert_close(mean, autograd_gradient(*problem), atol=1e-13, rtol=0)
    logits, losses = problem
    labels = torch.randint(3, (5, samples), generator=torch.Generator().manual_seed(0))
    found = math.leave_one_out_gradient(logits, labels, losses.gather(1, labels))
    for row in range(5):
        wanted = torch.zeros(3, dtype=torch.float64)
        for k in range(samples):
            others = [losses[row, labels[row, j]] for j in range(samples) if j != k]
            z = logits[row].clone().requires_grad_(True)
            (score,) = torch.autograd.grad(z.log_softmax(0)[labels[row, k]], z)
            wanted += (losses[row, labels[row, k]] - sum(others) / len(others)) * score / samples
        torch.testing.assert_close(found[row], wanted, atol=1e-14, rtol=0)


def test_a_baseline_that_knows_the_draw_is_biased(problem):
    """The test of bias can fail: the mean with the draw itself in it shrinks the gradient by (K − 1)/K."""

    def cheating(z, y, loss):
        return math.score_gradient(z, y, loss, loss.mean(1, keepdim=True))

    mean, _ = math.moments_by_enumeration(cheating, *problem, 2)
    torch.testing.assert_close(mean, autograd_gradient(*problem) / 2, atol=1e-13, rtol=0)


def test_the_best_baseline_has_the_least_variance(problem):
    def variance(baseline):
        return math.moments_by_enumeration(lambda z, y, loss: math.score_gradient(z, y, loss, baseline), *problem, 1)[1]

    best = math.best_baseline(*problem)
    for step in (-0.1, -1e-3, 1e-3, 0.1):
        assert (variance(best) < variance(best + step)).all()


def test_the_entropy_bonus_is_the_gradient_of_the_entropy_and_has_its_optimum():
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z = logits.clone().requires_grad_(True)
    p = z.softmax(1)
    (wanted,) = torch.autograd.grad((p * p.log()).sum(), z)
    torch.testing.assert_close(math.entropy_gradient(logits), wanted, atol=1e-14, rtol=0)
    losses = torch.rand(5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    best = -losses / 0.3  # p ∝ e^{−L/β}
    rest = math.exact_gradient(best, losses) + 0.3 * math.entropy_gradient(best)
    torch.testing.assert_close(rest, torch.zeros_like(rest), atol=1e-14, rtol=0)


def test_variance_by_enumeration_is_that_of_a_simulation(problem):
    logits, losses = problem
    exact = math.exact_gradient(logits, losses)
    labels = math.draw_labels(logits, 2 * 20_000, torch.Generator().manual_seed(0)).reshape(5, 20_000, 2)
    wide, spread = logits.repeat_interleave(20_000, 0), losses.repeat_interleave(20_000, 0)
    labels = labels.reshape(-1, 2)
    found = math.leave_one_out_gradient(wide, labels, spread.gather(1, labels)).reshape(5, 20_000, 3)
    squares = (found - exact[:, None]).square().sum(2)
    wanted = math.moments_by_enumeration(math.leave_one_out_gradient, logits, losses, 2)[1]
    error = squares.std(1) / 20_000**0.5
    assert ((squares.mean(1) - wanted).abs() < 4 * error).all()


def test_the_black_box_counts_and_says_right_or_wrong():
    box = BlackBox(torch.tensor([2, 0, 1]))
    assert box(torch.tensor([0, 2]), torch.tensor([[2, 1], [0, 1]])).tolist() == [[0, 1], [1, 0]]
    assert box.queries == 4
    assert box.of_all(torch.tensor([1]), 3).tolist() == [[0, 1, 1]]
    assert box.queries == 7


def test_the_running_mean_is_known_before_the_draw():
    logits, rows = torch.zeros(4, 3), torch.arange(4)
    baseline, box = Baseline(), BlackBox(torch.zeros(4, dtype=torch.int64))
    assert baseline.value == 0
    draws = torch.Generator().manual_seed(0)
    first = gradient_at_logits("mean", logits, rows, box, baseline, 4, draws)
    after = baseline.value
    plain = gradient_at_logits("none", logits, rows, box, Baseline(), 4, torch.Generator().manual_seed(0))
    assert torch.equal(first, plain)  # nothing was known yet
    assert after > 0
    baseline.update(torch.ones(4))
    assert after < baseline.value < 1


def small(folder, **fields):
    base = {"output_dir": str(folder), "steps": 300, "width": 32, "seeds": 2, "curve_points": 6, "estimates": 4}
    return validate(ZerothOrderConfig, base | {"batch_size": 48, "learning_rate": 5e-3} | fields)


def test_the_stage_learns_from_answers_and_goes_on_where_it_was_killed(tmp_path):
    metrics = zeroth_order(small(tmp_path / "a"))
    assert metrics["zeroth_order/checks_failed"] == 0
    assert_page_is_filled(tmp_path / "a")
    assert metrics["zeroth_order/leave_one_out_accuracy"] > 0.6  # chance is 0.1
    assert metrics["zeroth_order/supervised_accuracy"] > 0.85
    assert metrics["zeroth_order/exact_accuracy"] > metrics["zeroth_order/none_accuracy"]
    runs = tmp_path / "a" / "checkpoints" / "runs"
    half = sorted(runs.glob("*.json"))[:-2]
    other = tmp_path / "b" / "checkpoints" / "runs"
    other.mkdir(parents=True)
    for file in half:
        (other / file.name).write_bytes(file.read_bytes())
    assert zeroth_order(small(tmp_path / "b")) == metrics
    one, two = (json.loads((tmp_path / x / "exercise.json").read_text()) for x in "ab")
    assert one == two
    assert len(one["tables"]["methods"]["rows"]) == len(METHODS)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"steps": 3, "curve_points": 10}, "curve_points"),
        ({"dataset": "/no/such"}, "no such"),
        ({"samples": 1}, "samples"),
    ],
)
def test_wrong_input_is_one_line(fields, said):
    with pytest.raises(UserError, match=said) as error:
        validate(ZerothOrderConfig, fields)
    assert str(error.value).count("\n") == 0


def test_images_without_labels_are_refused(tmp_path):
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        Image.new("L", (8, 8), number).save(folder / f"{number}.png")
    with pytest.raises(UserError, match="no labels"):
        zeroth_order(small(tmp_path / "out", dataset=str(folder)))
