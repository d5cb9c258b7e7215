"""Rankings of micro-experts take exactly the budget in every scope."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from methods.moe.ranking import apportion, lowest, lowest_overall, lowest_per_expert

few = st.lists(st.integers(0, 5), min_size=1, max_size=40)


@given(few, st.data())
def test_lowest_takes_the_smallest_and_the_first_of_equals(values, data):
    count = data.draw(st.integers(0, len(values)))
    chosen = lowest(torch.tensor(values, dtype=torch.float64), count).tolist()
    expected = sorted(range(len(values)), key=lambda i: (values[i], i))[:count]
    assert chosen == sorted(expected)


@given(st.lists(few, min_size=1, max_size=6), st.data())
def test_every_scope_takes_exactly_the_budget(groups, data):
    tensors = [torch.tensor(group, dtype=torch.float64) for group in groups]
    total = sum(map(len, groups))
    count = data.draw(st.integers(0, total))

    overall = lowest_overall(tensors, count)
    assert sum(map(len, overall)) == count
    together = lowest(torch.cat(tensors), count).tolist()
    starts = [sum(map(len, groups[:i])) for i in range(len(groups))]
    assert [s + int(i) for s, part in zip(starts, overall, strict=True) for i in part] == together

    spans = [slice(s, s + len(g)) for s, g in zip(starts, groups, strict=True)]
    chosen = lowest_per_expert(torch.cat(tensors), spans, count).tolist()
    assert len(set(chosen)) == count
    for span, share in zip(spans, apportion([len(g) for g in groups], count), strict=True):
        assert sum(span.start <= i < span.stop for i in chosen) == share


@given(st.lists(st.integers(1, 50), min_size=1, max_size=10), st.data())
def test_apportionment_is_exact_and_fair(sizes, data):
    count = data.draw(st.integers(0, sum(sizes)))
    shares = apportion(sizes, count)
    assert sum(shares) == count
    for size, share in zip(sizes, shares, strict=True):
        assert abs(share - size * count / sum(sizes)) < 1
        assert share <= size
