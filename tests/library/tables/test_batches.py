import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from downslope.tables.batches import Batches, ShuffledOrder


def batches(num_rows: int, batch_size: int, shuffled: bool = True, **share: int) -> Batches:
    rows = torch.arange(num_rows, dtype=torch.float32)
    order = ShuffledOrder(num_rows, seed=7) if shuffled else None
    return Batches(rows[:, None] * 2, rows, batch_size, order, **share)


@settings(max_examples=60, deadline=None)
@given(num_rows=st.integers(1, 50), batch_size=st.integers(1, 60), shuffled=st.booleans())
def test_an_epoch_serves_each_row_once(num_rows: int, batch_size: int, shuffled: bool) -> None:
    served = list(batches(num_rows, batch_size, shuffled))
    target = torch.cat([target for _, target in served])
    assert sorted(target.tolist()) == list(range(num_rows))
    assert all(torch.equal(features[:, 0], 2 * target) for features, target in served)
    assert len(served) == len(batches(num_rows, batch_size, shuffled))
    assert [len(target) for _, target in served[:-1]] == [batch_size] * (len(served) - 1)


@settings(max_examples=60, deadline=None)
@given(num_rows=st.integers(2, 50), batch_size=st.integers(1, 9), num_processes=st.integers(1, 4))
def test_processes_share_each_batch_in_equal_parts(num_rows: int, batch_size: int, num_processes: int) -> None:
    shares = [
        list(batches(num_rows, batch_size, rank=rank, num_processes=num_processes)) for rank in range(num_processes)
    ]
    together = list(batches(num_rows, batch_size * num_processes))
    assert len({len(share) for share in shares}) == 1
    for index, parts in enumerate(zip(*shares, strict=True)):
        assert len({len(target) for _, target in parts}) == 1
        rows = sorted(value for _, target in parts for value in target.tolist())
        left_out = set(together[index][1].tolist()) - set(rows)
        assert set(rows) <= set(together[index][1].tolist())
        assert len(left_out) < num_processes
        assert not left_out or index == len(shares[0]) - 1


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    order = ShuffledOrder(100, seed=1)
    first = order.rows()
    torch.rand(5)
    order.set_epoch(1)
    second = order.rows()
    order.set_epoch(0)
    assert torch.equal(order.rows(), first)
    assert not torch.equal(first, second)
    assert not torch.equal(ShuffledOrder(100, seed=2).rows(), first)


def test_the_random_state_of_the_process_is_left_alone() -> None:
    before = torch.get_rng_state()
    list(batches(20, 3))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_is_the_tuple_that_it_is() -> None:
    batch = next(iter(Batches(torch.ones(4, 2), torch.zeros(4), 4)))
    assert batch.to(torch.device("cpu")) is batch
    assert batch.to("meta")[0].device.type == "meta"
    assert torch.func.vmap(lambda pair: pair[0].sum() + pair[1])(batch).tolist() == [2.0] * 4
