"""What decodes and what does not, whatever the file holds."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline import image_file
from pipeline.image_file import ImageTokens, look


def save(path: Path, mode: str = "RGB", size: tuple[int, int] = (56, 40), **options: Any) -> Path:
    Image.new(mode, size, 100 if mode in ("L", "P", "1", "I;16") else None).save(path, **options)
    return path


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.gif"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pictures_of_every_allowed_format_are_seen(tmp_path: Path, name: str, mode: str) -> None:
    seen = look(save(tmp_path / name, mode))
    assert (seen.fault, seen.doubt, seen.size, len(seen.digest)) == ("", "", (56, 40), 64) and seen.likeness is not None


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA", "CMYK"])
def test_every_kind_of_pixel_is_seen(tmp_path: Path, mode: str) -> None:
    seen = look(save(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"), mode))
    assert seen.fault == "" and seen.likeness is not None
    assert bool(seen.doubt) == mode.endswith("A"), "only what is transparent is"


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.gif"])
def test_a_file_cut_short_is_a_fault_wherever_it_is_cut(tmp_path: Path, name: str) -> None:
    noise = Image.effect_noise((64, 64), 80).convert("RGB")
    noise.save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for share in (0.0, 0.01, 0.3, 0.7, 0.95):
        (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
        assert "does not decode" in look(tmp_path / name).fault, share


def test_what_is_no_picture_of_ours_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.png").write_text("hello")
    save(tmp_path / "a.tiff")
    save(tmp_path / "long.png", size=(402, 2))
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    first.save(tmp_path / "moving.gif", save_all=True, append_images=[second])
    said = {name: look(tmp_path / name).fault for name in ("text.png", "a.tiff", "long.png", "moving.gif", "none.png")}
    assert said["text.png"] == said["a.tiff"] == "does not decode as PNG, JPEG, WEBP, BMP, GIF; save the picture again as one of these"
    assert "does not decode" in said["none.png"]
    assert "402x2" in said["long.png"] and "animation" in said["moving.gif"]
    monkeypatch.setattr(image_file, "MAX_PIXELS", 56 * 40 - 1)
    assert "56x40 pixels, more than" in look(save(tmp_path / "large.png")).fault


def test_more_than_8_bits_of_grey_are_a_fault(tmp_path: Path) -> None:
    Image.new("I;16", (56, 40), 30_000).save(tmp_path / "a.png")
    assert "more than 8 bits a channel" in look(tmp_path / "a.png").fault


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_exif_that_cannot_be_read_is_no_fault(tmp_path: Path, name: str) -> None:
    save(tmp_path / name, exif=b"Exif\0\0no TIFF header")
    assert (look(tmp_path / name).fault, look(tmp_path / name).doubt) == ("", "")
    Image.new("RGBA", (8, 8), (1, 2, 3, 9)).save(tmp_path / "clear.webp", exif=b"Exif\0\0no TIFF header")
    assert "transparent" in look(tmp_path / "clear.webp").doubt, "the rest is still looked at"


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    bomb = save(tmp_path / "bomb.png", "1", (16_000, 16_000))
    assert bomb.stat().st_size < 1_000_000 and "claims more than 50000000 pixels" in look(bomb).fault


@pytest.mark.parametrize(("size", "tokens"), [((56, 56), 4), ((8, 8), 4), ((224, 224), 25), ((112, 56), 8), ((1000, 500), 32), ((1, 200), 80)])
def test_image_tokens_of_the_tiny_model(size: tuple[int, int], tokens: int) -> None:
    """The contract with transformers stands in test_template_contract.py; these are its answers."""
    assert ImageTokens(14, 2, 2, 56 * 56, 4 * 112 * 112).count(*size) == tokens
