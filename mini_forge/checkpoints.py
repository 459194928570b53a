"""Checkpoints: the adapter, and beside it all else from which a loop goes on bit for bit."""

from pathlib import Path

from mini_forge.errors import CheckpointError
from mini_forge.io.adapters import fill_adapter, save_adapter, stored_tensors
from mini_forge.io.runs import REFERENCE_ADAPTER, REWARD_FOLDER, RunFolder
from mini_forge.io.safetensors_file import write_tensors
from mini_forge.io.state import check_same_data, load_state, rng_state, save_state, set_rng_state
from mini_forge.model.decoder import Decoder
from mini_forge.model.lora import Factors, LoraSpec, lora_layers
from mini_forge.prepare import Prepared
from mini_forge.training.loop import Resumable
from mini_forge.training.optim import load_optimizer_state, optimizer_state

STATE_FILE = "trainer_state.pt"


def save_checkpoint(
    folder: RunFolder, prepared: Prepared, model: Decoder, lora: LoraSpec, loop: Resumable, data: int,
    keep: int | None = None, **others,
):  # fmt: skip
    """`checkpoints/step-N` of where the loop stands, whole or not at all. data: the fingerprint of what is trained on;
    keep: a step whose checkpoint is not to be removed for its age; others: more of the state."""

    def write(target: Path):
        save_adapter(target, model, lora, prepared.base_name)
        state = {"loop": loop.state(), "optimizer": optimizer_state(loop.optimizer), "rng": rng_state(), "data": data}
        save_state(target / STATE_FILE, state | others)

    folder.save_checkpoint(loop.progress.step, write, prepared.config.save_total_limit, keep)


def read_checkpoint(folder: RunFolder, prepared: Prepared, data: int, *others: str) -> tuple[int, Path, dict]:
    """The last checkpoint: its step, its folder and its state. Raises UserError where that is damaged, or of other
    data."""
    step = folder.steps()[-1]
    source = folder.checkpoint(step)
    state = load_state(source / STATE_FILE, ("data", *others))
    check_same_data(state, data, prepared.config.dataset, source)
    return step, source, state


def put_back(source: Path, state: dict, model: Decoder, loop: Resumable):
    """Adapter, optimizer, loop and random generators, as the checkpoint has them."""
    fill_adapter(model, source)
    load_optimizer_state(loop.optimizer, state["optimizer"])
    loop.restore(state["loop"])
    set_rng_state(state["rng"])


def keep_reference(folder: RunFolder, model: Decoder):
    """Write the adapter that a policy is tied to into its run's folder: where it came from may change meanwhile."""
    tensors = {}
    for name, (A, B, _) in model.reference.items():
        tensors[f"{name}.A"], tensors[f"{name}.B"] = A, B
    write_tensors(folder.path / REFERENCE_ADAPTER, tensors)


def read_reference(folder: Path, model: Decoder) -> Factors:
    """What `keep_reference` wrote into a run's folder, for the layers that the model adapts."""
    path = folder / REFERENCE_ADAPTER
    if not path.is_file():
        raise CheckpointError(f"{path}: file not found; the run is tied to the adapter in it; put it back")
    tensors, layers = stored_tensors(path), dict(lora_layers(model))
    if tensors.keys() != {f"{name}.{letter}" for name in layers for letter in "AB"}:
        raise CheckpointError(f"{path}: has other layers than this run's adapter; put the run's own back")
    return {
        name: (*(tensors[f"{name}.{letter}"].to(model.device, copy=True) for letter in "AB"), layer.scaling)
        for name, layer in layers.items()
    }


def has_begun(folder: RunFolder) -> bool:
    """Whether there is something to resume: of the run, or of its reward model."""
    reward = RunFolder(folder.path / REWARD_FOLDER)
    return bool(folder.steps() or reward.steps() or reward.is_finished())


def last_checkpoint(folder: RunFolder) -> Path | None:
    """Of the run or, before it has one, of its reward model."""
    for each in (folder, RunFolder(folder.path / REWARD_FOLDER)):
        if each.steps():
            return each.checkpoint(each.steps()[-1])
    return None
