"""Verification from the files alone: a saved program verifies, and every kind of tampering is found.

Each tampering comes twice where that makes sense: as it is, which a sha256 finds, and with every sha256 and digest made
right again, where only running the certificates can find it.
"""

import functools
import json
import shutil
import sys

import pytest
import torch
from ftc.models.decoder import Decoder, DecoderConfig

import ftc
import ftc.rewrite.verify
from ftc.errors import FtcError
from ftc.rewrite import store
from ftc.rewrite.graph_json import graph_from_dict, graph_hash

verify_module = sys.modules["ftc.rewrite.verify"]

CONFIG = DecoderConfig(
    vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    head_dim=8, max_position_embeddings=32,
)  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    program = ftc.rewrite(
        Decoder(CONFIG).eval(), ["fuse-gate-up"], example={"input_ids": torch.arange(14).reshape(2, 7)}
    )
    folder = tmp_path_factory.mktemp("saved") / "program"
    program.save(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "program")


@pytest.fixture(autouse=True)
def graphs_read_once(monkeypatch):
    """Graph files of equal text are read once for all tests."""
    monkeypatch.setattr(verify_module, "graph_from_dict", lambda d: _graph(json.dumps(d)))


@functools.cache
def _graph(text):
    return graph_from_dict(json.loads(text))


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def reseal(folder):
    """Make `ftc.json` agree with the folder's files again, as somebody who knows the format would."""

    def change(about):
        about["files"] = {
            str(p.relative_to(folder).as_posix()): store.file_sha(p)
            for p in sorted(folder.rglob("*"))
            if p.is_file() and p.name != "ftc.json"
        }
        about["digest"] = store.digest(about)

    edit(folder / "ftc.json", change)


def failed(folder):
    found = ftc.verify(folder)
    assert found.ok is all(row["ok"] for row in found.rows)
    assert json.loads(json.dumps(found.as_dict()))["ok"] is found.ok
    return [f"{row['kind']} {row['name']}: {row['detail']}" for row in found.rows if not row["ok"]]


def test_a_saved_program_verifies(saved):
    found = ftc.verify(saved)
    assert found.ok, str(found)
    kinds = {row["kind"] for row in found.rows}
    assert kinds >= {"file", "graph", "pass", "certificate", "chain", "weights", "program"}
    assert "verified" in str(found)


def test_a_program_that_was_loaded_and_saved_again_verifies(saved, tmp_path):
    ftc.load(saved).save(tmp_path / "again")
    assert failed(tmp_path / "again") == []


def weight(folder):
    path = folder / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def first_graph(folder):
    edit(sorted((folder / "graphs").iterdir())[0], lambda d: d["nodes"][0].update(source="File elsewhere"))


FILES = {
    "a weight": weight,
    "a graph": first_graph,
    "a certificate": lambda f: edit(f / "certificates.json", lambda d: d["applied"][-1].update(seconds=0)),
    "a variant": lambda f: edit(f / "variants.json", lambda d: d["codes"][0]["variants"].pop()),
    "a removed graph": lambda f: sorted((f / "graphs").iterdir())[0].unlink(),
    "a removed list of certificates": lambda f: (f / "certificates.json").unlink(),
    "removed weights": lambda f: (f / "weights.safetensors").unlink(),
    "certificates that are no JSON": lambda f: (f / "certificates.json").write_text("{"),
    "the model's name": lambda f: edit(f / "ftc.json", lambda d: d.update(model="Other")),
    "the list of files": lambda f: edit(f / "ftc.json", lambda d: d.update(files=3)),
}


@pytest.mark.parametrize("tamper", FILES.values(), ids=FILES)
def test_a_changed_or_removed_file_fails(folder, tamper):
    tamper(folder)
    assert failed(folder)


def last_record(d):
    return d["applied"][-1]["certificates"][0]


def larger_error(d):
    record = last_record(d)
    record["trials"][0]["output_error"] = record["max_output_error"] = 9e-13
    d["applied"][-1]["max_output_error"] = 9e-13


def loose_bound(d):
    for trial in last_record(d)["trials"]:
        trial["bound"] = 1.0


def everywhere(key, value):
    def change(d):
        d["applied"][-1][key] = value
        for record in d["applied"][-1]["certificates"]:
            record[key] = value

    return change


def fewer_trials(d):
    record = last_record(d)
    record["trials"] = [t for t in record["trials"] if not t["lifted"]]


RECORDS = {
    "an error in the summary": lambda d: d["applied"][-1].update(max_gradient_error=0.0),
    "an error in a certificate": lambda d: last_record(d).update(max_gradient_error=0.0),
    "a larger error throughout": larger_error,
    "a bound": loose_bound,
    "a contract in one certificate": lambda d: last_record(d).update(contract="bitwise"),
    "a contract throughout": everywhere("contract", "lossy"),
    "a count in one certificate": lambda d: last_record(d).update(matches=7),
    "a count in the summary": lambda d: d["applied"][-1].update(matches=7),
    "the inverse": lambda d: d["applied"][-1].update(inverse=False),
    "a lens": lambda d: last_record(d).update(lenses=[]),
    "an earlier pass's certificates taken away": lambda d: d["applied"][0]["certificates"].clear(),
    "all certificates taken away": lambda d: d["applied"][-1]["certificates"].clear(),
    "a pass taken away": lambda d: d["applied"].pop(),
    "trials taken away": fewer_trials,
    "an entry that is none": lambda d: d["applied"].__setitem__(-1, None),
}


@pytest.mark.parametrize("tamper", RECORDS.values(), ids=RECORDS)
def test_a_changed_certificate_fails_though_every_sha_was_made_right(folder, tamper, monkeypatch):
    monkeypatch.setattr(verify_module, "_check_program", lambda *args: None)  # slow, and weights are not touched here
    edit(folder / "certificates.json", tamper)
    reseal(folder)
    assert failed(folder)


def rewrite_running_graph(folder, change):
    """Change the graph that a variant runs, rename its file to its new hash, and every mention of it too."""
    old = json.loads((folder / "variants.json").read_text())["codes"][0]["variants"][0]["captured"]["graph"]
    path = folder / "graphs" / f"{old}.json"
    edit(path, change)
    new = graph_hash(graph_from_dict(json.loads(path.read_text())))
    path.rename(path.with_name(f"{new}.json"))
    assert new != old
    for name in ("variants.json", "certificates.json"):
        (folder / name).write_text((folder / name).read_text().replace(old, new))
    reseal(folder)


def other_activation(d):
    next(r for r in d["nodes"] if "gated" in r["target"])["args"][2] = "gelu"


def other_scale(d):
    row = next(r for r in d["nodes"] if "scaled_dot_product" in r["target"])
    row["kwargs"]["scale"] = 0.5


def other_epsilon(d):
    row = next(r for r in d["nodes"] if r["target"] == "aten.rms_norm.default")
    row["args"] = [*row["args"][:3], 1e-3]


@pytest.mark.parametrize("change", [other_activation, other_scale, other_epsilon])
def test_a_graph_that_computes_something_else_fails_though_its_name_and_every_sha_were_made_right(folder, change):
    rewrite_running_graph(folder, change)
    found = failed(folder)
    assert any(line.startswith("certificate") and "error" in line for line in found), found


def test_a_variant_that_runs_another_graph_than_the_certificates_end_in_fails(folder):
    def change(d):
        variant = d["codes"][0]["variants"][0]
        variant["captured"]["graph"] = variant["start"]

    edit(folder / "variants.json", change)
    reseal(folder)
    assert any(line.startswith("chain") for line in failed(folder))


def test_a_pass_applied_without_its_proof_does_not_verify(tmp_path):
    torch.manual_seed(0)
    example = {"input_ids": torch.arange(14).reshape(2, 7)}
    ftc.rewrite(Decoder(CONFIG).eval(), ["fuse-gate-up"], example=example, check=False).save(tmp_path / "program")
    assert any("check=False" in line for line in failed(tmp_path / "program"))


def test_what_is_no_program_is_an_error(tmp_path):
    with pytest.raises(FtcError, match="holds no ftc.json"):
        ftc.verify(tmp_path)
    (tmp_path / "ftc.json").write_text('{"kind": "train"}')
    with pytest.raises(FtcError, match="'train'"):
        ftc.verify(tmp_path)
