"""Saved programs: the same bits after loading, without the original class, and one clear error for every kind of damage."""

import json
import shutil

import pytest
import torch
from ftc.models.decoder import Decoder, DecoderConfig
from torch import nn

import ftc
from ftc.errors import FtcError, FtcFailure
from ftc.rewrite import store, stored_weights

CONFIG = DecoderConfig(
    vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    head_dim=8, max_position_embeddings=32, tie_word_embeddings=True,
)  # fmt: skip
IDS = torch.arange(14).reshape(2, 7)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A rewritten tiny decoder with tied weights, its folder, and the original's weights."""
    torch.manual_seed(0)
    model = Decoder(CONFIG).eval()
    program = ftc.rewrite(model, ["fuse-gate-up"], example={"input_ids": IDS})
    folder = tmp_path_factory.mktemp("saved") / "program"
    program.save(folder)
    return program, folder, model


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved[1], tmp_path / "program")


def bits(program, *inputs):
    out = program(*inputs)
    parameters = list(program.parameters())
    return [out.detach(), *torch.autograd.grad(out.square().sum(), parameters)]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_loaded_program_gives_the_same_bits_in_both_modes(saved):
    program, folder, _ = saved
    loaded = ftc.load(folder)
    assert type(loaded).__module__ == "ftc.capture.program" and not any(
        isinstance(m, Decoder) for m in loaded.modules()
    )
    assert loaded.training is False
    for mode in (False, True):
        for ids in (IDS, torch.randint(31, (3, 11))):
            assert same(bits(program.train(mode), ids), bits(loaded.train(mode), ids))
    program.eval()


def test_names_report_and_original_weights_come_back(saved):
    program, folder, model = saved
    loaded = ftc.load(folder)
    assert list(loaded.state_dict()) == list(program.state_dict())
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in program.named_parameters()]
    assert [r.ftc_name for r in loaded.regions] == [r.ftc_name for r in program.regions]
    assert loaded.regions[0].code is loaded.regions[1].code
    assert loaded.report.as_dict()["passes"] == json.loads(json.dumps(program.report.as_dict()["passes"]))
    original = loaded.original_state_dict()
    assert all(torch.equal(original[name], value) for name, value in model.state_dict().items())
    assert loaded.config.vocab_size == CONFIG.vocab_size


def test_saving_a_loaded_program_writes_the_same_files(saved, tmp_path):
    _, folder, _ = saved
    ftc.load(folder).save(tmp_path / "again")
    for path in folder.rglob("*"):
        if path.is_file():
            assert (tmp_path / "again" / path.relative_to(folder)).read_bytes() == path.read_bytes(), path.name


def test_a_loaded_program_can_be_rewritten_further(saved):
    program, folder, _ = saved
    further = ftc.rewrite(ftc.load(folder), ["raise-norm"])
    assert further.report.as_dict()["passes"].keys() >= {"fuse-gate-up", "raise-norm"}
    torch.testing.assert_close(further(IDS), program(IDS), rtol=1e-5, atol=1e-5)


def test_a_structure_that_was_not_saved_is_an_error_that_lists_those_that_were(saved):
    loaded = ftc.load(saved[1])
    with pytest.raises(FtcError, match=r"input_ids int64 \[s0, s1\], in eval mode.*before saving"):
        loaded(IDS, attention_mask=torch.ones_like(IDS))
    with pytest.raises(FtcError, match="no graph of the model"):
        loaded.bfloat16()(IDS)


def test_a_transformers_model_gives_named_outputs_and_keeps_its_buffers(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=32, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    program = ftc.capture(model, {"input_ids": IDS})
    program.save(tmp_path / "program")
    loaded = ftc.load(tmp_path / "program")
    out, expected = loaded(input_ids=IDS), model(input_ids=IDS, use_cache=False)
    assert torch.equal(out.logits, expected.logits) and out.logits is out["logits"] is out[0]
    assert out.loss is None and list(out) == ["logits"]
    with pytest.raises(AttributeError, match="logits"):
        _ = out.nothing
    assert dict(loaded.named_buffers()).keys() == dict(model.named_buffers()).keys()
    assert list(loaded.state_dict()) == list(model.state_dict())  # inv_freq stays out of it
    assert loaded.config.vocab_size == 31


class Odd(nn.Module):
    """Tensors that are stored in an unusual way: complex, empty, transposed, scalar, and a module used twice."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3).t())
        self.scale = nn.Parameter(torch.tensor(2.0), requires_grad=False)
        self.register_buffer("turn", torch.randn(3, dtype=torch.complex64), persistent=False)
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("nothing", None)
        self.first = nn.Linear(3, 3)
        self.second = self.first

    def forward(self, x):
        turned = torch.view_as_real(x.to(torch.complex64) * self.turn).sum(-1)
        return {"a": self.second(self.first(turned)) @ self.weight * self.scale, "b": (self.empty.sum(), "plain")}


def test_unusual_tensors_and_outputs_come_back(tmp_path):
    torch.manual_seed(0)
    program = ftc.capture(Odd(), {"x": torch.randn(5, 3)})
    program.save(tmp_path / "odd")
    loaded = ftc.load(tmp_path / "odd")
    x = torch.randn(7, 3)
    out, expected = loaded(x), program(x)
    assert (
        torch.equal(out["a"], expected["a"]) and out["b"][1] == "plain" and torch.equal(out["b"][0], expected["b"][0])
    )
    assert loaded.weight.stride() == program.weight.stride() and not loaded.scale.requires_grad
    assert loaded.first is loaded.second and loaded.nothing is None and "turn" not in loaded.state_dict()


def test_tied_weights_are_stored_once_and_come_back_tied(saved):
    program, folder, _ = saved
    about = json.loads((folder / "ftc.json").read_text())
    assert len(about["aliases"]) == 1
    loaded = ftc.load(folder)
    ((one, other),) = about["aliases"].items()
    assert loaded.fetch(one) is loaded.fetch(other)
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in program.parameters())


def test_large_programs_are_sharded(saved, tmp_path, monkeypatch):
    program = saved[0]
    monkeypatch.setattr(stored_weights, "MAX_SHARD_BYTES", 4000)
    program.save(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("weights-*.safetensors"))) > 1
    assert torch.equal(ftc.load(tmp_path / "sharded")(IDS), program(IDS))


def reseal(folder):
    """Make `ftc.json` agree with the folder's files again, as somebody who knows the format would."""
    about = json.loads((folder / "ftc.json").read_text())
    about["files"] = {name: store.file_sha(folder / name) for name in about["files"] if (folder / name).is_file()}
    about["digest"] = store.digest(about)
    (folder / "ftc.json").write_text(json.dumps(about))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def rename_tensor(folder):
    about = json.loads((folder / "ftc.json").read_text())
    name = next(iter(about["tensors"]))
    about["tensors"][name + "_other"] = about["tensors"].pop(name)
    (folder / "ftc.json").write_text(json.dumps(about))
    reseal(folder)


DAMAGE = {
    "weights truncated": lambda f: truncate(f / "weights.safetensors"),
    "weights changed": lambda f: flip(f / "weights.safetensors"),
    "weights missing": lambda f: (f / "weights.safetensors").unlink(),
    "tensor missing": rename_tensor,
    "graph missing": lambda f: next((f / "graphs").iterdir()).unlink(),
    "graph truncated": lambda f: truncate(next((f / "graphs").iterdir())),
    "variants missing": lambda f: (f / "variants.json").unlink(),
    "certificates empty": lambda f: ((f / "certificates.json").write_text("{}"), reseal(f)),
    "ftc.json truncated": lambda f: truncate(f / "ftc.json"),
    "ftc.json of something else": lambda f: (f / "ftc.json").write_text('{"kind": "train"}'),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder_is_one_clear_error(copied, damage):
    damage(copied)
    with pytest.raises(FtcError) as error:
        ftc.load(copied)
    assert str(copied) in str(error.value) and "\n" not in str(error.value)


def test_other_folders_are_refused(saved, tmp_path):
    with pytest.raises(FtcError, match="is not a folder"):
        ftc.load(tmp_path / "missing")
    with pytest.raises(FtcError, match="holds no ftc.json"):
        ftc.load(tmp_path)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FtcError, match="did not write"):
        saved[0].save(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_full_disk_leaves_nothing_behind(saved, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(FtcFailure, match="No space left"):
        saved[0].save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
