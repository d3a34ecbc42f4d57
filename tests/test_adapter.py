"""An adapter's identity is the content of its two files; what is not such a folder is refused."""

from pathlib import Path

import pytest

from pipeline.adapter import adapter_digest, name_fault, read_adapter
from pipeline.errors import AdapterInvalid
from tests.conftest import write_adapter


def test_the_digest_follows_content_not_place(tmp_path: Path) -> None:
    one, same, other = (write_adapter(tmp_path / name, scale) for name, scale in (("a", 1.0), ("b", 1.0), ("c", 2.0)))
    assert adapter_digest(one) == adapter_digest(same) != adapter_digest(other)
    (same / "optimizer.pt").write_bytes(b"not ours")
    assert adapter_digest(one) == adapter_digest(same)


def test_what_an_adapter_is(tmp_path: Path) -> None:
    adapter = read_adapter(write_adapter(tmp_path / "a"))
    assert (adapter.rank, adapter.alpha, adapter.target_modules, adapter.tensors) == (8, 16.0, ("o_proj", "q_proj"), 2)


def test_damaged_or_foreign_folders_are_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:40])
    with pytest.raises(AdapterInvalid, match="safetensors"):
        read_adapter(folder)
    weights.unlink()
    with pytest.raises(AdapterInvalid, match="missing"):
        read_adapter(folder)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(whole)
    weights.symlink_to(elsewhere)
    with pytest.raises(AdapterInvalid, match="not a plain file"):
        read_adapter(folder)
    with pytest.raises(AdapterInvalid, match="not a LoRA adapter"):
        read_adapter(write_adapter(tmp_path / "b", peft_type="IA3"))


@pytest.mark.parametrize("name", ["image", "text", "", "..", ".a", "a/b", "a b", "%2e", "a" * 65, "glm"])
def test_names_that_are_never_served(name: str) -> None:
    assert name_fault(name, {"glm"})


@pytest.mark.parametrize("name", ["catalog", "a", "A-1_b.c", "a" * 64])
def test_names_that_are_served(name: str) -> None:
    assert name_fault(name, {"glm"}) is None
