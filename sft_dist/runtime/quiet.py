"""Keeps libraries from talking over the run: only what a user can act on is shown."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Silences progress bars, banners and warnings about how libraries call each other.

    Call before they are imported: some of them talk while they are.
    """
    # DeepSpeed calls collectives by their older names, twice a layer and step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    warnings.filterwarnings("ignore", message=r".*broadcast_buffers.*", category=FutureWarning)
    # PEFT asks transformers for it by its older name when it loads an adapter.
    warnings.filterwarnings("ignore", message=r".*is_gradient_checkpointing.*", category=FutureWarning)
    # bitsandbytes looks for an optional kernel package at its first 4-bit product.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    # c10d warns, with its C++ stack, that a peer has gone: after Ctrl-C all of them do.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # torch's profiler says on the console when it begins and ends.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # lm-eval warns of every default that a task leaves to it.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # On a full disk each line of a library's own log would be a stack trace on the console.
    logging.raiseExceptions = False
    name_accelerator()
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def name_accelerator() -> None:
    """Tells DeepSpeed what to run on: it warns when it has to find out for itself."""
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
