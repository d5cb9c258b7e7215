"""What the trie says about ranges of leaves, against sets of prefixes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.evaluation.text.prefix import packing
from bench.evaluation.text.prefix.packing import pack, pack_prefix
from bench.evaluation.text.prefix.trie import Trie
from bench.evaluation.text.requests import LoglikelihoodRequest

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=9)
INPUTS = st.lists(TOKENS, min_size=1, max_size=25)


def trie_of(inputs):
    return Trie([LoglikelihoodRequest(tokens, [0] * (1 + len(tokens) // 2)) for tokens in inputs])


def prefixes(inputs):
    return {tuple(tokens[:end]) for tokens in inputs for end in range(1, len(tokens) + 1)}


@given(INPUTS)
def test_every_prefix_is_counted_once_and_leaves_end_nowhere_else(inputs):
    trie = trie_of(inputs)
    assert trie.tokens == len(prefixes(inputs))
    leaves = [tuple(leaf.tolist()) for leaf in trie.leaves]
    inner = {prefix[:-1] for prefix in prefixes(inputs)}
    assert leaves == sorted({tuple(tokens) for tokens in inputs} - inner)


@pytest.mark.parametrize("inputs", [[], [5]])
def test_a_request_with_fewer_tokens_than_targets_is_refused(inputs):
    others = [LoglikelihoodRequest([5, 6], [7])]
    for before in ([], others):
        requests = [*before, LoglikelihoodRequest(inputs, [1, 2])]
        with pytest.raises(ValueError, match=f"2 targets and only {len(inputs)} input tokens"):
            Trie(requests)


@given(INPUTS, st.data())
def test_sizes_and_branches_of_ranges(inputs, data):
    trie = trie_of(inputs)
    low = data.draw(st.integers(0, len(trie) - 1))
    high = data.draw(st.integers(low + 1, len(trie)))
    inside = [leaf.tolist() for leaf in trie.leaves[low:high]]
    common = trie.common(low, high)
    assert len({tuple(leaf[:common]) for leaf in inside}) == 1
    assert trie.size(low, high, 0) == len(prefixes(inside))
    assert trie.size(low, high, common) == len(prefixes(inside)) - common
    if high - low > 1:
        branches = trie.branches(low, high, common)
        assert len({leaf[common] for leaf in inside}) == len(branches) > 1
        assert [low, *(b for _, b in branches)] == [*(a for a, _ in branches), high]


@given(INPUTS, st.sampled_from([4, 9, 256]), st.sampled_from([2, 32]), st.sampled_from([3, None]))
def test_sequences_hold_every_leaf_once_and_every_read_where_its_token_is(
    inputs, sequence, min_prefix, window
):
    trie = trie_of(inputs)
    limits = packing.PackingLimits(
        sequence=sequence, branching_sequence=4 * sequence, min_prefix=min_prefix
    )
    found = packing.group_by_prefix(trie, limits, window)
    sequences = [each for group in found for each in group.sequences]
    assert sorted(i for each in sequences for i in range(each.low, each.high)) == list(
        range(len(trie))
    )
    read = {number: [] for number in range(len(inputs))}
    for group in found:
        start = 0 if group.prefix is None else group.prefix.stop
        assert {each.start for each in group.sequences} <= {start}
        batches = [] if group.prefix is None else [pack_prefix(trie, group.prefix)]
        batches += [pack(trie, [each]) for each in group.sequences]
        for batch in batches:
            for part in batch.reads:
                tokens = batch.tokens_BT.flat[part.positions].tolist()
                depths = batch.depths_BT.flat[part.positions].tolist()
                read[part.request] += zip(depths, tokens, strict=True)
    for number, tokens in enumerate(inputs):
        first = len(tokens) - 1 - len(tokens) // 2
        assert sorted(read[number]) == list(enumerate(tokens))[first:]


@given(INPUTS)
def test_a_token_is_seen_by_its_descendants_only(inputs):
    trie = trie_of(inputs)
    (group,) = packing.group_by_prefix(trie)
    (sequence,) = group.sequences
    batch = pack(trie, [sequence])
    tokens, depths = batch.tokens_BT[0], batch.depths_BT[0]
    ends = batch.subtree_end_BT
    if ends is None:
        return
    seen_by = [[k for k in range(q + 1) if q < ends[0, k]] for q in range(len(tokens))]
    paths = {tuple(tokens[path].tolist()) for path in seen_by}
    assert paths == prefixes(inputs)
    assert [depths[path].tolist() for path in seen_by] == [list(range(len(p))) for p in seen_by]
