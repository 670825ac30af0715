"""What vattn cannot serve is refused when the engine starts, in one sentence."""

from __future__ import annotations

import vllm
from packaging.version import InvalidVersion, Version
from vllm.config import VllmConfig

from vattn.integrations.vllm.settings import Settings

# The versions whose hooks were read and whose suites were run.
OLDEST = Version("0.31")
BELOW = Version("0.33")


def vllm_version() -> Version | None:
    """Version of the vLLM that is imported, whichever package it came from; None: a dev tree."""
    try:
        return Version(vllm.__version__)
    except InvalidVersion:
        return None


def is_supported(found: Version | None) -> bool:
    """Whether this is a version whose hooks are known."""
    return found is not None and OLDEST <= Version(found.base_version) < BELOW


def check_version() -> None:
    """Check that this vLLM has the hooks that are used.

    Raises
    ------
    ValueError
        It is older, or newer than what was tested.
    """
    found = vllm_version()
    if not is_supported(found):
        raise ValueError(
            f"vLLM is {found or vllm.__version__}, and vattn supports {OLDEST} and later, below "
            f"{BELOW}; install one of these, or leave --kv-transfer-config out"
        )


def check_config(config: VllmConfig, settings: Settings) -> None:
    """Check that the engine's configuration is one that vattn can serve.

    Raises
    ------
    ValueError
        It is not. The message says what is in the way and what to do.
    """
    model, parallel = config.model_config, config.parallel_config
    remedy = "leave --kv-transfer-config out to serve it without vattn"
    transfer = config.kv_transfer_config
    refusals = {
        "kv_role must be 'kv_both', so that blocks in use by a step in flight are not given "
        "away": transfer.kv_role != "kv_both",
        "encoder-decoder models are not supported": model.is_encoder_decoder,
        "models with MLA (latent attention) are not supported": model.use_mla,
        "models with Mamba or linear attention are not supported": model.has_inner_state,
        "pipeline parallelism is not supported; use --tensor-parallel-size": (
            parallel.pipeline_parallel_size > 1
        ),
        "workers on several machines are not supported": parallel.nnodes > 1,
        "decode context parallelism is not supported": parallel.decode_context_parallel_size > 1,
        "sleep mode is not supported; an idle engine shrinks by itself": model.enable_sleep_mode,
        "speculative decoding is not supported in contiguous mode; use elastic": (
            settings.mode == "contiguous" and config.speculative_config is not None
        ),
    }
    for reason, found in refusals.items():
        if found:
            raise ValueError(f"vattn cannot serve this engine: {reason}; {remedy}")
    device = config.device_config.device_type
    if device not in ("cpu", "cuda"):
        raise ValueError(f"vattn cannot serve device {device!r}, only 'cpu' and 'cuda'; {remedy}")
