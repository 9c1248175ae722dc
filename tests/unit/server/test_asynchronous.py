"""Asynchronous collecting: a buffer that is filled by further orders, while clients come and go."""

import asyncio
from pathlib import Path

from tests.factories import make_registration
from tests.server_run import serving


def test_a_client_that_comes_back_without_its_data_sizes_meanwhile_isnt_asked(
    tmp_path: Path,
) -> None:
    """While the store is asked, a process that served two clients is there again with one."""
    with serving(tmp_path, strategy="fedbuff", min_clients=1) as server:

        async def give_more() -> set[int]:
            server.sessions.register(make_registration(0, instance_key="zero", num_examples=(10,)))
            await server.coordinator._resume()
            server.sessions.register(make_registration(1, 2, num_examples=(10, 10)))
            server.sessions.register(make_registration(3, instance_key="three", num_examples=(10,)))

            async def come_back() -> None:
                server.sessions.register(make_registration(1))

            # The second one runs when the first one waits for the first time.
            await asyncio.gather(server.asynchronous.give_more(), come_back())
            return {order.order.client_id for order in server.open_orders.list_open()}

        assert asyncio.run(give_more()) == {0, 3}
