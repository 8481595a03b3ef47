"""The comparison of written and learnt prompts: pairing, the best prompt, refusals, the report's table and figure."""

import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from pipelines.config import validate
from pipelines.errors import UserError
from pipelines.prompting.compare import CompareConfig, compare
from pipelines.prompting.compare_math import crossed_difference
from pipelines.reporting.kept import kept, results_block
from pipelines.reporting.report import write_report
from pipelines.reporting.run import opened
from pipelines.reporting.sections.prompting_compare import compared
from pipelines.reporting.tables import markdown_table
from pipelines.runner import Chain
from tests.chain.test_whole import documented

LETTERS = str.maketrans("0123456789", "abcdefghij")
IDS = [f"w{n}" for n in range(40)]
GROUPS = ["irregular" if n % 10 == 0 else "regular" for n in range(40)]


def write_hard(folder, right, metric_rows=None):
    """``right``: strategy -> (shots, values of the examples)."""
    folder.mkdir(parents=True)
    lines = []
    draw = np.random.default_rng(0)
    for strategy, (shots, values) in right.items():
        for number in draw.permutation(len(IDS)):  # examples are matched by their ids
            identifier, value = IDS[number], values[number]
            kind = "right" if value else "plausible"
            row = {"model": "m", "strategy": strategy, "shots": ["s"] * shots, "id": identifier, "right": "a b c"}
            lines.append(row | {"kind": kind, "answer": "a b c" if value else "x y"})
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def write_learnt(folder, runs, task="words", metric="accuracy", ids=IDS):
    """``runs``: (examples, seed) -> values."""
    folder.mkdir(parents=True)
    table = {"task": task, "metric": metric, "ids": ids, "groups": GROUPS, "references": [["a b c"]] * len(ids)}
    table["runs"] = [
        {"examples": size, "seed": seed, "values": list(map(float, values)), "trainable_parameters": 77}
        for (size, seed), values in runs.items()
    ]
    (folder / "results.json").write_text(json.dumps(table))
    return str(folder)


@pytest.fixture
def made(tmp_path):
    """Two seeds of two prompts, and two trained systems; (configuration, values by name)."""
    draw = np.random.default_rng(1)

    def coins(p):
        return (draw.random(40) < p).astype(int)

    hard = [{"few_0": (0, coins(0.2)), "few_3": (3, coins(0.6))} for _ in range(2)]
    soft = {(64, 0): coins(0.9), (64, 1): coins(0.9), (64, 2): coins(0.9), (8, 0): coins(0.5), (8, 1): coins(0.5)}
    lora = {(64, 0): coins(0.8)}
    config = {
        "hard": [write_hard(tmp_path / f"hard{n}", table) for n, table in enumerate(hard)],
        "learnt": {"soft": write_learnt(tmp_path / "soft", soft), "lora": write_learnt(tmp_path / "lora", lora)},
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "out").mkdir()
    values = {"best": np.array([table["few_3"][1] for table in hard])}
    values |= {"soft": np.array([soft[64, s] for s in range(3)]), "small": np.array([soft[8, s] for s in range(2)])}
    return config, values


def test_means_and_paired_differences_are_those_of_the_values(made):
    config, values = made
    metrics = compare(validate(CompareConfig, config))
    assert metrics["compare/best_hard/accuracy"] == pytest.approx(values["best"].mean())
    assert metrics["compare/best_hard/shots"] == 3
    assert metrics["compare/soft/accuracy"] == pytest.approx(values["soft"].mean())
    assert metrics["compare/soft/accuracy_8"] == pytest.approx(values["small"].mean())
    irregular = [group == "irregular" for group in GROUPS]
    assert metrics["compare/soft/accuracy_irregular"] == pytest.approx(values["soft"][:, irregular].mean())
    order = np.argsort(IDS)
    gain = crossed_difference(values["soft"][:, order], values["best"][:, order])
    key = "compare/soft/accuracy_minus_best_hard"
    assert (metrics[key], metrics[f"{key}_ci_low"], metrics[f"{key}_ci_high"]) == pytest.approx(gain)
    assert metrics["compare/soft/accuracy_8_minus_best_hard"] == pytest.approx(
        values["small"].mean() - values["best"].mean()
    )
    assert metrics["compare/lora/trainable_parameters"] == 77
    assert (metrics["compare/examples"], metrics["compare/seeds"]) == (40, 2)


def test_the_table_and_figure_show_every_point(made, tmp_path):
    config, values = made
    metrics = compare(validate(CompareConfig, config))
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
    table = compared(comparison)
    rows = {row[0].text: row for row in table.rows if row[2].text != "8"}
    assert list(rows) == ["few 0", "few 3 (the best)", "soft", "lora"]
    assert rows["soft"][1].text == "77"
    assert float(rows["soft"][3].text) == pytest.approx(100 * values["soft"].mean(), abs=0.06)
    assert rows["soft"][5].text.count(",") == 2
    gain = 100 * metrics["compare/soft/accuracy_minus_best_hard"]
    assert float(rows["soft"][4].text.replace("−", "-")) == pytest.approx(gain, abs=0.06)
    assert len(table.rows) == 5
    run = tmp_path / "run"
    (run / "compare").mkdir(parents=True)
    (tmp_path / "out" / "comparison.json").rename(run / "compare" / "comparison.json")
    record = {"stage": "prompting.compare.compare", "recipe": "prompting/compare", "state": "finished"}
    record |= {"fingerprint": "x", "config": {}, "metrics": metrics, "seed": 0}
    (run / "compare" / "stage.json").write_text(json.dumps(record))
    (run / "run.json").write_text(json.dumps({"name": "prompting", "about": "", "stages": ["compare"]}))
    assert kept([opened(run)]) == comparison
    assert markdown_table(table) in results_block(comparison)
    page = write_report(run).read_text()
    section = page[page.index('id="prompting-compare"') :]
    svg = re.search(r"<svg.*?</svg>", section, re.DOTALL).group()
    tree = ElementTree.fromstring(svg)
    assert "soft" in tree.attrib["aria-label"]
    texts = [node.text for node in tree.iter() if node.tag.endswith("text")]
    assert {"trained parameters", "soft", "lora", "written"} <= set(texts)


def test_what_needs_no_model_stands_first_and_is_measured_once(made, tmp_path):
    """A rule with its interval, guessing without one; metrics of models have one part more and are no baselines."""
    rules = {"hard/spelling_rules/accuracy": 0.9, "hard/chance/accuracy": 0.25, "hard/m/few_3/accuracy": 0.6}
    ends = {"hard/spelling_rules/accuracy_ci_low": 0.8, "hard/spelling_rules/accuracy_ci_high": 0.95}
    (tmp_path / "hard0" / "stage.json").write_text(json.dumps({"fingerprint": "f", "metrics": rules | ends}))
    compare(validate(CompareConfig, made[0]))
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
    found = {point["label"]: point for point in comparison["points"] if point["kind"] == "baseline"}
    assert found.keys() == {"spelling_rules", "chance"}
    assert [found["spelling_rules"][key] for key in ("value", "low", "high")] == [0.9, 0.8, 0.95]
    table = markdown_table(compared(comparison)).splitlines()
    assert table[2] == "| The rules of spelling | – | – | 90.0 (80.0–95.0) | – | – |"
    assert table[3] == "| Chance | – | – | 25.0 | – | – |"
    assert table[4].startswith("| few 0 | – | 0 |")


def test_summaries_are_compared_by_rouge(tmp_path):
    hard = [write_hard(tmp_path / "hard", {"tldr": (0, [1] * 20 + [0] * 20)})]
    learnt = write_learnt(tmp_path / "soft", {(64, 0): [80.0] * 40}, task="summarization", metric="rouge1")
    config = {"hard": hard, "learnt": {"soft": learnt}, "output_dir": str(tmp_path)}
    metrics = compare(validate(CompareConfig, config))
    assert metrics["compare/best_hard/rouge1"] == pytest.approx(50.0)
    assert metrics["compare/soft/rouge1_minus_best_hard"] == pytest.approx(30.0)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda c, p: c.update(hard=[]), r"hard=\[\]: there is nothing to compare"),
        (lambda c, p: c.update(hard=c["hard"][:1] * 2), "hard=.*: names a folder twice"),
        (lambda c, p: c.update(learnt={"best_hard": c["learnt"]["soft"]}), "learnt=best_hard: is the name of the best"),
        (lambda c, p: c.update(learnt={"Soft Prompt": c["learnt"]["soft"]}), "learnt.Soft Prompt=.*metric's name"),
        (lambda c, p: c.update(hard=[c["learnt"]["soft"]]), "hard.0=.*: holds no answers.jsonl; give the folder of a"),
        (lambda c, p: c.update(learnt={"a": c["hard"][0]}), "learnt.a=.*: holds no results.json"),
        (lambda c, p: c.update(hard_model="n"), "hard_model=n: was not asked in .*; the keys are: m"),
        (
            lambda c, p: c["hard"].append(write_hard(p / "more", {"few_0": (0, [1] * 40)})),
            "hard.2=.*: few_3 was not asked the same examples as in",
        ),
        (
            lambda c, p: c["learnt"].update(b=write_learnt(p / "b", {(8, 0): [1] * 40}, ids=[*IDS[1:], "z"])),
            r"learnt.b=b: was measured on other examples \(40, of which 39 are the same\)",
        ),
        (
            lambda c, p: c["learnt"].update(b=write_learnt(p / "b", {(8, 0): [1] * 40}, task="summarization")),
            "learnt.b=.*: is of summarization, soft of words; compare one task at a time",
        ),
    ],
)
def test_what_cannot_be_compared_is_told_in_one_line(made, tmp_path, change, line):
    config, _ = made
    change(config, tmp_path)
    with pytest.raises(UserError, match=line) as error:
        compare(validate(CompareConfig, config))
    assert len(str(error.value).splitlines()) == 1


def test_a_failed_answer_is_no_wrong_one(made, tmp_path):
    config, _ = made
    file = tmp_path / "hard0" / "answers.jsonl"
    file.write_text(file.read_text().replace('"kind": "plausible"', '"kind": "failed"', 1))
    with pytest.raises(UserError, match=r"has no answer to .*; run that stage again"):
        compare(validate(CompareConfig, config))


def test_the_chain_from_the_model_to_the_report(prompting_cli, root, nouns_file, tmp_path):
    """``genalign run prompting`` on a handful of words; every metric is explained in docs/metrics.md."""
    text = tmp_path / "text.jsonl"
    words = "walk walked walking cook cooked cooking lamp wall door seat time"
    rows = [{"document": f"{words} bell{n % 120:03d}".translate(LETTERS), "summary": f"{n}"} for n in range(480)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = {"hidden_size": 16, "intermediate_size": 32, "num_layers": 1, "num_heads": 2, "max_steps": 2}
    small |= {"dataset": nouns_file, "text": text, "validation_fraction": 0.2, "save_steps": 50}
    given = [f"word_model.{name}={value}" for name, value in small.items()]
    for stage in ("prompt_tuning", "lora", "full"):
        given.append(f"{stage}.train_sizes=[4]")
    for stage in ("prompt_tuning", "prompt_tuning_vocabulary", "prompt_tuning_random", "prefix_tuning", "p_tuning"):
        given.append(f"{stage}.max_steps=2")
    given += ["lora.max_steps=2", "full.max_steps=2", "repeats=1", "batch_size=4", "max_new_tokens=3", "samples=2"]
    given += ["hard_seed0.shots=[0, 1]", "hard_seed1.shots=[0, 1]", "hard_seed2.shots=[0, 1]", "wrong_labels.shots=[1]"]
    given += ["explore.temperatures=[0, 1]", "explore.strategies={few_shot: {shots: 1}}", "resamples=100"]
    code, printed = prompting_cli.run("run", "prompting", "--output_dir", str(tmp_path / "run"), *given)
    assert code == 0, printed[-3000:]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    patterns, recipes = documented(root), Chain.load("prompting").recipe_names
    for key in metrics:
        stage, _, rest = key.removesuffix("_ci_low").removesuffix("_ci_high").partition("/")
        plain = f"{recipes[stage].rpartition('/')[2]}/{rest}"
        assert any(pattern.fullmatch(plain) for pattern in patterns), f"docs/metrics.md does not explain {plain}"
    for name in ("prompt_tuning", "prefix_tuning", "p_tuning", "lora", "full"):
        assert metrics[f"compare/{name}/accuracy"] == metrics[f"{name}/accuracy"]
        assert f"compare/{name}/accuracy_minus_best_hard_ci_low" in metrics
    page = (tmp_path / "run" / "report.html").read_text()
    assert 'id="prompting-compare"' in page
    assert "prompt tuning random" in page
