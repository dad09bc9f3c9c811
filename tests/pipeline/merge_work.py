"""What the tests of merged graphs run on each rank: a pair of stages as one graph, beside the same run one after the other and by autograd."""

import helpers_experts as experts
import torch
import torch.distributed as dist
from ftc.models.decoder import Decoder
from ftc.models.presets import preset
from torch import nn

import ftc
from ftc import parallel
from ftc.pipeline.communication import is_start
from ftc.pipeline.interleave_check import collectives, unwaited
from ftc.pipeline.interleave_costs import Machine
from ftc.pipeline.merge_compile import pieces
from ftc.pipeline.merge_trace import Half
from ftc.pipeline.overlapped import OverlappedPair, StageGraphs
from ftc.pipeline.parameter_gathers import Sharding, shard_of

SLOW_LINK = Machine(flops_per_s=1e9, memory_bytes_per_s=1e9, link_bytes_per_s=1e6, latency_s=1e-4, launch_s=1e-6)


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients by name, taken off."""
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    for parameter in module.parameters():
        parameter.grad = None
    return found


def by_autograd(module: nn.Module, args: tuple, kwargs: dict, trained: list[int], grads: list[torch.Tensor]):
    """(results, gradients of inputs, of parameters) of a call and its backward."""
    args = [x.detach().requires_grad_(x.is_floating_point()) for x in args]
    results = module(*args, **kwargs)
    results = [results] if isinstance(results, torch.Tensor) else list(results)
    torch.autograd.backward([results[i] for i in trained], grads)
    return [r.detach() for r in results], [x.grad for x in args if x.requires_grad], gradients(module)


def pair_alone_and_autograd(module: nn.Module, front: list, back: list, kwargs: dict, example: tuple, **options) -> tuple[dict, OverlappedPair]:
    """F of `front` with B of `back`, both calls of `module`: what of a pair is not, bit for bit, what the two halves and autograd give."""
    graphs = StageGraphs(module, example, kwargs)
    given = lambda args: [*args, *kwargs.values()]  # noqa: E731
    results, saved = graphs.forward(given(back))
    grads = [torch.randn_like(results[i]) for i in graphs.trained_results]
    expected_back = by_autograd(module, back, kwargs, graphs.trained_results, list(grads))
    expected_front = by_autograd(module, front, kwargs, graphs.trained_results, list(grads))
    pair = OverlappedPair(graphs, graphs, machine=SLOW_LINK, **options)
    dx, later = graphs.backward_input(list(saved), list(grads))
    found = {"no weight yet": not gradients(module), "input half": equal(dx, expected_back[1])}
    graphs.backward_weights(later)
    found |= {"weight half": same_gradients(gradients(module), expected_back[2]), "forward alone": equal(results, expected_back[0])}
    alone = graphs.backward(list(saved), list(grads))
    found["backward alone"] = equal(alone, expected_back[1]) and same_gradients(gradients(module), expected_back[2])
    new, new_saved, dx = pair.run(given(front), saved, list(grads))
    found["pair forward"] = equal(new, expected_front[0])
    found["pair backward"] = equal(dx, expected_back[1]) and same_gradients(gradients(module), expected_back[2])
    found["emptied"] = not saved
    later = graphs.backward(new_saved, list(grads))
    found["saved by the pair"] = equal(later, expected_front[1]) and same_gradients(gradients(module), expected_front[2])
    found["all waited for"] = not unwaited(pair.interleaved.graph.graph)
    inside = [node for piece in pieces(pair.interleaved.graph).children() for node in piece.graph.nodes if is_start(node)]
    found["pieces keep the order"] = [str(n.target) for n in inside] == [name for _, name in collectives(pair.interleaved.graph.graph)]
    return found, pair


def same_gradients(a: dict, b: dict) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------------------------------------------------- experts


def expert_parallel(kind: str, sizes: tuple[list[int], list[int]], backend: str | None = None, parts: bool = False) -> tuple[dict, dict, list]:
    """Both microbatches of this rank through the same program, its experts divided over the ranks; (what holds, the pair's model, its collectives)."""
    program = experts.net(kind)
    passes = [("expert-parallel", {"degree": dist.get_world_size()})]
    program = parallel.bind(ftc.rewrite(program, passes, example=(torch.randn(1, 5, experts.D, dtype=torch.float64),), check=False))
    front, back = (experts.batches(each)[dist.get_rank()] for each in sizes)
    options = {"compile_options": {"backend": backend}} if backend else {}
    found, pair = pair_alone_and_autograd(program, [front], [back], {}, (back,), group=dist.group.WORLD, more_bytes=None, parts=parts, **options)
    return found, pair.interleaved.summary(), [name for _, name in collectives(pair.interleaved.graph.graph)]


# ----------------------------------------------------------------------------------------------------------------------- shards


class Uneven(nn.Module):
    """Rows that no number of ranks divides, a scalar, and a tensor of few rows."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.second = nn.Linear(5, 7, bias=False)
        self.third = nn.Linear(7, 6)

    def forward(self, x):
        return x + self.third(torch.tanh(self.second(torch.tanh(self.first(x)) * self.scale)))


def model_of(name: str) -> tuple[nn.Module, tuple, dict]:
    """A model (the same on all ranks), and this rank's own example."""
    torch.manual_seed(0)
    if name == "uneven":
        model, args = Uneven().double(), (torch.zeros(3, 6, dtype=torch.float64),)
    else:
        sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=44, head_dim=8, num_hidden_layers=1)
        model = Decoder(preset("tiny", **sizes, tie_word_embeddings=name == "tied decoder"))
        args = (torch.zeros(2, 6, dtype=torch.long),)
    return model, args, {}


def kept_from_shards(forward: Half) -> list:
    """Saved values that follow from shards alone: gathered parameters that a stage would hold until its backward."""
    made = {node for slot, node in forward.placeholders().items() if slot.kind == "shard"}
    for node in forward.graph.nodes:
        if node.op == "call_function" and node.all_input_nodes and set(node.all_input_nodes) <= made:
            made.add(node)
    return [node for slot, node in zip(forward.outputs, forward.results(), strict=True) if slot.kind == "saved" and node in made]


def sharded(name: str, bucket_bytes: int, store: torch.dtype | None = None) -> dict:
    """Parameters sharded over the ranks, gathered by the graphs: what is not what whole parameters give (gradients: their sum over ranks)."""
    model, example, kwargs = model_of(name)
    program = ftc.capture(model, example)
    rank, degree = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(7 + rank)
    front, back = ([torch.randn_like(x) if x.is_floating_point() else torch.randint(0, 61, x.shape) for x in example] for _ in range(2))
    whole = StageGraphs(program, example, kwargs)
    trained = {n: p for n, p in program.named_parameters()}
    shards = {n: shard_of(p, rank, degree).to(store or p.dtype).requires_grad_() for n, p in trained.items()}
    sharding = Sharding(dist.group.WORLD.group_name, degree, bucket_bytes, store)
    graphs = StageGraphs(program, example, kwargs, sharding=sharding, shards=shards)
    results, saved = whole.forward(back)
    grads = [torch.randn_like(results[i]) for i in whole.trained_results]
    own, own_saved = graphs.forward(back)
    pair = OverlappedPair(graphs, graphs, machine=SLOW_LINK, more_bytes=None)
    whole_ones = [s for s in graphs.traced.forward.inputs if s.kind == "parameter" and s.key in trained]
    found = {"forward": equal(own, results), "reads no whole parameter": not whole_ones}
    dx = whole.backward(saved, list(grads))
    expected = gradients(program)
    for gradient in expected.values():
        dist.all_reduce(gradient)
    new, new_saved, pair_dx = pair.run(front, own_saved, list(grads))
    found["pair"] = equal(new, whole.forward(front)[0]) and equal(pair_dx, dx)
    found["gradients"] = all(torch.equal(shards[n].grad, shard_of(expected[n], rank, degree).to(store or expected[n].dtype)) for n in trained)
    found["keeps no parameter"] = not kept_from_shards(graphs.traced.forward)
    counts = [target for _, target in collectives(pair.interleaved.graph.graph)]
    found["collectives"] = {kind: sum(kind in target for target in counts) for kind in ("all_gather", "reduce_scatter")}
    found["model"] = pair.interleaved.summary()
    return found


# ------------------------------------------------------------------------------------------------------------------- a schedule


def dual_pipe_by_graph(name: str, passes: list, parts: bool) -> tuple:
    """torch's DualPipeV, two stages a rank, every pair one graph: (summed loss or None, gradients by stage, which pairs there were)."""
    import pipeline_cases as cases
    import pipeline_work as pipelines
    from torch.distributed.pipelining.schedules import ScheduleDualPipeV

    from ftc.pipeline.overlapped_stage import GraphStage, register_graph_pairs

    group, given = dist.group.WORLD, cases.batch(pipelines.BATCH)
    one = {n: x.chunk(pipelines.MICROBATCHES)[0] for n, x in given.items()}
    stages, made = pipelines.stages_here(cases.program_of(name, passes), "DualPipeV", 2 * dist.get_world_size(), group), []
    for stage in stages:
        takes, gives = stage.examples(one)
        gives = cases.loss_of(gives) if stage.is_last else gives
        where = (stage.index, stage.num_stages, torch.device("cpu"))
        made.append(GraphStage(pipelines.WithLoss(stage), *where, input_args=takes, output_args=gives, group=group, example=one, takes=takes))
    total = (given["labels"] != -100).sum()
    schedule = ScheduleDualPipeV(made, pipelines.MICROBATCHES, loss_fn=lambda loss, labels: loss * ((labels != -100).sum() / total), scale_grads=False)
    pairs = register_graph_pairs(schedule, SLOW_LINK, parts=parts)
    losses: list[torch.Tensor] = []
    last = any(stage.is_last for stage in stages)
    schedule.step(**given, return_outputs=False, **({"target": given["labels"], "losses": losses} if last else {}))
    found = {stage.index: {n: p.grad for n, p in stage.body.named_parameters()} for stage in stages}
    return (torch.stack(losses).sum().item() if losses else None), found, sorted(pairs)
