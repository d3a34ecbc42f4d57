"""Signed hints; RECORDED is a delivery as MLflow 3.17's webhooks made it, with secret `sesame`."""

import json

import pytest

from pipeline.serving.hint import ID_HEADER, MAX_AGE_SECONDS, SIGNATURE_HEADER, TIME_HEADER, HintCheck, new_hint, signature

RECORDED_BODY = (
    b'{"entity": "model_version_alias", "action": "created", "timestamp": "2026-11-25T01:57:51.000000+00:00", '
    b'"data": {"name": "catalog", "alias": "champion", "version": "3"}}'
)
RECORDED_AT = 1795571871
RECORDED_SIGNATURE = "v1,yaa6GDzxvzCx0neb73XGQsCQVWefljub9mxWHV8RXxA="


@pytest.fixture
def sent():
    return new_hint("sesame", "catalog", "champion", "3")


def test_a_genuine_hint_passes_once(sent):
    body, headers = sent
    check = HintCheck("sesame")
    assert json.loads(body)["data"] == {"name": "catalog", "alias": "champion", "version": "3"}
    assert check.fault(headers, body) is None
    assert "delivered before" in check.fault(headers, body)


@pytest.mark.parametrize("missing", [ID_HEADER, TIME_HEADER, SIGNATURE_HEADER])
def test_every_header_is_signed_for(sent, missing):
    body, headers = sent
    assert HintCheck("sesame").fault({key: value for key, value in headers.items() if key != missing}, body)


def test_forgeries(sent):
    body, headers = sent
    check = HintCheck("sesame")
    assert HintCheck("other").fault(headers, body)
    for changed in (body + b" ", body[:-1], b""):
        assert "not signed" in check.fault(headers, changed)
    for header, value in ((ID_HEADER, "x"), (TIME_HEADER, str(int(headers[TIME_HEADER]) + 1)), (SIGNATURE_HEADER, "v1,\xe9"), (SIGNATURE_HEADER, "")):
        assert "not signed" in check.fault(headers | {header: value}, body)
    assert check.fault(headers, body) is None  # none of them used it up


@pytest.mark.parametrize("timestamp", ["0", "-5", "", "soon", "1e9", "٣", str(10**400)])
def test_a_time_that_is_not_now_is_refused_though_signed(timestamp):
    headers = {ID_HEADER: "1", TIME_HEADER: timestamp, SIGNATURE_HEADER: signature("sesame", "1", timestamp, b"{}")}
    assert "clock" in HintCheck("sesame").fault(headers, b"{}")


def test_a_delivery_is_remembered_as_long_as_its_time_is_good():
    check = HintCheck("sesame")
    for early_or_late in (-MAX_AGE_SECONDS, MAX_AGE_SECONDS):
        timestamp = str(int(1e9 + early_or_late))
        headers = {ID_HEADER: timestamp, TIME_HEADER: timestamp, SIGNATURE_HEADER: signature("sesame", timestamp, timestamp, b"")}
        assert check.fault(headers, b"", now=1e9) is None
        assert all(check.fault(headers, b"", now=1e9 + later) for later in range(0, 2000, 50))
    assert len(check._seen) <= 2


def test_mlflows_own_delivery_passes():
    headers = {"X-MLflow-Delivery-Id": "5c1a6a1e-3b0c-4e52-9a68-2f6c3a5c9d10", "X-MLflow-Timestamp": str(RECORDED_AT), "X-MLflow-Signature": RECORDED_SIGNATURE}
    assert HintCheck("sesame").fault(headers, RECORDED_BODY, now=RECORDED_AT + 2.0) is None
    assert HintCheck("sesam").fault(headers, RECORDED_BODY, now=RECORDED_AT + 2.0)
