"""Base model folders: what decides the revision, what is refused, and when the tiny one is made. What it holds: test_tinyglm_contract.py."""

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline import basemodel, tinyglm
from pipeline.basemodel import TEMPLATE_FILE, read_base_model, template_digest, tiny_base_model
from pipeline.errors import InvalidInput, TuneserveError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that has the form of a base model."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "glm4v_moe"}')
    (base / "model-1.safetensors").write_bytes(b"weights")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    return base


def _faults(folder: Path) -> list[str]:
    with pytest.raises(InvalidInput) as caught:
        read_base_model(folder)
    return [f"{Path(fault.file).name}: {fault.path}: {fault.message}" for fault in caught.value.faults]


def test_revision_does_not_depend_on_the_place(folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(folder, tmp_path / "else" / "where")
    assert read_base_model(moved).revision == read_base_model(folder).revision
    assert read_base_model(moved).folder == moved


@pytest.mark.parametrize("name", ["config.json", "model-1.safetensors", "chat_template.jinja"])
def test_revision_depends_on_every_defining_file(folder: Path, name: str) -> None:
    before = read_base_model(folder).revision
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content + b" ")
    changed = read_base_model(folder).revision
    (folder / name).write_bytes(content)
    (folder / name).rename(folder / f"b-{name}")
    (folder / "config.json").write_text('{"model_type": "glm4v_moe"}')
    (folder / "model-2.safetensors").write_bytes(b"more")
    assert len({before, changed, read_base_model(folder).revision}) == 3


def test_revision_ignores_what_does_not_define_the_model(folder: Path) -> None:
    before = read_base_model(folder).revision
    (folder / "README.md").write_text("words")
    (folder / basemodel.MEASURED_FILE).write_text("{}")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "state.json").write_text("{}")
    assert read_base_model(folder).revision == before


def test_digest_cache_is_used_and_notices_a_change(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "new" / "digests.json"
    revision = read_base_model(folder, cache).revision
    assert revision == read_base_model(folder).revision
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", lambda *_: pytest.fail("hashed again"))
        assert read_base_model(folder, cache).revision == revision
    weights = folder / "model-1.safetensors"
    weights.write_bytes(b"WEIGHTS")
    os.utime(weights, ns=(1, 1))
    assert read_base_model(folder, cache).revision not in {revision, ""}
    cache.write_text("not JSON")
    assert read_base_model(folder, cache).revision == read_base_model(folder).revision


def test_missing_folder(tmp_path: Path) -> None:
    assert "no such folder" in _faults(tmp_path / "none")[0]


def test_every_fault_is_found_at_once(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "model-1.safetensors").rename(folder / "pytorch_model.bin")
    (folder / "modeling_glm.py").write_text("")
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "other/repo--code.Tokenizer"}}')
    faults = _faults(folder)
    assert len(faults) == 5
    for words in (
        "config.json: : missing",
        "no *.safetensors",
        "pytorch_model.bin: : a pickle",
        "modeling_glm.py: : Python code",
        "tokenizer_config.json: auto_map",
    ):
        assert any(words in fault.replace("holds ", "") for fault in faults), words


@pytest.mark.parametrize("suffix", sorted(basemodel.PICKLE_SUFFIXES))
def test_pickles_are_refused_in_subfolders_too(folder: Path, suffix: str) -> None:
    (folder / "original").mkdir()
    (folder / "original" / f"weights{suffix}").write_bytes(b"")
    assert len(_faults(folder)) == 1


def test_auto_map_and_damaged_config_are_refused(folder: Path) -> None:
    (folder / "config.json").write_text('{"auto_map": {}}')
    assert "auto_map" in _faults(folder)[0]
    (folder / "config.json").write_text("{")
    assert "not JSON" in _faults(folder)[0]
    (folder / "config.json").write_text("[]")
    assert "not a JSON object" in _faults(folder)[0]


def test_a_download_that_lacks_a_shard_is_refused(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    assert _faults(folder) == ["model-2.safetensors: : missing, though model.safetensors.index.json names it; complete the download"]


def test_template_digest_is_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = template_digest()
    changed = tmp_path / "t.jinja"
    changed.write_bytes(TEMPLATE_FILE.read_bytes() + b"\n")
    monkeypatch.setattr(basemodel, "TEMPLATE_FILE", changed)
    assert len(before) == 64 and template_digest() != before


@pytest.mark.parametrize("text", ["Rubio tote", '{"a": [1, null]}', "zażółć 你好 🙂\n\t ", "for sleeping outdoors"])
def test_tokenizer_encodes_any_text(text: str) -> None:
    tokenizer = tinyglm.make_tokenizer()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) <= tinyglm.VOCABULARY


def _stand_in(builds: list[Path], seconds: float = 0.0) -> Any:
    def make_tiny(draft: Path, chat_template: str, measured_file: str, report: Any) -> None:
        builds.append(draft)
        draft.mkdir()
        (draft / "config.json").write_text("{}")
        threading.Event().wait(seconds)
        (draft / "model.safetensors").write_bytes(b"weights")

    return make_tiny


def test_tiny_is_made_once_though_two_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds: list[Path] = []
    said: list[str] = []
    monkeypatch.setattr(tinyglm, "make_tiny", _stand_in(builds, 0.3))
    monkeypatch.setattr(basemodel, "LOCK_POLL_SECONDS", 0.02)
    made: list[basemodel.BaseModel] = []
    racers = [threading.Thread(target=lambda: made.append(tiny_base_model(tmp_path / "bases", lambda text, _: said.append(text)))) for _ in range(2)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert len(builds) == 1 and len(made) == 2 and made[0] == made[1] == tiny_base_model(tmp_path / "bases")
    assert any("waiting" in text for text in said)
    assert made[0].folder.name.startswith("tiny-") and len(made[0].folder.name) == len("tiny-") + 12


def test_a_build_that_was_cut_short_is_cleared_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".tiny-0123456789ab.draft").mkdir()
    (tmp_path / ".tiny-0123456789ab.draft" / "config.json").write_text("{")
    monkeypatch.setattr(tinyglm, "make_tiny", _stand_in([]))
    base = tiny_base_model(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [base.folder.name]


def test_a_build_that_fails_leaves_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make_tiny(draft: Path, *_: Any) -> None:
        draft.mkdir()
        raise TuneserveError("did not learn")

    with monkeypatch.context() as patch:
        patch.setattr(tinyglm, "make_tiny", make_tiny)
        with pytest.raises(TuneserveError, match="did not learn"):
            tiny_base_model(tmp_path)
    assert not list(tmp_path.glob("tiny-*"))


def test_another_template_or_library_means_another_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    before = basemodel._tiny_digest()
    monkeypatch.setattr(basemodel, "version", lambda package: f"{package}-next")
    assert basemodel._tiny_digest() != before
