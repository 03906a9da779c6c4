"""A FastAPI application with a worker of its own: orders are taken at once and carried out in the background.

Run it with `trioserve examples.fastapi_app:app` and try it at http://127.0.0.1:8000/docs; needs `pip install fastapi`.

What it teaches: the lifespan is the place for tasks that outlive a request. They run in a nursery that the lifespan
opens, so they end with the server, and an error in them is seen. Requests hand work over through a channel with a
bounded buffer: when it is full the client is told to come again, instead of being promised what cannot be kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Annotated, Any

import trio
from fastapi import Depends, FastAPI, HTTPException, Request
from pydantic import BaseModel, Field


class Order(BaseModel):
    """What a client may order."""

    item: str = Field(min_length=1, max_length=100)
    amount: int = Field(gt=0, le=1000)


class Kitchen:
    """Carries out orders, one after the other."""

    def __init__(self) -> None:
        self.done: list[Order] = []
        self._orders, self._incoming = trio.open_memory_channel[Order](16)

    async def run(self) -> None:
        """Work until cancelled."""
        async for order in self._incoming:
            await trio.sleep(0.001 * order.amount)
            self.done.append(order)

    def take(self, order: Order) -> None:
        """Accept an order, or raise `trio.WouldBlock`."""
        self._orders.send_nowait(order)


@contextlib.asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[dict[str, Any]]:
    """The kitchen works for as long as the server serves."""
    kitchen = Kitchen()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(kitchen.run)
        yield {"kitchen": kitchen}
        nursery.cancel_scope.cancel()


app = FastAPI(lifespan=lifespan, title="Orders")


async def get_kitchen(request: Request) -> Kitchen:
    """The one from the lifespan."""
    kitchen: Kitchen = request.state.kitchen
    return kitchen


@app.post("/orders", status_code=202)
async def take_order(order: Order, kitchen: Annotated[Kitchen, Depends(get_kitchen)]) -> Order:
    """Promise to carry out an order."""
    try:
        kitchen.take(order)
    except trio.WouldBlock:
        raise HTTPException(503, "too much to do already", {"retry-after": "1"}) from None
    return order


@app.get("/orders")
async def list_done(kitchen: Annotated[Kitchen, Depends(get_kitchen)]) -> list[Order]:
    """What has been carried out."""
    return kitchen.done
