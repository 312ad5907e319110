"""Which devices of Ray an engine may count on: the cluster's, or those of its placement group."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from types import SimpleNamespace

import pytest
import ray
from vllm.platforms import current_platform

from vllm_twotower.ray_devices import check_ray_devices

pytestmark = pytest.mark.ray
NODE = {"NodeID": "5b92", "Labels": {"ray.io/node-id": "5b92"}}
GROUP = SimpleNamespace(id=SimpleNamespace(hex=lambda: "98fb"))


@pytest.fixture(autouse=True)
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is connected to a cluster of one node, started by hand; it is in no group, and no device is free."""
    monkeypatch.setattr(current_platform, "ray_device_key", "GPU")
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray.util, "get_current_placement_group", lambda: None)
    monkeypatch.setattr(ray, "nodes", lambda: [NODE])
    has_devices(monkeypatch, free={}, total={"GPU": 2.0})
    reports(monkeypatch, None)


def has_devices(monkeypatch: pytest.MonkeyPatch, free: Mapping[str, float], total: Mapping[str, float]) -> None:
    monkeypatch.setattr(ray, "available_resources", lambda: free)
    monkeypatch.setattr(ray, "cluster_resources", lambda: total)


def reports(monkeypatch: pytest.MonkeyPatch, report: dict | None) -> None:
    """What Ray's first autoscaler has written down."""
    status = None if report is None else json.dumps({"autoscaler_report": report}).encode()
    monkeypatch.setattr("ray.experimental.internal_kv._internal_kv_get", lambda key: status)


def test_too_few_devices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tensor_parallel_size=2 needs 2 GPUs of the Ray cluster, .* 0 .* \(of 2\)"):
        check_ray_devices(2, patience=0)


@pytest.mark.parametrize("is_current", [True, False])
@pytest.mark.parametrize(
    ("free", "share"),
    [
        (2.0, 1),
        (1.999, 1),  # Ray Serve's task, which makes the configuration, takes a thousandth
        (0.499, 0.25),
    ],
)
def test_devices_of_a_group_are_free(
    free: float, share: float, is_current: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_devices(monkeypatch, free={"GPU_group_98fb": free}, total={"GPU": 2.0, "GPU_group_98fb": 2.0})
    monkeypatch.setenv("VLLM_RAY_PER_WORKER_GPUS", str(share))
    if is_current:
        monkeypatch.setattr(ray.util, "get_current_placement_group", lambda: GROUP)
    check_ray_devices(2, None if is_current else GROUP, patience=0)


def test_devices_of_a_group_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the actor that starts the engine, which would wait for itself; nodes that are added would not help."""
    has_devices(monkeypatch, free={"GPU": 6.0, "GPU_group_98fb": 1.0}, total={"GPU": 8.0, "GPU_group_98fb": 2.0})
    reports(monkeypatch, {"active_nodes": {"ray.head.default": 1}})
    with pytest.raises(ValueError, match=r"=2 needs 2 GPUs of the Ray placement group, of which 1 are free \(of 2\)"):
        check_ray_devices(2, GROUP, patience=0)


@pytest.mark.parametrize(
    ("report", "labels", "may_grow"),
    [
        (None, {}, False),
        ({}, {}, False),  # no nodes yet
        ({"active_nodes": {"node_5b92": 1}}, {}, False),
        ({"active_nodes": {"ray.head.default": 1}}, {}, True),
        (None, {"ray.io/node-group": "headgroup"}, True),
    ],
)
def test_a_cluster_that_may_grow_is_waited_for(
    report: dict | None,
    labels: dict[str, str],
    may_grow: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    reports(monkeypatch, report)
    monkeypatch.setattr(ray, "nodes", lambda: [NODE | {"Labels": NODE["Labels"] | labels}])
    if may_grow:
        with caplog.at_level(logging.WARNING):
            check_ray_devices(2, patience=0)
        assert "needs 2 GPUs of the Ray cluster, of which 0 are free (of 2); waiting for nodes" in caplog.text
    else:
        with pytest.raises(ValueError, match=r"needs 2 GPUs"):
            check_ray_devices(2, patience=0)
