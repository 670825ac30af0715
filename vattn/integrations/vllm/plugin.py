"""The entry point of ``vllm.general_plugins``: runs in every process of vLLM.

It only enters names into vLLM's registries. Nothing changes for an engine that does not name
``VattnConnector`` in ``--kv-transfer-config``.
"""

from __future__ import annotations

from vattn.integrations.vllm.settings import CONNECTOR


def register() -> None:
    """Tell vLLM about the connector and the attention backend. May be called again."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from vattn.integrations.vllm.support import is_supported, vllm_version

    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(
            CONNECTOR, "vattn.integrations.vllm.connector", CONNECTOR
        )
    if not is_supported(vllm_version()):
        return  # who asks for the connector is told why not
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    # On the CPU vLLM takes CPU_ATTN whatever --attention-backend says.
    on_cpu = current_platform.is_cpu()
    member = AttentionBackendEnum.CPU_ATTN if on_cpu else AttentionBackendEnum.CUSTOM
    if not member.is_overridden():
        register_backend(member, "vattn.integrations.vllm.backend.Backend")
