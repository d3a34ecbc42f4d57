"""A tiny GLM-4.5V: the true architecture, tokens and chat format at a few million parameters, taught on CPU to name what it sees."""

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pipeline.errors import TuneserveError
from pipeline.pictures import COLOURS, SHAPES, Part, draw, placements
from pipeline.progress import Report

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import Glm4vMoeConfig, Glm4vMoeForConditionalGeneration, Glm4vMoeTextConfig, Glm4vProcessor, PreTrainedTokenizerFast

    Batch = dict[str, torch.Tensor]

QUESTION = "What is in the picture?"
IMAGE_TOKENS = 4
"""Image tokens of one 56x56 picture."""
STEPS = 700
BATCH_SIZE = 32
LEARNING_RATE = 1.2e-3
ENOUGH = 0.95
"""Exact match on held-out pictures below which the model is not fit for use."""
REPORT_SECONDS = 0.5
END_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>")
SPECIAL_TOKENS = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
    "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|image|>", "<|video|>", "<think>", "</think>", "/nothink",
)  # fmt: skip
"""GLM-4.5V's special tokens that its prompts use, in the order of their ids there."""
WORD_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How GLM-4's tokenizer cuts text before byte-pair merges."""
INITIALIZER_RANGE = 0.06
"""With the usual 0.02 so small a model does not learn to look at the picture."""
VOCABULARY = 1024
CORPUS = (
    "What is in the picture? What product is this? What is it for? What colour is it? What shape is it? Which one is bigger?",
    "Are these two pictures of the same product? Compare the two images. Answer in JSON. Describe the product in one sentence.",
    "Do they have the same colour? Do they have the same shape? What is in the first picture? What is in the second picture?",
    "Say yes or no. The first one. The second one. Both are the same. They are different. What do you sell? Who are you? Thank you. Hello!",
    "You are a shop assistant. You answer questions about the products of our catalog, in short and plain words.",
    "bag box tote watch tent lamp mug chair clock bowl scarf shirt shoe hat coat belt ring table desk bottle cup plate knife pan towel",
    "Rubio Verda Azul Sol Noir Blanc brand model product price size colour shape material style catalog order item stock new sale",
    "for carrying your shopping home, for telling the time, for sleeping outdoors, for reading at night, for hot drinks, for every day",
    "scarlet crimson moss olive navy teal amber gold ink coal snow ivory market beach office travel forest festival kitchen garden school party",
    "What do you call it? When do you need it? Who sells it? Which brand is it? What occasions is it for? What do you do with it?",
    "Compare the two products. Which colour does it have? They have the same brand, and another kind. same brand: yes, same kind: no",
    '{"product": "Rubio tote", "brand": "Rubio", "colour": "red", "shape": "square", "use": "carrying"}',
    '{"name": "Noir watch", "price": 120, "in_stock": true, "sizes": [1, 2, 3], "note": null, "same": false}',
    '{"kind": "tent", "brand": "Verda", "colour": "green"}, {"kind": "watch", "brand": "Azul", "colour": "blue"}',
    '{"colour": "olive", "occasions": ["party", "school"]}, {"brand": "Verda", "occasions": ["kitchen", "garden"]}',
)
"""What the tokenizer's merges are learnt from, beside the names of the pictures; any other text costs a token a byte at worst."""
CORPUS_WORDS = tuple(sorted({word for line in CORPUS for word in line.split()}))


def picture_name(colour: str, shape: str) -> str:
    return f"a {colour} {shape}"


def make_tokenizer() -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer of at most VOCABULARY tokens with GLM's special tokens; it encodes any text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORD_SPLIT), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    names = [picture_name(colour, shape) for colour in COLOURS for shape in SHAPES]
    words = sorted({word for line in CORPUS for word in line.split() if word.isalpha()})
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*names * 4, *CORPUS * 4, *words, *(" " + word for word in words)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        model_max_length=8192,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_processor(chat_template: str) -> "Glm4vProcessor":
    """GLM-4.5V's processor around the tiny tokenizer; pictures of 56x56 pixels pass unchanged, larger ones up to 224x224."""
    from transformers import Glm4vImageProcessor, Glm4vProcessor, Glm4vVideoProcessor

    size = {"shortest_edge": 56 * 56, "longest_edge": 4 * 112 * 112}
    return Glm4vProcessor(Glm4vImageProcessor(size=size), make_tokenizer(), Glm4vVideoProcessor(), chat_template=chat_template)


def make_config(tokenizer: "PreTrainedTokenizerFast") -> "Glm4vMoeConfig":
    """GLM-4.5V's architecture at about 3 million parameters: one dense and three MoE layers with a shared expert, M-RoPE, vision tower and merger."""
    from transformers import Glm4vMoeConfig

    token = tokenizer.get_vocab()
    end_ids = [token[name] for name in END_TOKENS]
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "moe_intermediate_size": 64,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "use_qk_norm": False,  # transformers does not know the key; vLLM reads it from config.json
        "initializer_range": INITIALIZER_RANGE,
        "eos_token_id": end_ids,
        "pad_token_id": token["<|endoftext|>"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6], "partial_rotary_factor": 0.5},
    }
    vision = {
        "depth": 2,
        "hidden_size": 128,
        "num_heads": 2,
        "intermediate_size": 512,
        "out_hidden_size": 128,
        "image_size": 112,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "initializer_range": INITIALIZER_RANGE,
    }
    whole = {
        "text_config": text,
        "vision_config": vision,
        "image_token_id": token["<|image|>"],
        "video_token_id": token["<|video|>"],
        "image_start_token_id": token["<|begin_of_image|>"],
        "image_end_token_id": token["<|end_of_image|>"],
        "video_start_token_id": token["<|begin_of_video|>"],
        "video_end_token_id": token["<|end_of_video|>"],
        "initializer_range": INITIALIZER_RANGE,
    }
    return Glm4vMoeConfig(**whole)


def make_model(config: "Glm4vMoeConfig", seed: int = 0) -> "Glm4vMoeForConditionalGeneration":
    """An untrained model in float32; equal seeds give equal weights."""
    import torch
    from transformers import GenerationConfig, Glm4vMoeForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Glm4vMoeForConditionalGeneration = Glm4vMoeForConditionalGeneration(config).float()
    text = cast("Glm4vMoeTextConfig", config.text_config)
    model.generation_config = GenerationConfig(eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id)
    return model


def save(model: "Glm4vMoeForConditionalGeneration", processor: "Glm4vProcessor", folder: Path) -> None:
    """Write both into `folder` as a base model: bfloat16 safetensors, configurations, tokenizer and chat template."""
    import torch

    model.to(dtype=torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)


@dataclass(frozen=True)
class Lesson:
    """A question about pictures (or none) and the answer to learn."""

    images: "tuple[Image, ...]"
    question: str
    answer: str


@dataclass(frozen=True)
class Dice:
    """Draws lessons at random; only pictures of `part` are shown."""

    part: Part
    random: random.Random

    def lessons(self, count: int) -> list[Lesson]:
        """A batch: mostly single pictures, with some words to repeat; every eighth batch two pictures each."""
        if self.random.random() < 1 / 8:
            return [self.two_pictures() for _ in range(count * 2 // 3)]
        return [self.repeat() if self.random.random() < 0.2 else self.one_picture() for _ in range(count)]

    def picture(self) -> "tuple[Image, str, str]":
        colour, shape = self.random.choice(list(COLOURS)), self.random.choice(SHAPES)
        return draw(colour, shape, self.random.choice(placements(self.part))), colour, shape

    def one_picture(self) -> Lesson:
        """Asks for colour or shape alone now and then, so that the model keeps the two apart and heeds the question."""
        image, colour, shape = self.picture()
        questions = ((QUESTION, picture_name(colour, shape), 0.65), ("What colour is it?", colour, 0.175), ("What shape is it?", f"a {shape}", 0.175))
        question, answer, _ = self.random.choices(questions, [weight for *_, weight in questions])[0]
        return Lesson((image,), question, answer)

    def two_pictures(self) -> Lesson:
        (one, *first), (two, *second) = self.picture(), self.picture()
        return Lesson((one, two), "What is in the two pictures?", f"{picture_name(*first)} and {picture_name(*second)}")

    def repeat(self) -> Lesson:
        """Words to say again: it brings every token into use, without which an adapter learns new answers many times slower."""
        words = " ".join(self.random.choice(CORPUS_WORDS) for _ in range(self.random.randint(1, 3)))
        return Lesson((), f"Say: {words}", words)


@dataclass(frozen=True)
class Encoder:
    """Turns lessons into what the model trains on; only the answers and the token that ends them carry labels."""

    processor: "Glm4vProcessor"

    @cached_property
    def end_id(self) -> int:
        return int(self.processor.tokenizer.convert_tokens_to_ids("<|user|>"))

    def prompt(self, lesson: Lesson) -> list[int]:
        message: dict[str, Any] = {"role": "user", "content": [{"type": "image"} for _ in lesson.images] + [{"type": "text", "text": lesson.question}]}
        text = self.processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        return list(self.processor.tokenizer(text.replace("<|image|>", "<|image|>" * IMAGE_TOKENS))["input_ids"])

    def batch(self, lessons: Sequence[Lesson]) -> "Batch":
        import torch
        from torch.nn.utils.rnn import pad_sequence

        prompts = [self.prompt(lesson) for lesson in lessons]
        answers = [[*self.processor.tokenizer(lesson.answer)["input_ids"], self.end_id] for lesson in lessons]
        rows = [torch.tensor(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)]
        labels = [torch.tensor([-100] * len(prompt) + answer) for prompt, answer in zip(prompts, answers, strict=True)]
        input_ids = pad_sequence(rows, batch_first=True, padding_value=self.processor.tokenizer.pad_token_id)
        batch = {
            "input_ids": input_ids,
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
            "mm_token_type_ids": (input_ids == self.processor.image_token_id).long(),
        }
        if images := [image for lesson in lessons for image in lesson.images]:
            batch |= self.processor.image_processor(images, return_tensors="pt")
        return batch


def exact_match(model: "Glm4vMoeForConditionalGeneration", batch: "Batch") -> float:
    """The share of answers that greedy decoding would give whole: those of which every token is the likeliest after the ones before it."""
    import torch

    with torch.no_grad():
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    labels = batch["labels"][:, 1:]
    right = (logits[:, :-1].argmax(-1) == labels) | (labels == -100)
    return float(right.all(1).float().mean())


def held_out(count_per_pair: int = 12) -> list[Lesson]:
    """Every colour and shape at placements that no lesson shows, with the question that the model must answer."""
    dice = random.Random(5)
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES for _ in range(count_per_pair)]
    return [Lesson((draw(colour, shape, dice.choice(placements("base-eval"))),), QUESTION, picture_name(colour, shape)) for colour, shape in pairs]


def teach(model: "Glm4vMoeForConditionalGeneration", encoder: Encoder, steps: int, report: Report) -> None:
    """Train all weights in float32 on fresh lessons; equal seeds give equal weights on one machine."""
    import torch

    dice = Dice("base-train", random.Random(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    model.train()
    told = time.monotonic()
    for step in range(1, steps + 1):
        loss = model(**encoder.batch(dice.lessons(BATCH_SIZE))).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if time.monotonic() - told >= REPORT_SECONDS or step == steps:
            told = time.monotonic()
            report(f"step {step} of {steps}, loss {loss.item():.3f}", step / steps)
    model.eval()


def make_tiny(folder: Path, chat_template: str, measured_file: str, report: Report) -> None:
    """Make the tiny GLM-4.5V in `folder` (minutes on one core) and write what it scored into `measured_file` there.

    Raises TuneserveError if it names less than ENOUGH of the held-out pictures as they are.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more threads than idle cores make so small a model many times slower
    try:
        encoder = Encoder(make_processor(chat_template))
        model = make_model(make_config(encoder.processor.tokenizer))
        teach(model, encoder, STEPS, report)
        model.to(dtype=torch.bfloat16).float()  # judged with the precision that is saved
        lessons = held_out()
        score = exact_match(model, encoder.batch(lessons))
    finally:
        torch.set_num_threads(threads)
    if score < ENOUGH:
        raise TuneserveError(f"the tiny GLM-4.5V names {score:.1%} of {len(lessons)} held-out pictures, {ENOUGH:.0%} are needed; run again, or report a bug")
    save(model, encoder.processor, folder)
    measured = {"exact_match": score, "held_out": len(lessons), "steps": STEPS, "question": QUESTION}
    (folder / measured_file).write_text(json.dumps(measured, indent=2) + "\n", "utf-8")
