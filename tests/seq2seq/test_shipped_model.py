"""The model that ships with the package: plain for transformers, small, clean of held-out packages, and of use."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.config import validate
from pipelines.corpus.packages import HELD_OUT
from pipelines.corpus.pydocs import TEST_PACKAGES, VALIDATION_PACKAGES
from pipelines.errors import UserError
from pipelines.seq2seq.evaluate import EvaluateConfig
from pipelines.seq2seq.ship import RECORD
from pipelines.share import shipped, shipped_names

NAME = "genalign:t5-docstrings"
FOLDER = Path(shipped(NAME))
PAIRS = [
    ("shapes.circle_area(radius)\nreturn math.pi * radius ** 2", "Return the area of a circle."),
    (
        "net.open_connection(host, port)\nsock = socket.socket()\nsock.connect((host, port))",
        "Open a connection to a host.",
    ),
    ("files.read_lines(path)\nwith open(path) as f: return f.readlines()", "Read all lines of a file."),
    ("users.delete_user(name)\nself.db.remove(name)", "Delete the user with the given name."),
    ("text.to_upper(s)\nreturn s.upper()", "Convert a string to upper case."),
    ("matrix.transpose(a)\nreturn [list(r) for r in zip(*a)]", "Return the transpose of a matrix."),
    ("cache.clear(self)\nself._items.clear()", "Remove all items from the cache."),
    ("dates.parse_date(text)\nreturn datetime.strptime(text, fmt)", "Parse a date from a string."),
    ("graph.add_edge(u, v, weight)\nself.edges[u][v] = weight", "Add an edge between two nodes of the graph."),
    ("stats.mean(values)\nreturn sum(values) / len(values)", "Compute the mean of the values."),
]


def test_it_ships_and_is_small():
    assert "t5-docstrings" in shipped_names()
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 20e6
    assert not [path.name for path in FOLDER.iterdir() if path.suffix not in (".json", ".safetensors", ".md")]


def test_the_held_out_packages_are_in_neither_text_nor_card():
    record = json.loads((FOLDER / RECORD).read_text(encoding="utf-8"))
    packages = record["text"]["packages"]
    read = {name for name, package in packages.items() if package["split"] == "train"}
    assert len(read) > 40
    assert not read & HELD_OUT
    assert {name for name in packages if name not in read} <= set(VALIDATION_PACKAGES)
    assert not set(packages) & set(TEST_PACKAGES)
    table = (FOLDER / "README.md").read_text(encoding="utf-8").split("| package |")[1]
    assert not [name for name in HELD_OUT if f"| {name} |" in table]
    assert all(f"| {name} | {packages[name]['version']} |" in table for name in read)


def test_transformers_alone_loads_it():
    script = (
        "import sys\n"
        "from transformers import AutoTokenizer, T5ForConditionalGeneration\n"
        f"model = T5ForConditionalGeneration.from_pretrained({str(FOLDER)!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(FOLDER)!r})\n"
        "found = model.generate(**tokenizer('users.delete_user(name)', return_tensors='pt'), max_new_tokens=16)\n"
        "assert tokenizer.decode(found[0], skip_special_tokens=True).strip()\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'pipelines']\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd="/")


def test_a_summary_fits_its_function_better_than_anothers():
    import torch
    from transformers import AutoTokenizer, T5ForConditionalGeneration

    model = T5ForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    count = len(PAIRS)
    documents = tokenizer([d for d, _ in PAIRS for _ in PAIRS], padding=True, return_tensors="pt")
    labels = tokenizer([s for _ in PAIRS for _, s in PAIRS], padding=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(**documents, labels=labels).logits
    log_probs = logits.log_softmax(-1).gather(2, labels[..., None])[..., 0] * (labels != tokenizer.pad_token_id)
    best = log_probs.sum(1).view(count, count).argmax(0)  # for each summary the function that it fits best
    assert (best == torch.arange(count)).sum() >= count - 1


def test_a_name_that_nothing_has_is_one_line(tmp_path):
    with pytest.raises(UserError) as error:
        validate(EvaluateConfig, {"systems": {"sft": "genalign:t5-docstring"}, "output_dir": str(tmp_path)})
    assert str(error.value) == (
        "systems.sft=genalign:t5-docstring: nothing of that name ships with genalign; "
        "did you mean 'genalign:t5-docstrings'?"
    )
