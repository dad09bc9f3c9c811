"""What the tests of parallel programs run on each rank, and the same in one process. Models are drawn from a seed, so all ranks build the same."""

import torch
import torch.distributed as dist
from ftc.models.decoder import Decoder
from ftc.models.presets import preset
from torch import nn

import ftc
from ftc import parallel
from ftc.parallel.weights import whole_tensors
from ftc.rewrite import probe

VOCABULARY = 64
_SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
)
CHANGES = {
    "decoder": {},
    "decoder with biases": dict(attention_bias=True, attention_output_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "decoder with four kv heads": dict(num_key_value_heads=4),
    "decoder with one kv head": dict(num_key_value_heads=1),
    "Llama": {},
    "Qwen2": {},
    "Qwen3": dict(head_dim=8),
}


def build(name: str) -> nn.Module:
    """A small model with random weights, biases and norm gains."""
    torch.manual_seed(1)
    if name.startswith("decoder"):
        model = Decoder(preset("tiny", vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, head_dim=8, **CHANGES[name]))
    else:
        import transformers

        config = getattr(transformers, f"{name}Config")(**_SIZES, **CHANGES[name])
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def batch(size: int = 4, tokens: int = 16) -> dict[str, torch.Tensor]:
    """Ids and labels (shifted), every seventh label ignored."""
    ids = torch.randint(1, VOCABULARY, (size, tokens + 1), generator=torch.Generator().manual_seed(5))
    labels = ids[:, 1:].clone()
    labels.view(-1)[::7] = -100
    return {"input_ids": ids[:, :-1].contiguous(), "labels": labels}


def loss_of(model: nn.Module, given: dict[str, torch.Tensor], inside: bool) -> torch.Tensor:
    """The sum over counted labels, over as many as the whole batch counts: by the model itself, or from its logits."""
    if inside:
        return model(**given)
    out = model(input_ids=given["input_ids"])
    logits = out if isinstance(out, torch.Tensor) else out.logits
    losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), given["labels"].flatten(), ignore_index=-100, reduction="sum")
    return losses / (batch()["labels"] != -100).sum()


def alone(name: str, inside: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the plain model in one process."""
    model = build(name)
    loss = loss_of(model, batch(), inside)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters()}


def rewritten(name: str, passes: list, inside: bool):
    """The model as a program, rewritten for ranks."""
    model, given = build(name), batch()
    example = given if inside else {"input_ids": given["input_ids"]}
    return ftc.rewrite(model, passes, example=example, check=False)


def largest_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest relative error of all gradients, as certificates measure it."""
    largest = max(float(g.abs().max()) for g in expected.values())
    return max(probe.relative_error(found[name], expected[name], largest) for name in expected)


def original_gradients(program) -> dict[str, torch.Tensor]:
    """Every gradient, whole, in the names and shapes of the original model."""
    found = dict(whole_tensors(program, {n: p.grad for n, p in program.named_parameters()}))
    for prefix, code in [(f"{r.ftc_name}.", r.code) for r in program.regions] + [("", program.code)]:
        for lens in reversed(code.lenses):
            if set(lens.with_prefix(prefix).targets) <= set(found):
                found = lens.with_prefix(prefix).backward(found)
    return found


def tensor_parallel(name: str, passes: list, inside: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients on the ranks of one axis."""
    program = parallel.bind(rewritten(name, passes, inside))
    loss = loss_of(program, batch(), inside)
    loss.backward()
    return loss.item(), original_gradients(program)


def context_parallel(name: str, passes: list, inside: bool, balanced: bool = True) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients with the tokens divided over the ranks; gradients summed by hand."""
    program = parallel.bind(rewritten(name, passes, inside))
    own = parallel.split_batch(batch(), dist.get_rank(), dist.get_world_size(), balanced)
    loss = loss_of(program, own, inside)
    loss.backward()
    parallel.sum_gradients(program)
    total = loss.detach().clone()
    if not inside:
        dist.all_reduce(total)
    return total.item(), original_gradients(program)


def mesh_of(**sizes: int):
    """A mesh with these named dimensions."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def both(name: str, passes: list) -> tuple[float, dict[str, torch.Tensor]]:
    """Tensor and context parallelism together, 2 x 2."""
    program, mesh = rewritten(name, passes, True), mesh_of(cp=2, tp=2)
    parallel.bind(program, mesh["tp"], "tensor")
    parallel.bind(program, mesh["cp"], "context")
    loss = program(**parallel.split_batch(batch(), mesh["cp"].get_local_rank(), 2))
    loss.backward()
    parallel.sum_gradients(program)
    return loss.item(), original_gradients(program)


def sharded(program, mesh):
    """FSDP2 over every region and the rest."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    for module in [*program.regions, program]:
        fully_shard(module, mesh=mesh)
    for module in program.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no premultiplied sum
    return program


def fsdp_and_tensor_parallel(name: str, passes: list, inside: bool) -> tuple[float, dict[str, torch.Tensor], float, float]:
    """FSDP2 over two ranks of data, tensor parallelism over two; also the gradient norm and that of the whole gradients."""
    program, mesh = rewritten(name, passes, inside), mesh_of(dp=2, tp=2)
    parallel.bind(program, mesh["tp"])
    sharded(program, mesh["dp"])
    own = {n: x.chunk(2)[mesh["dp"].get_local_rank()] for n, x in batch().items()}
    loss = loss_of(program, own, inside)
    counted = 1.0 if not inside else (own["labels"] != -100).sum() / (batch()["labels"] != -100).sum()
    (loss * counted * 2).backward()  # FSDP takes the mean over its ranks
    total = loss.detach() * counted
    dist.all_reduce(total, group=mesh["dp"].get_group())
    norm = parallel.gradient_norm(program)
    grads = original_gradients(program)
    whole = torch.stack([g.float().square().sum() for g in grads.values()]).sum().sqrt()
    return total.item(), grads, norm.item(), whole.item()


def trained(program, steps: int, optimizer: torch.optim.Optimizer) -> list[float]:
    """Losses of a few steps on the same batch."""
    losses = []
    for _ in range(steps):
        loss = program(**batch())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def moments(program, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """AdamW's moments by name, as `checkpoint_state` takes them."""
    names = {p: n for n, p in program.named_parameters()}
    return {f"optimizer.{names[p]}.{k}": v for p, state in optimizer.state.items() for k, v in state.items() if k != "step"}


def save_after_training(folder: str, passes: list, fsdp: bool) -> list[float]:
    """Train two steps, save weights and moments, and train two more."""
    import torch.distributed.checkpoint as dcp

    program, mesh = rewritten("decoder with four kv heads", passes, True), mesh_of(dp=dist.get_world_size() // 2, tp=2)
    parallel.bind(program, mesh["tp"])
    if fsdp:
        sharded(program, mesh["dp"])
    optimizer = torch.optim.AdamW(program.parameters(), lr=1e-2)
    trained(program, 2, optimizer)
    dcp.save(parallel.checkpoint_state(program) | parallel.checkpoint_state(program, moments(program, optimizer)), checkpoint_id=folder)
    return trained(program, 2, optimizer)


def load_and_train(folder: str, passes: list, degree: int) -> list[float]:
    """Load the same on another number of ranks, and train on."""
    import torch.distributed.checkpoint as dcp

    program = rewritten("decoder with four kv heads", passes, True)
    if degree > 1:
        parallel.bind(program)
    with torch.no_grad():
        for parameter in program.parameters():
            parameter.zero_()
    optimizer = torch.optim.AdamW(program.parameters(), lr=1e-2)
    for parameter in program.parameters():  # makes the moments, without a step
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = parallel.checkpoint_state(program) | parallel.checkpoint_state(program, moments(program, optimizer))
    dcp.load(state, checkpoint_id=folder)
    for entry in optimizer.state.values():
        entry["step"].fill_(2.0)
    optimizer.zero_grad()
    return trained(program, 2, optimizer)


def there_and_back() -> bool:
    """Whether unbinding gives back every bit, and the unbound program runs."""
    program = rewritten("decoder with biases", ["fuse-qkv", ("tensor-parallel", {"degree": 2})], True)
    before = {n: p.detach().clone() for n, p in program.state_dict().items()}
    parallel.bind(program)
    local = sum(p.numel() for p in program.parameters())
    whole = parallel.whole_state_dict(program)
    parallel.unbind(program)
    after = program.state_dict()
    assert local < 0.6 * sum(p.numel() for p in program.parameters())
    assert program.lm_head.weight is program.embed_tokens.weight
    return all(torch.equal(before[n], whole[n]) and torch.equal(before[n], after[n]) for n in before)


def late_variants() -> float:
    """The largest difference of logits in eval mode, and of a padded batch, met first while the program is bound."""
    program = ftc.rewrite(build("Llama").train(), ["fuse-qkv", ("tensor-parallel", {"degree": 2})], example={"input_ids": batch()["input_ids"]})
    parallel.bind(program)
    model, program = build("Llama").eval(), program.eval()
    mask = torch.ones(4, 16, dtype=torch.long)
    mask[0, :5] = 0
    worst = 0.0
    for given in ({"input_ids": batch()["input_ids"][:, :9]}, {"input_ids": batch()["input_ids"], "attention_mask": mask}):
        rows = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
        with torch.no_grad():
            worst = max(worst, (program(**given).logits - model(**given).logits)[rows].abs().max().item())
    return worst


def compiled(passes: list, backend: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients with each region compiled."""
    program = parallel.bind(rewritten("decoder", passes, True)).compile(backend=backend)
    loss = program(**batch())
    loss.backward()
    return loss.item(), original_gradients(program)
