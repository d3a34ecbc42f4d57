"""A base model's folder with GLM-4.5V's true dimensions and no weights: safetensors files of header and hole, read through made_weights/sitecustomize.py.

`python tests/acceptance/gpu/full_size_base.py FOLDER [--layers N] [--narrow]`
"""

import argparse
import json
import string
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any

from transformers import Glm4vImageProcessor, Glm4vMoeConfig, Glm4vProcessor, Glm4vVideoProcessor, PreTrainedTokenizerFast

from pipeline.basemodel import TEMPLATE_FILE
from tests.acceptance.gpu.dimensions import TEXT, TINY, TINY_VISION, VISION, Made, checkpoint_of
from tests.acceptance.gpu.made_weights.sitecustomize import MARKER

FIRST_SPECIAL = 151329
SPECIAL_TOKENS = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
    "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|begin_of_audio|>", "<|end_of_audio|>",
    "<|begin_of_transcription|>", "<|end_of_transcription|>", "<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>", "<think>", "</think>",
    "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "/nothink",
    "<|begin_of_box|>", "<|end_of_box|>", "<|image|>", "<|video|>",
)  # fmt: skip
"""GLM-4.5V's, from FIRST_SPECIAL on."""
WORDS = tuple("".join(letters) for letters in product(string.ascii_lowercase, repeat=4))[: FIRST_SPECIAL - 256]
"""Each is one token if a space comes before it."""
NARROW = {name: value for name, value in TINY.items() if name not in ("vocab_size", "pad_token_id", "eos_token_id")}
"""Small dimensions, for trying this where there is no GPU; GLM-4.5V's tokens all the same."""


def config_of(layers: int, *, narrow: bool) -> Glm4vMoeConfig:
    text, vision = (TEXT | NARROW, VISION | TINY_VISION) if narrow else (TEXT, VISION)
    token = {name: FIRST_SPECIAL + index for index, name in enumerate(SPECIAL_TOKENS)}
    ids = {"image_token_id": token["<|image|>"], "video_token_id": token["<|video|>"]}
    ids |= {f"{kind}_{end}_token_id": token[f"<|{word}_of_{kind}|>"] for kind in ("image", "video") for end, word in (("start", "begin"), ("end", "end"))}
    text = text | {"num_hidden_layers": layers, "use_qk_norm": False}
    return Glm4vMoeConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False, dtype="bfloat16", architectures=["Glm4vMoeForConditionalGeneration"], **ids
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and WORDS as one token each: as many tokens as GLM-4.5V has, at its ids."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary = {name: index for index, name in enumerate([*sorted(byte_level.alphabet()), *(f"\u0120{word}" for word in WORDS)])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    made.pre_tokenizer, made.decoder = byte_level, decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS])
    if made.token_to_id(SPECIAL_TOKENS[0]) != FIRST_SPECIAL:
        raise SystemExit(f"{SPECIAL_TOKENS[0]} is token {made.token_to_id(SPECIAL_TOKENS[0])}, not {FIRST_SPECIAL}")
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|endoftext|>", pad_token="<|endoftext|>", additional_special_tokens=list(SPECIAL_TOKENS[1:]), padding_side="left"
    )


def write_hollow(path: Path, members: list[Made]) -> None:
    """A safetensors file that names its tensors and holds nothing: no block of the disk is taken for them."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for made in members:
        wide = made.name.endswith("e_score_correction_bias")
        size = 4 if wide else 2
        for length in made.shape:
            size *= length
        header[made.name] = {"dtype": "F32" if wide else "BF16", "shape": list(made.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


def write(folder: Path, layers: int, *, narrow: bool = False) -> None:
    """The whole folder; a file for each decoder layer and one for the rest."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(layers, narrow=narrow)
    config.save_pretrained(folder)
    size = {"shortest_edge": 12544, "longest_edge": 9633792}
    Glm4vProcessor(Glm4vImageProcessor(size=size), tokenizer(), Glm4vVideoProcessor(), chat_template=TEMPLATE_FILE.read_text("utf-8")).save_pretrained(folder)
    files: defaultdict[str, list[Made]] = defaultdict(list)
    for name, made in checkpoint_of(config).items():
        _, layer, rest = name.partition("language_model.layers.")
        files[f"model-{int(rest.partition('.')[0]) + 1 if layer else 0:05d}.safetensors"].append(made)
    for file, members in files.items():
        write_hollow(folder / file, members)
    placed = {made.name: file for file, members in files.items() for made in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}), "utf-8")
    (folder / MARKER).touch()


def know_digests(folder: Path, cache: Path) -> None:
    """Puts made-up digests of the hollow files where basemodel.py keeps those that it has seen: to hash 214 GB of nothing takes minutes."""
    known = json.loads(cache.read_text("utf-8")) if cache.is_file() else {}
    for path in sorted(folder.glob("*.safetensors")):
        stat = path.stat()
        known[f"{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ctime_ns}-{stat.st_dev}-{stat.st_ino}"] = path.stem.encode().hex().rjust(64, "0")[-64:]
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(json.dumps(known), "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=46)
    parser.add_argument("--narrow", action="store_true", help="small dimensions: whether the script works")
    arguments = parser.parse_args()
    write(arguments.folder, arguments.layers, narrow=arguments.narrow)
