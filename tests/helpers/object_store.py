"""A server on this machine that speaks S3, for tests of object storage."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock


@contextmanager
def s3_server() -> Iterator[str]:
    """The URL of an empty bucket; the environment leads to it and is as before at the end."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line for every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        with mock.patch.dict(os.environ, settings):
            import fsspec

            fsspec.filesystem("s3", skip_instance_cache=True).mkdir("sft-dist")
            yield "s3://sft-dist"
    finally:
        server.stop()
