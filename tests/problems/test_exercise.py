"""What exercises are made of: checks, values, figures and tables, and the file they are written to."""

import json
import math

import numpy as np
import pytest
import torch

from pipelines.config import validate
from pipelines.errors import UserError
from pipelines.problems import estimates
from pipelines.problems.exercise import Answer, Check, ExerciseConfig, Figure
from pipelines.problems.search import minimized


@pytest.fixture
def answer(tmp_path):
    return Answer(ExerciseConfig(output_dir=str(tmp_path)), "some_page", "A title")


@pytest.mark.parametrize(
    ("found", "expected", "tolerance", "passed"),
    [
        (1.0, 1.1, 0.1000001, True),
        (1.0, 1.1, 0.09, False),
        (0.0, 0.0, 0.0, True),
        (math.inf, math.inf, 0.0, True),
        (math.inf, 1.0, 5.0, False),
        (math.nan, 1.0, 5.0, False),
        (1.0, math.nan, math.inf, False),
    ],
)
def test_a_check_holds_within_its_tolerance(found, expected, tolerance, passed):
    assert Check("s", found, expected, tolerance, "r").passed is passed


def test_all_is_written_and_read_back(answer, tmp_path):
    answer.value(count=np.int64(3), share=torch.tensor(0.25), never=math.inf)
    answer.check("one", 1.0, 1.0, 0.0, "counting")
    answer.check("two", math.nan, 1.0, 0.5, "simulation")
    answer.figure(Figure("curve", "<svg/>", caption="A line."))
    answer.figure(Figure("grid", png=b"\x89PNG", caption="Images.", title="Grid"))
    answer.table("numbers", ["a", "b"], [["x", np.float32(0.5)], ["y", 2]], "What they are.")
    assert answer.write() == {"some_page/checks": 2.0, "some_page/checks_failed": 1.0}
    found = json.loads((tmp_path / "exercise.json").read_text())
    assert found["values"] == {"count": 3, "share": 0.25, "never": "inf"}
    assert [check["passed"] for check in found["checks"]] == [True, False]
    assert found["checks"][1]["found"] == "nan"
    assert found["figures"]["grid"] == {"file": "figures/grid.png", "caption": "Images.", "title": "Grid"}
    assert (tmp_path / "figures" / "curve.svg").read_text() == "<svg/>"
    assert (tmp_path / "figures" / "grid.png").read_bytes() == b"\x89PNG"
    assert found["tables"]["numbers"]["rows"] == [["x", 0.5], ["y", 2]]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("value", {"x": math.nan}),
        ("value", {"count": 1}),
        ("check", ("s", 1, 1, -1, "r")),
        ("check", ("s", 1, 1, math.nan, "r")),
        ("check", ("known", 1, 1, 1, "r")),
        ("figure", (Figure("curve"),)),
        ("figure", (Figure("curve", "<svg/>", b"png", "c"),)),
        ("figure", (Figure("curve", "<svg/>"),)),
        ("figure", (Figure("curve", "<svg/>", caption="a\nb"),)),
        ("figure", (Figure("Curve 1", "<svg/>", caption="c"),)),
        ("table", ("t", ["a"], [["x", "y"]])),
    ],
)
def test_what_an_exercise_gets_wrong_is_refused(answer, name, arguments):
    answer.value(count=1)
    answer.check("known", 1, 1, 1, "r")
    method = getattr(answer, name)
    with pytest.raises(ValueError, match=r"."):
        method(**arguments) if isinstance(arguments, dict) else method(*arguments)


def test_a_missing_package_is_told_before_anything_runs(monkeypatch):
    known = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "latex2mathml" else known(name))
    with pytest.raises(UserError, match="genalign\\[problems\\]"):
        validate(ExerciseConfig, {})


def test_moments_on_a_grid_are_those_of_known_densities():
    found = estimates.moments(lambda x: 3.0 - (x - 0.7) ** 2 / (2 * 0.04), -5, 5)
    assert found.mean == pytest.approx(0.7, abs=1e-12)
    assert found.variance == pytest.approx(0.04, rel=1e-10)
    assert found.log_mass == pytest.approx(3.0 + 0.5 * math.log(2 * math.pi * 0.04), rel=1e-12)
    fourth = estimates.expectation(lambda x: estimates.gaussian_log(x, 0.0, 2.0), lambda x: x**4, -25, 25)
    assert fourth == pytest.approx(3 * 2.0**2, rel=1e-10)


def test_a_line_is_scipys():
    from scipy.stats import linregress

    draw = np.random.default_rng(0)
    x = draw.standard_normal(50) + 3
    y = 2 * x - 1 + draw.standard_normal(50)
    found, known = estimates.line(x, y), linregress(x, y)
    assert found[:4] == pytest.approx((known.slope, known.stderr, known.intercept, known.intercept_stderr), rel=1e-10)
    assert found.variance == pytest.approx(((y - known.intercept - known.slope * x) ** 2).sum() / 48)


def test_the_search_finds_a_known_minimum():
    """Rosenbrock's valley, whose minimum lies at (1, 1)."""
    found = minimized(lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2, torch.zeros(2, dtype=torch.float64))
    np.testing.assert_allclose(found, [1, 1], atol=1e-9)
