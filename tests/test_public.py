"""The package as others see it: its names, what importing it needs, who imports whom."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import jfp4

ROOT = Path(jfp4.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
NAMES = {
    *("nn", "convert", "linear", "gemm", "quantize", "calibrate", "Calibration", "QTensor"),
    *("PackedQTensor", "PreparedWeight", "prepare", "Backends", "backend", "backends"),
    *("FORMATS", "Format", "pack", "unpack", "round_to_format"),
    *("RECIPES", "Recipe", "save_codes", "optim", "master", "AdamW", "grad_comm"),
}


def module_name(file):
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(file):
    """Modules, and names of modules, that a file imports, wherever in it."""
    package = module_name(file) if file.name == "__init__.py" else module_name(file.parent)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = importlib.util.resolve_name("." * node.level + base, package)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def run_python(code, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent), **environment}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_public_names():
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    exported = set()
    for node in tree.body[1:]:  # after the docstring, imports and nothing else
        assert isinstance(node, ast.ImportFrom) and node.level == 0
        for alias in node.names:
            assert alias.asname == alias.name  # said to be public
            if node.module == "jfp4":
                source = importlib.import_module(f"jfp4.{alias.name}")
            else:
                source = getattr(importlib.import_module(node.module), alias.name)
            assert getattr(jfp4, alias.name) is source
            exported.add(alias.name)
    assert exported == NAMES


def test_public_names_are_documented():
    for name in NAMES - {"FORMATS", "RECIPES", "save_codes"}:
        assert getattr(jfp4, name).__doc__, name


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_every_module_imports_and_says_what_it_is(file):
    assert importlib.import_module(module_name(file)).__doc__


def test_importing_needs_no_compiler_and_starts_no_device():
    """Nothing is run, and JAX's back ends, which may be set up until then, are not made."""
    code = """
import sys
import jax, flax.nnx
def forbid(event, args):
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"):
        raise RuntimeError(f"{event}{args}")
sys.addaudithook(forbid)
import jfp4, jfp4.models.llama, jfp4.ops.reference
from jax._src import xla_bridge
print(len(xla_bridge._backends), jfp4.linear.__name__)
"""
    assert run_python(code, PATH="", CUDA_VISIBLE_DEVICES="") == ["0", "linear"]


def test_importing_brings_in_no_part_of_the_trainer():
    code = """
import sys
import jfp4, jfp4.models.llama
print(*{"train", "grain", "tokenizers", "pyarrow", "tensorboardX"} & set(sys.modules), "end")
"""
    assert run_python(code) == ["end"]


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_dependencies_run_one_way(file):
    """formats, then qtensor and recipe, ops, nn, models; nothing imports the trainer."""
    order = {
        "jfp4.formats": 0,
        **dict.fromkeys(("jfp4.qtensor", "jfp4.recipe"), 1),
        "jfp4.ops": 2,
        **dict.fromkeys(("jfp4.nn", "jfp4.optim"), 3),
        "jfp4.master": 4,
        **dict.fromkeys(("jfp4.adamw", "jfp4.models"), 5),
    }

    def level(module):
        return max(
            (n for name, n in order.items() if f"{module}.".startswith(f"{name}.")), default=-1
        )

    names = set(imported(file))
    roots = {name.split(".")[0] for name in names}
    assert not roots & {"train", "tests", "benchmarks"}
    if file != ROOT / "__init__.py":
        assert "jfp4" not in names or {n for n in names if n.startswith("jfp4.")}
        above = {n for n in names if n.startswith("jfp4.") and level(n) > level(module_name(file))}
        assert not above


def test_the_oracle_shares_no_code_with_what_it_checks():
    names = set(imported(ROOT / "ops" / "reference.py"))
    assert not [n for n in names if n.split(".")[0] in ("jfp4", "jax", "flax")]
