"""Checkpoints of a run: ``checkpoints/step-N`` holds all that the run needs to go on as if it had never stopped.

    state.json              steps, tokens, counters, where the data stream is; size and checksum of every file below
    model/                  a model like any other: it loads, generates and converts
    optimizer*.safetensors  the optimizers' moments, by the name of their parameter
    rng*.safetensors        the random generators of each rank

A checkpoint is written by every rank under a hidden name, in the background, and renamed when all of it is there:
whatever kills a run, the newest one loads. No name is ever written twice. The files do not depend on how many ranks
there are (``torch.distributed.checkpoint`` cuts tensors anew), and nothing in them is ever unpickled: they are JSON
and safetensors, through the reader and the writer below instead of the library's own, which pickle.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import warnings
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.distributed.tensor import DTensor, Shard, zeros
from torch.optim import Optimizer

from fourfold.text.tokenizer import Tokenizer
from fourfold.train.storage import MODEL, PIECES, Reader, damage, flush, merge, written
from fourfold.weights.checkpoint import NATIVE, write_json
from fourfold.weights.tensors import CheckpointError

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single process is nothing to warn of


# ---------------------------------------------------------------- what a run is in the middle of


@dataclass
class TrainState:
    """All that changes while a run goes on, as one object.

    ``data``: where the stream is, the same on every rank and JSON-ready; ``counters``: e.g. skipped steps;
    ``rng``: whether the random generators (this rank's torch, numpy, python) are part of it.
    Parameters that differ between ranks must be DTensors; everything else is taken to be the same on all ranks.
    """

    model: nn.Module
    optimizers: list[Optimizer]
    step: int = 0
    tokens: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)
    rng: bool = True

    def progress(self) -> dict[str, Any]:
        return {"step": self.step, "tokens": self.tokens, "data": self.data, "counters": self.counters}

    def state_dict(self) -> dict[str, Any]:
        """``progress``: JSON-ready; ``tensors``: by part (model, optimizer, rng) and name, joined by a slash."""
        tensors = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, (optimizer, parameter) in self._parameters().items():
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{name}:{key}"] = torch.as_tensor(value)
        if self.rng:
            tensors[f"rng/{_rank()}"] = _read_generators()
        return {"progress": self.progress(), "tensors": tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` returned. Tensors of the model are copied, those of optimizers are not."""
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "rng": {}}
        for name, tensor in state["tensors"].items():
            part, rest = name.split("/", 1)
            parts[part][rest] = tensor
        self.model.load_state_dict(parts["model"])
        parameters = self._parameters()
        for optimizer in self.optimizers:
            optimizer.state.clear()
        for name, tensor in parts["optimizer"].items():
            optimizer, parameter = parameters[name.rpartition(":")[0]]
            optimizer.state[parameter][name.rpartition(":")[2]] = tensor
        if self.rng and parts["rng"]:
            _set_generators(parts["rng"].popitem()[1])
        for name, value in state["progress"].items():
            setattr(self, name, value)

    def targets(self, stored: dict[str, TensorStorageMetadata]) -> dict[str, Tensor]:
        """What ``stored`` tensors are to be read into: the model's own, and new ones for the rest.

        Moments are laid out as their parameter is. Raises CheckpointError if model and checkpoint do not fit.
        """
        tensors = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        parameters = self._parameters()
        faults = [f"{name} is missing" for name in tensors if name not in stored]
        for name, found in stored.items():
            part, rest = name.split("/", 1)
            if part == "model" and name not in tensors:
                faults.append(f"{name} is not in the model")
            elif part == "model" and tensors[name].shape != found.size:
                faults.append(f"{name}: has shape {tuple(found.size)}, the model's is {tuple(tensors[name].shape)}")
            elif part == "optimizer" and rest.rpartition(":")[0] not in parameters:
                faults.append(f"{name} is of a parameter that is not optimized")
            elif part == "optimizer":
                _, parameter = parameters[rest.rpartition(":")[0]]
                tensors[name] = _empty_beside(parameter, found.size, found.properties.dtype)
        ranks = sum(name.startswith("rng/") for name in stored)
        if self.rng and ranks:  # more ranks than there were share generators
            mine = f"rng/{_rank() % ranks}"
            tensors[mine] = torch.empty(stored[mine].size, dtype=torch.uint8)
        if faults:
            raise CheckpointError(*faults)
        return tensors

    def _parameters(self) -> dict[str, tuple[Optimizer, nn.Parameter]]:
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return {
            names[id(parameter)]: (optimizer, parameter)
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }


def _empty_beside(parameter: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """For a moment of a parameter: cut between the ranks as the parameter is, as far as it has those dimensions."""
    cut = isinstance(parameter, DTensor) and len(shape) > 0 and shape == parameter.shape[: len(shape)]
    if cut and all(place.dim < len(shape) for place in parameter.placements if isinstance(place, Shard)):
        if shape == parameter.shape:
            return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        return zeros(shape, dtype=dtype, device_mesh=parameter.device_mesh, placements=parameter.placements)
    return torch.zeros(shape, dtype=dtype, device=parameter.device)


def seed_generators(seed: int) -> None:
    """Seeds the generators that a :class:`TrainState` keeps."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _read_generators() -> Tensor:
    """The state of this rank's generators, uint8 [bytes] of JSON."""
    kind, keys, *rest = np.random.get_state()
    values = {
        "torch": torch.get_rng_state().tolist(),
        "cuda": torch.cuda.get_rng_state().tolist() if torch.cuda.is_initialized() else None,
        "numpy": [kind, keys.tolist(), *rest],
        "python": random.getstate(),
    }
    return torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)


def _set_generators(blob: Tensor) -> None:
    values = json.loads(bytes(blob.tolist()))
    torch.set_rng_state(torch.tensor(values["torch"], dtype=torch.uint8))
    if values["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(values["cuda"], dtype=torch.uint8))
    np.random.set_state(tuple(values["numpy"]))
    version, inner, gauss = values["python"]
    random.setstate((version, tuple(inner), gauss))


# ---------------------------------------------------------------- a run's checkpoints


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = (p.parent for p in (Path(run) / "checkpoints").glob("step-*/state.json"))
    return sorted((p for p in found if re.fullmatch(r"step-\d+", p.name)), key=lambda p: int(p.name[5:]))


class Checkpoints:
    """Writes, prunes and finds the checkpoints of a run; every rank makes one and calls it at the same steps.

    ``tokenizer``: goes beside the weights, with the model's config; None: weights only.
    """

    def __init__(self, run: Path, keep: int, tokenizer: Tokenizer | None = None) -> None:
        self.run, self.keep, self.tokenizer = Path(run), keep, tokenizer
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None  # training never waits for it
        self._pending: tuple[_Writer, Future] | None = None

    def save(self, state: TrainState) -> Path:
        """Copies the state and returns; it is then written in the background as ``step-N``, and all but the newest
        ``keep`` removed. Waits for the save before, and raises what that raised. Raises FileExistsError."""
        self.wait()
        path = self.run / "checkpoints" / f"step-{state.step}"
        if path.exists():
            raise FileExistsError(f"{path} exists; a run goes on from its newest checkpoint, or in another directory")
        cfg = self.tokenizer and {"model_type": NATIVE, **state.model.cfg.to_dict()}
        values = state.state_dict()
        writer = _Writer(path, json.loads(json.dumps(values["progress"])), cfg, self.tokenizer, self.keep)
        tensors = {name: tensor.detach().contiguous() for name, tensor in values["tensors"].items()}
        planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
        future = dcp.async_save(tensors, storage_writer=writer, planner=planner, process_group=self.group)
        self._pending = writer, future
        return path

    def wait(self) -> None:
        """Returns when the last save is complete; raises what it raised, e.g. OSError for a full disk."""
        if self._pending is None:
            return
        (writer, future), self._pending = self._pending, None
        try:
            future.result()
        except CheckpointException as error:
            if _rank() == 0:
                shutil.rmtree(writer.partial, ignore_errors=True)
            raise _first(error) from None

    def resume(self, state: TrainState) -> Path | None:
        """Loads the newest checkpoint whose files are whole; returns it, or None if there is no checkpoint.

        One with damaged files is warned of and moved to ``step-N.damaged``: the steps since the one before are done
        again and come out the same, so nothing but time is lost. Raises CheckpointError if none is whole, or if one
        that is does not fit the model.
        """
        faults = []
        for path in reversed(self._agreed(checkpoints(self.run))):
            try:
                load(path, state, self.group)
                return path
            except DamagedError as error:
                faults.append(str(error))
                if _rank() == 0:
                    warnings.warn(f"{error}; going back to the checkpoint before", stacklevel=2)
                    aside = path.with_name(f"{path.name}.damaged")
                    shutil.rmtree(aside, ignore_errors=True)
                    path.rename(aside)
        if faults:
            raise CheckpointError(*faults, "no checkpoint is whole")
        return None

    def _agreed(self, found: list[Path]) -> list[Path]:
        """What rank 0 found."""
        shared = [found]
        if self.group is not None:
            dist.broadcast_object_list(shared, src=0, group=self.group)
        return shared[0]


class DamagedError(CheckpointError):
    """A checkpoint whose files are not as they were written."""


def load(path: Path, state: TrainState, group: dist.ProcessGroup | None = None) -> None:
    """Loads one checkpoint, on any number of ranks.

    Raises DamagedError if its files are not as written, CheckpointError if they do not fit the model; ``state`` is
    then as it was.
    """
    path = Path(path)
    faults = damage(path, _rank(), dist.get_world_size(group) if dist.is_initialized() else 1)
    if dist.is_initialized():
        everyones: list[list[str]] = [[] for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(everyones, faults, group=group)
        faults = sorted({fault for some in everyones for fault in some})
    if faults:
        raise DamagedError(f"{path}: damaged: {'; '.join(faults)}")
    reader = Reader(path)
    tensors = state.targets(reader.read_metadata().state_dict_metadata)
    try:
        planner = dcp.DefaultLoadPlanner(flatten_state_dict=False)
        dcp.load(tensors, storage_reader=reader, planner=planner, process_group=group)
    except CheckpointException as error:
        raise _first(error) from None
    progress = json.loads((path / "state.json").read_text())["progress"]
    state.load_state_dict({"progress": progress, "tensors": tensors})


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _first(error: CheckpointException) -> BaseException:
    """What went wrong on the first rank where something did."""
    return min(error.failures.items())[1][0]


# ---------------------------------------------------------------- files


class _Writer(StorageWriter, BlockingAsyncStager):
    """Every rank writes its pieces under a hidden name; when all have, rank 0 makes a checkpoint of them."""

    def __init__(
        self, path: Path, progress: dict[str, Any], cfg: dict[str, Any] | None, tokenizer: Tokenizer | None, keep: int
    ) -> None:
        BlockingAsyncStager.__init__(self)
        self.path, self.progress, self.cfg, self.tokenizer, self.keep = path, progress, cfg, tokenizer, keep
        self.partial = path.with_name(f".{path.name}.partial")

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """One writer writes one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """There is nothing to set up."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        if others := [item.index.fqn for item in plan.items if item.tensor_data is None]:
            raise TypeError(f"not tensors: {', '.join(others)}")  # the library would pickle them
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On rank 0 alone, before any rank writes."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for left in self.path.parent.glob(".step-*"):  # by a run that was killed
            shutil.rmtree(left)
        (self.partial / "model").mkdir(parents=True)
        return [
            replace(plan, storage_data="" if len(plans) == 1 else f"-{rank:05}-of-{len(plans):05}")
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        parts: dict[str, dict[str, Tensor]] = {}
        pieces: dict[str, dict[str, Any]] = {}
        for item in plan.items:
            part, name = item.index.fqn.split("/", 1)
            assert item.tensor_data is not None
            offsets, shape = list(item.tensor_data.chunk.offsets), list(item.tensor_data.size)
            tensor = planner.resolve_data(item)
            if list(tensor.shape) != shape:
                key = f"{name}@{','.join(map(str, offsets))}"
                pieces.setdefault(part, {})[key] = {"name": name, "offsets": offsets, "shape": shape}
                name = key
            parts.setdefault(part, {})[name] = tensor.contiguous()
        results = []
        for part, tensors in parts.items():
            file = f"{part}{plan.storage_data}.safetensors" if part != "model" or plan.storage_data else MODEL
            save_file(tensors, self.partial / file, {PIECES: json.dumps(pieces[part])} if part in pieces else None)
            results.append(written(self.partial, file))
        done: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0 alone, when every rank has written."""
        files = {result.index.fqn: result for some in results for result in some}
        if cut := [file for file in files if file.startswith("model-")]:
            merge([self.partial / file for file in cut], self.partial / MODEL)
            for file in cut:
                (self.partial / file).unlink()
                del files[file]
            files[MODEL] = written(self.partial, MODEL)
        if self.cfg is not None and self.tokenizer is not None:
            (self.partial / "model/config.json").write_text(json.dumps(self.cfg, indent=1) + "\n")
            self.tokenizer.save(self.partial / "model/tokenizer.json")
        sums = {file: [result.size_in_bytes, result.storage_data] for file, result in sorted(files.items())}
        write_json(self.partial / "state.json", {"progress": self.progress, "files": sums})
        for new in (self.partial / "state.json", self.partial / "model", self.partial):
            flush(new)
        self.partial.rename(self.path)
        flush(self.path.parent)
        for old in checkpoints(self.path.parents[1])[: -self.keep]:
            old.rename(hidden := old.with_name(f".{old.name}.old"))  # half of a checkpoint must not look like one
            shutil.rmtree(hidden)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True
