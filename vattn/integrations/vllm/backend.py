"""Which attention backend a layer gets, decided when vLLM asks.

``plugin.register`` tells vLLM's registry that a backend is ``vattn.integrations.vllm.backend.
Backend``. That name is resolved here, by the configuration of the engine that is being made: what
does not use vattn gets the class that vLLM would have taken itself.
"""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from vattn.integrations.vllm import geometry
from vattn.integrations.vllm.settings import Settings, active_settings
from vattn.integrations.vllm.support import check_config, check_version


def __getattr__(name: str) -> Any:
    if name == "Backend":
        return _choose()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _choose() -> type[AttentionBackend]:
    config = get_current_vllm_config_or_none()
    settings = active_settings(config)
    on_cpu = current_platform.is_cpu()
    if settings is None:
        if on_cpu:
            return _stock("CPU_ATTN")
        raise ValueError(
            "--attention-backend CUSTOM is vattn's, but --kv-transfer-config does not name "
            "VattnConnector; give both or neither"
        )
    assert config is not None
    check_version()
    check_config(config, settings)
    if settings.mode == "contiguous":
        from vattn.integrations.vllm.attention import ContiguousCpuBackend, ContiguousCudaBackend

        return _over(ContiguousCpuBackend if on_cpu else ContiguousCudaBackend, config, settings)
    return _over(_stock("CPU_ATTN" if on_cpu else settings.kernels), config, settings)


def _stock(name: str) -> type[AttentionBackend]:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    if name not in AttentionBackendEnum.__members__ or name == "CUSTOM":
        known = ", ".join(member for member in AttentionBackendEnum.__members__)
        raise ValueError(f"kernels is {name!r}, expected one of vLLM's backends: {known}")
    # Not get_class(), which would be this module again.
    backend: type[AttentionBackend] = resolve_obj_by_qualname(AttentionBackendEnum[name].value)
    return backend


def _over(
    base: type[AttentionBackend], config: VllmConfig, settings: Settings
) -> type[AttentionBackend]:
    """Make a backend that is another one, but for whom the blocks of its layers come from."""

    class Backend(base):
        """A backend whose KV cache is on memory of vattn."""

        @classmethod
        def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
            from vattn.integrations.vllm import specs

            return specs.customize(super().customize_spec(spec), config, settings)

        @classmethod
        def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...] | None:
            layouts = super().supported_kv_cache_layouts()
            if layouts is None:
                return None
            return tuple(layout for layout in layouts if layout.name in geometry.LAYOUTS)

    Backend.__name__ = Backend.__qualname__ = f"Vattn{base.__name__}"
    return Backend
