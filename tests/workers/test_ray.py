"""A Ray cluster of two nodes on this machine: one is killed on the way. Takes half a minute to start."""

import dataclasses
import os
from pathlib import Path

import pytest

import distill3d
from distill3d.bench.judging import Judges
from distill3d.bench.protocol import Protocol, Variant
from distill3d.bench.run import Listeners, run_bench
from distill3d.distill.recipes import DISTILL
from distill3d.objectives import SDS
from distill3d.priors.loading import load_prior
from distill3d.workers.ray_cluster import RayCluster, connect

ray = pytest.importorskip("ray", reason='needs the extra ray: pip install "distill3d[ray]"')
pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray itself, about its own future

SMALL = dataclasses.replace(
    DISTILL, steps=2, views=1, scene=dataclasses.replace(DISTILL.scene, resolution=12), objective=SDS()
)
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
METRICS = ("saturation", "nfe", "diverged")


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one core each; the second one may be removed by a test."""
    from ray.cluster_utils import Cluster

    before = dict(os.environ)
    source = str(Path(distill3d.__file__).parents[1])
    path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0", PYTHONPATH=path)
    head = {**NODE, "include_dashboard": False, "include_log_monitor": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    connect(cluster.address)  # before there is another node of this machine that it could belong to
    cluster.second = cluster.add_node(**NODE)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    os.environ.clear()
    os.environ.update(before)


def test_a_bench_on_two_nodes_one_of_which_is_killed(cluster, kl_folder, tmp_path):
    prior = load_prior(str(kl_folder))
    protocol = Protocol(
        (Variant("SDS", SMALL),), ("a cat", "a dog"), (0, 1), prior=str(kl_folder), dtype="float32", views=2, size=16
    )
    whole, out = tmp_path / "whole", tmp_path / "ray"
    run_bench(whole, protocol, prior, Judges(), METRICS)
    made = []

    def on_cell(task, outcome, new):
        made.append(task.folder)
        if len(made) == 1:
            cluster.remove_node(cluster.second, allow_graceful=False)

    executor = RayCluster(cluster.address)
    run_bench(out, protocol, prior, Judges(), METRICS, listeners=Listeners(on_cell=on_cell), executor=executor)
    assert sorted(made) == sorted(task.folder for task in protocol.tasks())
    files = [
        p.relative_to(whole) for name in ("views.png", "maps.npz", "mesh.glb") for p in whole.glob(f"cells/*/{name}")
    ]
    for name in (*files, "table.md", "table.tex", "table.csv", "cells.csv"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_more_gpus_than_there_are_is_one_line(cluster):
    with pytest.raises(ValueError, match=r"no node of the Ray cluster has 1 CPU and 0.5 GPU for a cell"):
        list(RayCluster(cluster.address, gpus=0.5).run(str, ["a"]))
