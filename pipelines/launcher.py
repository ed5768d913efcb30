"""What a launcher says of itself in the environment, read before a library that joins its processes is loaded."""

from __future__ import annotations

import os

from vqgen.errors import InputError

_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_CURE = (
    "Start several with `torchrun --nproc-per-node 2 -- $(which vqgen) ...`, on GPUs also with `accelerate launch "
    "--no_python --multi_gpu`; start one without a launcher."
)
_FOREIGN = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


def launched() -> int:
    """How many processes a launcher started; 1 where none did."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_launcher() -> None:
    """Refuse a launch that is not what it seems, before anything is done.

    Raises:
        InputError: the launcher started processes each of which would work by itself, over the files of the others; or
            it was told to start several, and started one; or it asks for what is not done here, or makes no sense.
    """
    if foreign := [name for key, name in _FOREIGN.items() if os.environ.get(key, "").lower() in ("1", "true")]:
        raise InputError(
            f"`accelerate launch` asks for {foreign[0]}, which vqgen does not work with.",
            "Leave it out of accelerate's config: models are whole on every process, their gradients exchanged.",
        )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise InputError("`accelerate launch` asks for torch.compile.", "Leave it to vqgen, with --compile.")
    count = os.environ.get("WORLD_SIZE")
    if count is not None:
        if not count.isdecimal() or int(count) < 1:
            raise InputError(f"WORLD_SIZE={count!r} in the environment is no number of processes.", "Unset it.")
        return
    if any(os.environ.get(name, "1") not in ("0", "1") for name in _MPI):
        raise InputError("Processes that mpirun or srun starts do not find each other here.", _CURE)
    # Where `accelerate launch` starts a single process, this address is only there if it was asked for more.
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ:
        raise InputError("`accelerate launch` was asked for several processes, and started one.", _CURE)


def ignored_precision() -> str:
    """The sentence where `accelerate launch` was told a precision: here it is a setting of each training."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if asked == "no":
        return ""
    return f"accelerate's mixed_precision={asked} changes nothing here: set training.mixed_precision of each model."
