"""The root is the package: the guards of its sharp edges, and what an installed copy must do."""

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
NOT_SHIPPED = {"tests", "docs", "build", "dist", "results"}
DATA = ("kernels/tuned/*.json", "pocket/weights/*")


def package_files() -> list[Path]:
    """Every Python file below the root that belongs to the package."""
    files = (path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
    hidden = ("__pycache__", ".", "~")
    return [file for file in files if file.parts[0] not in NOT_SHIPPED and not file.parts[0].startswith(hidden)]


def python(code: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a line outside the checkout, where only what is installed can be imported."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=300
    )


def test_every_folder_with_python_is_declared():
    folders = {".".join(["unipic_run", *file.parent.parts]) for file in package_files()}
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(folders)


def test_nothing_else_lies_at_the_root():
    assert {file.name for file in package_files() if len(file.parts) == 1} == {"__init__.py", "cli.py"}


def test_hugging_faces_kernels_package_is_not_shadowed():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert ROOT not in [Path(entry or ".").resolve() for entry in sys.path]


def test_the_version_is_written_the_same_twice():
    tree = ast.parse((ROOT / "__init__.py").read_text("utf-8"))
    values = [
        ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__version__"
    ]
    assert values == [PROJECT["project"]["version"]]


def test_constraints_pin_every_dependency_we_test():
    pins = [
        Requirement(line)
        for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
        if line and line[0] != "#"
    ]
    versions = {pin.name.lower(): str(next(iter(pin.specifier)).version) for pin in pins}
    extras = PROJECT["project"]["optional-dependencies"]
    for text in PROJECT["project"]["dependencies"] + extras["test"] + extras["bnb"] + extras["bench"]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(versions[wanted.name.lower()]), f"{text} is not met by constraints.txt"


@pytest.fixture(scope="module")
def unpacked_sdist(tmp_path_factory) -> Path:
    """A source distribution, unpacked; built from a copy of the checkout, since setuptools leaves files behind."""
    if find_spec("setuptools") is None:
        pytest.skip("building without isolation needs setuptools in this environment")
    work = tmp_path_factory.mktemp("sdist")
    unwanted = (".*", "__pycache__", "build", "dist", "*.egg-info", "results")
    shutil.copytree(ROOT, work / "source", ignore=shutil.ignore_patterns(*unwanted))
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(work)!r})"
    done = python(code, work / "source")
    assert done.returncode == 0, done.stderr
    (archive,) = work.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(work, filter="data")
    return work / archive.name.removesuffix(".tar.gz")


def test_the_sdist_can_do_what_the_readme_says(unpacked_sdist):
    wanted = ["constraints.txt", "README.md", "LICENSE", "tests/conftest.py", "tests/data/unipic-tiny/kl16.ckpt"]
    wanted += ["tests/data/goldens/unipic1/cases/units.safetensors", "bench/gpu_check.sh"]
    assert [name for name in wanted if not (unpacked_sdist / name).is_file()] == []
    assert not list(unpacked_sdist.rglob("__pycache__"))


def test_the_wheel_of_the_sdist_holds_every_module(unpacked_sdist, tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    done = subprocess.run(build, cwd=unpacked_sdist, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        shipped = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    data = [path.relative_to(ROOT) for pattern in DATA for path in ROOT.glob(pattern)]
    assert {f"unipic_run/{name.as_posix()}" for name in [*package_files(), Path("py.typed"), *data]} <= shipped
    assert any(name.endswith("licenses/LICENSE") for name in shipped)
    assert not any("tests/" in name for name in shipped)
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); import unipic_run; print(unipic_run.__file__)"
    assert str(tmp_path / "site") in python(code, tmp_path).stdout


def test_importing_the_package_and_its_command_loads_no_torch(tmp_path):
    done = python("import unipic_run, unipic_run.cli, sys; sys.exit('torch' in sys.modules)", tmp_path)
    assert done.returncode == 0, done.stderr or "torch was imported"


def test_the_public_door_shows_what_is_behind_it_and_every_error_to_catch(tmp_path):
    code = (
        "import unipic_run, sys; from unipic_run.engine import errors; "
        "kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type)}; "
        "assert kinds <= set(dir(unipic_run)) == set(unipic_run.__all__), kinds; "
        "assert all(getattr(unipic_run, name) is getattr(errors, name) for name in kinds); "
        "assert 'torch' not in sys.modules; [getattr(unipic_run, name) for name in dir(unipic_run)]"
    )
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["gen", "--help"]])
def test_help_loads_no_torch(tmp_path, arguments):
    command = shutil.which("unipic-run", path=str(Path(sys.executable).parent))
    assert command, "the unipic-run command is not installed beside this Python: pip install -e ."
    env = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run([command, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "unipic_run.cli" in imported and not imported & {"torch", "triton", "transformers"}


def test_every_module_imports_without_triton(tmp_path):
    names = [
        ".".join(["unipic_run", *file.with_suffix("").parts]).removesuffix(".__init__") for file in package_files()
    ]
    code = f"import sys, importlib; sys.modules['triton'] = None; [importlib.import_module(name) for name in {names!r}]"
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
