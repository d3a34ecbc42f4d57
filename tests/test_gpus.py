"""Kinds of GPUs by name, and what nvidia-smi says is here."""

import pytest

from pipeline.errors import InvalidInput
from pipeline.gpus import GIB, KNOWN, Gpu, gpus_here, known_gpu, read_nvidia_smi

SMI = """0, GPU-aaaa1111, NVIDIA H100 80GB HBM3, 81559, 480
1, GPU-bbbb2222, NVIDIA H200, 143771, 610
"""
"""The first line is a real one; CUDA said 85,017,493,504 B of that card."""
H100 = Gpu("NVIDIA H100 80GB HBM3", 85_017_493_504, "nvidia-smi")


def test_total_less_reserved_is_what_cuda_reports() -> None:
    found, why_none = read_nvidia_smi(SMI, None)
    assert (found[0], len(found), why_none) == (H100, 2, "")


@pytest.mark.parametrize(("visible", "names"), [("1", ["NVIDIA H200"]), ("1,0", ["NVIDIA H200", H100.name]), ("GPU-aaaa", [H100.name]), ("0,7,1", [H100.name])])
def test_cuda_visible_devices_chooses_as_in_cuda(visible: str, names: list[str]) -> None:
    assert [gpu.name for gpu in read_nvidia_smi(SMI, visible)[0]] == names


@pytest.mark.parametrize(
    ("text", "visible", "said"), [(SMI, "", "names none"), (SMI, "MIG-1", "names none"), ("", None, "lists none"), ("[N/A]\n", None, "lists none")]
)
def test_none_has_a_reason(text: str, visible: str | None, said: str) -> None:
    found, why_none = read_nvidia_smi(text, visible)
    assert found == [] and said in why_none


def test_without_a_driver_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert gpus_here() == ([], "nvidia-smi is not on the PATH, so there is no NVIDIA driver")


def test_kinds_have_less_than_their_names_say() -> None:
    assert all(gpu.bytes < int(gpu.name.rpartition("-")[2].removesuffix("gb")) * GIB for gpu in KNOWN)
    assert known_gpu("H100-80GB").name == "h100-80gb"
    assert list(KNOWN) == sorted(KNOWN, key=lambda gpu: gpu.bytes)


def test_an_unknown_kind_lists_the_known_ones() -> None:
    with pytest.raises(InvalidInput, match="h100-80gb, h200-141gb"):
        known_gpu("h100")
