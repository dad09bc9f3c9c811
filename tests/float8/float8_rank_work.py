"""What ranks do for test_float8_all_gather: train a small program under FSDP2, count what is gathered."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

IDS = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(3))


def program_of(recipe: str, all_gather: bool, save: str = "input", width: int = 64):
    from ftc.models.decoder import Decoder
    from ftc.models.presets import preset

    import ftc

    torch.manual_seed(0)
    model = Decoder(preset("tiny", vocab_size=64, hidden_size=width, intermediate_size=2 * width + 16))
    passes = ["raise", ("float8", {"recipe": recipe, "save": save, "all_gather": all_gather})]
    return ftc.rewrite(model, passes, example={"input_ids": IDS[:, :7]}, check=False)


GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


class Counter:
    """Bytes that this rank gives to each kind of collective, and how many of each there are."""

    def __enter__(self):
        self.bytes, self.calls = {"gather": 0, "reduce": 0}, {"gather": 0, "reduce": 0}
        self.saved = {GATHER: getattr(dist, GATHER), "all_reduce": dist.all_reduce}

        def counted(kind, name, given):
            def call(*args, **kwargs):
                tensor = kwargs.get("input_tensor", args[given] if given < len(args) else None)
                self.bytes[kind] += tensor.numel() * tensor.element_size()
                self.calls[kind] += 1
                return self.saved[name](*args, **kwargs)

            return call

        setattr(dist, GATHER, counted("gather", GATHER, 1))
        dist.all_reduce = counted("reduce", "all_reduce", 0)
        return self

    def __exit__(self, *exc):
        for name, function in self.saved.items():
            setattr(dist, name, function)


def train(recipe: str, all_gather: bool, steps: int = 3, dtype: str = "bfloat16", save: str = "input", reshard: bool = True, width: int = 64):
    """(losses, bytes and calls of the last step, whole parameters) of a run on this rank's half of the batch."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    from ftc.float8.all_gather import gather_in_float8

    mesh, param = init_device_mesh("cpu", (dist.get_world_size(),)), getattr(torch, dtype)
    program = program_of(recipe, all_gather, save, width)
    if all_gather:
        gather_in_float8(program, reshard)
    for captured in (*program.regions, program):
        captured.compute_dtype = param
    options = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(param_dtype=param, reduce_dtype=torch.float32)}
    for region in program.regions:
        fully_shard(region, **options, reshard_after_forward=reshard)
    fully_shard(program, **options)
    for module in program.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
    optimizer = torch.optim.AdamW(program.parameters(), lr=1e-2)
    rank, losses = dist.get_rank(), []
    rows = IDS[rank * 2 % 4 :][:2]
    for _ in range(steps):
        with Counter() as counter:
            logits = program(input_ids=rows[:, :-1])
            loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    whole = {name: p.full_tensor().detach() for name, p in program.named_parameters()}
    whole = {name: getattr(t, "whole", t) for name, t in whole.items()}
    return losses, counter.bytes, counter.calls, whole


def sharded(recipe: str, **options):
    """A program under FSDP2 in float32, its weights gathered in float8, and its optimizer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    from ftc.float8.all_gather import gather_in_float8

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    program = program_of(recipe, True)
    marked = gather_in_float8(program)
    for region in program.regions:
        fully_shard(region, mesh=mesh)
    fully_shard(program, mesh=mesh)
    for module in program.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
    return program, marked


def reload(recipe: str) -> tuple:
    """(types of the local tensors in a state dict, loss before, loss after the weights are halved in place through a loaded state, loss of the halved model alone)."""
    program, marked = sharded(recipe)
    state = program.state_dict()
    kinds = {type(t._local_tensor).__name__ for t in state.values()}
    first = float(program(input_ids=IDS).float().square().mean())
    program.load_state_dict({name: t.detach().clone() * 0.5 for name, t in state.items()})
    second = float(program(input_ids=IDS).float().square().mean())
    alone = program_of(recipe, False)
    with torch.no_grad():
        for p in alone.parameters():
            p.mul_(0.5)
    return kinds, first, second, float(alone(input_ids=IDS).float().square().mean()), len(marked)


def refused(recipe: str) -> str:
    """What is said where regions are recomputed in the backward pass although nobody said so beforehand."""
    from torch.utils.checkpoint import checkpoint

    from ftc.errors import FtcError

    program, _ = sharded(recipe)
    for region in program.regions:
        region.around = lambda run, args, kwargs: checkpoint(run, *args, use_reentrant=False, **kwargs)
    try:
        program(input_ids=IDS).float().square().mean().backward()
    except FtcError as error:
        return str(error)
    return ""
