"""The public names, and that sources, stubs and tests use the same words."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest

import pybsp
from pybsp import _core, ops, reference

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pybsp"
#: Fixed by the documentation: these must never go.
PROMISED = {
    "BlockPruner", "BlockPruningCallback", "BlockPruningConfig", "BlockSparseMatrix",
    "DistillationConfig", "Distiller", "block_sparse_linear", "nn", "ops", "pack_",
    "preserve_sparsity", "print_sparsity", "prune_one_shot", "reference", "save_packed",
    "show_config", "suggest_block_shape",
}  # fmt: skip
#: Sources whose tests are named after something else.
TESTED_IN = {
    "__main__": "cli/test_main.py",
    "ops/arguments": "test_ops.py",
    "ops/codes": "test_ops.py",
    "ops/encoder": "kernels/test_encoder.py",
    "ops/encoder_spec": "kernels/test_encoder.py",
    "ops/fields": "test_ops.py",
    "ops/int8": "test_ops_int8.py",
    "ops/gradients": "kernels/test_block_sparse_grad.py",
    "ops/linear": "test_ops.py",
    "ops/runtime": "runtime/test_isa.py",
    "ops/tiles": "kernels/test_token_tiles.py",
    "ops/training": "kernels/test_group_lasso.py",
}


def public_modules() -> list[str]:
    return ["pybsp", "pybsp.ops", "pybsp.nn", "pybsp.pruning", "pybsp.quantization",
            "pybsp.integrations"]  # fmt: skip


def test_promised_names_exist() -> None:
    assert set(pybsp.__all__) >= PROMISED
    assert set(ops.__all__) >= {
        "apply_block_mask_", "block_mask", "block_norms", "block_sparse_linear",
        "group_lasso_grad_", "group_lasso_prox_", "reweight", "show_config",
    }  # fmt: skip
    assert hasattr(pybsp.nn, "BlockSparseLinear")
    assert pybsp.__version__


@pytest.mark.parametrize("name", public_modules())
def test_all_lists_what_there_is(name: str) -> None:
    module = importlib.import_module(name)
    names = getattr(module, "__all__", [])
    assert len(names) == len(set(names))
    missing = [n for n in names if not hasattr(module, n)]
    assert not missing
    assert set(names) <= set(dir(module))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'pybsp' has no attribute 'nothing'"):
        _ = pybsp.nothing


@pytest.mark.parametrize("name", public_modules())
def test_public_callables_are_documented(name: str) -> None:
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", []):
        value = getattr(module, public)
        if inspect.isfunction(value) or inspect.isclass(value):
            assert value.__doc__, f"{name}.{public}"


TWINS = [
    name for name, function in vars(reference).items()
    if inspect.isfunction(function) and function.__module__ == reference.__name__
]  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(TWINS) & set(ops.__all__)))
def test_twins_take_the_same_arguments(name: str) -> None:
    if name == "block_sparse_linear":  # the twin takes the matrix as its fields
        return
    ours = inspect.signature(getattr(ops, name))
    twin = inspect.signature(getattr(reference, name))
    assert list(ours.parameters) == list(twin.parameters)


def test_every_native_operation_has_a_twin() -> None:
    native = {
        "apply_block_mask_", "block_mask", "block_norms", "block_sparse_linear",
        "group_lasso_grad_", "group_lasso_prox_", "reweight",
    }  # fmt: skip
    assert native <= set(TWINS)
    assert native <= set(ops.__all__)


def parameters_of(function: Any) -> list[str]:
    """The argument names of a pybind11 function, from its docstring."""
    signature = ast.parse(
        "def " + function.__doc__.splitlines()[0].partition(" -> ")[0] + ": ..."
    ).body[0]
    assert isinstance(signature, ast.FunctionDef)
    return [argument.arg for argument in signature.args.args]


def test_the_stub_is_the_compiled_module() -> None:
    stub = ast.parse((PACKAGE / "_core.pyi").read_text())
    functions = {n.name: n for n in stub.body if isinstance(n, ast.FunctionDef)}
    classes = {n.name: n for n in stub.body if isinstance(n, ast.ClassDef)}
    public = {name for name in vars(_core) if not name.startswith("_")}
    assert set(functions) | set(classes) == public
    for name, node in functions.items():
        expected = [argument.arg for argument in node.args.args]
        assert parameters_of(getattr(_core, name)) == expected, name
    for name, cls in classes.items():
        members = {n.name: n for n in cls.body if isinstance(n, ast.FunctionDef)}
        compiled = getattr(_core, name)
        found = {m for m in vars(compiled) if not m.startswith("_")}
        assert {m for m in members if not m.startswith("_")} == found
        for member, node in members.items():
            value = getattr(compiled, member)
            if not isinstance(value, property):
                expected = [argument.arg for argument in node.args.args]
                assert parameters_of(value) == expected, (name, member)


def python_sources() -> list[str]:
    return sorted(
        str(path.relative_to(PACKAGE).with_suffix(""))
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
    )


@pytest.mark.parametrize("source", python_sources())
def test_only_ops_imports_the_compiled_module(source: str) -> None:
    if source.startswith("ops/"):
        return
    for node in ast.walk(ast.parse((PACKAGE / f"{source}.py").read_text())):
        names = [a.name for a in getattr(node, "names", []) if isinstance(a, ast.alias)]
        if isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
        words = {word for name in names for word in name.split(".")}
        assert "_core" not in words, "call pybsp.ops instead"
        if not source.startswith(("integrations/", "cli/")):
            module = getattr(node, "module", None) or (names or [""])[0]
            if getattr(node, "level", 0) == 0:
                assert module.split(".")[0] != "transformers", source


@pytest.mark.parametrize(
    "source",
    [s for s in python_sources() if "/" not in s or s.startswith("ops/")],
)
def test_a_source_has_a_test_of_the_same_word(source: str) -> None:
    expected = ROOT / "tests" / TESTED_IN.get(source, f"test_{source}.py")
    assert expected.exists(), f"{source} has no {expected.relative_to(ROOT)}"


@pytest.mark.parametrize("folder", ["pruning", "nn", "integrations", "cli"])
def test_tests_are_named_after_what_they_test(folder: str) -> None:
    words = {Path(s).name for s in python_sources() if s.startswith(f"{folder}/")}
    tests = list((ROOT / "tests" / folder).glob("test_*.py"))
    assert tests
    covered = {t.stem.removeprefix("test_") for t in tests}
    assert len(words & covered) >= len(words) // 3, sorted(words - covered)
