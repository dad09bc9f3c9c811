"""The bigram start: the untrained decoder already predicts like a bigram table."""

import numpy as np
import pytest
import torch
from ftc.models.decoder import Decoder
from ftc.models.presets import preset

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
