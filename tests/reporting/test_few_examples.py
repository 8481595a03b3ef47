"""ROUGE against the number of examples: which stages make a curve, and what stands in the table."""

import re

import pytest

from pipelines.reporting.run import Run, Stage
from pipelines.reporting.sections.few_examples import few_examples

SCORES = {"scratch_100": 12.0, "scratch": 24.5, "finetuned_100": 27.25, "finetuned": 34.0}


def trained(folder, name, examples, model):
    record = {
        "recipe": "summarization/sft",
        "config": {"model": model},
        "metrics": {"sft/train_examples": float(examples), "sft/steps": 300.0},
    }
    return Stage(name, folder / name, record)


@pytest.fixture
def run(tmp_path):
    stages = [
        trained(tmp_path, name, 100 if name.endswith("100") else 17_000, "m" if name.startswith("fine") else None)
        for name in SCORES
    ]
    systems = {stage.name: str(stage.folder) for stage in stages}
    stages.append(
        Stage("evaluate", tmp_path / "evaluate", {"recipe": "summarization/evaluate", "config": {"systems": systems}})
    )
    metrics = {"name/rouge1": 25.6, "lead1/rouge1": 20.2}
    for name, score in SCORES.items():
        metrics |= {f"{name}/rouge1": score, f"{name}/rouge1_ci_low": score - 1, f"{name}/rouge1_ci_high": score + 1}
    return Run(tmp_path, "x", "", "", 0, tuple(stages), metrics)


def test_each_kind_has_its_curve_and_the_best_baseline_a_line(run):
    section = few_examples(run)
    figure = str(section.body).split("<table")[0]
    assert "pretrained: 27.2 at 100, 34.0 at 17,000" in figure
    assert "from scratch: 12.0 at 100, 24.5 at 17,000" in figure
    assert "The name in words: 25.6" in figure
    assert "20.2" not in figure


def test_the_table_has_every_system_by_its_examples(run):
    rows = re.findall(r"<tr>(.*?)</tr>", str(few_examples(run).body), re.S)[1:]
    texts = [re.sub(r"<[^>]+>|\s+", " ", row) for row in rows]
    assert len(texts) == 4
    assert [("100" if " 100 " in text else "17,000") for text in texts] == ["100", "100", "17,000", "17,000"]
    assert "33.0" in texts[-1]
    assert "35.0" in texts[-1]


def test_one_size_alone_makes_no_section(run):
    from dataclasses import replace

    few = replace(run, stages=tuple(s for s in run.stages if not s.name.endswith("100")))
    assert few_examples(few) is None
