"""How a run is spread over devices: one, copies of the model (DDP), or pieces of it (FSDP2); on one node or many."""

from __future__ import annotations

import os
from typing import Any, Literal

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from annformer.errors import input_error
from annformer.model.config import ModelConfig
from annformer.scgpt import ScGPT
from annformer.train.checkpoint import CheckpointFiles
from annformer.train.config import Machine, Precision


def placement(machine: Machine, precision: Precision, model: ScGPT) -> dict[str, Any]:
    """Arguments of Lightning's Trainer that say where and in which numbers it computes.

    Where torchrun or SLURM started this process, they say how many processes and nodes there are.

    Raises
    ------
    InputError
        When `machine` says something else than they do, or the model can only be trained by one process.
    """
    require_same_norm(machine, model.config.model)
    kind, devices, nodes = _places(machine)
    plugins: list[Any] = [CheckpointFiles()]
    if not TorchElasticEnvironment.detect() and _slurm_started_this():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # which would save and stop in its own way
    if precision != "32":
        # errors of bins squared are large: from torch's own first scale a dozen steps would be skipped
        scaler = torch.amp.GradScaler(kind, init_scale=2.0**10) if precision == "fp16" else None
        plugins.append(MixedPrecision("16-mixed" if precision == "fp16" else "bf16-mixed", kind, scaler))
    return {
        "accelerator": "gpu" if kind == "cuda" else "cpu",
        "devices": devices,
        "num_nodes": nodes,
        "strategy": _strategy(machine.strategy, devices * nodes, model.config.model),
        "plugins": plugins,
    }


def require_same_norm(machine: Machine, network: ModelConfig) -> None:
    """Refuse a network whose gradient on several devices would not be that of one: each would normalise by its own cells only."""
    _, devices, nodes = _places(machine)
    if network.input_norm == "batch" and devices * nodes > 1:
        found = f"input_norm is 'batch' and {devices * nodes} processes are to train: each would normalise by its own cells only"
        raise input_error(found, "one process, or a norm that sees the cells of all", "train on one device, or choose another input_norm")


def shard(model: ScGPT, mesh: DeviceMesh) -> None:
    """Cut a model into pieces, one per rank (FSDP2); each layer is put together only while it computes.

    All ranks get the weights of the first one. Weights travel in float32; what is computed in half precision, autocast says.
    """
    for tensor in model.state_dict().values():
        on_device = tensor.to(mesh.device_type)
        torch.distributed.broadcast(on_device, 0)
        tensor.copy_(on_device)
    for layer in model.encoder.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "losses")


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights are in pieces, so that ranks can only compute together."""
    return any(isinstance(parameter, torch.distributed.tensor.DTensor) for parameter in model.parameters())


def _strategy(name: Literal["auto", "ddp", "fsdp"], n_processes: int, network: ModelConfig) -> Strategy | str:
    if n_processes == 1:
        return "auto"
    if name == "fsdp":
        # one file per checkpoint: a run may go on with another number of processes
        return ModelParallelStrategy(data_parallel_size=n_processes, tensor_parallel_size=1, save_distributed_checkpoint=False)
    # these weights only get a gradient where a head reads the context, or where a batch has doses; DDP would wait for it
    untouched = network.batch_context or network.n_modalities > 0 or network.dose
    # buffers are statistics over all ranks, so equal on all of them
    return DDPStrategy(find_unused_parameters=untouched, broadcast_buffers=False)


def _places(machine: Machine) -> tuple[Literal["cuda", "cpu"], int, int]:
    """Kind of the devices, their number per node, and nodes."""
    kind: Literal["cuda", "cpu"] = "cuda" if machine.accelerator != "cpu" and torch.cuda.is_available() else "cpu"
    return kind, *(_launched(machine) or (_devices(machine, kind), machine.nodes))


def _devices(machine: Machine, kind: str) -> int:
    if machine.devices != "auto":
        return machine.devices
    return torch.cuda.device_count() if kind == "cuda" else 1


def _launched(machine: Machine) -> tuple[int, int] | None:
    """Processes per node, and nodes, as torchrun or SLURM started them; None where neither did."""
    if TorchElasticEnvironment.detect():
        by, devices = "torchrun", int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    elif _slurm_started_this():
        by, nodes = "SLURM", int(os.environ.get("SLURM_NNODES", "1"))
        n_tasks = int(os.environ["SLURM_NTASKS"])
        if n_tasks > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
            found = f"SLURM runs {n_tasks} tasks without --ntasks-per-node"
            raise input_error(found, "as many tasks on every node as it has devices", f"add --ntasks-per-node={n_tasks // nodes}")
        devices = n_tasks // nodes
    else:
        return None
    if machine.devices not in ("auto", devices) or machine.nodes not in (1, nodes):
        found = f"{by} started {devices} processes on {nodes} nodes, and {machine.devices} devices on {machine.nodes} nodes are asked for"
        raise input_error(found, "the same numbers, or none", "leave out devices and nodes")
    return devices, nodes


def _slurm_started_this() -> bool:
    return "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")
