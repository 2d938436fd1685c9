"""What looks like a secret leaves no process."""

from __future__ import annotations

import pytest

from sft_dist.config.secrets import HIDDEN, without_secrets


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_TOKEN", "abc"), ("WANDB_API_KEY", "abc"), ("AWS_SECRET_ACCESS_KEY", "x"), ("password", "x"),
        ("db-password", "x"), ("apikey", "x"), ("GOOGLE_APPLICATION_CREDENTIALS", "/home/x/key.json"),
        ("x", "hf_" + "A1" * 17), ("x", "sk-" + "a" * 40), ("x", "AKIA" + "A" * 16), ("x", "ghp_" + "a" * 36),
        ("x", "github_pat_" + "a1_" * 20), ("x", "xoxb-123456789012-abcdef"), ("x", "ASIA" + "A" * 16),
        ("x", "wandb_v1_" + "a" * 30), ("private_key", "x"), ("passwd", "x"), ("DB_PWD", "x"), ("passphrase", "x"),
    ],
)  # fmt: skip
def test_it_is_hidden_wherever_it_stands(name: str, value: str) -> None:
    assert without_secrets({"a": [{name: value}]}) == {"a": [{name: HIDDEN}]}
    assert without_secrets(({name: (value,)},)) == [{name: [HIDDEN]}]


def test_of_a_url_the_password_alone_is_hidden() -> None:
    assert without_secrets({"mirror": "https://me:pass@host/x"}) == {"mirror": f"https://{HIDDEN}@host/x"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train_tokens", ["<|a|>"]), ("max_tokens", 3), ("add_tokens", ["token"]), ("tokenizer", "x"), ("path", "a/b"),
        ("mirror", "s3://bucket/runs"), ("password", ""), ("token", None), ("key", "optim.lr"), ("url", "http://h:80/x"),
    ],
)  # fmt: skip
def test_what_is_none_stays(name: str, value: object) -> None:
    assert without_secrets({name: value}) == {name: value}
