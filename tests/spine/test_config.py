"""Configuration: types, ranges, overrides, and every mistake shown at once."""

import re

import pytest
from pydantic import Field

from pipelines.config import (
    Source,
    StageConfig,
    config,
    describe,
    override,
    read_yaml,
    sources,
    split_overrides,
    validate,
)
from pipelines.errors import Problem, UserError


@config
class Toy(StageConfig):
    rate: float = Field(0.1, gt=0, le=1, description="a rate")
    steps: int = Field(10, ge=1, description="how many")
    name: str = Field("x", description="a name")
    model: Source | None = Field(None, description="a model")
    systems: dict[str, Source] = Field(default_factory=dict, description="systems")
    words: list[str] = Field(default_factory=list, description="words")

    def problems(self):
        found = super().problems()
        if self.steps > 100 and self.rate > 0.5:
            found.append(Problem("steps", self.steps, f"too many for rate={self.rate}", "give fewer"))
        return found


def test_every_mistake_is_shown_at_once():
    values = {"rat": 1, "rate": 3, "seed": "one", "steps": 0, "model": "./not/there"}
    with pytest.raises(UserError) as caught:
        validate(Toy, values, "toy.")
    text = str(caught.value)
    assert len(text.splitlines()) == 5
    assert "toy.rat=1: unknown key; did you mean 'rate'?" in text
    assert re.search(r"toy\.rate=3: .*less than or equal to 1; give float, such as 0\.1", text)
    assert "toy.seed=one" in text
    assert "toy.steps=0" in text
    assert "toy.model=./not/there: no such file or folder; mend the path" in text


def test_impossible_combinations_are_found_beside_wrong_types():
    with pytest.raises(UserError) as caught:
        validate(Toy, {"steps": 200, "rate": 0.9, "seed": "x"})
    lines = str(caught.value).splitlines()
    assert any(line.startswith("seed=x") for line in lines)
    assert any(line.startswith("steps=200: too many for rate=0.9") for line in lines)


def test_a_combination_with_a_bad_field_is_not_reported_twice():
    with pytest.raises(UserError) as caught:
        validate(Toy, {"steps": "many", "rate": 0.9})
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("value", ["nan", ".nan", float("inf"), "inf"])
def test_no_number_that_is_none(value):
    with pytest.raises(UserError, match=r"rate"):
        validate(Toy, {"rate": value})


def test_scientific_notation_and_text_that_looks_like_something_else():
    values = {}
    for key, text in split_overrides(
        ["rate=1e-4", "name=summarize: ", "words=[a, b]", "model=null", "systems.sft=org/m"]
    ):
        override(Toy, values, key, text)
    made = validate(Toy, values)
    assert (made.rate, made.name, made.words, made.model, made.systems) == (
        1e-4,
        "summarize: ",
        ["a", "b"],
        None,
        {"sft": "org/m"},
    )
    override(Toy, values, "name", "123")
    assert validate(Toy, values).name == "123"


def test_an_override_without_a_value_is_one_line():
    with pytest.raises(UserError, match=r"^override=rate: not of the form key=value; write it as key=value$"):
        split_overrides(["rate"])


def test_sources_are_found_in_mappings_and_hub_ids_are_not_paths(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("{}")
    made = validate(Toy, {"model": str(file), "systems": {"sft": "google/flan-t5-base", "ppo": "t5-small"}})
    assert sources(made) == {"model": str(file), "systems.sft": "google/flan-t5-base", "systems.ppo": "t5-small"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\na: 2\n", "line 2: not valid YAML (the key 'a' stands twice)"),
        ("a: [1\n", "not valid YAML"),
        ("- 1\n", "holds a list, not keys and values"),
        (b"\xff\xfe\x00bad", "cannot be read"),
    ],
)
def test_bad_yaml_names_the_file_and_the_line(tmp_path, text, says):
    file = tmp_path / "bad.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        read_yaml(file)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(UserError, match=r"no such file"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(UserError, match=r"is a folder"):
        read_yaml(tmp_path)


def test_help_lists_every_field_with_meaning_and_default():
    text = describe(Toy)
    assert "rate  (float; default 0.1)\n      a rate" in text
    assert "model  (str or null; default None)\n      a model" in text
    for field in ("output_dir", "seed", "steps", "name", "systems", "words"):
        assert f"  {field}  (" in text
