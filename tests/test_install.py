"""The package as a user gets it: wheel, metadata, Python versions, no traces of one machine in the files."""

from __future__ import annotations

import ast
import email.message
import email.parser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from functools import cache
from importlib import metadata, util
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PACKAGE = REPO / "recbole_llm"
TEMPLATES = sorted(PACKAGE.glob("*/templates/*"))
VERSIONS = ("3.10", "3.11", "3.12", "3.13")

# What `import X` is called at the package index, where the two names differ.
DISTRIBUTIONS = {"sklearn": "scikit-learn", "yaml": "pyyaml"}
# Come with the packages that we require and whose versions they must match.
COME_ALONG = {
    "tokenizers": "transformers", "huggingface_hub": "transformers", "accelerate": "peft", "markupsafe": "jinja2",
}  # fmt: skip
# Extras: may be imported inside a function only.
OPTIONAL = {"bitsandbytes", "pyarrow"}
# An extra that one module needs as a whole; it is imported when the command `serve` is given, or a report is drawn.
WHOLE = {
    "serving/server.py": {"fastapi", "uvicorn", "prometheus_client", "pydantic"},
    "comparison/charts.py": {"matplotlib"},
}

pytestmark = pytest.mark.skipif(
    not (REPO / "setup.cfg").is_file(), reason="the tests of the installation need the project's folder"
)


def run(
    *command: str | Path, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and show what it wrote if it failed."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@cache
def project_files() -> tuple[Path, ...]:
    """Every file that is in the repository or would be added to it."""
    if not (REPO / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    listing = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=REPO).stdout
    return tuple(REPO / name for name in listing.split("\0") if name and (REPO / name).is_file())


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project: building leaves nothing behind and finds nothing that an older build left."""
    target = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    for folder in ("recbole_llm", "properties"):
        shutil.copytree(REPO / folder, target / folder, ignore=ignore)
    for file in REPO.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copy(file, target / file.name)
    return target


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built as pip builds it, but with the setuptools at hand instead of one that pip fetches."""
    if util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed: pip install -e .[test]")
    target = tmp_path_factory.mktemp("wheel")
    run(
        *(sys.executable, "-m", "pip", "wheel", checkout, "--no-deps", "--no-build-isolation", "--quiet"),
        *("--no-index", "--wheel-dir", target),
        cwd=target,
    )
    (built,) = target.glob("recbole_llm-*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


@pytest.fixture(scope="module")
def wheel_metadata(unpacked: Path) -> email.message.Message:
    (file,) = unpacked.glob("recbole_llm-*.dist-info/METADATA")
    return email.parser.Parser().parsestr(file.read_text(encoding="utf-8"))


@cache
def imports(file: Path) -> tuple[tuple[str, int, bool], ...]:
    """(full name, line, whether it is at the module's top level) of every absolute import in a file."""
    found: list[tuple[str, int, bool]] = []

    def visit(node: ast.AST, top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, child.lineno, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.level == 0 and child.module:
                found.extend((f"{child.module}.{alias.name}", child.lineno, top) for alias in child.names)
            visit(child, top and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    visit(ast.parse(file.read_text(encoding="utf-8"), str(file)), True)
    return tuple(found)


# ------------------------------------------------------------------------------------------- the wheel


def test_the_wheel_holds_the_whole_package_and_nothing_else(unpacked: Path) -> None:
    expected = {file.relative_to(REPO).as_posix() for file in sources()}
    expected |= {
        f"recbole_llm/{file.relative_to(REPO).as_posix()}" for file in (REPO / "properties").rglob("*.yaml")
    }
    expected |= {file.relative_to(REPO).as_posix() for file in TEMPLATES}
    built = {
        file.relative_to(unpacked).as_posix()
        for file in unpacked.rglob("*")
        if file.is_file() and ".dist-info" not in file.as_posix()
    }
    assert built == expected, "setup.cfg: [options] packages and package_data do not fit the folders"


def test_the_source_distribution_holds_what_the_wheel_is_built_from(checkout: Path, tmp_path: Path) -> None:
    script = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    run(sys.executable, "-c", script, tmp_path, cwd=checkout)
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path)
    (root,) = (folder for folder in tmp_path.iterdir() if folder.is_dir())
    for file in [
        *sources(),
        *TEMPLATES,
        *(REPO / "properties").rglob("*.yaml"),
        REPO / "LICENSE",
        REPO / "Makefile",
    ]:
        assert (root / file.relative_to(REPO)).is_file(), f"MANIFEST.in: {file.relative_to(REPO)} is missing"


def test_the_metadata_names_python_licence_and_command(
    wheel_metadata: email.message.Message, unpacked: Path
) -> None:
    assert wheel_metadata["Name"] == "recbole_llm"
    assert set(wheel_metadata["Requires-Python"].split(",")) == {">=3.10", "<3.14"}
    assert "MIT" in (wheel_metadata["License-Expression"] or wheel_metadata["License"])
    assert list(unpacked.glob("*.dist-info/**/LICENSE"))
    (commands,) = unpacked.glob("*.dist-info/entry_points.txt")
    assert "recbole-llm = recbole_llm.cli:main" in commands.read_text(encoding="utf-8")


def test_the_metadata_requires_neither_ray_nor_the_package_that_pins_it(
    wheel_metadata: email.message.Message,
) -> None:
    names = {re.split(r"[^\w-]", line)[0].lower() for line in wheel_metadata.get_all("Requires-Dist", [])}
    assert not names & {"ray", "recbole", "hyperopt", "thop"}
    assert {"torch", "transformers", "peft", "pandas", "numpy"} <= names


def test_properties_are_found_from_another_folder_when_installed_as_a_wheel(
    unpacked: Path, tmp_path: Path
) -> None:
    script = (
        "import recbole_llm, recbole_llm.utils.yaml_files as c, importlib.metadata as m\n"
        "print(recbole_llm.__file__); print(c.properties_dir())\n"
        "print(recbole_llm.__version__ == m.version('recbole_llm'))"
    )
    lines = run(sys.executable, "-c", script, cwd=tmp_path, env={"PYTHONPATH": str(unpacked)}).stdout.split(
        "\n"
    )
    assert Path(lines[0]) == unpacked / "recbole_llm" / "__init__.py"
    found = Path(lines[1]).resolve()
    assert found == (unpacked / "recbole_llm" / "properties").resolve()
    assert lines[2] == "True"
    for file in (REPO / "properties").rglob("*.yaml"):
        assert (found / file.relative_to(REPO / "properties")).read_bytes() == file.read_bytes()


def test_properties_are_found_from_another_folder_when_installed_editable(tmp_path: Path) -> None:
    # Several may be found: a build leaves an egg-info folder, which says nothing, in the project's folder.
    installed = metadata.distributions(name="recbole_llm")
    if not any('"editable": true' in (found.read_text("direct_url.json") or "") for found in installed):
        pytest.skip("recbole_llm is not installed in editable mode: pip install -e .")
    script = "import recbole_llm.utils.yaml_files as c; print(c.properties_dir())"
    found = Path(run(sys.executable, "-c", script, cwd=tmp_path, env={"PYTHONPATH": ""}).stdout.strip())
    assert (found / "overall.yaml").is_file()


# ----------------------------------------------------------------------------------------- the imports


def test_nothing_imports_ray_or_the_parts_of_recbole_that_do() -> None:
    forbidden = ("ray", "recbole.quick_start", "hyperopt", "thop", "pkg_resources", "distutils", "plotly")
    bad = [
        f"{file.relative_to(REPO)}:{line}: {name}"
        for file in [*sources(), REPO / "run_recbole_llm.py"]
        if file.is_file()
        for name, line, _ in imports(file)
        if name.split(".")[0] in forbidden or name.startswith("recbole.quick_start")
    ]
    assert not bad, "\n".join(bad)


def test_every_import_is_declared(wheel_metadata: email.message.Message) -> None:
    declared = {
        re.split(r"[^\w-]", line)[0].lower()
        for line in wheel_metadata.get_all("Requires-Dist", [])
        if "extra ==" not in line
    }
    bad = []
    for file in sources():
        for name, line, top in imports(file):
            module = name.split(".")[0]
            if module in sys.stdlib_module_names or module in {"recbole", "recbole_llm"}:
                continue
            if module in OPTIONAL and not top:
                continue
            if module in WHOLE.get(file.relative_to(PACKAGE).as_posix(), ()):
                continue
            distribution = DISTRIBUTIONS.get(module, COME_ALONG.get(module, module))
            if distribution.lower() not in declared:
                bad.append(f"{file.relative_to(REPO)}:{line}: {name} is not in setup.cfg's install_requires")
    assert not bad, "\n".join(bad)


def test_the_version_can_be_read_without_running_the_package() -> None:
    """setup.cfg's `attr:` reads a literal from the source; otherwise a build would need torch and RecBole."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (value,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    )
    assert re.fullmatch(r"\d+\.\d+\.\d+\w*", ast.literal_eval(value))


def without(module: str) -> str:
    """Python lines that hide a module, as if it was not installed."""
    return (
        "import sys\n"
        "class Hide:\n"
        "    def __init__(self, finder):\n"
        "        self.finder = finder\n"
        "    def __getattr__(self, name):\n"
        "        return getattr(self.finder, name)\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        hidden = name.split('.')[0] == {module!r}\n"
        "        return None if hidden else self.finder.find_spec(name, path, target)\n"
        "sys.meta_path[:] = [Hide(finder) for finder in sys.meta_path]\n"
    )


def test_every_module_can_be_imported_without_ray(tmp_path: Path) -> None:
    names = []
    for file in sources():
        parts = file.relative_to(REPO).with_suffix("").parts
        if parts[-1] == "__main__":
            continue
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    script = f"{without('ray')}import importlib\nfor name in {names!r}: importlib.import_module(name)\n"
    script += (
        f"import sys\nprint(len([name for name in {names!r} if name in sys.modules]), 'ray' in sys.modules)\n"
    )
    done = run(sys.executable, "-c", script, cwd=tmp_path, env={"PYTHONPATH": str(REPO)})
    assert done.stdout.split()[-2:] == [str(len(names)), "False"]


def test_without_recbole_the_message_says_how_to_install_it(tmp_path: Path) -> None:
    script = (
        f"{without('recbole')}"
        "try:\n    import recbole_llm.quick_start as q\n    q.main([])\n"
        "except (ImportError, SystemExit) as error:\n    print(error)\n"
    )
    done = run(sys.executable, "-c", script, cwd=tmp_path, env={"PYTHONPATH": str(REPO)})
    assert "pip install --no-deps recbole==1.2.1" in done.stdout + done.stderr


# --------------------------------------------------------------------------------- the Python versions


@cache
def interpreter(version: str) -> str | None:
    """A Python of this version on this machine, or None. Each is tried, since pyenv's shims may not work."""
    candidates = [shutil.which(f"python{version}")]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    candidates += [str(path) for path in sorted(pyenv.glob(f"{version}.*/bin/python"))]
    probe = "import sys; print('%d.%d' % sys.version_info[:2])"
    for candidate in filter(None, candidates):
        done = subprocess.run(
            [candidate, "-I", "-S", "-c", probe], capture_output=True, text=True, check=False
        )
        if done.returncode == 0 and done.stdout.strip() == version:
            return candidate
    return None


# Runs in each Python, without any package: compiles every file, and looks up every name that is imported from
# the standard library at a module's top level (tomllib, typing.Self and distutils are not everywhere).
CHECK = """
import ast, importlib, sys, warnings
warnings.simplefilter("ignore")
removed = {"distutils", "imp", "asyncore", "asynchat", "tomllib"}
for name in sys.stdin.read().split("\\n"):
    tree = ast.parse(open(name, encoding="utf-8").read(), name)
    compile(tree, name, "exec", dont_inherit=True)
    for node in tree.body:
        if isinstance(node, ast.Import):
            wanted = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            wanted = [(node.module, alias.name) for alias in node.names]
        else:
            continue
        for module, attribute in wanted:
            top = module.split(".")[0]
            if top == "__future__" or top not in sys.stdlib_module_names | removed:
                continue
            found = importlib.import_module(module)
            if attribute and attribute != "*" and not hasattr(found, attribute):
                importlib.import_module(module + "." + attribute)
"""


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("package", ["recbole_llm", "recbole"])
def test_every_module_compiles_and_finds_its_standard_library(version: str, package: str) -> None:
    """RecBole 1.2.1 is checked too: nothing it imports at module level has left the standard library."""
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} on this machine")
    root = PACKAGE
    if package == "recbole":
        spec = util.find_spec("recbole")
        assert spec is not None and spec.origin is not None
        root = Path(spec.origin).parent
    files = "\n".join(map(str, sorted(root.rglob("*.py"))))
    done = subprocess.run(
        [python, "-I", "-S", "-c", CHECK], input=files, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------- the Makefile


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
def test_make_says_what_is_wrong_with_the_python(tmp_path: Path) -> None:
    for name in ("Makefile", "setup.cfg", "pyproject.toml"):
        shutil.copy(REPO / name, tmp_path)
    too_old = tmp_path / "python3.9"
    # Answers as an old Python would: the version check fails, --version says why.
    too_old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.18" && exit 0\nexit 1\n')
    too_old.chmod(0o755)
    for python, message in (
        ("no-such-python", "There is no 'no-such-python' on this machine"),
        (str(too_old), "needs Python 3.10 to 3.13, but"),
    ):
        done = subprocess.run(
            ["make", "test", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.returncode != 0
        assert message in done.stderr
        assert not (tmp_path / ".venv").exists()


# ------------------------------------------------------------------------------------------- the files


def test_no_file_names_a_folder_of_one_machine_or_the_host_of_a_package_index() -> None:
    patterns = {
        "a folder of one machine": re.compile(r"(?<![\w.~/$}-])/(?:work|root|home|Users|opt)/\w"),
        "a package index": re.compile(
            r"pypi[.]org|pythonhosted[.]org|download[.]pytorch|--(?:extra-)?index-url"
        ),
    }
    bad = []
    for file in project_files():
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture or another binary file
        for number, line in enumerate(text.splitlines(), 1):
            bad += [
                f"{file.relative_to(REPO)}:{number}: {what}: {line.strip()[:120]}"
                for what, pattern in patterns.items()
                if pattern.search(line)
            ]
    assert not bad, "\n".join(bad)


def test_git_ignores_no_file_of_the_package():
    """A rule for RecBole's output folder ``dataset/`` once hid ``properties/dataset`` from every clone."""
    if shutil.which("git") is None or not (REPO / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        [
            "git",
            "ls-files",
            "--others",
            "--ignored",
            "--exclude-standard",
            "properties",
            "recbole_llm",
            "tests",
        ],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert [name for name in listed if name.endswith((".py", ".yaml"))] == []
