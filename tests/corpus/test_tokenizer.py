"""The tokenizer: T5's conventions, round trips, shared words, the same vocabulary in every process."""

import json
import os
import random
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import AutoTokenizer, T5Config

from pipelines.corpus.tokenizer import TokenizerConfig, tokenizer
from pipelines.corpus.unigram import JOINER, SENTINELS, count_words, normalizer, train, train_pieces
from pipelines.errors import UserError

WORDS = ["return", "the", "list", "of", "items", "name", "value", "get", "set", "file", "path", "item", "count", "node"]


def texts(seed=0, size=300):
    rng = random.Random(seed)
    made = []
    for _ in range(size):
        words = [rng.choice(WORDS) for _ in range(8)]
        made.append(f"def {words[0]}_{words[1]}(self, {words[2]}): {words[3].title()}{words[4].title()}.{words[5]}[0]")
        made.append(f"{words[0].title()} the {words[1]} of a {words[2]}, {words[6]} & {words[7]}.")
    return made


@pytest.fixture(scope="module")
def made():
    return train(texts(), 400, lowercase=True)


def test_ids_follow_t5(made):
    assert (made.pad_token_id, made.eos_token_id, made.unk_token_id) == (0, 1, 2)
    assert sorted(made.get_vocab().values()) == list(range(len(made)))
    assert 200 < len(made) <= 400
    assert made.convert_tokens_to_ids(SENTINELS[0]) == len(made) - 1
    assert made.convert_tokens_to_ids(SENTINELS[99]) == len(made) - 100
    ids = made("get the <extra_id_3> node").input_ids
    assert ids[-1] == made.eos_token_id
    assert made.convert_tokens_to_ids("<extra_id_3>") in ids
    assert made(["a b", "get the list of items"], padding=True).input_ids[0][-1] == made.pad_token_id


def test_words_of_identifiers_are_those_of_prose(made):
    def pieces(text):
        return made.tokenize(text)

    prose = pieces("get item name")
    for text in ("get_itemName", "get.item.name", "getItemName", "GET(item)[name]"):
        found = iter(pieces(text))
        assert all(piece in found for piece in prose), text


def test_loads_by_itself_and_beside_a_t5(made, tmp_path):
    made.save_pretrained(tmp_path)
    alone = AutoTokenizer.from_pretrained(tmp_path)
    T5Config(vocab_size=len(made)).save_pretrained(tmp_path)
    beside = AutoTokenizer.from_pretrained(tmp_path)
    text = "Get_itemName(x) of the <extra_id_0> file's path."
    assert alone(text).input_ids == beside(text).input_ids == made(text).input_ids
    assert alone.get_vocab() == beside.get_vocab() == made.get_vocab()
    shown = alone.decode(alone("Get_itemName(value) of THE  path.").input_ids, skip_special_tokens=True)
    assert shown == "get_itemname(value) of the path."


CODE = st.text("abdeNTR ._()[]:,&0\n\t", max_size=60)


@settings(deadline=None)
@given(CODE)
def test_decoding_gives_the_text_back(made, text):
    # Only letters and signs that the training text had can come back.
    known = set("".join(texts()).lower())
    kept = "".join(c for c in text if c.lower() in known or c.isspace())
    ids = made(kept).input_ids
    assert made.unk_token_id not in ids
    assert made.decode(ids, skip_special_tokens=True) == " ".join(kept.lower().split())


@given(st.text(max_size=80))
def test_normalization_never_looks_across_white_space(text):
    normal = normalizer(True)
    whole = normal.normalize_str(text)
    assert whole == " ".join(part for word in text.split() if (part := normal.normalize_str(word)))
    assert sum(count_words([text, text], normal).values()) == 2 * len(whole.split(" ") if whole else [])


@given(st.text(max_size=80))
def test_joiners_can_always_be_taken_out(text):
    plain = normalizer(False).normalize_str(text)
    # the library's NFKC, not Python's: they follow different versions of Unicode
    expected = re.sub(r"\s+", " ", normalizers.NFKC().normalize_str(text)).strip()
    assert JOINER not in expected
    assert re.sub(f" ?{JOINER} ?", "", plain) == expected


def test_the_same_in_every_process(made, tmp_path):
    made.save_pretrained(tmp_path / "here")
    code = (
        "import sys, json\nfrom pipelines.corpus.unigram import train\n"
        "train(json.load(open(sys.argv[1])), 400, lowercase=True).save_pretrained(sys.argv[2])\n"
    )
    (tmp_path / "texts.json").write_text(json.dumps(texts()))
    for seed in ("1", "2"):
        command = [sys.executable, "-c", code, str(tmp_path / "texts.json"), str(tmp_path / seed)]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / seed / name).read_bytes() == (tmp_path / "here" / name).read_bytes()


def test_pieces_are_log_probabilities_and_marks_are_pieces():
    pieces = dict(train_pieces(count_words(texts(), normalizer(True)), 300))
    assert list(pieces)[:3] == ["<pad>", "</s>", "<unk>"]
    assert f"▁{JOINER}_{JOINER}" in pieces
    assert all(score < 0 for score in list(pieces.values())[3:])
    assert "&" in pieces


def test_a_vocabulary_too_small_for_the_characters(tmp_path):
    alphabet = ["".join(chr(0x4E00 + i + j) for j in range(5)) for i in range(0, 500, 5)]
    with pytest.raises(UserError, match=r"vocab_size=150: too small for the 500 different characters"):
        train(alphabet, 150, lowercase=False)


def corpus_file(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"document": text, "summary": other} for text, other in zip(*[iter(texts())] * 2, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_stage_trains_on_the_training_split_and_counts(tmp_path):
    config = TokenizerConfig(dataset=corpus_file(tmp_path), output_dir=str(tmp_path / "t"), vocab_size=300)
    metrics = tokenizer(config)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "t")
    assert metrics["tokenizer/vocab_size"] == len(loaded) <= 300
    assert metrics["tokenizer/unknown_rate"] == 0
    assert metrics["tokenizer/characters_per_token"] > 1.5
    assert metrics == tokenizer(config)
    from pipelines.corpus import load_corpus

    validation = load_corpus(config)["validation"]
    lengths = [len(loaded(text).input_ids) for text in validation["summary"]]
    assert metrics["tokenizer/summary_tokens"] == pytest.approx(sum(lengths) / len(lengths))


def test_stage_copies_the_tokenizer_of_a_model(made, tmp_path):
    made.save_pretrained(tmp_path / "model")
    T5Config(vocab_size=len(made)).save_pretrained(tmp_path / "model")
    config = TokenizerConfig(
        dataset=corpus_file(tmp_path), output_dir=str(tmp_path / "t"), model=str(tmp_path / "model"), vocab_size=300
    )
    assert tokenizer(config)["tokenizer/vocab_size"] == len(made)
    assert AutoTokenizer.from_pretrained(tmp_path / "t").get_vocab() == made.get_vocab()
    assert not (tmp_path / "t" / "config.json").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no tokenizer"):
        tokenizer(TokenizerConfig(dataset=corpus_file(tmp_path), model=str(tmp_path / "empty")))
