"""What the tests of the problem set share: the finished stages that some exercises read."""

from pathlib import Path

import pytest

from tests.problems.finished_stages import make_stages


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """The folder of the small stages of ``tiny_stages.yaml``. Tests must not change it."""
    return make_stages(tmp_path_factory.mktemp("stages"))


def pytest_collection_modifyitems(items):
    """Keep the tests that read those stages in one worker: they take long to make."""
    for item in items:
        if "finished" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("finished_stages"))
