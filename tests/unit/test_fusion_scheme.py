"""The bit code of fusion schemes: inverse, legal, and the paper's own example."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stof_kernels.fusion.graph import Kind
from stof_kernels.fusion.scheme import MAX_COMPUTE, FusionScheme

schemes = st.lists(st.integers(1, 9), max_size=40).map(lambda lengths: FusionScheme(tuple(lengths)))
kinds = st.sampled_from(list(Kind))
C, M, A = Kind.COMPUTE, Kind.MEMORY, Kind.ATTENTION
# The 15 operators behind the artifact's words: QKV product, bias, five of attention, output product, bias + norm, ...
PAPER = [C, M, A, A, A, A, A, C, M, M, C, M, C, M, M]


@given(schemes)
def test_decode_inverts_encode(scheme):
    assert FusionScheme.decode(scheme.encode(), scheme.operators) == scheme


@given(st.integers(1, 80).flatmap(lambda n: st.tuples(st.integers(0, (1 << n) - 1), st.just(n))))
def test_encode_inverts_decode_up_to_the_complement(word_and_length):
    word, n = word_and_length
    scheme = FusionScheme.decode(word, n)
    assert scheme.encode() in (word, word ^ ((1 << n) - 1))
    assert scheme == FusionScheme.decode(word ^ ((1 << n) - 1), n)


@given(schemes)
def test_segments_cover_all_operators_in_order(scheme):
    assert [i for s in scheme.segments for i in s] == list(range(scheme.operators))
    assert FusionScheme.from_boundaries(scheme.boundaries, scheme.operators) == scheme
    # Equal neighbouring bits are one segment, different ones two.
    bits = f"{scheme.encode():0{max(1, scheme.operators)}b}"
    same = {i for s in scheme.segments for i in s if i > s.start}
    assert all((bits[i] == bits[i - 1]) == (i in same) for i in range(1, scheme.operators))


@given(st.integers(1, 9))
def test_words_name_every_scheme_once(n):
    found = {FusionScheme.decode(word, n) for word in range(1 << (n - 1))}
    assert len(found) == 1 << (n - 1)


@given(st.lists(kinds, min_size=1, max_size=14), st.data())
def test_legality_is_what_it_says(operators, data):
    scheme = FusionScheme.decode(data.draw(st.integers(0, (1 << len(operators)) - 1)), len(operators))
    runs = [list(g) for _, g in itertools.groupby(range(len(operators)), key=lambda i: operators[i])]
    attentions = [range(run[0], run[-1] + 1) for run in runs if operators[run[0]] is A]
    expected = all(a in scheme.segments for a in attentions)
    expected &= all(sum(operators[i] is C for i in s) <= MAX_COMPUTE for s in scheme.segments)
    assert (scheme.illegal(operators) is None) == expected


def test_the_papers_start_value():
    # facts of the artifact: 41115 = 1 010000010011011, a flag and 15 operators
    scheme = FusionScheme.decode(41115 & 0x7FFF, 15)
    assert str(scheme) == "[1] [2] [3-7] [8] [9-10] [11-12] [13] [14-15]"
    assert scheme.illegal(PAPER) is None
    assert 1 << 15 | scheme.encode() == 41115


def test_the_papers_bert_example():
    scheme = FusionScheme((1, 5, 3, 3, 2))
    assert str(scheme).endswith("[7-9] [10-12] [13-14]")
    assert scheme.illegal([M, A, A, A, A, A, C, M, M, C, M, M, C, M]) is None


def test_reasons_name_the_segment():
    assert "segment [1-2] mixes attention" in FusionScheme((2,)).illegal([C, A])
    assert "segment [1] is a part of an attention" in FusionScheme((1, 1)).illegal([A, A])
    assert "segment [1-3] has 3 compute-intensive operators, allowed: 2" in FusionScheme((3,)).illegal([C, C, C])
    assert FusionScheme.unfused(3).illegal([C, A, M]) is None


def test_bad_input_is_one_line():
    with pytest.raises(ValueError, match="word 8 for 3 operators, allowed: 0 to 7"):
        FusionScheme.decode(8, 3)
    with pytest.raises(ValueError, match="a segment of length 0, allowed: an integer >= 1"):
        FusionScheme((2, 0))
    with pytest.raises(ValueError, match="3 operators, got 2 kinds"):
        FusionScheme.unfused(3).illegal([C, M])
    assert FusionScheme(()).encode() == 0
    assert FusionScheme.decode(0, 0) == FusionScheme(())
