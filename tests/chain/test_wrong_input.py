"""Each kind of wrong input ends in one line that says what, where, which value and how to mend it; nothing is left.

Every case of the tables (``wrong_input_*.py``) goes through a real command line in a process of its own.
"""

import re

import pytest

from tests.chain import wrong_input_config, wrong_input_data, wrong_input_folders, wrong_input_models
from tests.chain.wrong_input import KINDS, At, contents, errors_in, fits

TABLES = (wrong_input_config, wrong_input_data, wrong_input_models, wrong_input_folders)  # they fill KINDS

SHAPE = re.compile(r"[^=]+=.*: \S.*; \S.*")


@pytest.mark.parametrize("name", KINDS)
def test_wrong_input(genalign, data, uninterrupted, tmp_path, name):
    at = At(tmp_path, data, uninterrupted)
    with at.stack:
        wrong = KINDS[name](at)
        before, run_before = contents(at.folder), contents(uninterrupted)
        code, printed, errors = genalign.answer(*wrong.argv, cwd=at.folder)
        assert code == 2, printed + errors
        said = errors_in(errors)
        assert len(said) == len(wrong.says), errors
        for line, wanted in zip(said, wrong.says, strict=True):
            assert fits(line, wanted), f"said:   {line}\nwanted: {wanted}"
            assert SHAPE.fullmatch(line), line
        assert "Traceback" not in printed + errors
        assert "error: " not in printed
        assert contents(at.folder) == before
        assert contents(uninterrupted) == run_before


def test_there_are_at_least_35_kinds():
    assert len(KINDS) >= 35
