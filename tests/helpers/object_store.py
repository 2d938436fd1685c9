"""A server on this machine that speaks S3, for tests of object storage."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

# What leads to the server.
VARIABLES = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")


@contextmanager
def s3_server() -> Iterator[str]:
    """The URL of an empty bucket; the environment leads to it and is as before at the end."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line for every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = dict(zip(VARIABLES, (f"http://{host}:{port}", "test", "test", "us-east-1"), strict=True))
    bucket = f"sft-dist-{uuid.uuid4().hex}"  # servers of one process share their buckets
    try:
        with mock.patch.dict(os.environ, settings):
            import fsspec

            fsspec.filesystem("s3", skip_instance_cache=True).mkdir(bucket)
            yield f"s3://{bucket}"
    finally:
        server.stop()
