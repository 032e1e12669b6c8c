"""Functions that the user names: found beside a document or among the modules, or refused with the line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from optkit.errors import CheckpointError, DataError
from optkit.functions import absolute, find_function


def test_a_function_imports_its_neighbours_early_and_late(tmp_path: Path) -> None:
    (tmp_path / "early_neighbour.py").write_text("ONE = 1\n")
    (tmp_path / "late_neighbour.py").write_text("TWO = 2\n")
    (tmp_path / "mine.py").write_text(
        "from early_neighbour import ONE\n"
        "def add(more, *, times=1):\n    from late_neighbour import TWO\n    return (ONE + TWO + more) * times\n"
    )
    before = list(sys.path)
    add = find_function("mine.py:add", tmp_path)
    assert sys.path == before
    assert add(3, times=2) == 12
    assert sys.path == before
    assert add.place == f"{tmp_path / 'mine.py'}:2"


def test_a_module_beside_the_document_and_one_that_is_installed(tmp_path: Path) -> None:
    (tmp_path / "module_beside_the_document.py").write_text("def four():\n    return 4\n")
    assert find_function("module_beside_the_document:four", tmp_path)() == 4
    dumps = find_function("json:dumps", tmp_path)
    assert dumps([1]) == "[1]" and dumps.place.rpartition(":")[0].endswith("json/__init__.py")
    assert find_function("math:sqrt", tmp_path).place == "not written in Python"


def test_a_dataclass_in_the_file_finds_its_module(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import KW_ONLY, dataclass\n"
        "@dataclass\nclass Point:\n    x: int\n    _: KW_ONLY\n    y: int = 2\n"
    )
    assert find_function("mine.py:Point", tmp_path)(1).y == 2


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("mine.py", r"function 'mine.py': write module:function or path.py:function"),
        (":f", "write module:function"),
        ("yours.py:f", r"there is no file .*yours\.py"),
        ("no_such_package.inner:f", "there is no module 'no_such_package'; install it, or write the path"),
        ("mine.py:seven", "there is no function 'seven', did you mean 'eleven'"),
        ("mine.py:NUMBER", "there is no function 'NUMBER', known: eleven"),
        ("lacks.py:f", r"importing it failed: ModuleNotFoundError: .* at .*lacks\.py:2: `import no_such_package`"),
        ("lacks:f", r"importing it failed: ModuleNotFoundError: .* at .*lacks\.py:2: `import no_such_package`"),
        ("leaves.py:f", r"importing it failed: SystemExit: 3 at .*leaves\.py:1: `raise SystemExit\(3\)`"),
        ("typo.py:f", r"importing it failed: SyntaxError: .* at .*typo\.py:1"),
    ],
)
def test_what_cannot_be_found_or_imported(reference: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("NUMBER = 7\ndef eleven():\n    return 11\n")
    (tmp_path / "lacks.py").write_text("NUMBER = 7\nimport no_such_package\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "typo.py").write_text("def f(:\n")
    modules, path = set(sys.modules), list(sys.path)
    with pytest.raises(DataError, match=message):
        find_function(reference, tmp_path)
    assert sys.path == path
    assert not [
        name for name in sys.modules.keys() - modules if any(word in name for word in ("lacks", "leaves", "typo"))
    ]


def test_the_caller_says_what_it_is_and_what_to_raise(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^factory 'net\.py:make': there is no file"):
        find_function("net.py:make", tmp_path, role="factory", error=CheckpointError)


def test_a_reference_to_a_file_is_resolved_and_one_to_a_module_is_not(tmp_path: Path) -> None:
    assert absolute("net.py:make", tmp_path) == f"{tmp_path / 'net.py'}:make"
    assert absolute("/somewhere/net.py:make", tmp_path) == "/somewhere/net.py:make"
    assert absolute("package.net:make", tmp_path) == "package.net:make"
