"""Whether reading a ``.pt2`` could run code.

``torch.export.load`` unpickles example inputs and unusual tensors without ``weights_only``, evaluates symbolic sizes
and guards as Python, writes Python from names, and looks operators up by name: all of it is checked first.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optkit.failures import reason
from optkit.source.reading import damaged
from optkit.source.torch_save import RefusedPickleError, unpickle

_OPERATORS = re.compile(
    "abs|add|and_|eq|floordiv|ge|getitem|gt|invert|le|lshift|lt|mod|mul|ne|neg|not_|or_|pos|pow|rshift|sub|truediv|xor"
)


def danger_in(path: Path) -> str | None:
    """Why reading this file could run code, or None."""
    with zipfile.ZipFile(path) as archive:
        try:
            texts = {name: archive.read(name) for name in archive.namelist() if name.endswith(".json")}
            documents = {name.partition("/")[2]: json.loads(text) for name, text in texts.items()}
        except (zipfile.BadZipFile, ValueError, OSError) as error:
            raise damaged(path, reason(error)) from error
        pairs = [pair for document in documents.values() for pair in _pairs(document)]
        pickled = {value.get("path_name") for _, value in pairs if isinstance(value, dict) and value.get("use_pickle")}
        for name in archive.namelist():
            base = name.rpartition("/")[2]
            if base.startswith(("custom_obj_", "opaque_obj_")):
                return f"it holds the pickled object {base}"
            if (base.endswith(".pt") or base in pickled) and (refused := _refused_in(archive, name)):
                return f"{name.partition('/')[2]} pickles {refused}"
    return next((why for key, value in pairs if (why := _danger_in_value(key, value))), None)


def _pairs(document: Any) -> Iterator[tuple[str, Any]]:
    """Every key of a JSON document with its value, at any depth; the items of a list carry the list's key."""
    for key, value in document.items() if isinstance(document, dict) else ():
        yield from ((key, item) for item in (value if isinstance(value, list) else [value]))
    for value in document.values() if isinstance(document, dict) else document if isinstance(document, list) else ():
        yield from _pairs(value)


def _refused_in(archive: zipfile.ZipFile, member: str) -> str | None:
    content = archive.read(member)
    try:
        if content:
            unpickle(io.BytesIO(content))
    except RefusedPickleError as error:
        return str(error)
    except Exception as error:
        return f"something unreadable ({reason(error)})"
    return None


def _danger_in_value(key: str, value: Any) -> str | None:
    if not isinstance(value, str):
        return None
    if key in ("expr_str", "guards_code") and not _is_arithmetic(value):
        return f"its {key} {value[:80]!r} is no arithmetic"
    if key in ("name", "as_name") and not re.fullmatch(r"[\w.]*", value):
        return f"the name {value[:80]!r} is no identifier"
    if key in ("target", "as_operator") and not _is_operator(value):
        return f"it calls {value[:80]!r}, which is no operator that is registered here"
    return None


def _is_arithmetic(text: str) -> bool:
    """Whether the text only computes with sizes: ``Mul(Integer(2), Symbol('s0'))``, ``L['x'].size()[0] % 4 == 0``."""
    try:
        return all(map(_is_harmless, ast.walk(ast.parse(text, mode="eval"))))
    except (SyntaxError, ValueError):
        return False


def _is_harmless(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):  # of a class of sympy, or of the size of a tensor
        return isinstance(node.func, ast.Attribute) or (
            isinstance(node.func, ast.Name)
            and re.fullmatch(r"[A-Z]\w*|floor|ceiling|abs|min|max", node.func.id) is not None
        )
    if isinstance(node, ast.Attribute):
        return node.attr in ("size", "stride", "storage_offset", "dim")
    if isinstance(node, ast.Constant):  # torch pastes guards into source code between quotes
        return isinstance(node.value, (int, float)) or re.fullmatch(r"[\w.]*", str(node.value)) is not None
    compound = (ast.Expression, ast.Subscript, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp)
    parts = (ast.Name, ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context, ast.keyword)
    return isinstance(node, (*compound, *parts))


def _is_operator(target: str) -> bool:
    import torch

    if target.startswith("torch.ops."):
        found: Any = torch.ops
        for name in target.split(".")[2:]:
            found = getattr(found, name, None)
        return isinstance(found, torch._ops.OperatorBase)
    root, _, name = target.partition(".")
    return {
        "_operator": _OPERATORS.fullmatch(name) is not None,
        "math": name.isidentifier(),
        "torch": re.fullmatch(r"_?sym_\w+", name) is not None,
    }.get(root, False)
