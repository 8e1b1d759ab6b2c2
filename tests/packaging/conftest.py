"""The wheel, built once, and clean virtual environments that have it instead of the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from sinkbench.api import API_VERSION

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "README.md", "sinkbench", "plugins", "recipes")


@dataclass(frozen=True)
class Installation:
    """A virtual environment with sinkbench installed, and a folder away from the checkout."""

    environment: Path
    folder: Path

    @property
    def python(self) -> Path:
        return self.environment / "bin" / "python"

    @property
    def command(self) -> Path:
        return self.environment / "bin" / "sinkbench"

    def run(self, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs a program in the folder, as someone would who never saw the checkout."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        return subprocess.run(
            [str(argument) for argument in arguments],
            cwd=self.folder,
            env=inherited | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    def sinkbench(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run(self.command, *arguments, **environment)

    def pretrain(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run(self.python, "-m", "sinkbench.pretrain", *arguments, **environment)

    def install(self, wheel: Path) -> None:
        _pip("--python", self.python, "install", "--no-index", "--no-deps", "--ignore-installed", wheel)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the wheel is made from, so that no earlier build leaks into it."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    return source


@pytest.fixture(scope="session")
def wheel(source: Path) -> Path:
    return build_wheel(source)


@pytest.fixture(scope="session")
def make_installation(
    wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Sequence[Path]], Installation]:
    """Makes a clean environment with the wheel and, beside it, the given plugin wheels."""

    def make(plugins: Sequence[Path] = ()) -> Installation:
        environment = tmp_path_factory.mktemp("environment")
        venv.create(environment, with_pip=False, symlinks=True)
        site_packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(environment)}))
        # torch and the like come from the environment that runs the tests. Its own .pth files, the
        # one of the editable checkout among them, are not read from there.
        dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        (site_packages / "dependencies.pth").write_text("\n".join(sorted(dependencies)) + "\n")
        installation = Installation(environment, tmp_path_factory.mktemp("elsewhere"))
        for package in (wheel, *plugins):
            installation.install(package)
        return installation

    return make


@pytest.fixture(scope="session")
def installation(make_installation: Callable[[Sequence[Path]], Installation]) -> Installation:
    """An environment with the wheel alone."""
    return make_installation(())


@pytest.fixture(scope="session")
def build_plugin(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builds the wheel of a plugin package of one module, as its author would; it may name the version of
    sinkbench.api that it needs."""

    def build(module: str, code: str, api_version: str = API_VERSION) -> Path:
        source = tmp_path_factory.mktemp(module)
        (source / f"{module}.py").write_text(textwrap.dedent(code))
        (source / "pyproject.toml").write_text(
            textwrap.dedent(
                f"""
                [build-system]
                requires = ["setuptools"]
                build-backend = "setuptools.build_meta"

                [project]
                name = "{module.replace("_", "-")}"
                version = "1.2.3"
                dependencies = ["sinkbench"]

                [project.entry-points.sinkbench]
                {module} = "{module}"

                [project.entry-points."sinkbench.api"]
                "{api_version}" = "sinkbench.api"

                [tool.setuptools]
                py-modules = ["{module}"]
                """
            )
        )
        return build_wheel(source)

    return build


def build_wheel(source: Path) -> Path:
    _pip("wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", source / "dist", source)
    (built,) = (source / "dist").glob("*.whl")
    return built


def _pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
