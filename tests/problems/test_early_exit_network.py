"""Early exit, network: work by hand and by torch's counter, leaving one by one, thresholds, and the stage."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from pipelines.config import validate
from pipelines.errors import UserError
from pipelines.problems import early_exit_layers as layers
from pipelines.problems.early_exit_layers import ExitPoint, StagedNetwork
from pipelines.problems.early_exit_network import EarlyExitNetworkConfig, early_exit_network
from pipelines.problems.fits import bend, power_law, seed_interval
from tests.problems.pages import assert_page_is_filled


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    made = StagedNetwork(1, 5, 4, stages=3, blocks=1).double()
    images = torch.randn(64, 1, 8, 8, dtype=torch.float64)
    made.train()
    for _ in range(20):  # so that the running statistics are not those of nothing
        made.every_exit(images)
    for name in ("0", "1", "2"):
        made.heads[name][-1].weight.data *= 6  # answers of all degrees of certainty
    return made.eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(50, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_macs_of_a_convolution_and_a_linear_layer_by_hand():
    conv = nn.Conv2d(3, 8, 5, stride=2, padding=2)
    with layers.counted_macs(conv) as total:
        conv(torch.zeros(2, 3, 9, 9))
    assert total[0] == 2 * (5 * 5) * 8 * (3 * 5 * 5)  # images · places · channels out · (channels in · kernel)
    grouped = nn.Conv2d(4, 8, (3, 1), groups=2)
    with layers.counted_macs(grouped) as total:
        grouped(torch.zeros(1, 4, 5, 5))
    assert total[0] == 3 * 5 * 8 * (2 * 3)
    linear = nn.Linear(7, 3)
    with layers.counted_macs(linear) as total:
        linear(torch.zeros(4, 7))
    assert total[0] == 4 * 7 * 3
    linear(torch.zeros(4, 7))
    assert total[0] == 4 * 7 * 3  # the hooks are gone


@pytest.mark.parametrize(("width", "stages", "blocks"), [(4, 3, 1), (6, 4, 2)])
def test_macs_of_the_network_against_torchs_counter(width, stages, blocks):
    network = StagedNetwork(1, 10, width, stages, blocks).eval()
    image = torch.zeros(1, 1, 8, 8)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network.every_exit(image)
    found = layers.macs_to_each_exit(network, image)
    assert found == sorted(found)
    assert len(found) == stages
    assert found[-1] == counter.get_total_flops() / 2


def test_the_plan_is_resnet_18s():
    network = StagedNetwork(3, 1000, 64)
    layers_with_weights = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    inside = [m for m in layers_with_weights if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(inside) == 17  # with the last linear layer 18
    plain = StagedNetwork(3, 1000, 64, exits=False)
    # torchvision's ResNet-18 has 11,689,512 weights, 9,408 of them in a 7×7 stem that is 3×3 here (1,728)
    assert sum(p.numel() for p in plain.parameters()) == 11_689_512 - 9_408 + 1_728


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.8, 1.2, 2.0])
def test_each_image_leaves_by_itself(network, images, threshold):
    logits, left_by = network.leave_early(images, threshold)
    with torch.no_grad():
        exits = network.every_exit(images)
    for row in range(len(images)):
        wanted = next((e for e in range(2) if float(layers.entropy(exits[e])[row]) < threshold), 2)
        assert int(left_by[row]) == wanted
        torch.testing.assert_close(logits[row], exits[wanted][row], atol=1e-10, rtol=0)
        alone, by = network.leave_early(images[row : row + 1], threshold)
        assert int(by) == wanted
        torch.testing.assert_close(alone[0], logits[row], atol=1e-10, rtol=0)


def test_work_is_really_skipped(network, images):
    macs = layers.macs_to_each_exit(network, images[:1])
    with torch.no_grad():
        certain = layers.entropy(network.every_exit(images)[0]).quantile(torch.tensor([0.2, 0.5, 0.8]).double())
    seen = set()
    for threshold in (0.0, *certain.tolist(), 2.0):
        with layers.counted_macs(network) as total:
            _, left_by = network.leave_early(images, threshold)
        assert total[0] == sum(macs[int(e)] for e in left_by)
        seen.add(total[0])
    assert len(seen) == 5


def test_points_read_off_all_exits_are_those_of_leaving(network, images):
    labels = torch.arange(50) % 5
    with torch.no_grad():
        exits = network.every_exit(images)
    macs = layers.macs_to_each_exit(network, images[:1])
    for point in layers.exit_points(exits, labels, macs, [0.0, 0.4, 0.9, 3.0]):
        logits, left_by = network.leave_early(images, point.threshold)
        assert point.accuracy == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
        assert point.macs == pytest.approx(sum(macs[int(e)] for e in left_by) / 50)
        assert sum(point.shares) == pytest.approx(1)
    assert point.shares == (1.0, 0.0, 0.0)  # 3 nats are above log 5


def test_entropy_and_loss_by_their_formulas():
    logits = torch.randn(6, 4, dtype=torch.float64)
    p = logits.softmax(1)
    torch.testing.assert_close(layers.entropy(logits), -(p * p.log()).sum(1))
    assert float(layers.entropy(torch.zeros(1, 8))[0]) == pytest.approx(math.log(8))
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    exits = [torch.randn(6, 4, dtype=torch.float64) for _ in range(3)]
    wanted = 0.3 * cross_entropy(exits[0], labels) + 0.3 * cross_entropy(exits[1], labels)
    wanted = wanted + cross_entropy(exits[2], labels)
    torch.testing.assert_close(layers.joint_loss(exits, labels, 0.3), wanted)


def test_the_least_threshold_that_beats_a_rival():
    points = [ExitPoint(t, a, m, ()) for t, a, m in ((0, 0.99, 100), (0.1, 0.98, 60), (0.2, 0.97, 40), (0.9, 0.8, 20))]
    assert layers.least_winning(points, 0.95, 70).threshold == 0.1
    assert layers.least_winning(points, 0.95, 50).threshold == 0.2
    assert layers.least_winning(points, 0.95, 30) is None


def test_the_bend_of_a_curve():
    x = [0, 1, 2, 3, 10]
    assert bend(x, [0, 5, 9, 9.5, 10]) == 2
    assert bend(x[::-1], [10, 9.5, 9, 5, 0]) == 2
    assert bend([0, 1, 2], [0, 0.1, 2]) in (0, 2)  # no point lies above the chord
    with pytest.raises(ValueError, match="three points"):
        bend([0, 1], [0, 1])


def test_exponents_and_their_intervals_against_a_regression_by_hand():
    found = power_law([1, 2, 4, 8, 16], [3 * v**1.7 for v in (1, 2, 4, 8, 16)])
    assert found.value == pytest.approx(1.7)
    assert found.high - found.low < 1e-6
    x, y = [1.0, 2.0, 3.0, 5.0], [1.0, 2.5, 2.9, 6.0]
    a = torch.tensor([[1.0, math.log(v)] for v in x], dtype=torch.float64)
    b = torch.tensor([math.log(v) for v in y], dtype=torch.float64)
    slope = torch.linalg.solve(a.T @ a, a.T @ b)
    rest = b - a @ slope
    error = math.sqrt(float(rest @ rest) / 2 * float(torch.linalg.inv(a.T @ a)[1, 1]))
    found = power_law(x, y)
    assert found.value == pytest.approx(float(slope[1]))
    assert found.high - found.value == pytest.approx(4.302652729749464 * error)  # Student's quantile, 2 degrees
    with pytest.raises(ValueError, match="positive"):
        power_law([1, 2, 0], [1, 2, 3])


def test_interval_over_seeds():
    found = seed_interval([0.8, 0.9, 1.0])
    assert found.value == pytest.approx(0.9)
    assert found.high - found.value == pytest.approx(4.302652729749464 * 0.1 / math.sqrt(3))
    assert seed_interval([0.5]).shown() == "0.500"


def small(folder, **fields):
    base = {"output_dir": str(folder), "width": 6, "stages": 3, "blocks": 1, "small_width": 3, "small_blocks": 1}
    base |= {"epochs": 3, "seeds": 2, "thresholds": [0.0, 0.1, 0.5, 1.0, 2.4], "max_test": 150, "max_train": 700}
    base |= {"timed_images": 6, "timed_batch": 32, "timed_repeats": 1, "batch_size": 48}
    return validate(EarlyExitNetworkConfig, base | fields)


def test_the_stage_measures_and_goes_on_where_it_was_killed(tmp_path):
    metrics = early_exit_network(small(tmp_path / "a"))
    assert metrics["early_exit_network/checks_failed"] == 0
    assert_page_is_filled(tmp_path / "a")
    assert metrics["early_exit_network/baseline_accuracy"] > 0.5
    assert 0 < metrics["early_exit_network/macs_share"] < 1.05
    part = tmp_path / "b" / "checkpoints" / "seeds"
    part.mkdir(parents=True)
    first = tmp_path / "a" / "checkpoints" / "seeds" / "000000.json"
    (part / first.name).write_bytes(first.read_bytes())
    assert early_exit_network(small(tmp_path / "b")) == metrics
    one, two = (json.loads((tmp_path / x / "exercise.json").read_text()) for x in "ab")
    assert one == two


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"thresholds": [0.1, 0.2, 0.3]}, "do not rise from 0"),
        ({"thresholds": [0, 0.2, 0.2]}, "do not rise from 0"),
        ({"stages": 1}, "stages"),
        ({"dataset": "/no/such"}, "no such"),
    ],
)
def test_wrong_input_is_one_line(fields, said):
    with pytest.raises(UserError, match=said) as error:
        validate(EarlyExitNetworkConfig, fields)
    assert str(error.value).count("\n") == 0


def test_a_batch_that_cannot_be_filled_is_one_line(tmp_path):
    with pytest.raises(UserError, match="do not fill it"):
        early_exit_network(small(tmp_path, max_train=40))
