"""Closed doors: /adapters without the token, fuzzed model names, forged hints: the server stays healthy and nothing is loaded."""

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import httpx

from pipeline.serving.hint import ID_HEADER, MAX_AGE_SECONDS, SIGNATURE_HEADER, TIME_HEADER, new_hint, signature
from tests.acceptance.figures import show
from tests.acceptance.load import CHAT, ask_all, post_all
from tests.acceptance.serving_environment import BASE, TEXT, Server, World, engine_name, wait_until

FUZZED = 2_000
SYNC = "/adapters/sync"
ROUTES = (("GET", "/adapters"), ("GET", "/adapters/ready"), ("POST", SYNC))
Hint = tuple[bytes, Mapping[str, str]]


def unauthorised(world: World, server: Server) -> dict[str, int]:
    """The status of every /adapters route that the server has, for every wrong way to show the token."""
    token = world.token
    wrong = {
        "nothing": {},
        "empty": {"Authorization": ""},
        "no token": {"Authorization": "Bearer"},
        "another token": {"Authorization": f"Bearer {'x' * len(token)}"},
        "a part": {"Authorization": f"Bearer {token[:-1]}"},
        "more": {"Authorization": f"Bearer {token}x"},
        "bare": {"Authorization": token},
        "basic": {"Authorization": f"Basic {token}"},
        "long": {"Authorization": "Bearer " + "x" * 16_000},
        "another header": {"X-Authorization": f"Bearer {token}"},
        "not ASCII": {"Authorization": "Bearer \xff\xfe".encode("latin-1")},
    }
    served = server.http.get("/openapi.json").json().get("paths", {})
    routes = {*ROUTES, *((method.upper(), path) for path, methods in served.items() if path.startswith("/adapters") for method in methods)}
    found = {}
    for method, path in sorted(routes):
        for way, headers in wrong.items():
            found[f"{method} {path}, {way}"] = server.http.request(method, path, headers=headers).status_code
    found["POST /adapters/sync, the token but no signature"] = server.http.post(SYNC, headers={"Authorization": f"Bearer {token}"}).status_code
    return found


def fuzzed_name(dice: random.Random, known: list[str]) -> str:
    """A name that nobody serves."""
    letters = [chr(dice.choice((dice.randrange(0x20, 0x7F), dice.randrange(0xA0, 0xD800), dice.randrange(0x1F300, 0x1F600)))) for _ in range(20)]
    control = [chr(dice.randrange(0, 0x20)) for _ in range(5)]
    name = dice.choice(known)
    makers: tuple[Callable[[], str], ...] = (
        lambda: "".join(dice.sample(letters, dice.randrange(1, 20))),
        lambda: "".join(dice.sample(letters + control, 12)),
        lambda: "../" * dice.randrange(1, 9) + dice.choice(("etc/passwd", name, "")),
        lambda: "%2e%2e%2f" * dice.randrange(1, 9) + name,
        lambda: dice.choice(letters) * dice.choice((300, 5_000, 100_000)),
        lambda: name + dice.choice(("/", "//", "/..", "/0", "/-1", "/1e3", "/99999999999999999999", " ", "\t", "\x00", "@", ":latest", ".json", "%00")),
        lambda: dice.choice((" ", "\u200b", "\ufeff", "/", "./", "\x00")) + name,
        lambda: f"{name}/{dice.randrange(1, 9)}@{dice.randbytes(4).hex()}",
        lambda: name.swapcase() + dice.choice(("", "!")),
        lambda: dice.choice(("image", "video", "audio", "text", "/", ".", "..", "lora", "default", "null", "None", "[]", "{}", "0", "true")),
        lambda: f"{dice.choice(('file', 'http', 's3', 'runs', 'models'))}:/{'/' * dice.randrange(3)}{name}",
        lambda: str([name, name]),
    )
    return dice.choice(makers)()


def forged(dice: random.Random, token: str, genuine: Hint) -> Hint:
    """A hint that must not be followed."""
    body, headers = new_hint(token, "catalog", "champion", str(dice.randrange(1, 9)))
    now = int(time.time())

    def signed(body: bytes, timestamp: str, secret: str = token) -> Hint:
        return body, headers | {TIME_HEADER: timestamp, SIGNATURE_HEADER: signature(secret, headers[ID_HEADER], timestamp, body)}

    def without(name: str) -> Hint:
        return body, {key: value for key, value in headers.items() if key != name}

    stale = int(MAX_AGE_SECONDS) + dice.randrange(30, 100_000)
    huge = json.dumps({"data": {"name": "catalog", "padding": "x" * dice.randrange(100_000, 1_000_000)}}).encode()
    makers: tuple[Callable[[], Hint], ...] = (
        lambda: signed(body, str(now), secret=dice.randbytes(16).hex()),
        lambda: signed(body, str(now), secret=""),
        lambda: signed(body, str(now - stale)),
        lambda: signed(body, str(now + stale)),
        lambda: signed(body, dice.choice(("", "now", "-1", "1e9", "nan", "9" * 400, f"{now}.0", f"{now} 1"))),
        lambda: genuine,
        lambda: (body[: dice.randrange(len(body))], headers),
        lambda: (body + b" ", headers),
        lambda: (body.replace(b"catalog", b"cata10g"), headers),
        lambda: signed(huge, str(now)),
        lambda: without(dice.choice((ID_HEADER, TIME_HEADER, SIGNATURE_HEADER))),
        lambda: (body, headers | {SIGNATURE_HEADER: headers[SIGNATURE_HEADER].removeprefix("v1,")}),
        lambda: (body, headers | {SIGNATURE_HEADER: dice.choice(("", "v1,", "v2," + headers[SIGNATURE_HEADER], "v1,====", "v1," + "A" * 5_000))}),
        lambda: (body, headers | {ID_HEADER: dice.choice(("", "x" * 5_000, "another"))}),
        lambda: (dice.randbytes(dice.randrange(2_000)), {}),
    )
    return dice.choice(makers)()


def held(server: Server) -> dict[str, Any]:
    """What is loaded, named, followed and kept, apart from what moves by itself."""
    status = server.adapters()
    names = sorted(model["id"] for model in server.http.get("/v1/models").json()["data"])
    versions = {name: [each["engine_name"] for each in model["versions"]] for name, model in status["models"].items()}
    return {"resident": status["slots"]["resident"], "versions": versions, "names": names, "cache": status["cache"]["folders"], "disk": on_disk(server)}


def on_disk(server: Server) -> list[str]:
    return sorted(path.name for path in server.folder("").iterdir())


def test_closed_doors(world: World) -> None:
    dice = random.Random(7)
    with world.serving("doors", follow=["catalog"], forget_after_seconds=1) as server:
        server.promote(world.trained)
        wait_until(lambda: server.adapters()["slots"]["forgetting"] == 0, 20, "nothing to forget")
        before = held(server)
        doors = unauthorised(world, server)
        known = [BASE, "catalog", world.trained.label]
        names = [engine_name(world.trained)]
        while len(names) < FUZZED:
            names += {fuzzed_name(dice, known)} - {*names, *before["names"]}
        asked = ask_all(server.url, [({"model": name, "messages": TEXT, "max_tokens": 1}, {}) for name in names])
        halves = ask_all(server.url, [({"model": f"catalog{chr(dice.randrange(0xD800, 0xE000))}", "messages": TEXT, "max_tokens": 1}, {}) for _ in range(50)])
        strange = [({"model": value, "messages": TEXT, "max_tokens": 1}, {}) for value in (1, True, ["catalog"], {"a": 1})]
        strangers = post_all(server.url, CHAT, [(json.dumps(body).encode(), {"Content-Type": "application/json"}) for body, _ in strange])
        genuine = new_hint(world.token, "catalog", "champion", world.trained.version)
        followed = post_all(server.url, SYNC, [genuine])
        hints = post_all(server.url, SYNC, [forged(dice, world.token, genuine) for _ in range(FUZZED)])
        still = held(server)
        alive = server.alive() and server.answering("catalog") == engine_name(world.trained)
    of_names, of_hints = Counter(answer.status for answer in asked), Counter(hints)
    show(
        doors=len(doors),
        opened=[door for door, status in doors.items() if status != httpx.codes.UNAUTHORIZED],
        names=len(asked),
        of_names=dict(of_names),
        of_half_characters=dict(Counter(answer.status for answer in halves)),
        of_other_types=dict(Counter(strangers)),
        hints=len(hints),
        of_hints=dict(of_hints),
        genuine=followed,
    )
    assert set(doors.values()) == {httpx.codes.UNAUTHORIZED}
    assert len(asked) == len(hints) == FUZZED
    assert all(400 <= status < 500 for status in (*of_names, *strangers)), of_names
    assert followed == [httpx.codes.OK]
    assert set(of_hints) <= {httpx.codes.UNAUTHORIZED, httpx.codes.REQUEST_ENTITY_TOO_LARGE}
    assert still == before
    assert alive
