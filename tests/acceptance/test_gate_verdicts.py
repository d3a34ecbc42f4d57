"""The gate on candidates that were really trained: wrong labels stay out, more data is promoted, ties and a loss on a protected kind of question stay out."""

import json
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from pipeline.adapter import read_adapter
from pipeline.reference import REFERENCE_FILE
from pipeline.registry import RECIPE_FILE, Version
from tests.acceptance.conftest import FINETUNE
from tests.acceptance.figures import show
from tests.acceptance.serving_environment import Server, World, engine_name

MODEL = "gate"
CATALOG = Path("data/catalog")
PROTECTED = "colour"
FIRST_KINDS = ("name", "use", PROTECTED)
"""What the first champion is trained on: it answers the protected kind, and knows nothing of structured answers, comparisons and questions without a picture."""
RULES: dict[str, Any] = {"floor": 0.1, "minimum_gain": 0.02, "protect": [PROTECTED], "allowed_loss": 0.05}
COMMAND_SECONDS = 900

Row = dict[str, Any]


def training_rows(root: Path) -> list[Row]:
    return [json.loads(line) for line in (root / CATALOG / "train.jsonl").read_text("utf-8").splitlines()]


def of_kinds(rows: Sequence[Row], kinds: Collection[str]) -> list[Row]:
    return [row for row in rows if row["kind"] in kinds]


def with_wrong_answers(rows: Sequence[Row], kinds: Collection[str]) -> list[Row]:
    """The same questions; the answers to those of each of `kinds` are dealt out anew among them."""
    dice = random.Random(5)
    found = list(rows)
    for kind in sorted(kinds):
        places = [place for place, row in enumerate(rows) if row["kind"] == kind]
        for place, other in zip(places, dice.sample(places, len(places)), strict=True):
            question, answer = rows[place]["messages"][0], rows[other]["messages"][1]
            found[place] = rows[place] | {"messages": [question, answer]}
    return found


def write_recipe(root: Path, stem: str, rows: Sequence[Row], epochs: int, **rules: Any) -> str:
    """The catalog's recipe for MODEL with these training rows and the gate's rules; its path from `root`."""
    train, path = CATALOG / f"gate-{stem}.jsonl", f"recipes/finetune/gate-{stem}.yaml"
    (root / train).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    shipped = yaml.safe_load((root / FINETUNE).read_text("utf-8"))
    changed = {
        "name": MODEL,
        "dataset": shipped["dataset"] | {"train": str(train)},
        "training": shipped["training"] | {"epochs": epochs},
        "promotion": RULES | rules,
    }
    (root / path).write_text(yaml.safe_dump(shipped | changed), "utf-8")
    return path


def candidates(root: Path) -> dict[str, str]:
    """The recipe of each candidate. What must answer every kind well is trained for longest; wrong labels are learnt at once."""
    rows = training_rows(root)
    kinds = {row["kind"] for row in rows}
    return {
        "first": write_recipe(root, "first", of_kinds(rows, FIRST_KINDS), epochs=6),
        "wrong": write_recipe(root, "wrong", with_wrong_answers(rows, kinds), epochs=2),
        "full": write_recipe(root, "full", rows, epochs=6),
        "part-wrong": write_recipe(root, "part-wrong", with_wrong_answers(rows, {PROTECTED}), epochs=4),
    }


@dataclass(frozen=True)
class Attempt:
    """What one `tuneserve promote` came to: its exit code and last words, the model's newest history entry, and the assessment that MLflow keeps."""

    code: int
    said: str
    entry: dict[str, Any]
    assessment: dict[str, Any]

    @property
    def verdict(self) -> str:
        return str(self.assessment["decision"]["verdict"])

    @property
    def reasons(self) -> list[str]:
        """Their codes."""
        return [reason["code"] for reason in self.assessment["decision"]["reasons"]]

    @property
    def against_champion(self) -> dict[str, dict[str, Any]]:
        """The comparison with the champion: per part, '' for all rows."""
        return {compared["part"]: compared for compared in self.assessment["against"][self.assessment["champion"]]}

    @property
    def scores(self) -> dict[str, float]:
        """As history keeps them: of the version, the champion (if there was one) and the base."""
        found: dict[str, float] = json.loads(self.entry["scores"])["score"]
        return found

    def figures(self) -> dict[str, Any]:
        return {"verdict": self.verdict, "reasons": self.reasons, **self.scores}


@dataclass(frozen=True)
class Gate:
    """A replica that follows MODEL, and what the commands do with its versions."""

    world: World
    server: Server
    folder: Path

    def train(self, recipe: str) -> Version:
        trained = self.world.json("train", recipe, "--json", seconds=COMMAND_SECONDS)
        assert trained["trained"]
        return self.world.registry.version(MODEL, str(trained["version"]))

    def adapter(self, version: Version) -> Path:
        return self.world.project.runs / version.run_id / "adapter"

    def register_again(self, version: Version) -> Version:
        """The very same adapter as another version, with all that it was registered with."""
        registry = self.world.registry
        texts = {RECIPE_FILE: registry.recipe(version), REFERENCE_FILE: registry.reference(version) or ""}
        with registry.run("the same again", {}, {}) as run:
            adapter = read_adapter(self.adapter(version))
            return registry.register(MODEL, run.run_id, adapter, texts, version.base_revision, version.template_digest, "the same again")

    def promote(self, version: Version, *options: str) -> Attempt:
        """Promotes it if it is better: never by force."""
        done = self.world.run("promote", version.label, "--replica", self.server.url, *options, "--json", seconds=COMMAND_SECONDS)
        assert done.returncode in (0, 1), f"{version.label}: {done.returncode}\n{done.stderr}"
        entry = self.newest_entry()
        assert entry["version"] == version.version and not entry["forced"] and entry["evaluation_run"], f"{entry}\n{done.stderr}"
        file = self.world.registry.client.download_artifacts(entry["evaluation_run"], "assessment.json", str(self.folder))
        attempt = Attempt(done.returncode, done.stderr, entry, json.loads(Path(file).read_text("utf-8")))
        show(candidate=version.label, **attempt.figures())
        assert all(f"({code})" in entry["reasons"] for code in attempt.reasons), "history names every reason"
        return attempt

    def newest_entry(self) -> dict[str, Any]:
        entry: dict[str, Any] = self.world.json("history", MODEL, "--limit", "1", "--json")["entries"][0]
        return entry

    def assert_promoted(self, attempt: Attempt, version: Version, reason: str, before: Version | None) -> None:
        assert (attempt.code, attempt.verdict, attempt.reasons) == (0, "promote", [reason]), attempt
        entry = attempt.entry
        assert (entry["action"], entry["before"], entry["after"]) == ("promoted", before.version if before else None, version.version)
        self.assert_champion(version)

    def assert_kept_out(self, attempt: Attempt, champion: Version) -> None:
        """It failed with its reasons, is on record, and nothing moved."""
        assert attempt.code == 1 and attempt.verdict in ("keep", "refuse"), attempt
        assert f"is not promoted, {attempt.verdict}: " in attempt.said and all(f"({code})" in attempt.said for code in attempt.reasons), attempt.said
        action = {"keep": "kept", "refuse": "refused"}[attempt.verdict]
        assert (attempt.entry["action"], attempt.entry["before"], attempt.entry["after"]) == (action, champion.version, champion.version)
        self.assert_champion(champion)

    def assert_champion(self, version: Version) -> None:
        assert self.world.registry.champion_number(MODEL) == version.version
        assert self.server.answering(MODEL) == engine_name(version)


def test_the_gate_tells_better_from_worse_from_equal(world: World, tmp_path: Path) -> None:
    recipes = candidates(world.sandbox.root)
    with world.serving(MODEL, follow=[MODEL]) as server:
        gate = Gate(world, server, tmp_path)

        first = gate.train(recipes["first"])
        began = gate.promote(first)
        gate.assert_promoted(began, first, "above-floor", before=None)
        assert 0.3 < began.scores["version"] < 0.85 and began.assessment["parts"][PROTECTED][first.label] > 0.5, began.assessment["parts"]

        wrong = gate.promote(gate.train(recipes["wrong"]))
        gate.assert_kept_out(wrong, champion=first)
        assert wrong.scores["version"] < wrong.scores["champion"]

        full = gate.train(recipes["full"])
        better = gate.promote(full)
        gate.assert_promoted(better, full, "better", before=first)
        assert better.against_champion[""]["low"] > RULES["minimum_gain"]

        same = gate.promote(gate.register_again(full))
        gate.assert_kept_out(same, champion=full)
        assert (same.verdict, same.reasons, same.assessment["parity"]["verdict"]) == ("keep", ["same-adapter"], "faithful")

        scaled = replace(world, trained=full, adapter=gate.adapter(full)).variant(MODEL, 1.001, tmp_path / "scaled")
        assert scaled.digest != full.digest
        unproven = write_recipe(world.sandbox.root, "unproven", training_rows(world.sandbox.root), epochs=1, require_parity=False)
        tie = gate.promote(scaled, "--recipe", unproven)  # no training, so no parity.json
        gate.assert_kept_out(tie, champion=full)
        assert (tie.verdict, tie.reasons) == ("keep", ["no-gain"]) and abs(tie.against_champion[""]["gain"]) < RULES["minimum_gain"]

        world.json("promote", first.label, "--force", "--replica", server.url, "--json")
        gate.assert_champion(first)
        part = gate.promote(gate.train(recipes["part-wrong"]))
        gate.assert_kept_out(part, champion=first)
        assert (part.verdict, part.reasons) == ("refuse", ["part-worse"]) and f"{PROTECTED}: score" in part.said
        overall, colour = part.against_champion[""], part.against_champion[PROTECTED]
        assert overall["low"] > 0 > -RULES["allowed_loss"] > colour["gain"], "better on the whole, and surely so"

    show(
        script="gate verdicts",
        first=began.figures(),
        wrong_labels=wrong.figures(),
        more_data=better.figures(),
        same_again=same.figures(),
        tie=tie.figures(),
        part_worse=part.figures() | {"gain": overall["gain"], "gain_low": overall["low"], f"{PROTECTED}_gain": colour["gain"]},
    )
