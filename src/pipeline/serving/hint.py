"""Signed hints to look at the registry now, in the format of MLflow's webhooks, so that MLflow itself may send them too.

Signature: base64 of HMAC-SHA256 over `delivery id . unix time . body`, after "v1," (mlflow.webhooks.delivery, MLflow 3.17).
"""

import base64
import hashlib
import hmac
import json
import re
import time
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime

ID_HEADER, TIME_HEADER, SIGNATURE_HEADER = "X-MLflow-Delivery-Id", "X-MLflow-Timestamp", "X-MLflow-Signature"
MAX_AGE_SECONDS = 300.0
"""How far a hint's time may be from ours; its delivery id is remembered twice as long."""
MAX_BODY_BYTES = 65536
MAX_ID_CHARACTERS = 128


def signature(secret: str, delivery_id: str, timestamp: str, body: bytes) -> str:
    signed = f"{delivery_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(secret.encode(), signed, hashlib.sha256).digest()).decode()


def new_hint(secret: str, name: str, alias: str, version: str) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a hint that says: `alias` of the registered model `name` points to `version` now."""
    event = {
        "entity": "model_version_alias",
        "action": "created",
        "timestamp": datetime.now(UTC).isoformat(),
        "data": {"name": name, "alias": alias, "version": version},
    }
    body, delivery_id, timestamp = json.dumps(event).encode(), str(uuid.uuid4()), str(int(time.time()))
    headers = {ID_HEADER: delivery_id, TIME_HEADER: timestamp, SIGNATURE_HEADER: signature(secret, delivery_id, timestamp, body)}
    return body, {"Content-Type": "application/json", **headers}


class HintCheck:
    """Tells genuine hints from forged, stale and repeated ones. What the body says is not needed: a hint only means "look now"."""

    def __init__(self, secret: str) -> None:
        self._secret = secret
        self._seen: dict[str, float] = {}
        """Delivery ids of genuine hints by arrival, oldest first; only whoever has the secret can make it grow."""

    def fault(self, headers: Mapping[str, str], body: bytes, now: float | None = None) -> str | None:
        """Why the hint is not to be followed, or None. `now`: unix time in seconds. A genuine one is remembered, so that it passes once."""
        now = time.time() if now is None else now
        delivery_id, timestamp, signed = (headers.get(name, "") for name in (ID_HEADER, TIME_HEADER, SIGNATURE_HEADER))
        if not hmac.compare_digest(signed.encode("utf-8", "replace"), signature(self._secret, delivery_id, timestamp, body).encode()):
            return f"{SIGNATURE_HEADER}: not signed with this replica's token"
        if not re.fullmatch(r"[0-9]{1,12}", timestamp) or abs(now - int(timestamp)) > MAX_AGE_SECONDS:
            return f"{TIME_HEADER}: over {MAX_AGE_SECONDS:.0f} s from this replica's clock; sign anew, and compare the clocks"
        if not 0 < len(delivery_id) <= MAX_ID_CHARACTERS:
            return f"{ID_HEADER}: must be 1 to {MAX_ID_CHARACTERS} characters"
        while self._seen and now - next(iter(self._seen.values())) > 2 * MAX_AGE_SECONDS:
            del self._seen[next(iter(self._seen))]
        if delivery_id in self._seen:
            return f"{ID_HEADER}: this hint was delivered before"
        self._seen[delivery_id] = now
        return None
