"""Pairs by hand; the stage's files and figures; the same after a kill; people's preferences converted."""

from __future__ import annotations

import itertools
import json

import pytest

from pipelines.config import validate
from pipelines.errors import UserError
from pipelines.seq2seq.preferences import PreferencesConfig, pairs_of, preferences, ranking_of


def _config(output, corpus, model, **changes) -> PreferencesConfig:
    fields = {
        "output_dir": str(output),
        "dataset": str(corpus),
        "model": None if model is None else str(model),
        "max_train": 20,
        "max_validation": 8,
        "max_test": 8,
        "max_source_length": 32,
        "max_target_length": 8,
        "precision": "fp32",
        "shard_size": 7,
        "samples": 3,
    }
    return validate(PreferencesConfig, fields | changes)


def test_best_against_worst():
    pairs, ties = pairs_of("d", ["a", "b", "c", "b", ""], [1.0, 3.0, 2.0, 3.0, 0.0])
    assert ties == 0
    assert pairs == [
        {"id": "d", "chosen": "b", "rejected": "a", "chosen_score": 3.0, "rejected_score": 1.0, "margin": 2.0}
    ]


def test_all_pairs_and_ties():
    pairs, ties = pairs_of("d", ["a", "b", "c"], [1.0, 2.0, 2.0], which="all")
    assert [(p["chosen"], p["rejected"]) for p in pairs] == [("b", "a"), ("c", "a")]
    assert len({p["id"] for p in pairs}) == 2
    assert ties == 1
    assert pairs_of("d", ["a", "b"], [1.0, 1.5], tie_margin=0.5) == ([], 1)
    assert pairs_of("d", ["a", "a", " "], [1.0, 1.0, 2.0]) == ([], 1)


def test_random_pairs_are_ordered_and_cover_all():
    samples, scores = list("abcd"), [4.0, 3.0, 2.0, 1.0]
    seen = set()
    for number in range(200):
        ((pair,), _) = pairs_of(f"d{number}", samples, scores, which="random", seed=1)
        assert pair["margin"] > 0
        seen.add((pair["chosen"], pair["rejected"]))
    assert seen == set(itertools.combinations("abcd", 2))
    assert pairs_of("d", samples, scores, which="random", seed=1) == pairs_of(
        "d", samples, scores, which="random", seed=1
    )


def test_a_ranking_leaves_ties_equal_and_empty_texts_out():
    texts, scores = ["a", "b", "", "c", "b", "d"], [1.0, 3.0, 9.0, 2.9, 3.0, 2.0]
    assert ranking_of(texts, scores) == (["a", "b", "c", "d"], [1, 2, 3, 0])
    assert ranking_of(texts, scores, tie_margin=0.5) == (["a", "b", "d"], [1, 2, 0])
    assert ranking_of(["a", "b"], [1.0, 1.0]) == (["a"], [0])


def test_saved_rankings_agree_with_the_scores(tmp_path, tiny_corpus, tiny_t5):
    from pipelines.corpus import RankingFields, load_rankings

    preferences(_config(tmp_path, tiny_corpus, tiny_t5, samples=4))
    lines = map(json.loads, (tmp_path / "samples.jsonl").read_text().splitlines())
    scores = {(line["id"], t): s for line in lines for t, s in zip(line["samples"], line["scores"], strict=True)}
    found = load_rankings(RankingFields(rankings=str(tmp_path / "rankings")))
    assert {len(row["ranking"]) for row in found["train"]} > {2}
    for split in found.values():
        for row in split:
            ranked = [scores[row["id"], row["completions"][number]] for number in row["ranking"]]
            assert ranked == sorted(set(ranked), reverse=True)
            assert len(ranked) == len(row["completions"])


def test_stage_saves_pairs_that_its_readers_take(tmp_path, tiny_corpus, tiny_t5):
    from pipelines.corpus import load_corpus, load_preferences
    from pipelines.corpus.fields import PreferenceFields
    from pipelines.seq2seq.annotators import load_annotator

    config = _config(tmp_path, tiny_corpus, tiny_t5)
    metrics = preferences(config)
    found = load_preferences(PreferenceFields(preferences=str(tmp_path)))
    corpus = load_corpus(config)
    assert {split: len(found[split]) for split in found} == {
        split: metrics[f"preferences/{split}_pairs"] for split in ("train", "validation", "test")
    }
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines if line["split"] == "test"] == corpus["test"]["id"]
    assert all(len(line["samples"]) == 3 for line in lines)
    gold = load_annotator("rouge")
    references = dict(zip(corpus["train"]["id"], corpus["train"]["references"], strict=True))
    documents = dict(zip(corpus["train"]["id"], corpus["train"]["document"], strict=True))
    for row in found["train"]:
        assert row["prompt"] == documents[row["id"]]
        scores = gold([row["prompt"]] * 2, [row["chosen"], row["rejected"]], [references[row["id"]]] * 2)
        assert [row["chosen_score"], row["rejected_score"]] == pytest.approx(scores)
        assert row["margin"] == pytest.approx(scores[0] - scores[1])
        assert row["margin"] > 0
    test = [line["scores"] for line in lines if line["split"] == "test"]
    assert metrics["preferences/gold_best_of_n"] == pytest.approx(sum(max(s) for s in test) / len(test))
    assert metrics["preferences/gold_mean_ci_low"] <= metrics["preferences/gold_mean"]
    documents_without_pair = 36 - sum(len(found[split]) for split in found)
    assert metrics["preferences/tie_rate"] == pytest.approx(documents_without_pair / 36)


def test_a_killed_run_ends_the_same(tmp_path, monkeypatch, tiny_corpus, tiny_t5):
    import pipelines.seq2seq.generation as generation

    whole = preferences(_config(tmp_path / "whole", tiny_corpus, tiny_t5))
    generate, calls = generation.generate_summaries, []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    config = _config(tmp_path / "cut", tiny_corpus, tiny_t5)
    monkeypatch.setattr(generation, "generate_summaries", dying)
    with pytest.raises(KeyboardInterrupt):
        preferences(config)
    assert preferences(config) == whole
    assert len(calls) == 3 + 7 - 2  # 3 + 2 + 2 shards, two of which had been written
    assert (tmp_path / "whole/samples.jsonl").read_bytes() == (tmp_path / "cut/samples.jsonl").read_bytes()


def test_peoples_preferences(tmp_path, tiny_corpus):
    from datasets import load_from_disk

    file = tmp_path / "human.jsonl"
    rows = [{"prompt": f"document {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(30)]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    config = _config(
        tmp_path / "out",
        tiny_corpus,
        None,
        preferences_file=str(file),
        max_train=None,
        max_test=None,
        max_validation=None,
    )
    metrics = preferences(config)
    found = load_from_disk(str(tmp_path / "out"))
    assert [len(found[split]) for split in ("train", "validation", "test")] == [24, 3, 3]
    assert metrics["preferences/mean_margin"] == 1.0
    assert {row["prompt"] for split in found.values() for row in split} <= {row["prompt"] for row in rows}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": None}, "no policy to sample from"),
        ({"do_sample": False}, "cannot give 3 summaries"),
        ({"tie_margin": 1000.0}, "none has two samples of different score"),
    ],
)
def test_one_line_for_what_cannot_be(tmp_path, tiny_corpus, tiny_t5, changes, says):
    with pytest.raises(UserError) as error:
        preferences(_config(tmp_path, tiny_corpus, **({"model": tiny_t5} | changes)))
    assert says in str(error.value)
