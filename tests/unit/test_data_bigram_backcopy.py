"""Bigram-Backcopy: the rule at every position, the distributions, and independence of sequences."""

from __future__ import annotations

import numpy as np
import pytest

from sinkbench.config import BigramBackcopyConfig
from sinkbench.data.bigram_backcopy import BigramBackcopy, make_table


def make(seed: int = 1, seq_length: int = 64, **values: float) -> BigramBackcopy:
    config = BigramBackcopyConfig.model_validate({"source": "bigram_backcopy", **values})
    return BigramBackcopy(config, seq_length=seq_length, seed=seed)


def test_rule_holds_at_every_position() -> None:
    source = make()
    batch = source.sequences(0, 200)
    tokens, triggers = batch["tokens"], source.table.is_trigger
    assert tokens.shape == (200, 65)
    assert tokens.dtype == np.int64
    assert (tokens[:, 0] == 0).all()
    assert (tokens[:, 1:] > 0).all()
    assert not triggers[tokens[:, 1]].any()
    np.testing.assert_array_equal(batch["trigger"], triggers[tokens])
    copies = 0
    for row in tokens:
        for t in range(2, len(row)):
            if triggers[row[t - 1]]:
                assert row[t] == row[t - 2]
                assert not triggers[row[t]]
                copies += 1
            else:
                assert source.table.bigram[row[t - 1] - 1, row[t] - 1] > 0
    assert copies > 200


def test_table_has_stationary_unigram_and_most_frequent_triggers() -> None:
    table = make_table(BigramBackcopyConfig(source="bigram_backcopy", vocab_size=20, num_triggers=4))
    np.testing.assert_allclose(table.unigram @ table.bigram, table.unigram, atol=1e-12)
    np.testing.assert_allclose(table.bigram.sum(1), 1)
    assert not table.is_trigger[0]
    assert table.unigram[table.is_trigger[1:]].min() > table.unigram[~table.is_trigger[1:]].max()
    assert table.is_trigger.sum() == 4


def test_successors_follow_the_bigram_rows_and_first_tokens_the_unigram() -> None:
    source = make(vocab_size=12, num_triggers=2, concentration=1.0)
    tokens = source.sequences(0, 4000)["tokens"]
    last, following = tokens[:, 1:-1].ravel(), tokens[:, 2:].ravel()
    for token in np.flatnonzero(~source.table.is_trigger)[1:]:
        found = np.bincount(following[last == token], minlength=12)[1:]
        # The counts are multinomial: four standard deviations of each.
        expected = source.table.bigram[token - 1]
        allowed = 4 * np.sqrt(expected * (1 - expected) / found.sum()) + 1e-12
        assert (abs(found / found.sum() - expected) <= allowed).all()
    first = np.bincount(tokens[:, 1], minlength=12)[1:] / 4000
    expected = np.where(source.table.is_trigger[1:], 0, source.table.unigram)
    np.testing.assert_allclose(first, expected / expected.sum(), atol=0.03)


def test_a_sequence_depends_on_seed_and_index_alone() -> None:
    source = make()
    whole = source.sequences(90, 20)
    for index in (90, 97, 109):
        for name, row in source.sequence(index).items():
            np.testing.assert_array_equal(row, whole[name][index - 90])
    np.testing.assert_array_equal(make().sequences(90, 20)["tokens"], whole["tokens"])
    rows = source.sequences(0, 500)["tokens"]
    assert len(np.unique(rows, axis=0)) == 500
    assert not (make(seed=2).sequences(0, 500)["tokens"] == rows).all(1).any()


def test_far_sequences_are_as_cheap_as_near_ones() -> None:
    far = 10**12
    np.testing.assert_array_equal(make().sequence(far)["tokens"], make().sequences(far - 3, 4)["tokens"][3])


def test_held_out_sequences_are_others_and_do_not_follow_the_run_seed() -> None:
    one, other = make(seed=1), make(seed=2)
    held_out = one.validation("held_out")
    rows = held_out.sequences(0, 50)["tokens"]
    np.testing.assert_array_equal(held_out[7]["tokens"], rows[7])
    np.testing.assert_array_equal(other.validation("held_out").sequences(0, 50)["tokens"], rows)
    probe = one.probe(50, 65)["tokens"]
    np.testing.assert_array_equal(other.probe(50, 65)["tokens"], probe)
    # The table's seed is 0 by default: a run with that seed still trains on other sequences.
    train = make(seed=0).sequences(0, 50)["tokens"]
    assert len(np.unique(np.concatenate([rows, probe, train]), axis=0)) == 150
    with pytest.raises(IndexError):
        held_out[len(held_out)]


def test_probe_has_its_shape_and_triggers() -> None:
    source = make()
    probe = source.probe(100, 32)
    assert probe["tokens"].shape == probe["trigger"].shape == (100, 32)
    np.testing.assert_array_equal(probe["trigger"], source.table.is_trigger[probe["tokens"]])


def test_fingerprint_tells_sources_apart() -> None:
    prints = [
        make().fingerprint,
        make(seed=2).fingerprint,
        make(seq_length=32).fingerprint,
        make(num_triggers=4).fingerprint,
        make(concentration=0.2).fingerprint,
    ]
    assert len(set(prints)) == len(prints)
    assert make().fingerprint == prints[0]
