"""What ships with the project holds together: chains, recipes, launcher files, the README."""

import ast
import re
import subprocess
import sys

import pytest
import yaml

from pipelines.config import fields_of
from pipelines.runner import Chain, list_chains, list_recipes, shared_folder

CHAINS = [name for name, _, _ in list_chains()]
RECIPES = dict(list_recipes())
STAGES = ["corpus", "tokenizer", "sft", "preferences", "reward", "ppo", "dpo", "evaluate"]


def test_every_stage_has_its_recipe_and_every_chain_all_of_them():
    assert set(RECIPES) >= {f"summarization/{stage}" for stage in STAGES}
    assert set(CHAINS) >= {"demo", "scitldr", "xsum_t5_small", "cnn_flan_t5_base"}


@pytest.mark.parametrize("name", [name for name in CHAINS if name != "methods"])  # that one needs a finished demo
def test_every_chain_is_valid_as_it_stands(name, tmp_path):
    chain = Chain.load(name)
    # the folder of own data is the one thing a chain may leave to the user
    own = [f"dataset={tmp_path}"] if name in ("scitldr", "mnist", "mnist_long") else []
    if name == "pretraining":  # the packages that are read are installed by `make pretraining-text`
        (tmp_path / "package.dist-info").mkdir()
        own = [f"text.site_packages={tmp_path}"]
    configured = list(chain.configured(tmp_path / "run", own))
    if "preferences" in chain.stages and "policy_gradient" not in chain.stages:  # the problem set's chains have more
        # the demo's model ships with its tokenizer
        assert configured == [stage for stage in STAGES if name != "demo" or stage != "tokenizer"]
    else:
        assert configured == list(chain.stages)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_help_lists_every_field_at_once(name):
    script = shared_folder("recipes") / f"{name}.py"
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for field, info in fields_of(RECIPES[name].config_class).items():
        assert info.description, f"{name}.{field} has no description"
        assert f"  {field}  (" in done.stdout
    # a person waits for this: nothing heavy may be imported for it
    loads = (
        f"import runpy, sys; sys.argv = ['x', '--help']\ntry: runpy.run_path({str(script)!r}, run_name='__main__')\n"
    )
    loads += "except SystemExit: pass\nprint('torch' in sys.modules, 'transformers' in sys.modules)"
    seen = subprocess.run([sys.executable, "-c", loads], capture_output=True, text=True, timeout=60)
    assert seen.stdout.splitlines()[-1] == "False False"


def test_recipes_are_thin_and_say_how_they_are_launched(root):
    for name, recipe in RECIPES.items():
        text = (shared_folder("recipes") / f"{name}.py").read_text()
        assert len(text.splitlines()) < 200
        assert "accelerate launch" in recipe.doc, name
        assert recipe.summary.endswith("."), name


def test_no_file_is_too_long(root):
    for file in [*root.glob("pipelines/**/*.py"), *root.glob("tests/**/*.py"), *root.glob("benchmarks/*.py")]:
        assert len(file.read_text().splitlines()) < 600, file


def test_launcher_files_parse_with_the_installed_accelerate(root):
    from accelerate.commands.config.config_args import load_config_from_file

    for file in (root / "accelerate_configs").glob("*.yaml"):
        found = load_config_from_file(str(file))
        assert found.num_processes == yaml.safe_load(file.read_text())["num_processes"], file


def test_the_readme_names_what_exists(root):
    text = (root / "README.md").read_text()
    targets = set(re.findall(r"^([a-z-]+):.*##|^\$\(STAGES\)", (root / "Makefile").read_text(), flags=re.M))
    stages = set(STAGES)
    for target in set(re.findall(r"`make ([a-z-]+)`", text)) | set(re.findall(r"^make ([a-z-]+)", text, flags=re.M)):
        assert target in targets | stages, f"README names make {target}"
    for path in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (root / path).exists(), path
    for name in re.findall(r"^\| `([a-z_0-9]+)` \|", text, flags=re.M):
        assert name in CHAINS, name
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        ast.parse(block)


def test_constraints_pin_every_package(root):
    text = (root / "constraints.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.\-]+==[^=\s]+", line) for line in lines)
    assert "torch==2.13.0" in lines
    assert not any("nvidia" in line or "cuda" in line for line in lines)


def test_the_tables_of_benchmarks_are_those_of_their_files(root):
    pages = [page.read_text(encoding="utf-8") for page in (root / "docs").glob("*.md")]
    tables = list((root / "docs" / "results").glob("*.md"))
    assert tables
    for table in tables:
        text = table.read_text(encoding="utf-8").strip()
        lines = [line for line in text.splitlines() if line.startswith("| ")]
        assert any(all(line in page for line in lines) for page in pages), table.name
