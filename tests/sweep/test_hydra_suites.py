"""Hydra's own suites: with an application that is not ladezeit, the sweeper is Hydra's basic one."""

import pytest
from hydra import version
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.test_utils.launcher_common_tests import BatchedSweeperTestSuite, LauncherTestSuite

OURS = "hydra/sweeper=ladezeit"


@pytest.fixture(autouse=True)
def known_to_hydra() -> None:
    """An editable install hides namespace packages from Hydra's scan, so the app registers the sweeper; so do we.

    The suites are written for Hydra's oldest behaviour (jobs change the working directory), which is process-wide.
    """
    version.setbase("1.1")
    plugins = Plugins.instance()
    from hydra_plugins.ladezeit_sweeper.sweeper import LadezeitSweeper

    plugins.register(LadezeitSweeper)


def test_hydra_discovers_the_sweeper() -> None:
    """A user of another app can write `hydra/sweeper=ladezeit`."""
    assert "LadezeitSweeper" in [found.__name__ for found in Plugins.instance().discover(Sweeper)]


@pytest.mark.parametrize("launcher_name, overrides", [("basic", [OURS])])
class TestWithBasicLauncher(LauncherTestSuite):
    """The launcher suite passes with our sweeper in place of the basic one."""


@pytest.mark.slow
@pytest.mark.parametrize("launcher_name, overrides", [("joblib", [OURS])])
class TestWithJoblibLauncher(LauncherTestSuite):
    """The same with jobs in other processes."""


@pytest.mark.parametrize("launcher_name, overrides", [("basic", [OURS, "hydra.sweeper.max_batch_size=2"])])
class TestBatches(BatchedSweeperTestSuite):
    """Batches are kept: six jobs in batches of two, in the basic order."""
