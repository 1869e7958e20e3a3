"""Take the data order of a run: that of its checkpoint, else what ``data.order`` chooses."""

from __future__ import annotations

from accelerate import Accelerator

from pipeline.config.schema import Config
from pipeline.data.arrangement import describe
from pipeline.data.loader import make_order
from pipeline.data.order import Order
from pipeline.data.shards import Index
from pipeline.runs.run_folder import saved_order
from pipeline.runtime.console import say
from pipeline.runtime.ranks import count_nodes, on_rank_zero


def order_of_run(config: Config, index: Index, accelerator: Accelerator) -> Order:
    """Return the order, the same on every rank; say on rank 0 what it means for a node."""
    saved, nodes = on_rank_zero(accelerator, lambda: saved_order(config)), count_nodes(accelerator)
    order = make_order(config, index, saved, nodes)
    if accelerator.is_main_process:
        say(f"data order: {describe(config, index, order, nodes, saved)}")
    return order
