"""The bigram start: the untrained decoder already predicts like a bigram table."""

import numpy as np
import pytest
import torch
from ftc.models.decoder import Decoder
from ftc.models.presets import preset
from ftc.models.rope import apply_rope, rope_cos_sin

from ftc.errors import FtcError
from ftc.train.initialization import _pair_counts, initialize_from_bigrams

VOCAB = 32


def chain(length=6000):
    """A Markov chain with sharp transitions."""
    generator = np.random.default_rng(0)
    table = generator.dirichlet(np.full(VOCAB, 0.1), size=VOCAB)
    ids = [0]
    for _ in range(length):
        ids.append(int(generator.choice(VOCAB, p=table[ids[-1]])))
    return np.array(ids)


def test_the_loss_before_training_is_the_bigram_entropy():
    torch.manual_seed(0)
    stream = chain()
    model = Decoder(preset("tiny", vocab_size=VOCAB))
    assert initialize_from_bigrams(model, stream) is model
    counts = _pair_counts(stream, VOCAB).double()
    conditional = counts / counts.sum(1, keepdim=True).clamp(min=1)
    entropy = -(counts * conditional.clamp(min=1e-30).log()).sum() / counts.sum()
    ids = torch.from_numpy(stream[:2001])
    loss = model(ids[:-1].view(-1, 200), labels=ids[1:].view(-1, 200)).item()
    assert loss < entropy + 0.2, f"{loss} against the text's own bigram entropy {entropy}"


def test_counts_are_pairs():
    counts = _pair_counts(np.array([0, 1, 1, 2, 0, 1]), 3)
    assert counts.tolist() == [[0, 2, 0], [0, 1, 1], [1, 0, 0]]


def test_the_same_seed_gives_the_same_bits():
    weights = []
    for _ in range(2):
        torch.manual_seed(3)
        weights.append(initialize_from_bigrams(Decoder(preset("tiny", vocab_size=VOCAB)), chain(500)).state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_tied_head_is_refused():
    with pytest.raises(FtcError, match="untied head"):
        initialize_from_bigrams(Decoder(preset("tiny", vocab_size=VOCAB, tie_word_embeddings=True)), chain(100))


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_first_heads_look_one_and_two_tokens_back(interleaved):
    model = Decoder(preset("tiny", vocab_size=VOCAB, rope_interleaved=interleaved))
    initialize_from_bigrams(model, chain(500))
    attention, config = model.layers[0].self_attn, model.config
    x = model.layers[0].input_layernorm(model.embed_tokens(torch.randint(VOCAB, (1, 20))))
    positions = torch.arange(20)[None]
    cos, sin = rope_cos_sin(config.rope, 16, config.max_position_embeddings, positions, interleaved, torch.float32)
    q, k = (
        apply_rope(project(x).unflatten(-1, (-1, 16)).transpose(1, 2), cos, sin, interleaved)
        for project in (attention.q_proj, attention.k_proj)
    )
    for head, distance in ((0, 1), (1, 2)):
        scores = (q[0, head] @ k[0, 0].T / 4).masked_fill(torch.ones(20, 20).triu(1) > 0, float("-inf"))
        weights = scores.softmax(-1)[distance:].diagonal()
        assert weights.min() > 0.9, f"head {head} gives {weights.min():.2f} to the token {distance} back"
