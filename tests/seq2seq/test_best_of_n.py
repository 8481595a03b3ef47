"""Best-of-n against the enumeration of all choices, its KL against all draws, the stage, its section of the report."""

import itertools
import json
import math

import numpy as np
import pytest

from pipelines.errors import UserError
from pipelines.seq2seq.best_of_n import BestOfNConfig, analytic_kl, best_of_n, measured_kl, pick_probabilities


@pytest.mark.parametrize("scores", [[3.0, 1.0, 2.0, 5.0, 4.0], [1.0, 2.0, 2.0, 0.0, 2.0, 1.0], [1.0, 1.0, 1.0]])
def test_picks_are_those_of_all_choices(scores):
    for n in range(1, len(scores) + 1):
        wanted = np.zeros(len(scores))
        choices = list(itertools.combinations(range(len(scores)), n))
        for choice in choices:
            best = max(scores[i] for i in choice)
            ties = [i for i, score in enumerate(scores) if score == best]
            for i in ties:  # by symmetry: which of those that tie are among the n is as probable for each
                wanted[i] += 1 / len(ties) / len(choices)
        assert pick_probabilities(scores, n) == pytest.approx(wanted)
        assert pick_probabilities(scores, n).sum() == pytest.approx(1)


def test_the_estimate_is_unbiased():
    """Mean over many sets of N samples of a known law = the exact expectation of the best of n."""
    values, law = np.array([0.0, 1.0, 2.0, 5.0]), np.array([0.4, 0.3, 0.2, 0.1])
    generator = np.random.default_rng(0)
    drawn = generator.choice(values, size=(4000, 8), p=law)
    for n in (1, 3, 8):
        exact = float((np.diff(law.cumsum() ** n, prepend=0) * values).sum())
        found = np.mean([pick_probabilities(row, n) @ row for row in drawn])
        assert found == pytest.approx(exact, abs=0.06)


def test_measured_kl_is_that_of_all_draws():
    scores = [0.5, 1.0, 1.0, 3.0]
    for n in (1, 2, 3):
        won = dict.fromkeys(scores, 0.0)
        for draw in itertools.product(scores, repeat=n):
            won[max(draw)] += len(scores) ** -n
        share = {score: scores.count(score) / len(scores) for score in scores}
        exact = sum(p * math.log(p / share[score]) for score, p in won.items())
        assert measured_kl(scores, n) == pytest.approx(exact)
    assert measured_kl([2.0, 2.0], 7) == 0


def test_measured_kl_tends_to_the_analytic_one_and_ties_lower_it():
    distinct = np.arange(4096)
    for n in (1, 2, 4, 16, 64):
        assert measured_kl(distinct, n) == pytest.approx(analytic_kl(n), abs=0.03)
        assert measured_kl(distinct // 512, n) <= analytic_kl(n) + 1e-9
    assert analytic_kl(4) == pytest.approx(math.log(4) - 3 / 4)


def settings(tiny_t5, tiny_corpus, output, **fields) -> BestOfNConfig:
    given = {
        "model": str(tiny_t5),
        "dataset": str(tiny_corpus),
        "reward": "length",
        "output_dir": str(output),
        "samples": 12,
        "max_target_length": 8,
        "precision": "fp32",
        "shard_size": 10,
        "resamples": 200,
    }
    return BestOfNConfig(**(given | fields))


def test_the_stage_measures_every_n_and_goes_on_after_a_kill(tiny_t5, tiny_corpus, tmp_path):
    metrics = best_of_n(settings(tiny_t5, tiny_corpus, tmp_path / "whole"))
    proxies = [metrics[f"best_of_n/proxy_{n}"] for n in (1, 2, 4, 8, 12)]
    assert proxies == sorted(proxies)
    assert proxies[-1] > proxies[0]
    lines = [json.loads(line) for line in (tmp_path / "whole" / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == metrics["best_of_n/examples"] == 24
    assert metrics["best_of_n/proxy_1"] == pytest.approx(np.mean([line["proxy"] for line in lines]))
    assert metrics["best_of_n/gold_1"] == pytest.approx(np.mean([line["gold"] for line in lines]))
    assert metrics["best_of_n/proxy_12"] == pytest.approx(np.mean([max(line["proxy"]) for line in lines]))
    curve = json.loads((tmp_path / "whole" / "curve.json").read_text())
    assert [point["n"] for point in curve] == [1, 2, 4, 8, 12]
    assert curve[0]["kl"] == pytest.approx(0, abs=1e-12) == curve[0]["kl_measured"]
    assert all(point["kl_measured"] <= point["kl"] + 1e-9 for point in curve)
    assert all(point["gold_low"] <= point["gold"] <= point["gold_high"] for point in curve)
    # Of three shards the first was done before the kill.
    made = tmp_path / "whole" / "checkpoints" / "test" / "000000.json"
    kept = tmp_path / "again" / "checkpoints" / "test" / made.name
    kept.parent.mkdir(parents=True)
    kept.write_bytes(made.read_bytes())
    assert best_of_n(settings(tiny_t5, tiny_corpus, tmp_path / "again")) == metrics


def test_the_section_draws_both_scores_against_both_divergences(tmp_path):
    from pipelines.reporting.run import Run, Stage
    from pipelines.reporting.sections.best_of_n import best_of_n as section

    folder = tmp_path / "best_of_n"
    folder.mkdir()
    point = {"gold": 30.0, "gold_low": 29.0, "gold_high": 31.0, "proxy": 1.0, "proxy_low": 0.9, "proxy_high": 1.1}
    curve = [{"n": n, "kl": analytic_kl(n), "kl_measured": 0.9 * analytic_kl(n), **point} for n in (1, 2, 4)]
    (folder / "curve.json").write_text(json.dumps(curve))
    stage = Stage("best_of_n", folder, {"recipe": "summarization/best_of_n"})
    run = Run(tmp_path, "x", "", "", 0, (stage,), {})
    body = str(section(run).body)
    for text in ("proxy reward", "gold score", "analytic KL", "measured KL", "n = 1, 2, 4"):
        assert text in body
    assert section(run).stages == {"best_of_n"}
    assert section(Run(tmp_path, "x", "", "", 0, (Stage("sft", tmp_path),), {})) is None


def test_searching_is_refused(tiny_t5, tiny_corpus, tmp_path):
    assert [p.what for p in settings(tiny_t5, tiny_corpus, tmp_path, do_sample=False).problems()] == ["do_sample"]
    with pytest.raises(UserError, match="reward"):
        best_of_n(settings(tiny_t5, tiny_corpus, tmp_path, reward="no_such_module:f"))
