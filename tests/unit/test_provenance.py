"""Code digests: an edit that can change a number changes them, any other does not."""

from __future__ import annotations

import pytest

from stof_kernels import provenance
from stof_kernels.provenance import code_digest, normalized_source

PYTHON = (
    "def f(x):\n    return x + 1\n",
    '"""Doc."""\n\ndef f(x):  # why\n    """Add."""\n    return (x + 1)\n',
    "def f(x):\n    return x + 2\n",
)
CPP = (
    'int f() { return 1; }\nchar* s = "// no";\n',
    '// c\nint  f() { return /* x */ 1; }\n\nchar* s = "// no";\n',
    'int f() { return 1; }\nchar* s = "// yes";\n',
)
CUDA = ("#define N 3\nint x = N;\n", "#define N 3 // three\n  int x = N;\n", "#define N 4\nint x = N;\n")


@pytest.mark.parametrize(("name", "texts"), [("a.py", PYTHON), ("a.cpp", CPP), ("a.cu", CUDA)])
def test_only_meaning_counts(tmp_path, name, texts):
    text, same, different = texts
    path = tmp_path / name
    path.write_text(text)
    original = normalized_source(path)
    path.write_text(same)
    assert normalized_source(path) == original
    path.write_text(different)
    assert normalized_source(path) != original


def test_digest_covers_folders_and_names(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGE_ROOT", tmp_path)
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "a.py").write_text("x = 1\n")
    (tmp_path / "masks" / "notes.md").write_text("not code")
    first = code_digest(["masks"])
    assert len(first) == 12
    (tmp_path / "masks" / "a.py").rename(tmp_path / "masks" / "b.py")
    assert code_digest(["masks"]) != first
    with pytest.raises(FileNotFoundError, match=r"'timer\.py' is neither a file nor a folder"):
        code_digest(["timer.py"])


def test_digest_does_not_depend_on_the_python_version(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("class A:\n    def f(self, x: int = 1) -> str:\n        return f'{x!r:>4} {None}'\n")
    # Typed out from the grammar that 3.11 to 3.13 share; 3.12 adds empty type_params, 3.13's dump drops empty lists.
    assert normalized_source(path) == (
        "Module(body=[ClassDef(name='A',body=[FunctionDef(name='f',args=arguments(args=[arg(arg='self'),"
        "arg(arg='x',annotation=Name(id='int',ctx=Load()))],defaults=[Constant(value=1)]),"
        "body=[Return(value=JoinedStr(values=[FormattedValue(value=Name(id='x',ctx=Load()),conversion=114,"
        "format_spec=JoinedStr(values=[Constant(value='>4')])),Constant(value=' '),"
        "FormattedValue(value=Constant(),conversion=-1)]))],returns=Name(id='str',ctx=Load()))])])"
    )
