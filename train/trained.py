"""The model that a run has trained, out of its directory."""

import contextlib
import dataclasses
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from flax import nnx

from jfp4 import master
from jfp4.models.llama import Llama
from train import rundir
from train.checkpoint import check_holds, named_leaves, orbax_silent
from train.config import from_dict
from train.errors import UserError
from train.step import Trainer


def load_model(run_dir: str | Path, step: int | None = None) -> Llama:
    """The model of a run's checkpoint, on the default device, to be evaluated or trained on.

    Of the checkpoint parameters and calibration alone are read. Parameters are float32 values
    whatever the run kept them in, and calibration is the running one (``model.train()`` turns that
    off), so that a token's logits do not depend on the tokens beside it.

    Args:
        run_dir: of ``train.main``.
        step: of the checkpoint; None is the newest.

    Raises:
        UserError: there is no such run, or no such checkpoint, or it cannot be read.
    """
    run_dir = Path(run_dir)
    if not (run_dir / rundir.CONFIG).is_file():
        raise UserError(f"run_dir={run_dir} holds no run")
    steps = rundir.saved_steps(run_dir)
    if not steps or step not in (None, *steps):
        found = ", ".join(map(str, steps)) or "none"
        raise UserError(f"step={step} is not among the checkpoints of {run_dir}: {found}")
    trainer = Trainer(from_dict(rundir.read(run_dir)["config"]))
    abstract = jax.eval_shape(trainer.init)
    part = dataclasses.replace(abstract, step=None, opt_state=None, loss_scale=None)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)
        for name, leaf in named_leaves(part).items()
    }
    step = steps[-1] if step is None else step
    path = (run_dir / "checkpoints" / str(step) / "default").absolute()
    reading = contextlib.closing(ocp.Checkpointer(ocp.PyTreeCheckpointHandler()))
    with orbax_silent(), reading as reader:
        check_holds(reader, path, wanted)
        restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
        arrays = reader.restore(
            path, args=ocp.args.PyTreeRestore(wanted, restore_args, partial_restore=True)
        )
    state = jax.tree.unflatten(jax.tree.structure(part), [arrays[name] for name in wanted])
    model: Llama = nnx.merge(trainer.graph, jax.tree.map(master.decode, state.params), state.stats)
    model.eval()
    return model
