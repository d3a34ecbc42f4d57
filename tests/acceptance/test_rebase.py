"""Two live models move to a new base as one batch, with real servers: the old fleet answers throughout, the new one takes over, and the way back is open."""

import json
import shutil

from pipeline.basemodel import tiny_name
from tests.acceptance.serving_environment import World
from tests.acceptance.small_retraining import write_recipe, write_rows

MODELS = ("moves-one", "moves-two")
NEW_BASE = "new-base"


def test_two_models_move_to_a_new_base_while_the_old_fleet_serves(world: World) -> None:
    root = world.sandbox.root
    recipes = [write_recipe(root, name) for name in MODELS]
    for number, name in enumerate(MODELS):
        write_rows(root, name, number)
    shutil.copytree(world.project.bases / tiny_name(), root / NEW_BASE)
    config = root / NEW_BASE / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | {"release": 2}), "utf-8")  # the same weights, another revision
    with world.serving("rebase-old", follow=list(MODELS)) as old:
        for path in recipes:
            assert world.json("retrain", path, "--replica", old.url, "--json", seconds=600)["promoted"]
        listed = {each["name"]: each for each in world.json("rebase", "--to", NEW_BASE, "--json")["champions"]}
        assert [(listed[name]["need"], listed[name]["recipes"]) for name in MODELS] == [("re-train", [path]) for path in recipes]
        for path in recipes:
            text = (root / path).read_text("utf-8")
            (root / path).write_text(text.replace("base_model: tiny", f"base_model: {NEW_BASE}"), "utf-8")
        with world.serving("rebase-new", follow=list(MODELS), base_model=NEW_BASE) as new:
            assert [new.model(name)["live"] for name in MODELS] == [None, None]
            for args, said in ((recipes, old.url), "is a replica of the old base"), ((recipes[:1], new.url), "follows moves-two too"):
                done = world.run("rebase", *args[0], "--replica", args[1], "--json")
                assert done.returncode == 1 and said in done.stdout, done.stdout + done.stderr
            done = world.json("rebase", *recipes, "--replica", new.url, "--json", seconds=900)
            print(json.dumps(done, indent=2))
            assert done["moved"] == [f"{name}/2" for name in MODELS] and all(each["trained"] for each in done["batch"])
            for name in MODELS:
                assert old.answering(name).startswith(f"{name}/1@") and new.answering(name).startswith(f"{name}/2@")
                newest = world.json("history", name, "--json")["entries"][0]
                assert (newest["action"], newest["before"], newest["after"]) == ("promoted", "1", "2") and "as-good" in newest["reasons"]
            again = world.json("rebase", *recipes, "--replica", new.url, "--json")
            assert again["moved"] == [] and [each["need"] for each in again["batch"]] == ["nothing", "nothing"]
            back = world.json("rollback", MODELS[0], "--replica", old.url, "--json")
            assert back["version"] == 1 and old.answering(MODELS[0]).startswith("moves-one/1@") and new.answering(MODELS[0]).startswith("moves-one/2@")
