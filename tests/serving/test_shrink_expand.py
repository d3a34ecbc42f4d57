"""The kernel in Triton's interpreter, against float64, and built for real GPUs, which needs none. What it computes and takes there: tests/acceptance/gpu/compare_lora.py."""

import json
import subprocess
import sys

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pipeline.serving import shrink_expand
from tests.conftest import ROOT

GLM = ((4096, (12288, 1024, 1024)), (12288, (4096,)))
"""qkv_proj and o_proj of GLM-4.5V: inputs, and outputs of each slice."""
POINTERS = dict.fromkeys(("x", "y", "a0", "a1", "a2", "b0", "b1", "b2"), "*bf16") | {"parts": "*fp32", "arrivals": "*i64"}
POINTERS |= dict.fromkeys(("tokens", "lora_ids", "lora_tokens", "lora_starts"), "*i32")


def test_every_token_gets_its_own_adapter():
    run = subprocess.run([sys.executable, "-m", "tests.serving.interpreted_lora"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    cases = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(cases) > 3 and all(case["supported"] for case in cases)
    assert {case["shape"] for case in cases} == set(range(len(shrink_expand.SHAPES) - 1)), (
        "every shape but that of the longest steps, which is the one before it with fewer shares"
    )
    assert [case for case in cases if case["far"] > 1e-5] == []


@pytest.mark.parametrize(
    ("tokens", "inputs", "rank", "slices"),
    [
        (16, 4096, 8, 3),
        (16, 4096, 320, 1),
        (16, 4096, 128, 1),
        (16, 4096, 16, 4),
        (16, 4100, 16, 3),
        (16, 256, 16, 3),
        (2048, 12288, 16, 1),
        (2**18, 4096, 16, 3),
        (0, 4096, 16, 3),
    ],
)
def test_what_the_kernel_is_not_for_is_left_to_vllm(tokens, inputs, rank, slices):
    assert not shrink_expand.supported(tokens, inputs, rank, slices)


@pytest.mark.parametrize("gpus", [1, 2])
def test_it_is_for_glm_on_one_gpu_and_two(gpus):
    for tokens in (1, 2, 5, 64, 65, 400, 1024):
        assert shrink_expand.supported(tokens, 4096, 16, 3) and shrink_expand.supported(tokens, 12288 // gpus, 16, 1)
    assert shrink_expand.supported(8192, 4096, 16, 3)


def test_programs_that_wait_for_one_another_fit_a_gpu_at_once():
    """An A100 has 108 multiprocessors, each of which runs one program at least."""
    shapes = [shape for _, shape in (*shrink_expand.SHAPES, *shrink_expand.BESIDE_SHAPES)]
    assert max(shape.shares for shape in shapes) <= 108
    assert all(shape.shares & (shape.shares - 1) == 0 for shape in shapes)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("tokens", "layer", "beside"), [(1, 0, False), (1, 1, True), (16, 1, False), (16, 0, True), (64, 1, True), (1024, 0, False)])
def test_it_can_be_built_for_ampere_and_hopper(tokens, layer, beside, capability):
    kernel, (inputs, widths), shape = shrink_expand._shrink_expand, GLM[layer], shrink_expand.shape_for(tokens, beside)
    constants = shrink_expand.constants(tokens, inputs, widths, rank=16, groups=9, shape=shape) | {"SHRINKS": True, "EXPANDS": True, "ADD": True}
    constants["launch_pdl"] = capability >= 90
    signature = {name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(kernel.arg_names) if name not in constants}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=aligned)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": shape.warps, "num_stages": shape.stages})
    assert ("griddepcontrol.wait" in built.asm["ptx"]) == (capability >= 90), "waits for the kernel before it, where it can start early"
    assert "ld.global.b16" not in built.asm["ptx"], "reads 16 bytes at a time"
    assert "ld.global.gpu.acquire" in built.asm["ptx"], "sees what other programs wrote"
