"""The chains that people start from are valid, say how they are started, and carry the estimate of the command."""

import re

import pytest

from pipelines.cli import main
from pipelines.errors import UserError
from pipelines.estimate import DEVICES, MARK, header
from pipelines.runner import Chain, list_chains

FILES = {name: file for name, _, file in list_chains() if MARK in file.read_text(encoding="utf-8")}


def test_every_model_set_and_size_of_hardware_has_one():
    names = " ".join(FILES)
    for part in ("xsum_", "cnn_", "flan_t5_base", "flan_t5_large", "t5gemma_", "_24gb", "_80gb", "_8x80gb"):
        assert part in names
    lora = {name for name in FILES if Chain.load(name).stages["ppo"].get("lora_r")}
    assert lora
    assert set(FILES) - lora


@pytest.mark.parametrize("name", FILES)
def test_a_starting_chain_is_valid_and_says_how_it_is_started(name, tmp_path, root):
    chain = Chain.load(name)
    assert list(chain.configured(tmp_path, [])) == [
        "corpus", "tokenizer", "sft", "preferences", "reward", "ppo", "dpo", "evaluate",
    ]  # fmt: skip
    assert chain.stages["tokenizer"]["model"] == chain.stages["sft"]["model"]
    text = FILES[name].read_text(encoding="utf-8")
    assert f"genalign run {name}" in text
    launched = re.search(r"accelerate launch --config_file (\S+) (\S+) --config (\S+)", text)
    assert all((root / path).is_file() for path in launched.groups())
    assert launched.group(3).endswith(FILES[name].name)


@pytest.mark.parametrize("name", FILES)
def test_the_head_has_an_estimate_that_fits_the_hardware(name):
    words, written = header(FILES[name])
    assert words[0] == name
    device = DEVICES[words[words.index("--device") + 1]]
    used = float(re.search(r"most at once: ([\d.]+) GiB", written).group(1))
    # A tenth is left for the libraries and for what the allocator cannot use.
    assert 0.1 * device.memory < used * 2**30 < 0.9 * device.memory


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_the_estimate_is_what_the_command_prints(name, capsys):
    words, written = header(FILES[name])
    with pytest.raises(SystemExit) as ended:
        main(["estimate", *words])
    assert ended.value.code == 0
    assert capsys.readouterr().out.rstrip("\n") == written


def test_the_command_writes_its_estimate_into_the_head_again_and_again(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    text = f"# Mine.\n{MARK}mine.yaml --device cpu\nname: mine\nbase: demo\nstages: {{sft: {{max_steps: 10}}}}\n"
    path.write_text(text, encoding="utf-8")
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            main(["estimate", str(path), "--device", "cpu", "--documents", "1000", "--write"])
        assert ended.value.code == 0
        printed = capsys.readouterr().out.rstrip("\n")
        assert header(path) == (["mine.yaml", "--device", "cpu"], printed)
        assert "mine on 1 x cpu" in printed
    assert Chain.load(path).stages["sft"]["max_steps"] == 10


def test_a_chain_on_another_changes_fields_one_by_one(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "name: mine\nbase: demo\ndefaults: {max_source_length: 32}\nstages: {sft: {batch_size: 4}, dpo: {beta: 0.1}}\n"
    )
    mine, demo = Chain.load(tmp_path / "mine.yaml"), Chain.load("demo")
    assert list(mine.stages) == list(demo.stages)
    assert mine.stages["sft"] == demo.stages["sft"] | {"batch_size": 4, "max_source_length": 32}
    assert mine.stages["dpo"]["beta"] == 0.1
    (tmp_path / "next.yaml").write_text("name: next\nbase: mine.yaml\nstages: {sft: {batch_size: 2}}\n")
    assert Chain.load(tmp_path / "next.yaml").stages["sft"]["batch_size"] == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: a\nbase: nothing\n", "chain=nothing: no such chain"),
        ("name: a\nbase: a.yaml\n", "base=a.yaml: a.yaml would be based on itself"),
        ("name: a\nbase: demo\nstages: [1]\n", "stages=[1]: not a mapping in a.yaml"),
        ("name: a\nbase: demo\nstages: {sft: {batch: 1}}\n", "sft.batch=1: unknown key"),
    ],
)
def test_a_base_that_cannot_be_is_one_line(tmp_path, text, says):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError) as told:
        Chain.load(tmp_path / "a.yaml").configured(tmp_path, [])
    assert says in str(told.value)
