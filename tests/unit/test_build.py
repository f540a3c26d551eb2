from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stof_kernels import provenance

build_module = importlib.import_module("stof_kernels.kernels.build")
loader = importlib.import_module("stof_kernels.kernels.loader")

# A target of one small source instead of the kernels: what is tested here is the building, not the built.
TINY = """
import importlib, sys
from pathlib import Path
from stof_kernels import provenance, settings
build = importlib.import_module("stof_kernels.kernels.build")
root = Path(sys.argv[1])
build.PACKAGE_ROOT = provenance.PACKAGE_ROOT = root
build.TARGETS["tiny"] = build.Target(
    settings.cxx, "install one", ("-O1", "-fPIC"), ("-shared",), (build.Unit("tiny/a.cpp", "a"),), ("tiny",), 1
)
print(build.build("tiny"))
"""
SOURCE = '// says a number\nint number() { return 4; }  /* "four" */\nconst char* url = "https://x";\n'


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A package root with the tiny target's source, an empty cache, and the table entry."""
    folder = tmp_path / "package" / "kernels" / "csrc" / "tiny"
    folder.mkdir(parents=True)
    (folder / "a.cpp").write_text(SOURCE)
    monkeypatch.setenv("STOF_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(build_module, "PACKAGE_ROOT", tmp_path / "package")
    monkeypatch.setattr(provenance, "PACKAGE_ROOT", tmp_path / "package")
    entry = build_module.Target(
        build_module.settings.cxx,
        "install one",
        ("-O1", "-fPIC"),
        ("-shared",),
        (build_module.Unit("tiny/a.cpp", "a"),),
        ("tiny",),
        1,
    )
    monkeypatch.setitem(build_module.TARGETS, "tiny", entry)
    build_module.compiler_version.cache_clear()
    yield folder / "a.cpp"
    build_module.compiler_version.cache_clear()


@pytest.fixture
def recorder(tmp_path, monkeypatch):
    """A compiler that notes each of its compilations, and may be told to take its time."""
    log, delay = tmp_path / "compiled", tmp_path / "delay"
    log.touch()
    script = tmp_path / "cxx"
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *" -c "*) echo compile >> {log}; [ -f {delay} ] && sleep 2;; esac\nexec c++ "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return log, delay


def build_elsewhere(tmp_path: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", TINY, str(tmp_path / "package")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_import_and_digest_need_no_torch():
    code = "import sys; from stof_kernels.kernels import digest, manifest; digest('cpu'); manifest('cpu'); "
    run = subprocess.run([sys.executable, "-c", code + "sys.exit('torch' in sys.modules)"], check=False)
    assert run.returncode == 0


def test_digest_ignores_comments_and_layout_only(tiny):
    before = build_module.digest("tiny")
    tiny.write_text('int number()  { return 4; }\n\n// another\nconst char* url = "https://x";\n')
    assert build_module.digest("tiny") == before
    tiny.write_text(SOURCE.replace("4", "5"))
    changed = build_module.digest("tiny")
    assert changed != before
    tiny.write_text(SOURCE.replace("https://x", "https://y"))
    assert build_module.digest("tiny") not in {before, changed}


def test_builds_once_and_says_so_in_one_line(tiny, recorder):
    lines: list[str] = []
    path = build_module.build("tiny", progress=lines.append)
    assert path.is_file()
    assert len(lines) == 1
    assert "\n" not in lines[0]
    assert build_module.build("tiny", progress=lines.append) == path
    assert len(lines) == 1
    assert recorder[0].read_text().count("compile") == 1
    build_module.build("tiny", progress=lines.append, force=True)
    assert recorder[0].read_text().count("compile") == 2


def test_a_revert_finds_the_old_library(tiny, recorder):
    first = build_module.build("tiny", progress=lambda line: None)
    tiny.write_text(SOURCE.replace("4", "5"))
    second = build_module.build("tiny", progress=lambda line: None)
    assert second != first
    tiny.write_text(SOURCE)
    assert build_module.build("tiny", progress=pytest.fail) == first


def test_manifest_names_no_place_of_this_machine(tiny, tmp_path):
    path = build_module.build("tiny", progress=lambda line: None)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    assert manifest == json.loads(json.dumps(build_module.manifest("tiny")))
    assert manifest["sources"] == ["kernels/csrc/tiny/a.cpp"]
    assert str(tmp_path) not in json.dumps(manifest)
    assert str(tmp_path).encode() not in path.read_bytes()


def test_builders_at_the_same_time_compile_once(tiny, recorder, tmp_path):
    recorder[1].touch()
    builders = [build_elsewhere(tmp_path) for _ in range(3)]
    printed = [builder.communicate(timeout=60) for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0, 0], printed
    assert len({out.splitlines()[-1] for out, _ in printed}) == 1
    assert recorder[0].read_text().count("compile") == 1


def test_killed_builder_leaves_nothing_that_counts(tiny, recorder, tmp_path):
    recorder[1].touch()
    builder = build_elsewhere(tmp_path)
    deadline = time.monotonic() + 30
    while not recorder[0].read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(builder.pid, signal.SIGKILL)
    builder.communicate()
    assert not build_module.is_complete(build_module.library_dir("tiny"))
    recorder[1].unlink()
    assert build_module.is_complete(build_module.build("tiny", progress=lambda line: None).parent)


@pytest.mark.parametrize("missing", ["libstof.so", "manifest.json"])
def test_incomplete_folder_does_not_count(tiny, missing):
    path = build_module.build("tiny", progress=lambda line: None)
    (path.parent / missing).unlink()
    assert loader.find("tiny") is None
    assert build_module.build("tiny", progress=lambda line: None) == path
    assert loader.find("tiny") == path
    assert not list(path.parent.parent.glob(".*"))  # nothing is left aside


def test_missing_compiler_is_one_line(tiny, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-c++ -m64")
    with pytest.raises(build_module.BuildError, match=r"'no-such-c\+\+ -m64' not found; install one") as error:
        build_module.build("tiny")
    assert "\n" not in str(error.value)


def test_existing_library_is_found_without_a_compiler(tiny, monkeypatch):
    path = build_module.build("tiny", progress=lambda line: None)
    monkeypatch.setenv("CXX", "no-such-c++")
    assert loader.find("tiny") == path
    tiny.write_text(SOURCE.replace("4", "5"))
    assert loader.find("tiny") is None


def test_library_in_the_package_is_found_first(tiny, tmp_path, monkeypatch):
    path = build_module.build("tiny", progress=lambda line: None)
    monkeypatch.setattr(loader, "__file__", str(tmp_path / "package" / "kernels" / "loader.py"))
    packaged = tmp_path / "package" / "kernels" / "lib" / "tiny"
    shutil.copytree(path.parent, packaged)
    assert loader.find("tiny") == packaged / "libstof.so"
    tiny.write_text(SOURCE.replace("4", "5"))  # a library of other sources is passed over
    assert loader.find("tiny") is None


def test_failed_compilation_is_one_line_with_a_log(tiny):
    tiny.write_text("int number() { return four; }\n")
    with pytest.raises(build_module.BuildError, match=r"compiling the tiny kernels failed; .*build\.log$") as error:
        build_module.build("tiny", progress=lambda line: None)
    assert "\n" not in str(error.value)
    assert "four" in Path(str(error.value).split()[-1]).read_text()


def test_unwritable_cache_is_one_line(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("STOF_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(build_module.BuildError, match=r"cannot be written.*STOF_CACHE_DIR") as error:
        build_module.build("tiny")
    assert "\n" not in str(error.value)


def test_unknown_target_names_the_known_ones():
    with pytest.raises(build_module.BuildError, match=r"no build target 'sm_12'; known are .*cpu"):
        build_module.digest("sm_12")
