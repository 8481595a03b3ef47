"""Wrong data: files, lines, columns and values."""

import shutil

from tests.chain.wrong_input import At, Wrong, kind

GOOD = {"source": ["Ships sail.", "They carry grain."], "target": "ships carry grain"}


@kind
def missing_file(at: At) -> Wrong:
    file = at.folder / "none.jsonl"
    argv = ["run", *at.chain()[1:], f"dataset={file}"]
    return Wrong(argv, [f"corpus.dataset={file}: no such file or folder; mend the path"])


@kind
def folder_where_a_file_should_be(at: At) -> Wrong:
    folder = at.folder / "test.jsonl"
    folder.mkdir()
    problem = "holds neither a saved dataset nor train, validation and test files (.jsonl, .json, .csv, .tsv, .parquet)"
    argv = at.corpus(at.data / "train.jsonl", f"test_dataset={folder}")
    return Wrong(argv, [f"test_dataset={folder}: {problem}; give a data file"])


@kind
def file_that_may_not_be_read(at: At) -> Wrong:
    # to root too: a memory that has no content at its beginning
    says = "dataset=/proc/self/mem: cannot be read (Input/output error); give a readable file or folder"
    return Wrong(at.corpus("/proc/self/mem"), [says])


@kind
def unknown_kind_of_file(at: At) -> Wrong:
    file = at.write("train.docx", "text")
    says = f"dataset={file}: unknown kind of file; give one of .jsonl, .json, .csv, .tsv, .parquet"
    return Wrong(at.corpus(file), [says])


@kind
def no_such_hub_dataset(at: At) -> Wrong:
    says = "dataset=owner/none: no such file or folder, and the hub gave no such dataset (…); mend the path, or …"
    return Wrong(at.corpus("owner/none"), [says])


@kind
def wrong_column(at: At) -> Wrong:
    says = f"text_column=sources: no such column in {at.data}/train.jsonl (it has: 'source', 'target'); "
    says += "did you mean 'source'?; pass text_column=source"
    return Wrong(at.corpus(at.data, "text_column=sources"), [says])


@kind
def wrong_column_in_a_chain_on_a_finished_run(at: At) -> Wrong:
    shutil.copytree(at.run, at.out)
    says = f"summary_column=tldr: no such column in {at.data}/train.jsonl (it has: 'source', 'target'); "
    return Wrong(at.chain("summary_column=tldr"), [says + "pass summary_column=NAME"])


@kind
def empty_set(at: At) -> Wrong:
    file = at.write("empty.jsonl", "\n\n")
    return Wrong(at.corpus(file), [f"dataset={file}: holds no examples; give a file with at least one"])


@kind
def csv_with_a_header_only(at: At) -> Wrong:
    file = at.write("empty.csv", "source,target\n")
    return Wrong(at.corpus(file), [f"dataset={file}: holds no examples; give a file with at least one"])


@kind
def too_few_examples_to_split(at: At) -> Wrong:
    file = at.lines("two.jsonl", GOOD, GOOD)
    says = f"dataset={file}: too few different examples to also make validation and test; give more examples, or …"
    return Wrong(at.corpus(file), [says])


@kind
def bad_utf8(at: At) -> Wrong:
    file = at.write("latin.jsonl", b'{"source": "a", "target": "b"}\n{"source": "caf\xe9", "target": "b"}\n')
    says = f"dataset={file} line 2: not UTF-8 (byte 16 of the line is 0xe9); save the file as UTF-8"
    return Wrong(at.corpus(file), [says])


@kind
def malformed_json_line(at: At) -> Wrong:
    file = at.lines("broken.jsonl", GOOD, GOOD, '{"source": "a" "target": "b"}')
    says = f"dataset={file} line 3: not valid JSON (Expecting ',' delimiter, character 16); mend or drop that line"
    return Wrong(at.corpus(file), [says])


@kind
def json_line_that_is_no_object(at: At) -> Wrong:
    file = at.lines("list.jsonl", GOOD, ["a", "b"])
    says = f"dataset={file} line 2: a list, not an object with columns; write {{…}} on each line"
    return Wrong(at.corpus(file), [says])


@kind
def null(at: At) -> Wrong:
    file = at.lines("null.jsonl", GOOD, GOOD | {"source": None})
    return Wrong(at.corpus(file), [f"dataset={file} line 2: the column 'source' holds null, not text; give text there"])


@kind
def number_where_text_should_be(at: At) -> Wrong:
    file = at.lines("number.jsonl", GOOD, GOOD, GOOD | {"target": 7})
    says = f"dataset={file} line 3: the column 'target' holds a number, not text; give text there"
    return Wrong(at.corpus(file), [says])


@kind
def empty_text(at: At) -> Wrong:
    file = at.lines("blank.jsonl", GOOD | {"source": [" ", ""]})
    says = f"dataset={file} line 1: the column 'source' is empty; give a text or drop the example"
    return Wrong(at.corpus(file), [says])


@kind
def column_missing_in_one_line(at: At) -> Wrong:
    file = at.lines("holes.jsonl", GOOD, {"source": "a"})
    says = f"dataset={file} line 2: the column 'target' is missing there; add it or drop the example"
    return Wrong(at.corpus(file), [says])


@kind
def ragged_csv(at: At) -> Wrong:
    file = at.write("ragged.csv", 'source,target\n"a\nb",c\nd,e,f\n')
    says = f"dataset={file} line 4: 3 cells under 2 column names; quote texts that hold the delimiter or line breaks"
    return Wrong(at.corpus(file), [says])


@kind
def corrupt_parquet(at: At) -> Wrong:
    file = at.write("torn.parquet", b"PAR1" + bytes(range(64)) + b"PAR1")
    return Wrong(at.corpus(file), [f"dataset={file}: not a readable Parquet file (…); write the file again"])


@kind
def damaged_dataset_folder(at: At) -> Wrong:
    folder = at.folder / "saved"
    shutil.copytree(at.run / "corpus", folder)
    for file in (folder / "train").glob("*.arrow"):
        file.write_bytes(b"torn")
    argv = at.recipe("corpus", f"dataset={folder}")
    return Wrong(argv, [f"dataset={folder}: a damaged dataset folder (…); save it again"])


@kind
def one_file_for_two_splits(at: At) -> Wrong:
    file = at.data / "train.jsonl"
    says = f"test_dataset={file}: is dataset too; give each split data of its own"
    return Wrong(at.corpus(file, f"test_dataset={file}"), [says])


@kind
def identical_preference_pair(at: At) -> Wrong:
    pair = {"prompt": "a b", "chosen": "c", "rejected": "d"}
    file = at.lines("pairs.jsonl", pair, pair | {"rejected": "c"})
    says = f"preferences={file} line 2: chosen and rejected are identical; drop that pair"
    return Wrong(at.recipe("dpo", f"model={at.run}/sft", f"preferences={file}"), [says])


@kind
def preference_column_missing(at: At) -> Wrong:
    file = at.lines("pairs.jsonl", {"prompt": "a b", "chosen": "c", "reject": "d"})
    says = f"preferences=rejected: no such column in {file} (it has: 'prompt', 'chosen', 'reject')…; "
    says += "name a column 'rejected'"
    return Wrong(at.recipe("reward", f"model={at.run}/sft", f"preferences={file}"), [says])


@kind
def preference_scores_the_wrong_way_round(at: At) -> Wrong:
    pair = {"prompt": "a b", "chosen": "c", "rejected": "d", "chosen_score": 0.1, "rejected_score": 0.4}
    file = at.lines("pairs.jsonl", pair)
    says = f"preferences_file={file} line 1: chosen_score 0.1 is not above rejected_score; swap the two or drop …"
    return Wrong(at.recipe("preferences", f"preferences_file={file}"), [says])


@kind
def fewer_examples_than_a_batch(at: At) -> Wrong:
    argv = at.recipe("sft", f"model={at.run}/sft", f"dataset={at.run}/corpus", "batch_size=1000")
    problem = "one step takes 1000 examples (devices × batch_size × gradient_accumulation)"
    mend = "give more examples, or a smaller batch_size"
    return Wrong(argv, [f"dataset=96 training examples: {problem}; {mend}"])


@kind
def fewer_documents_than_a_rollout(at: At) -> Wrong:
    argv = at.recipe("ppo", f"model={at.run}/sft", "reward=rouge", f"dataset={at.run}/corpus", "max_train=20")
    mend = "give more documents, or sources_per_rollout=20 or less"
    return Wrong(argv, [f"dataset=20 training documents: a rollout takes 64 documents; {mend}"])


@kind
def fewer_pairs_than_a_batch(at: At) -> Wrong:
    argv = at.recipe("dpo", f"model={at.run}/sft", f"preferences={at.run}/preferences", "batch_size=1000")
    problem = "one step takes 1000 pairs (devices × batch_size × gradient_accumulation)"
    return Wrong(argv, [f"preferences=… training pairs: {problem}; give more pairs, or a smaller batch_size"])


@kind
def vocabulary_too_small(at: At) -> Wrong:
    argv = at.recipe("tokenizer", f"dataset={at.run}/corpus", "vocab_size=150")
    says = "vocab_size=150: too small for the … different characters of the training text; give … or more"
    return Wrong(argv, [says])
