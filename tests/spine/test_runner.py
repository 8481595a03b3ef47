"""Chains: order, references, overrides, skipping, forcing, merging, and what is refused."""

import json
import textwrap

import pytest

from pipelines import runner
from pipelines.errors import UserError
from pipelines.runner import Chain, run

RECIPES = {
    "toy/make": """
        '''Write a number.'''
        from pathlib import Path
        from pydantic import Field
        from pipelines.config import StageConfig, config
        from pipelines.recipe import recipe

        @config
        class MakeConfig(StageConfig):
            '''Write a number.'''
            number: int = Field(1, ge=0, description="what to write")

        def make(config: MakeConfig) -> dict[str, float]:
            (Path(config.output_dir) / "number.txt").write_text(str(config.number + config.seed))
            return {"make/number": config.number}

        main = recipe(make, __doc__)
    """,
    "toy/add": """
        '''Add numbers.'''
        from pathlib import Path
        from pydantic import Field
        from pipelines.config import Source, StageConfig, config
        from pipelines.recipe import recipe

        @config
        class AddConfig(StageConfig):
            '''Add numbers.'''
            parts: dict[str, Source] = Field(default_factory=dict, description="folders")
            one: Source | None = Field(None, description="a folder")
            number: int = Field(0, description="a summand")

        def add(config: AddConfig) -> dict[str, float]:
            folders = [*config.parts.values(), *([config.one] if config.one else [])]
            total = sum(int((Path(f) / "number.txt").read_text()) for f in folders) + config.number
            (Path(config.output_dir) / "number.txt").write_text(str(total))
            return {"add/total": total}

        main = recipe(add, __doc__)
    """,
}

CHAIN = """
    name: toy
    about: numbers
    defaults: {seed: 0}
    stages:
      sum: {recipe: toy/add, parts: {a: "${make}", b: "${other}"}, number: 5}
      make: {recipe: toy/make, number: 1}
      other: {recipe: toy/make, number: 2}
      add: {recipe: toy/add, one: "${sum}"}
"""


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A folder of toy recipes and a way to write chains beside them."""
    shared = tmp_path / "share" / "recipes"
    for name, text in RECIPES.items():
        file = shared / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
    monkeypatch.setattr(runner, "shared_folder", lambda name: tmp_path / "share" / name)
    runner.load_recipe.cache_clear()
    monkeypatch.chdir(tmp_path)

    def write(text):
        file = shared / "toy" / "toy.yaml"
        file.write_text(textwrap.dedent(text))
        return file

    yield write
    runner.load_recipe.cache_clear()


def went(capsys):
    """Which stages ran, from what was printed."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    return [line.split()[1].rstrip(":") for line in lines if not line.endswith("up to date")]


def test_stages_run_in_the_order_of_their_references(house, tmp_path, capsys):
    house(CHAIN)
    chain = Chain.load("toy")
    assert list(chain.stages) == ["make", "other", "sum", "add"]
    metrics = run(chain, tmp_path / "out", [])
    assert metrics == {"add/total": 8, "make/number": 1, "other/number": 2, "sum/total": 8}
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics
    assert (tmp_path / "out" / "report.html").stat().st_size > 1000
    assert went(capsys) == ["make", "other", "sum", "add"]


def test_only_what_changed_and_what_depends_on_it_runs_again(house, tmp_path, capsys):
    house(CHAIN)
    out = tmp_path / "out"
    run(Chain.load("toy"), out, [])
    capsys.readouterr()
    run(Chain.load("toy"), out, [])
    printed = capsys.readouterr().out
    assert "nothing to do" in printed
    assert printed.count("up to date") == 5
    assert run(Chain.load("toy"), out, ["other.number=10"])["add/total"] == 16
    assert went(capsys) == ["other", "sum", "add"]
    run(Chain.load("toy"), out, ["other.number=10"], force=["make"])
    assert went(capsys) == ["make"], "a stage made again to the same fingerprint changes nothing after it"


def test_until_runs_only_what_is_needed(house, tmp_path, capsys):
    house(CHAIN)
    run(Chain.load("toy"), tmp_path / "out", [], until="other")
    assert went(capsys) == ["other"]


def test_a_bare_key_goes_to_every_stage_that_does_not_take_it_from_another(house, tmp_path):
    house(CHAIN)
    metrics = run(Chain.load("toy"), tmp_path / "out", ["number=3", "seed=1"])
    # make and other write 3 + seed; sum adds its own 3; add too
    assert metrics["sum/total"] == 4 + 4 + 3
    assert metrics["add/total"] == 11 + 3
    house(CHAIN.replace('one: "${sum}"', 'one: "${sum}", parts: {x: "${make}"}'))
    with pytest.raises(UserError, match=r"every stage takes it from another stage; say which: sum.parts=…"):
        run(Chain.load("toy"), tmp_path / "out2", ["parts=x"])


def test_all_mistakes_of_all_stages_are_shown_before_anything_runs(house, tmp_path):
    house(CHAIN)
    with pytest.raises(UserError) as caught:
        run(Chain.load("toy"), tmp_path / "out", ["make.number=-1", "sum.numbr=2", "nonsense=1", "seed=x"])
    lines = str(caught.value).splitlines()
    assert any(line.startswith("make.number=-1") for line in lines)
    assert any(line.startswith("sum.numbr=2: unknown key; did you mean 'number'?") for line in lines)
    assert any(line.startswith("nonsense=1: no stage or field of this name") for line in lines)
    assert sum("seed=x" in line for line in lines) == 4
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("number: 1}", 'number: 1, one: "${add}"}'), None),
        (('one: "${sum}"', 'one: "${add}"'), "stages=add -> add: these stages wait for one another"),
        (('"${other}"', '"${add}"'), "stages=sum -> add -> sum: these stages wait for one another"),
        (('"${other}"', '"${othr}"'), "sum=${othr}: no such stage; did you mean 'other'?"),
        (("recipe: toy/make, number: 1", "recipe: toy/mak, number: 1"), "no such recipe; did you mean 'toy/make'?"),
        (("recipe: toy/make, number: 1", "number: 1"), "stages.make={'number': 1}: has no recipe"),
        (
            ("defaults: {seed: 0}", "defaults: {sed: 0}"),
            "defaults.sed=0: no stage has this field; did you mean 'seed'?",
        ),
        (("about: numbers", "abut: numbers"), "abut=numbers: unknown key in toy.yaml; did you mean 'about'?"),
        (("defaults: {seed: 0}", "defaults: 3"), "defaults=3: not a mapping"),
    ],
)
def test_a_chain_that_cannot_be_is_one_line(house, tmp_path, change, says):
    file = house(CHAIN.replace(*change))
    with pytest.raises(UserError) as caught:
        run(Chain.load(file), tmp_path / "out", [])
    assert len(str(caught.value).splitlines()) == 1
    if says is not None:
        assert says in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_unknown_chains_and_stages_name_the_nearest(house, tmp_path):
    house(CHAIN)
    with pytest.raises(UserError, match=r"chain=toi: no such chain; did you mean 'toy'\?"):
        Chain.load("toi")
    with pytest.raises(UserError, match=r"chain=missing\.yaml: no such file"):
        Chain.load("missing.yaml")
    for arguments in ({"until": "sm"}, {"force": ["othr"]}):
        with pytest.raises(UserError, match=r"has no such stage; did you mean"):
            run(Chain.load("toy"), tmp_path / "out", [], **arguments)


def test_a_folder_of_another_chain_or_of_nobody_is_refused(house, tmp_path):
    house(CHAIN)
    run(Chain.load("toy"), tmp_path / "out", [], until="make")
    house(CHAIN.replace("name: toy", "name: other"))
    with pytest.raises(UserError, match=r"belongs to the chain 'toy', not 'other'"):
        run(Chain.load("other"), tmp_path / "out", [])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds files of no run \(thesis.tex\)"):
        run(Chain.load("other"), tmp_path / "mine", [])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"is a file"):
        run(Chain.load("other"), tmp_path / "file", [])
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_recipe_runs_its_stage_of_a_chain_on_what_is_there(house, tmp_path, capsys):
    file = house(CHAIN)
    recipe = runner.load_recipe("toy/add")
    with pytest.raises(SystemExit) as ended:
        recipe(["--config", str(file), "--stage", "add"])
    assert ended.value.code == 2
    said = f"this stage comes before and is not finished; run it first: genalign run {file} --output_dir runs/toy"
    assert said in capsys.readouterr().err
    run(Chain.load("toy"), tmp_path / "runs" / "toy", [], until="sum")
    with pytest.raises(SystemExit) as ended:
        recipe(["--config", str(file), "--stage", "add", "number=7"])
    assert ended.value.code == 0
    assert "add/total = 15" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        recipe(["--config", str(file)])
    assert ended.value.code == 2
    assert "name one with --stage" in capsys.readouterr().err


def test_options_and_overrides_may_stand_in_any_order(house, tmp_path, capsys):
    from pipelines.cli import main

    house(CHAIN)
    with pytest.raises(SystemExit) as ended:
        main(["run", "toy", "make.number=4", "--output_dir", "out", "--until", "make", "seed=2"])
    assert ended.value.code == 0
    assert (tmp_path / "out" / "make" / "number.txt").read_text() == "6"
    with pytest.raises(SystemExit) as ended:
        main(["run", "toy", "--nonsense"])
    assert ended.value.code == 2


def test_list_shows_chains_and_recipes(house, capsys):
    from pipelines.cli import main

    house(CHAIN)
    with pytest.raises(SystemExit) as ended:
        main(["list"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    assert "toy                    numbers" in printed
    assert "make -> other -> sum -> add" in printed
    assert "toy/make                     Write a number." in printed
