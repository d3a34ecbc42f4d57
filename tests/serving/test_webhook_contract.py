"""MLflow's real webhook delivery against our check: what it sends is what we accept."""

import pytest

from pipeline.serving.hint import HintCheck

pytestmark = pytest.mark.contract


def test_mlflow_signs_and_sends_what_we_check():
    from mlflow.entities.webhook import Webhook, WebhookAction, WebhookEntity, WebhookEvent, WebhookStatus
    from mlflow.webhooks import delivery

    sent = {}

    class Session:
        def post(self, url, data, headers, timeout):
            sent.update(headers=headers, body=data)

    event = WebhookEvent(WebhookEntity.MODEL_VERSION_ALIAS, WebhookAction.CREATED)
    webhook = Webhook("1", "w", "https://example.com/adapters/sync", [event], 0, 0, None, WebhookStatus.ACTIVE, "sesame")
    checked, delivery._validate_webhook_url = delivery._validate_webhook_url, lambda url: None  # it would look the name up
    try:
        delivery._send_webhook_request(webhook, {"name": "catalog", "alias": "champion", "version": "3"}, event, Session())
    finally:
        delivery._validate_webhook_url = checked
    assert HintCheck("sesame").fault(sent["headers"], sent["body"]) is None
    assert b'"name": "catalog"' in sent["body"]
