"""ByteTransformer's rules that need no GPU: dispatch, launch shapes, refusals, the mask, packing, the library's build."""

from __future__ import annotations

import json
import re
import shlex
import shutil

import pytest
import torch

from stof_kernels import masks
from stof_kernels.baselines import Problem, Unsupported, bytetransformer, get, native
from stof_kernels.baselines.bytetransformer import (
    Launch,
    attention_mask,
    launch_of,
    pack,
    prefix_lengths,
    removes_padding,
)
from stof_kernels.baselines.inputs import make_tensors
from stof_kernels.kernels.__main__ import report
from stof_kernels.kernels.build import BuildError, nvcc

needs_nvcc = pytest.mark.skipif(shutil.which(shlex.split(nvcc())[0]) is None, reason="no nvcc")

# Published launch shapes: length in tiles of 16 -> query rows, threads, bytes of shared memory of a block.
WHOLE = {16: (128, 5376), 32: (256, 11776), 48: (384, 19200), 64: (512, 27648), 80: (800, 37120)}
SLABS = {
    96: (48, 576, 30720), 112: (64, 896, 40704), 128: (64, 1024, 45056), 144: (48, 864, 42240), 160: (48, 960, 46080),
    176: (32, 704, 41728), 256: (32, 1024, 58368), 272: (16, 544, 50432), 352: (16, 704, 64512),
}  # fmt: skip


def problem_of(**changes) -> Problem:
    values = {
        "pattern": masks.causal(), "batch": 2, "q_len": 48, "kv_len": 48, "heads": 3, "kv_heads": 3, "head_dim": 64,
        "dtype": "float16", "device": "cpu", "seed": 1,
    }  # fmt: skip
    return Problem(**values | changes)


def prepare(**changes):
    problem = problem_of(**changes)
    return get("bytetransformer").prepare(problem, make_tensors(problem))


def test_launch_shapes_are_the_published_ones():
    for rows, (threads, size) in WHOLE.items():
        for tokens in (rows - 15, rows):
            assert launch_of(tokens, 12, 64) == Launch("short kernel A", rows, threads, size)
    for rows, want in SLABS.items():
        for tokens in (max(rows - 15, 81), rows):
            assert launch_of(tokens, 12, 64) == Launch("short kernel B", *want)
    for tokens in range(81, 353):
        launch = launch_of(tokens, 1, 64)
        assert launch.threads <= 1024
        assert launch.shared_bytes <= 64 * 1024


@pytest.mark.parametrize(
    ("tokens", "heads", "dim", "dtype", "path"),
    [
        *(
            (353, 12, 64, "float16", "unfused"),
            (384, 12, 64, "float16", "unfused"),
            (385, 12, 64, "float16", "unfused"),
        ),
        *((392, 12, 64, "float16", "long"), (393, 12, 64, "float16", "unfused"), (1024, 12, 64, "float16", "long")),
        *(
            (1025, 12, 64, "float16", "unfused"),
            (1365, 12, 64, "float16", "unfused"),
            (64, 12, 64, "float32", "unfused"),
        ),
        *(
            (48, 12, 16, "float16", "short kernel A"),
            (49, 12, 16, "float16", "unfused"),
            (512, 8, 128, "float16", "unfused"),
        ),
    ],
)
def test_paths_by_length_head_dim_and_type(tokens, heads, dim, dtype, path):
    assert launch_of(tokens, heads, dim, dtype).path == path


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((1366, 12, 64), r"1366 tokens: the fused paths end at 1024, .* = 65568 bytes in shared memory, at most 65536"),
        ((2048, 12, 64), r"2048 tokens: the fused paths end at 1024"),
        ((384, 33, 32), r"33 heads, its unfused softmax runs a warp per head, at most 32"),
        ((512, 40, 64), r"heads \* head_dim is 40 \* 64, its split runs a thread per pair, at most 1024"),
        ((64, 12, 64, "bfloat16"), r"float16, and float32 without fusion, not bfloat16"),
    ],
)
def test_what_no_path_takes_is_refused_by_name(arguments, reason):
    with pytest.raises(Unsupported, match=reason) as caught:
        launch_of(*arguments)
    assert "\n" not in str(caught.value)


def test_other_refusals_come_before_the_library_is_needed(monkeypatch):
    monkeypatch.setattr(bytetransformer, "load", lambda: None)
    with pytest.raises(Unsupported, match="queries and keys differ in number"):
        prepare(q_len=32)
    with pytest.raises(Unsupported, match="no grouped queries"):
        prepare(heads=4, kv_heads=2)
    with pytest.raises(Unsupported, match="a row attends to nothing"):
        prepare(pattern=masks.causal(offset=-1))
    with pytest.raises(Unsupported, match="2048 tokens"):
        prepare(q_len=2048, kv_len=2048, heads=12, kv_heads=12, batch=1)


def test_masks_per_head_are_refused_unless_they_agree():
    from stof_kernels.masks import Pattern

    class PerHead(Pattern):
        def __init__(self, differ):
            self.differ = differ

        family, params = "per_head", {}

        def bind(self, q_len, kv_len, device="cpu"):
            return lambda b, h, q, kv: (q >= kv) & (q >= kv + (h * 2 if self.differ else h * 0)) | (q == kv)

    problem = problem_of(pattern=PerHead(False))
    assert torch.equal(attention_mask(problem), torch.ones(48, 48).tril().half().expand(2, 48, 48))
    with pytest.raises(Unsupported, match="one mask per sequence, shared by its heads"):
        attention_mask(problem_of(pattern=PerHead(True)))


def test_the_mask_is_a_dense_tensor_of_ones_and_zeros_per_sequence():
    pattern = masks.get("bigbird", 48)
    mask = attention_mask(problem_of(pattern=pattern))
    rule, zero = pattern.bind(48, 48), torch.zeros((), dtype=torch.int64)
    keep = rule(zero, zero, torch.arange(48)[:, None], torch.arange(48)[None]).expand(48, 48)
    assert mask.shape == (2, 48, 48)
    assert mask.dtype == torch.float16
    assert mask.is_contiguous()
    assert torch.equal(mask, keep.half().expand(2, 48, 48))


def test_packing_is_what_a_qkv_product_writes():
    torch.manual_seed(3)
    hidden, weight = torch.randn(2, 5, 12), torch.randn(12, 36)
    packed = hidden @ weight
    q, k, v = packed.view(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)
    assert torch.equal(pack(q, k, v), packed)


def test_only_prefix_padding_can_be_removed():
    tokens = torch.arange(24)
    lengths = torch.tensor([24, 7, 16])
    padded = (tokens < lengths[:, None, None]).expand(3, 24, 24)
    assert prefix_lengths(padded).tolist() == [24, 7, 16]
    assert prefix_lengths(padded).dtype == torch.int32
    assert removes_padding(padded)
    assert not removes_padding(padded[:2]), "up to two sequences are not packed"
    assert not removes_padding(torch.ones(3, 24, 24, dtype=torch.bool)), "nothing to remove"
    # Row 0 says one token; the rest of a causal mask says otherwise. Padding in front is no prefix either.
    assert prefix_lengths(torch.ones(3, 24, 24, dtype=torch.bool).tril()) is None
    assert prefix_lengths((tokens >= 3).expand(3, 24, 24)) is None
    changed = padded.clone()
    changed[1, 20, 9] = True
    assert prefix_lengths(changed) is None


def test_registered_as_a_labelled_reimplementation_for_cuda():
    spec = get("bytetransformer")
    assert spec.label == "ByteTransformer (reimpl.)"
    assert spec.reimplemented
    assert spec.why_not("mha", "cpu") == "runs on cuda only"
    assert "baselines/csrc/bytetransformer" in spec.depends
    assert not any(name.startswith("kernels/") for name in spec.depends), "an edit of our kernels must not make it old"


def test_numbers_depend_on_sources_not_on_comments(tmp_path, monkeypatch):
    root = tmp_path / "package"
    shutil.copytree(native.PACKAGE_ROOT / native.CSRC, root / native.CSRC)
    for module in ("stof_kernels.baselines.native", "stof_kernels.provenance"):
        monkeypatch.setattr(f"{module}.PACKAGE_ROOT", root)
    before = native.source_digest("bytetransformer", "sm_90a")
    source = root / native.CSRC / "bytetransformer/scores.cuh"
    source.write_text(source.read_text() + "\n// a remark\n")
    assert native.source_digest("bytetransformer", "sm_90a") == before
    source.write_text(source.read_text() + "\nconstexpr int kMore = 1;\n")
    assert native.source_digest("bytetransformer", "sm_90a") != before
    assert native.source_digest("bytetransformer", "sm_80") != native.source_digest("bytetransformer", "sm_90a")


@pytest.fixture
def without_nvcc(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("STOF_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "_loaded", {})


def test_without_library_and_compiler_one_line_says_what_to_do(without_nvcc, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(native, "find", lambda name, target: None)
    with pytest.raises(
        Unsupported, match=r"sm_90a library of bytetransformer is not built and there is no nvcc"
    ) as caught:
        bytetransformer.load()
    assert "\n" not in str(caught.value)
    assert "baselines/lib/bytetransformer-sm_90a" in str(caught.value)


def test_a_library_is_found_without_a_compiler_only_if_it_is_of_these_sources(without_nvcc, tmp_path):
    folder = tmp_path / "cache/lib/bytetransformer-sm_90a-0123456789ab"
    folder.mkdir(parents=True)
    (folder / native.library_file("bytetransformer")).write_bytes(b"")
    manifest = folder / native.MANIFEST
    manifest.write_text(json.dumps({"source_digest": "of another day"}))
    elsewhere = native.PACKAGE_ROOT / "baselines/lib/bytetransformer-sm_90a"
    assert native.find("bytetransformer", "sm_90a") in (None, elsewhere / native.library_file("bytetransformer"))
    manifest.write_text(json.dumps({"source_digest": native.source_digest("bytetransformer", "sm_90a")}))
    assert native.find("bytetransformer", "sm_90a") is not None


def test_unknown_names_are_one_line(capsys):
    assert native.main(["bytetransformer", "sm_99"]) == 2
    assert "no CUDA target 'sm_99'; known are sm_80" in capsys.readouterr().err
    with pytest.raises(BuildError, match=r"no competitor 'cpp' has CUDA sources; known are .*bytetransformer"):
        native.units("cpp")
    assert native.main([]) == 2


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_it_compiles_without_spills_and_with_the_published_shared_memory(target, tmp_path, monkeypatch):
    monkeypatch.setenv("STOF_CACHE_DIR", str(tmp_path))
    library = native.build("bytetransformer", target)
    assert native.find("bytetransformer", target) in (
        library,
        native.PACKAGE_ROOT / f"baselines/lib/bytetransformer-{target}" / library.name,
    )
    log = library.with_name("build.log").read_text()
    kernels = report(log)
    assert len(kernels) >= 40
    # The float32 softmax of 1024 keys keeps 32 numbers a lane under a limit of 64 registers; no experiment runs it.
    assert [kernel for kernel in kernels if kernel[3] and "masked_softmaxIfLi32E" not in kernel[0]] == []
    blocks = re.findall(
        r"Compiling entry function '\S*attend_wholeILi(\d+)ELi64E\S*'.*?, (\d+) bytes smem", log, re.DOTALL
    )
    assert {int(rows): int(size) for rows, size in blocks} == {rows: size for rows, (_, size) in WHOLE.items()}
    binary = library.read_bytes().decode("latin-1")
    for folder in (tmp_path, native.PACKAGE_ROOT, native.torch_dir()):
        assert str(folder) not in binary, "a folder of this machine is in the binary"
