"""Work in threads that may be left behind."""

import asyncio
import os
import threading
import time

import pytest

from nautilus.runtime.threads import Worker, in_a_thread


def who() -> str:
    return threading.current_thread().name


def test_what_it_gives_and_what_it_raises_come_back():
    assert asyncio.run(in_a_thread(divmod, 7, 2)) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(in_a_thread(divmod, 7, 0))
    with pytest.raises(RuntimeError, match="SystemExit: 3"):
        asyncio.run(in_a_thread(exit, 3))


def test_one_thread_does_one_thing_after_another():
    Worker.idle.clear()  # of others, which would take turns

    async def several():
        found = set()
        for _ in range(20):
            found.add(await in_a_thread(threading.get_ident))
            while not Worker.idle:  # it tells what came of it, and then is free
                await asyncio.sleep(0)
        return found

    assert len(asyncio.run(several())) == 1 and threading.get_ident() not in asyncio.run(several())


def test_one_that_hangs_keeps_nobody_waiting():
    go_on = threading.Event()

    async def beside():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(in_a_thread(go_on.wait), 0.05)
        begin = time.monotonic()
        found = await asyncio.gather(*(in_a_thread(lambda number=number: number) for number in range(50)))
        assert found == [*range(50)] and time.monotonic() - begin < 30

    asyncio.run(beside())
    go_on.set()


def test_a_child_process_has_threads_of_its_own():
    asyncio.run(in_a_thread(who))
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, asyncio.run(in_a_thread(who)).encode())
        os._exit(0)
    os.close(write)
    assert os.read(read, 100) == b"worker" and os.waitpid(child, 0)[1] == 0
