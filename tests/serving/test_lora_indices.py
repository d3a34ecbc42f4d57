import numpy as np
import pytest

from pipeline.serving.lora_indices import groups_of, slots_of


def test_each_adapter_is_found_in_its_slot():
    assert slots_of((7, 0, 5, 7), [5, None, 7]).tolist() == [2, -1, 0, 2]
    assert slots_of((0, 0), [None, None]).tolist() == [-1, -1]


@pytest.mark.parametrize("adapter", [3, 6, 9])
def test_an_adapter_without_a_slot_is_an_error(adapter):
    with pytest.raises(KeyError, match=rf"adapters \[{adapter}\] are in no slot"):
        slots_of((5, adapter), [5, None, 7])


def test_rows_are_grouped_by_slot_and_stay_in_order_within_one():
    rows, order, ids, counts, starts = groups_of(np.array([2, -1, 0, 2]), 5)
    assert rows.tolist() == [2, -1, 0, 2] and order.tolist() == [1, 2, 0, 3]
    assert (ids.tolist(), counts.tolist(), starts.tolist()) == ([-1, 0, 2, -1, -1], [1, 1, 2, 0, 0], [0, 1, 2, 4, 0, 0])


def test_without_any_adapter_there_are_no_groups():
    rows, order, ids, counts, starts = groups_of(np.array([-1, -1]), 3)
    assert (len(rows), len(order), ids.tolist(), counts.tolist(), starts.tolist()) == (0, 0, [-1, -1, -1], [0, 0, 0], [0, 0, 0, 0])
