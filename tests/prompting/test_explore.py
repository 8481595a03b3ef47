"""The sweep, the digits and the token view: against the model itself, scipy's formula and the report's page."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import yaml

from pipelines.config import validate
from pipelines.errors import UserError
from pipelines.prompting.backends_local import load_local
from pipelines.prompting.explore import ExploreConfig, chi_square, digits_of, diversity, explore, temperature_name
from pipelines.reporting.report import write_report
from pipelines.reporting.sections.prompting_explore import visible
from pipelines.stage import execute
from tests.chain.test_whole import documented
from tests.prompting.faulty_proxy import FaultyProxy


class Tags(HTMLParser):
    """The elements of a page with their attributes, in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))


def test_diversity():
    assert diversity(["a", "a", "a"]) == 0
    assert diversity(["a", "b", "c"]) == 1
    assert diversity(["a", "b", "a"]) == 0.5


def test_digits_are_counted_one_by_one():
    assert digits_of("1, 2, 34 and 5.6 — 78", 5) == [1, 2, 3, 4, 5]
    assert digits_of("none ٣ ²", 5) == []  # other scripts' digits are no answer here


def test_chi_square_is_pearsons():
    draw = np.random.default_rng(1)
    digits = draw.integers(0, 10, 400).tolist()
    counts = np.bincount(digits, minlength=10)
    statistic, p = chi_square(digits)
    assert statistic == pytest.approx((((counts - 40) ** 2) / 40).sum())
    # the tail of χ² with 9 degrees of freedom, by simulation of fair digits
    fair = draw.multinomial(400, [0.1] * 10, size=20_000)
    tail = ((((fair - 40) ** 2) / 40).sum(1) >= statistic).mean()
    assert p == pytest.approx(tail, abs=0.02)
    assert chi_square([7] * 100)[1] < 1e-100
    assert chi_square(list(range(10)) * 10) == (0, 1)
    with pytest.raises(ValueError, match="at least 50"):
        chi_square([1] * 49)


def test_names_of_temperatures():
    assert [temperature_name(t) for t in (0.0, 0.8, 1.0, 1.25, 10.0)] == ["0", "0_8", "1", "1_25", "10"]


@pytest.fixture(scope="module")
def chain(tiny_folder, nouns_file, tmp_path_factory):
    """A chain of both stages, as YAML."""
    file = tmp_path_factory.mktemp("chain") / "tiny.yaml"
    common = {"models": {"small": str(tiny_folder)}, "max_new_tokens": 4}
    stages = {
        "asked": {"recipe": "prompting/hard", "strategies": ["few_shot", "few_shot_wrong_labels"], "shots": [0, 1, 3]},
        "explore": {"recipe": "prompting/explore", "temperatures": [0, 0.5, 3], "samples": 3, "shots": [2]},
    }
    stages["explore"] |= {"digits_prompt": "1 2 3 4 5 6 7 8 9 0 ", "digits_max_new_tokens": 40, "views": 2}
    table = {"name": "tiny", "defaults": {"dataset": str(nouns_file), "test_fraction": 0.4}}
    file.write_text(yaml.safe_dump(table | {"stages": {name: fields | common for name, fields in stages.items()}}))
    return file


@pytest.fixture(scope="module")
def run_dir(prompting_cli, chain, tmp_path_factory):
    """The chain's finished run."""
    out = tmp_path_factory.mktemp("run") / "run"
    code, printed = prompting_cli.run("run", str(chain), "--output_dir", str(out))
    assert code == 0, printed
    return out


def test_a_chain_measures_explores_and_reports(run_dir, root):
    metrics = json.loads((run_dir / "metrics.json").read_text())
    patterns = documented(root)
    for key in metrics:
        plain = re.sub("^asked/", "hard/", key.removesuffix("_ci_low").removesuffix("_ci_high"))
        assert any(pattern.fullmatch(plain) for pattern in patterns), f"docs/metrics.md does not explain {plain}"
    assert metrics["explore/small/diversity_t0"] == 0
    assert metrics["explore/small/diversity_t3"] > 0.9
    assert metrics["asked/small/few_shot_wrong_labels_3/accuracy_minus_few_shot_3"] == 0
    text = (run_dir / "report.html").read_text()
    page = Tags(text)
    ids = [attrs["id"] for tag, attrs in page.tags if "id" in attrs]
    assert len(set(ids)) == len(ids)
    assert {"prompting", "explore"} <= set(ids)
    for figure in ("shots-asked", "wrong-labels-asked", "sweep-explore"):
        assert any(i.startswith(figure) for i in ids), figure
    views = json.loads((run_dir / "explore" / "views.json").read_text())
    shown = [attrs for tag, attrs in page.tags if attrs.get("class") == "token"]
    assert len(shown) == sum(len(view["tokens"]) for view in views)
    for attrs, token in zip(shown, (t for view in views for t in view["tokens"]), strict=True):
        assert attrs["style"] == f"--p:{token['probability']:.2f}"
    rewritten = write_report(run_dir).read_text()
    assert rewritten == text


@torch.no_grad()
def test_a_views_probabilities_are_the_models(run_dir, tiny_folder):
    model, tokenizer = load_local(str(tiny_folder), "model")
    views = json.loads((run_dir / "explore" / "views.json").read_text())
    assert len(views) == 2
    for view in views:
        ids = tokenizer(view["prompt"])["input_ids"]
        for token in view["tokens"]:
            shares = model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)
            top = shares.topk(5)
            assert token["probability"] == pytest.approx(top.values[0].item(), abs=1e-5)
            assert [p for _, p in token["alternatives"]] == pytest.approx(top.values.tolist(), abs=1e-5)
            assert token["alternatives"][0][0] == token["token"] == tokenizer.decode([top.indices[0]])
            ids.append(top.indices[0].item())


def test_at_temperature_zero_the_sweep_has_the_views_answer(run_dir):
    points = json.loads((run_dir / "explore" / "sweep.json").read_text())["points"]
    answers = {point["temperature"]: point["answers"] for point in points}
    assert len(set(answers[0.0])) == 1
    assert len(set(answers[3.0])) == 3
    assert all(len(some) == 3 for some in answers.values())


def test_white_space_and_control_characters_of_a_token_are_seen():
    assert [visible(t) for t in (" cats", "\n", "\t", "", "\x01", "ä")] == ["·cats", "⏎", "⇥", "∅", "�", "ä"]


def test_digits_of_a_model_against_chance(nouns_file, tmp_path):
    """A server that always writes sevens is found out; numpy's generator is not."""
    with FaultyProxy(None) as proxy:
        proxy.plan = lambda body, before: {"choices": [{"text": "7, " * 100, "finish_reason": "length"}]}
        config = validate(
            ExploreConfig,
            {
                "endpoints": {"sevens": {"url": proxy.url, "model": "m"}},
                "dataset": str(nouns_file),
                "strategies": {"few_shot": {"shots": 1}},
                "temperatures": [0.0],
                "max_examples": 1,
                "views": 0,
                "response_cache": str(tmp_path / "cache"),
                "output_dir": str(tmp_path / "explore"),
            },
        )
        metrics = execute(explore, config)
        asked = [json.loads(body) for body in proxy.seen]
        with pytest.raises(UserError, match=r"endpoints\.sevens=.*the token-probability view needs them; give views=0"):
            execute(
                explore, validate(ExploreConfig, vars_of(config) | {"views": 1, "output_dir": str(tmp_path / "no")})
            )
    assert metrics["explore/sevens/digits"] == metrics["explore/generator/digits"] == 500
    assert metrics["explore/sevens/digits_p_value"] < 1e-100
    assert metrics["explore/sevens/digits_repeat_rate"] == 1
    assert metrics["explore/generator/digits_p_value"] > 0.001
    low, high = (metrics[f"explore/generator/digits_repeat_rate_ci_{end}"] for end in ("low", "high"))
    assert low < 0.1 < high
    lists = [body for body in asked if "random digits" in body["prompt"]]
    assert len(lists) == 5  # each list with a seed of its own
    assert len({body["seed"] for body in lists}) == 5
    assert not (tmp_path / "no").exists()


def vars_of(config) -> dict:
    return {name: getattr(config, name) for name in type(config).__pydantic_fields__}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"strategies": ["few_shot", "instruction"]}, "strategies=.*a sweep asks exactly one"),
        ({"shots": [1, 2]}, r"shots=\[1, 2\]: a sweep has one number of shots"),
        ({"temperatures": []}, r"temperatures=\[\]: is empty"),
        ({"temperatures": [1, 1.0001]}, "temperatures=.*names one twice"),
        ({"temperatures": [-1]}, "temperatures=-1.0: is no temperature"),
        ({"models": {"generator": "gpt2"}}, "models.generator=generator: is what chance goes by"),
        ({"samples": 1}, "samples=1"),
    ],
)
def test_wrong_input_is_one_line(values, message):
    with pytest.raises(UserError, match=message) as caught:
        validate(ExploreConfig, {"models": {"a": "gpt2"}} | values)
    assert len(caught.value.problems) == 1
