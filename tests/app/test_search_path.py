"""A Hydra app of the user's own writes `superpipe: balanced`, and nothing else, to have the presets."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import run_code

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "lightning_superpipe" / "app" / "hydra_plugins"

APP = """
import sys
import hydra

@hydra.main(version_base=None, config_path="conf", config_name="config")
def main(cfg):
    print("torch" in sys.modules)
    strategy = hydra.utils.instantiate(cfg.superpipe)
    print(getattr(strategy, "config", strategy), cfg.lr, sep="\\n")

main()
"""
CONFIG = "defaults:\n  - superpipe: balanced\n  - _self_\nlr: 0.5\n"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Where Python looks: a checkout that is not installed stands in the search path by hand."""
    paths = [str(ROOT)]
    if not _is_found():
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "hydra_plugins").symlink_to(PLUGINS)
        paths.append(str(tmp_path / "site"))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _is_found() -> bool:
    try:
        return importlib.util.find_spec("hydra_plugins.lightning_superpipe_configs") is not None
    except ModuleNotFoundError:
        return False


def run(folder: Path, environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_an_app_of_the_users_own_has_the_presets_without_setup(
    tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text(CONFIG)
    ran = run(tmp_path, environment, "app.py", "superpipe.k_prime=2")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("False"), "the plugin is loaded for every Hydra app: it must be light"
    assert "SuperpipeConfig(k=3, k_prime=2," in ran.stdout and "0.5" in ran.stdout.splitlines()
    for path in environment["PYTHONPATH"].split(os.pathsep):
        monkeypatch.syspath_prepend(path)
    ran = run_code("import runpy; runpy.run_path('app.py', run_name='__main__')", "superpipe=off", folder=tmp_path)
    assert ran.stdout.splitlines()[1:] == ["auto", "0.5"], ran.stderr
    refused = run(tmp_path, environment, "app.py", "superpipe=balance")
    assert refused.returncode == 1 and "low_memory" in refused.stderr


def test_the_module_is_the_command_and_its_exit_status_tells(tmp_path: Path, environment: dict[str, str]) -> None:
    ran = run(tmp_path, environment, "-m", "lightning_superpipe", "plan", "experimnt=x")
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.strip().splitlines() == ["superpipe: unknown key 'experimnt': did you mean 'experiment'?"]
    assert list(tmp_path.glob("outputs")) == []
