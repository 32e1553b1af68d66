"""The wheel holds the whole package; the command and the README's Python work in another directory."""

import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = ("qmoe_jax", "pallas_kernels")
NUMBER = re.compile(r"\d+(?:\.\d+)?")
TOLERANCE = 0.01  # of each printed number: another CPU rounds a few weights the other way


def run(*command: object, cwd: pathlib.Path) -> str:
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """Built from a copy, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source" / name)
    build = (
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "--wheel-dir",
        folder,
        folder / "source",
    )
    run(sys.executable, "-m", "pip", *build, cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> pathlib.Path:
    """The interpreter of a fresh environment with the wheel; dependencies come from that of the tests."""
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment)
    python = environment / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        wheel,
        cwd=environment,
    )
    site = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=environment
    ).strip()
    (pathlib.Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_wheel_holds_every_module_and_data_file(wheel):
    found = {name for name in zipfile.ZipFile(wheel).namelist() if name.split("/")[0] in SOURCES}
    kinds = (".py", ".json", ".typed", ".ptx")
    files = {path for name in SOURCES for path in (ROOT / name).rglob("*") if path.suffix in kinds}
    files |= {ROOT / name / "py.typed" for name in SOURCES}
    assert found == {path.relative_to(ROOT).as_posix() for path in files}


def test_the_command_runs_from_another_directory(python, tmp_path):
    assert "compress" in run(python.with_name("qmoe"), "--help", cwd=tmp_path)
    where = run(python, "-c", "import qmoe_jax; print(qmoe_jax.__file__)", cwd=tmp_path)
    assert pathlib.Path(where.strip()).is_relative_to(python.parent.parent)


@pytest.mark.slow
def test_the_python_of_the_readme_prints_what_the_readme_says(python, tmp_path):
    readme = (ROOT / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    expected = re.search(r"\nprints\n```\n(.*?)```", readme, re.DOTALL)[1]
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    printed = run(python, "-c", code, cwd=tmp_path)
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", expected)
    found, wanted = ([float(number) for number in NUMBER.findall(text)] for text in (printed, expected))
    assert found == pytest.approx(wanted, rel=TOLERANCE)
