"""vattn inside vLLM: physical memory for the KV cache that follows the requests.

Switched on by ``--kv-transfer-config`` on the command line of ``vllm serve``; docs/vllm.md tells
how. From Python, :func:`instances`, :func:`status` and :func:`set_budget` talk to engines that run
on this machine.
"""

from __future__ import annotations

from vattn.integrations.vllm.control import InstanceStatus, instances, set_budget, status

__all__ = ["InstanceStatus", "instances", "set_budget", "status"]
